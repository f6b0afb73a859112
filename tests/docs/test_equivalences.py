"""What docs/how-it-works.md proves of the rule, in float64: special cases that are other known methods."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from extraopt.kernels.reference import end_cycle

K, N = 7, 21


def cycles(count: int = 6, noise: float = 0.3) -> list[Tensor]:
    """The change of the weights by the real steps of each cycle."""
    generator = torch.Generator().manual_seed(0)
    ahead = torch.randn(50, dtype=torch.float64, generator=generator)
    return [ahead + noise * torch.randn(50, dtype=torch.float64, generator=generator) for _ in range(count)]


def anchors(beta: float, gate: float | None, length: float = N, moves: list[Tensor] | None = None) -> list[Tensor]:
    """Where each cycle begins, by the rule."""
    a, v, taken = torch.ones(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64), list[float]()
    found = [a]
    for d in moves or cycles():
        (a,), (v,), _, (w,) = end_cycle(
            [a + d], [a], [v], [taken], every=K, length=length, beta=beta, gate=gate, momentum=0.9
        )
        taken.append(w)
        found.append(a)
    return found


def test_with_b_0_and_no_gate_it_is_lookahead_with_alpha_above_1_and_outer_sgd() -> None:
    alpha = 1 + N / K
    slow, gradient = torch.ones(50, dtype=torch.float64), torch.ones(50, dtype=torch.float64)
    outer = torch.optim.SGD([torch.nn.Parameter(gradient)], lr=alpha)
    weights = outer.param_groups[0]["params"][0]
    for d, ours in zip(cycles(), anchors(0.0, None)[1:]):
        slow = slow + alpha * ((slow + d) - slow)
        weights.grad = -d  # anchor less fast weights
        outer.step()
        torch.testing.assert_close(ours, slow)
        torch.testing.assert_close(ours, weights.detach())


@pytest.mark.parametrize("beta", [0.5, 0.75])
def test_with_b_and_no_gate_it_is_an_outer_momentum_step(beta: float) -> None:
    """Its buffer begins as a plain mean, so only changes of it are compared once w is 1 - b."""
    found, moves = anchors(beta, None, moves=cycles(20)), cycles(20)
    begin = round(1 / (1 - beta))
    steps = [b - a for a, b in zip(found, found[1:])]
    buffer = [(step - d) * K / N / (1 - beta) for step, d in zip(steps, moves)]  # M, by the page's equation
    for n in range(begin, 20):
        torch.testing.assert_close(buffer[n], beta * buffer[n - 1] + moves[n])


def test_at_n_over_k_of_b_over_1_less_b_it_is_nesterov() -> None:
    beta = N / K / (1 + N / K)
    found, moves = anchors(beta, None, moves=cycles(20)), cycles(20)
    begin = round(1 / (1 - beta))
    weights = torch.nn.Parameter(found[begin].clone())
    outer = torch.optim.SGD([weights], lr=1.0, momentum=beta, nesterov=True)
    buffer = (found[begin] - found[begin - 1] - moves[begin - 1]) * K / N / (1 - beta)
    outer.state[weights]["momentum_buffer"] = -buffer
    for d, ours in zip(moves[begin:], found[begin + 1 :]):
        weights.grad = -d
        outer.step()
        torch.testing.assert_close(ours, weights.detach())


def test_a_shut_gate_is_between_adamw_and_lookahead_with_alpha_one_half() -> None:
    turning = [d if i % 2 else -d for i, d in enumerate(cycles(noise=0.01))]
    found = anchors(0.9, 0.5, moves=turning)
    for d, a, b in zip(turning[1:], found[1:], found[2:]):
        torch.testing.assert_close(b, a + d / 2)  # drifts as large as the weights
    small = [1e-6 * d for d in turning]
    found = anchors(0.9, 0.5, moves=small)
    for d, a, b in zip(small[1:], found[1:], found[2:]):
        assert float((b - a - d).norm() / d.norm()) < 1e-3  # far below them: AdamW's own place
