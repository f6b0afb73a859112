"""A tiny model, a run whose every step is a function of its number, and comparison: bitwise, and with the reference."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from extraopt import ExtraAdam

K, N = 3, 6
# each jump is N steps long: these models' outputs are no distributions that a trust region could look at
PAPER: dict[str, Any] = {"extra_every": K, "extra_steps": N, "extra_beta": 0.0, "extra_gate": None, "extra_kl": None}
GATED: dict[str, Any] = {"extra_every": K, "extra_steps": N, "extra_kl": None}
RULES = [PAPER, GATED]


def rule_name(rule: dict[str, Any]) -> str:
    return "gated" if rule is GATED else "paper"


def tiny_model(seed: int = 0, device: str = "cpu") -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(device)


def batch_loss(model: torch.nn.Module, step: int) -> Tensor:
    """The loss of step number `step`: the same batch in every run, and a target that gives a fairly straight path."""
    p = next(model.parameters())
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)).to(p.device, p.dtype)
    return (model(x) - x[:, :2].sin() - 2).square().mean()


def train(
    model: torch.nn.Module,
    optimizer: ExtraAdam,
    steps: Iterable[int],
    step: Callable[[ExtraAdam, Tensor], Any] | None = None,
) -> list[int]:
    """Train over the numbered steps; return the numbers of those that ended a cycle."""
    ends = []
    for i in steps:
        before = optimizer.last_jump
        optimizer.zero_grad()
        loss = batch_loss(model, i)
        if step is None:
            loss.backward()
            optimizer.step()
        else:
            step(optimizer, loss)
        if optimizer.last_jump is not before:
            ends.append(i)
    return ends


def by_hand(params: list[Tensor], grads: list[list[Tensor]], ratio: float = N / K, **options: Any) -> list[Tensor]:
    """The paper's rule around torch's AdamW, on copies: what ExtraAdam must make of `grads`, a list for each step."""
    params = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, **options)
    anchors = [p.clone() for p in params]
    for i, gs in enumerate(grads, 1):
        for p, g in zip(params, gs):
            p.grad = g.clone()
        optimizer.step()
        if i % K == 0:
            for p, a in zip(params, anchors):
                p.copy_((p.double() + ratio * (p.double() - a.double())).to(p.dtype))
                a.copy_(p)
    return params


def reload(state: Any) -> Any:
    """Through a file, as a trainer would resume."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bitwise equality of nested dicts, lists and tensors."""
    assert type(a) is type(b) or not isinstance(a, (Tensor, dict)), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), f"{where}: tensors differ"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {sorted(map(str, a))} and {sorted(map(str, b))}"
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}.{i}")
    else:
        assert a == b, f"{where}: {a} and {b}"


def assert_same_run(a: torch.nn.Module, a_opt: torch.optim.Optimizer, b: torch.nn.Module, b_opt: torch.optim.Optimizer):
    """Weights and optimizer states are bit-equal."""
    assert_same(list(a.parameters()), list(b.parameters()), "weights")
    assert_same(a_opt.state_dict(), b_opt.state_dict(), "optimizer")


@dataclass
class Ending:
    """What the end of a cycle may make of a tensor, in float64."""

    gate: float
    share: float  # w, of the drift in the new estimate
    landed: Tensor  # without the jump
    estimate: Tensor


def endings(e: Tensor, a: Tensor, v: Tensor, gate: float, share: float, gated: bool, least: float) -> list[Ending]:
    """The reference's end of a cycle, and where float32 sums may round a gate or a retreat to, the next ones.

    Args:
        e, a, v: weights, anchor and estimate before.
        gate, share: the reference's g and w.
        gated: whether there is a gate, and the tensor may jump: if not, there is one ending.
        least: w of a shut gate.
    """
    E, D = e.double(), e.double() - a.double()
    if not gated:
        return [Ending(gate, share, E, v.double() + share * (D - v.double()))]
    norm = float(E.norm())
    size = min(1.0, 100 * float(D.norm()) / norm) if norm else 1.0
    found = []
    for g in [gate] if e.dtype == torch.float64 else [gate, gate - 1 / 256, gate + 1 / 256]:
        part = 256 * (1 - g) * size
        for back in {math.floor(part), math.ceil(part)} if 0 <= g <= 1 else ():
            if abs(back - part) < 0.501:  # as it is rounded, or half way
                w = share if g == gate else max(least, g * g)
                found.append(Ending(g, w, E - back / 512 * D, v.double() + w * (D - v.double())))
    return found
