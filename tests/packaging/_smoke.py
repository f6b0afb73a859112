"""What `make dist` runs with an installed wheel, in an environment that has nothing else: two cycles of training.

python -I tests/packaging/_smoke.py native|operations
"""

import importlib.metadata
import sys
from pathlib import Path

import torch

import extraopt
from extraopt import ExtraAdam
from extraopt.kernels import native


class Classifier(torch.nn.Module):
    """Its outputs are logits, which the trust region looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.layers(x)}


def main(expected: str) -> None:
    assert Path(sys.prefix) in Path(extraopt.__file__).parents, extraopt.__file__
    assert importlib.metadata.version("extraopt") == extraopt.__version__
    used = "operations" if native._library() is None else "native"
    assert used == expected, f"the end of a cycle on a CPU is computed by {used}"

    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(64, 8)
    optimizer = ExtraAdam(model.parameters(), lr=1e-3, extra_every=3, extra_gate=None)
    for _ in range(6):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x)["logits"], x[:, :4].argmax(1)).backward()
        optimizer.step()
    jump = optimizer.last_jump
    assert jump is not None and jump.jumped == 4 and jump.length > 0 and 0 < jump.kl < 0.02, jump
    print(f"extraopt {extraopt.__version__} by {used}: {jump}")


if __name__ == "__main__":
    main(sys.argv[1])
