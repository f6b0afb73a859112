"""Write the states of this version beside this file, with what training makes of them in the next 12 steps.

    python tests/optimizer/golden/make.py VERSION

VERSION is extraopt.__version__, said aloud so that no state is filed under another. Nothing is ever overwritten.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import extraopt
from extraopt.wrap import Extra

HERE = Path(__file__).parent
STEPS = 12  # after the state was taken
SHAPES = [(3, 4), (4,), (5,), ()]
RULES: dict[str, dict[str, Any]] = {
    "gated": {"extra_every": 3, "extra_steps": 6, "extra_kl": None},
    "paper": {"extra_every": 3, "extra_steps": 6, "extra_beta": 0.0, "extra_gate": None, "extra_kl": None},
    "limited": {"extra_every": 3, "extra_steps": 6, "extra_watch": False},
}
SECOND_GROUP = {"lr": 0.02, "extra_every": 4, "extra_steps": 10, "extra_beta": 0.5, "extra_gate": 0.8, "extra_start": 8}
MOMENTS = {"mid-cycle": 7, "after-jump": 12}  # 12 ends a cycle of both groups
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = list(itertools.product(["ExtraAdam", "Extra-SGD"], RULES, DTYPES, MOMENTS))


def optimizer_of(name: str, params: list[Tensor], rule: dict[str, Any]) -> torch.optim.Optimizer:
    groups = [{"params": params[:2]}, {"params": params[2:], **SECOND_GROUP}]
    if name == "ExtraAdam":
        return extraopt.ExtraAdam(groups, lr=0.01, **rule)
    return Extra(torch.optim.SGD(groups, lr=0.01, momentum=0.9), **rule)


def walk(optimizer: Any, params: list[Tensor], grads: list[list[Tensor]]) -> None:
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()


def gradients(steps: int, dtype: torch.dtype, generator: torch.Generator) -> list[list[Tensor]]:
    """A slope and as much noise, so that some tensors jump and some retreat."""
    slopes = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [[(s + torch.randn(s.shape, generator=generator)).to(dtype) for s in slopes] for _ in range(steps)]


def golden(name: str, rule: str, dtype: str, moment: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in SHAPES]
    optimizer = optimizer_of(name, params, RULES[rule])
    before = MOMENTS[moment]
    grads = gradients(before + STEPS, DTYPES[dtype], generator)
    walk(optimizer, params, grads[:before])
    start = [p.clone() for p in params]
    state = optimizer.state_dict()
    state["state"] = {i: {k: clone(v) for k, v in s.items()} for i, s in state["state"].items()}
    expected = []
    for step in grads[before:]:
        walk(optimizer, params, [step])
        expected.append([p.clone() for p in params])
    return {
        "extraopt": extraopt.__version__,
        "torch": str(torch.__version__),
        "optimizer": name,
        "weights": start,
        "state_dict": state,
        "gradients": [torch.stack(column) for column in zip(*grads[before:])],  # one tensor a parameter: small files
        "expected": [torch.stack(column) for column in zip(*expected)],
    }


def clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def main(version: str) -> None:
    if version != extraopt.__version__:
        sys.exit(f"this is extraopt {extraopt.__version__}, not {version}")
    for name, rule, dtype, moment in CASES:
        file = HERE / f"{version}-{name}-{rule}-{dtype}-{moment}.pt"
        if file.exists():
            sys.exit(f"{file} is there already: golden files are never remade")
        torch.save(golden(name, rule, dtype, moment), file)
        print(file.name, file.stat().st_size)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
