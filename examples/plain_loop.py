"""A plain training loop: the same steps with AdamW and with ExtraAdam, fitting a small network to a curve.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch

from extraopt import ExtraAdam


def train(name: str, optimizer_class: type[torch.optim.Optimizer], steps: int = 300) -> None:
    torch.manual_seed(0)
    x = torch.rand(512, 1) * 6 - 3
    y = torch.sin(2 * x) * x
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
    )
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        batch = torch.randint(len(x), (256,))
        loss = torch.nn.functional.mse_loss(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            loss = torch.nn.functional.mse_loss(model(x), y)
            print(f"{name:10} step {step:4}  loss {loss.item():.4f}", end="")
            if isinstance(optimizer, ExtraAdam) and optimizer.last_jump:
                print(f"  coherence {optimizer.last_jump.coherence:5.2f}, gate {optimizer.last_jump.gate:.2f}", end="")
            print()


if __name__ == "__main__":
    train("AdamW", torch.optim.AdamW)
    train("ExtraAdam", ExtraAdam)
