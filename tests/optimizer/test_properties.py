"""Every implementation and the whole optimizer against the float64 reference, over random inputs."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import Ending, endings
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from extraopt import ExtraAdam, kernels
from extraopt.extrapolation import CycleBatch, end_cycle
from extraopt.gate import averaged_noise
from extraopt.kernels import reference
from extraopt.trust import Length

REAL = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["contiguous", "transposed", "channels_last", "offset", "gapped"]
shapes = st.one_of(
    st.just(()), st.just((0,)), st.just((0, 3)), st.tuples(st.integers(1, 40)), st.tuples(*[st.integers(1, 9)] * 2)
) | st.tuples(*[st.integers(1, 5)] * 4)
hyperparameters = st.fixed_dictionaries(
    {
        "extra_every": st.integers(1, 7),
        "extra_steps": st.integers(1, 40),
        "extra_beta": st.just(0.0) | st.floats(0, 0.99),
        "extra_gate": st.none() | st.floats(0.05, 1),
        "extra_kl": st.none(),
    }
)


def make(shape: tuple[int, ...], layout: str, dtype: torch.dtype, generator: torch.Generator, scale: float) -> Tensor:
    """A tensor of that shape whose elements lie in storage as the layout says."""
    values = (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).to(dtype)
    if layout == "transposed" and len(shape) > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and len(shape) == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "offset":
        return torch.cat([values.new_zeros(3), values.reshape(-1)])[3:].view(shape)
    if layout == "gapped" and len(shape) > 0:
        return torch.stack([values, values], -1)[..., 0]
    return values


def bound(dtype: torch.dtype, result: Tensor, ratio: float, *terms: Tensor) -> Tensor:
    """One rounding into the dtype, and the roundings of the float32 (float64) arithmetic before it."""
    eps = torch.finfo(dtype).eps
    work = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    arithmetic = 4 * work * (1 + ratio) * sum(t.abs().double() for t in terms)
    return eps / 2 * (result.abs() + arithmetic) + arithmetic + torch.finfo(dtype).smallest_normal * eps


def within(got: Tensor, want: Tensor, ratio: float, *terms: Tensor, stored: Tensor | float = 0.0) -> bool:
    """Whether it is the result, to one rounding, and to one of what was `stored` on the way."""
    eps = torch.finfo(got.dtype).eps
    allowed = bound(got.dtype, want, ratio, *terms) + eps / 2 * abs(stored)
    return bool(((got.double() - want).abs() <= allowed).all())


def assert_within_one_rounding(got: Tensor, want: Tensor, ratio: float, *terms: Tensor) -> None:
    assert within(got, want, ratio, *terms), f"off by {(got.double() - want).abs().max()} in {got.dtype}"


def ended(p: Tensor, nv: Tensor | None, e: Tensor, a: Tensor, v: Tensor, ratio: float, ways: list[Ending]) -> Ending:
    """Which of the ways a cycle took whose weights and estimate are now these; jumps are `ratio` gates long.

    An estimate is stored, and so are the weights after the retreat, before the jump is made of both.
    """
    for way in ways:
        length, estimate, stored = way.gate * ratio, way.estimate, 0.0
        if nv is not None:
            if not within(nv, way.estimate, 0, e, a, v):
                continue
            estimate, stored = nv.double(), way.landed
        if within(p, way.landed + length * estimate, length, e, a, v, stored=stored):
            return way
    way = ways[0]
    off = [(p.double() - way.landed - way.gate * ratio * way.estimate).abs().max()]
    off += [] if nv is None else [(nv.double() - way.estimate).abs().max()]
    raise AssertionError(f"off by {off} in {p.dtype} with gate {way.gate}, share {way.share}")


def fold(taken: list[float], every: int, momentum: float) -> tuple[float, float]:
    cov = var = torch.zeros(1, dtype=torch.float64)
    for w in taken:
        cov, var = averaged_noise(cov, var, torch.tensor([w], dtype=torch.float64), every, momentum)
    return float(cov), float(var)


@given(
    tensors=st.lists(st.tuples(shapes, st.sampled_from(LAYOUTS), st.sampled_from(REAL)), min_size=1, max_size=6),
    hyperparameters=hyperparameters,
    seed=st.integers(0, 2**30),
    along=st.sampled_from([0.0, 0.3, 1.0]),
    size=st.sampled_from([0.001, 0.01, 0.1]),
    momentum=st.sampled_from([0.9, 0.0, 0.5]),
    taken=st.lists(st.lists(st.floats(0.01, 1), max_size=4).map(lambda ws: [1.0, *ws]), min_size=6, max_size=6),
    lengths=st.none() | st.lists(st.floats(0, 50), min_size=1, max_size=3),
)
def test_the_end_of_a_cycle_is_the_reference_within_one_rounding(
    tensors, hyperparameters, seed, along, size, momentum, taken, lengths
):
    """Of N steps, or of the last length that is tried, however many were."""
    g = torch.Generator().manual_seed(seed)
    E = [make(*t, g, 1.0) for t in tensors]
    A = [(e.double() + torch.randn(e.shape, dtype=torch.float64, generator=g) * size).to(e.dtype) for e in E]
    # an estimate that agrees with the drift more or less, so that gates open more or less
    V = [(along * (e.double() - a.double()) + make(e.shape, "contiguous", torch.float64, g, size)).to(e.dtype)
         for e, a in zip(E, A)]  # fmt: skip
    taken = taken[: len(E)]
    k, n, b, gate = (hyperparameters[f"extra_{key}"] for key in ("every", "steps", "beta", "gate"))
    length = n if lengths is None else min(lengths[-1], n)
    rule = {"every": k, "length": length, "beta": b, "gate": gate, "momentum": momentum}
    _, _, gates, shares = reference.end_cycle(E, A, V, taken, **rule)

    P = [make_like(e) for e in E]
    anchors, estimates = [make_like(a) for a in A], [make_like(v) for v in V]
    noise, seen = [fold(ws, k, momentum) for ws in taken], [len(ws) for ws in taken]
    batch = CycleBatch(
        P, anchors, estimates, noise, [k] * len(P), seen, k, n, b, gate, 0, lengths is not None, momentum
    )
    asked = []

    def choose(move, gate):
        asked.append(move)
        for tried in lengths:
            move(tried)
        return Length(lengths[-1], 1.0)

    report, _, (outcome,) = end_cycle([batch], [], 50.0, choose)

    assert len(asked) <= (lengths is not None)
    assert sum(x > 1 / 256 for x in gates) * (length > 0) <= report.jumped <= len(P)
    assert report.length in (0, length) and not outcome.reset
    for i, (e, a, v, x, w) in enumerate(zip(E, A, V, gates, shares)):
        assert torch.equal(anchors[i], P[i])
        gated = gate is not None and float(v.double().norm()) > 0
        ways = endings(e, a, v, x, w, gated, max(1 / (seen[i] + 1), 1 - b))
        way = ended(P[i], estimates[i], e, a, v, length / k, ways)
        assert outcome.noise[i] == pytest.approx(fold([*taken[i], way.share], k, momentum), rel=1e-9, abs=1e-15)


def make_like(t: Tensor) -> Tensor:
    """A copy with the same strides, gaps included."""
    if t.numel() == 0 or t.is_contiguous():
        return t.clone()
    base = torch.empty(sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1, dtype=t.dtype)
    return base.as_strided(t.shape, t.stride()).copy_(t)


def test_complex_tensors_jump_as_pairs_of_reals():
    g = torch.Generator().manual_seed(0)
    E, A, V = (torch.randn(5, 3, dtype=torch.complex64, generator=g) for _ in range(3))
    V = V + 0.4 * (E - A)
    pairs = [torch.view_as_real(t) for t in (E, A, V)]
    rule = {"every": 3, "beta": 0.8, "gate": 0.4, "momentum": 0.5}
    want, (estimate,), (gate,), _ = reference.end_cycle(*([t] for t in pairs), [[1.0, 0.5]], length=9, **rule)
    p, v = E.clone(), V.clone()
    noise = [fold([1.0, 0.5], 3, 0.5)]
    batch = CycleBatch([p], [A.clone()], [v], noise, [3], [2], horizon=9, start=0, limited=False, **rule)
    report, *_ = end_cycle([batch], [], 9.0, lambda move: Length(0.0, 1.0))
    assert report.gate == pytest.approx(gate) and 0 < gate < 1
    assert_within_one_rounding(torch.view_as_real(v), estimate, 0, *pairs)
    assert_within_one_rounding(torch.view_as_real(p), want[0], gate * 3, *pairs, *pairs)


@pytest.mark.parametrize("dtype", REAL)
def test_the_bits_of_the_sums_do_not_depend_on_the_number_of_threads(dtype):
    g = torch.Generator().manual_seed(0)
    sizes = [300_001, 1 << 20, *range(1, 400)]
    lists = [[torch.randn(n, generator=g).to(dtype) for n in sizes] for _ in range(3)]
    threads, sums = torch.get_num_threads(), []
    try:
        for n in 1, 2, 3:
            torch.set_num_threads(n)
            sums.append(kernels.TensorLists(*lists).sums())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


class Shadow:
    """AdamW beside an ExtraAdam: it tells where each step would have ended without a jump."""

    def __init__(self, params: list[Tensor], **options: Any) -> None:
        self.params = [torch.nn.Parameter(make_like(p.detach())) for p in params]
        self.optimizer = torch.optim.AdamW(self.params, **options)

    def step(self, params: list[Tensor]) -> list[Tensor]:
        for mine, p in zip(self.params, params):
            mine.data.copy_(p.detach())
            mine.grad = None if p.grad is None else make_like(p.grad)
        self.optimizer.step()
        return [p.detach().clone() for p in self.params]


def gradients(params: list[Tensor], target: list[Tensor], generator: torch.Generator) -> None:
    for p, t in zip(params, target):
        p.grad = (p.detach() - t + 0.3 * torch.randn(p.shape, generator=generator).to(p.dtype)).to(p.dtype)


def leaves(kinds: list[Any], generator: torch.Generator) -> list[Tensor]:
    return [torch.nn.Parameter(make(*kind, generator, 1.0)) for kind in kinds]


kinds = st.lists(
    st.tuples(shapes, st.sampled_from(LAYOUTS[:4]), st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
    min_size=1, max_size=4,
)  # fmt: skip


@given(
    kinds=kinds,
    hyperparameters=st.lists(hyperparameters, min_size=1, max_size=2),
    implementation=st.sampled_from(["forloop", "foreach", "fused"]),
    start=st.integers(0, 9),
    seed=st.integers(0, 2**30),
)
def test_every_step_is_adamw_and_every_kth_is_the_reference(kinds, hyperparameters, implementation, start, seed):
    g = torch.Generator().manual_seed(seed)
    params = leaves(kinds, g)
    target = [make(p.shape, "contiguous", p.dtype, g, 1.0) for p in params]
    options = {"lr": 0.01, "foreach": implementation == "foreach", "fused": implementation == "fused"}
    groups = [
        {"params": params[i :: len(hyperparameters)], **hyperparameter}
        for i, hyperparameter in enumerate(hyperparameters)
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = ExtraAdam(groups, extra_start=start, **options)
    shadow = Shadow(params, **options)
    anchors = {p: p.detach().clone() for p in params}
    estimates = {p: torch.zeros_like(p) for p in params}
    taken: dict[Tensor, list[float]] = {p: [] for p in params}

    for t in range(1, 15):
        gradients(params, target, g)
        without_jump = dict(zip(params, shadow.step(params)))
        optimizer.step()
        for group in optimizer.param_groups:
            ps = group["params"]
            if t % group["extra_every"]:
                assert all(torch.equal(p, without_jump[p]) for p in ps)
                continue
            k, n, b, gate = (group[f"extra_{key}"] for key in ("every", "steps", "beta", "gate"))
            for p in ps:
                e, a, v, state = without_jump[p], anchors[p], estimates[p], optimizer.state[p]
                rule = {"every": k, "length": n, "beta": b, "gate": gate, "momentum": 0.9}
                *_, (x,), (w,) = reference.end_cycle([e], [a], [v], [taken[p]], **rule, jump=t >= start)
                gated = gate is not None and t >= start and float(v.double().norm()) > 0
                ways = endings(e, a, v, x, w, gated, max(1 / (len(taken[p]) + 1), 1 - b))
                way = ended(p, state.get("extra_estimate"), e, a, v, n / k, ways)
                assert torch.equal(state["extra_anchor"], p)
                taken[p].append(way.share)
                anchors[p] = p.detach().clone()
                if "extra_estimate" in state:
                    estimates[p] = state["extra_estimate"].clone()
                    noise = state["extra_noise_cov"], state["extra_noise_var"]
                    assert noise == pytest.approx(fold(taken[p], k, 0.9), rel=1e-9)
                else:
                    assert b == 0 and gate is None and way.share == 1


@given(
    kinds=kinds,
    hyperparameter=hyperparameters,
    seed=st.integers(0, 2**30),
    stop=st.integers(0, 12),
    fused=st.booleans(),
)
def test_a_run_resumed_at_a_random_step_is_bit_equal(kinds, hyperparameter, seed, stop, fused):
    g = torch.Generator().manual_seed(seed)
    params = leaves(kinds, g)
    target = [make(p.shape, "contiguous", p.dtype, g, 1.0) for p in params]
    noise = [g.get_state()]

    def train(params: list[Tensor], optimizer: ExtraAdam, steps: int) -> None:
        g.set_state(noise[0])
        for _ in range(steps):
            gradients(params, target, g)
            optimizer.step()
        noise[0] = g.get_state()

    optimizer = ExtraAdam(params, lr=0.01, fused=fused, **hyperparameter)
    train(params, optimizer, stop)
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    at_stop = noise[0]
    train(params, optimizer, 9)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [torch.nn.Parameter(p) for p in saved["params"]]
    again = ExtraAdam(resumed, lr=0.01, fused=fused)
    again.load_state_dict(saved["optimizer"])
    noise[0] = at_stop
    train(resumed, again, 9)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed))
    for p, q in zip(params, resumed):
        assert optimizer.state[p].keys() == again.state[q].keys()
        for key, value in optimizer.state[p].items():
            other = again.state[q][key]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, key


RESUME = """
import sys, torch
from extraopt import ExtraAdam
file = sys.argv[1]
results = []
for case in torch.load(file, weights_only=True):
    params = [torch.nn.Parameter(p) for p in case["params"]]
    optimizer = ExtraAdam(params, extra_watch=False)
    optimizer.load_state_dict(case["optimizer"])
    for grads in case["grads"]:
        for p, grad in zip(params, grads):
            p.grad = grad
        optimizer.step()
    results.append([p.detach() for p in params])
torch.save(results, file + ".resumed")
"""


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_resumed_in_a_new_process_is_bit_equal_at_every_offset_in_a_cycle(tmp_path, fused):
    hyperparameters = [
        {"extra_every": 3, "extra_steps": 9, "extra_kl": None},
        {"extra_every": 3, "extra_steps": 60, "extra_watch": False},
        {"extra_every": 7, "extra_steps": 21, "extra_beta": 0.0, "extra_gate": None, "extra_kl": None},
        {"extra_every": 4, "extra_steps": 8, "extra_beta": 0.5, "extra_gate": None, "extra_start": 5, "extra_kl": None},
    ]
    cases, wanted = [], []
    for hyperparameter in hyperparameters:
        for stop in range(2 * hyperparameter["extra_every"] + 1):
            g = torch.Generator().manual_seed(stop)
            params = [torch.nn.Parameter(torch.randn(s, generator=g).to(d)) for s, d in
                      [((4, 3), torch.float32), ((17,), torch.bfloat16), ((), torch.float64)]]  # fmt: skip
            optimizer = ExtraAdam(params, lr=0.02, fused=fused, **hyperparameter)
            grads = [
                [(1 + 0.3 * torch.randn(p.shape, generator=g)).to(p.dtype) for p in params] for _ in range(stop + 9)
            ]
            for i, step in enumerate(grads):
                if i == stop:
                    state = io.BytesIO()
                    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, state)
                for p, grad in zip(params, step):
                    p.grad = grad.clone()
                optimizer.step()
            state.seek(0)
            cases.append({**torch.load(state, weights_only=True), "grads": grads[stop:]})
            wanted.append([p.detach() for p in params])
            assert optimizer.last_jump is not None and optimizer.last_jump.jumped == 3
    torch.save(cases, tmp_path / "cases.pt")
    subprocess.run([sys.executable, "-c", RESUME, str(tmp_path / "cases.pt")], check=True, cwd=tmp_path)
    for want, got in zip(wanted, torch.load(tmp_path / "cases.pt.resumed", weights_only=True)):
        assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.parametrize("k, n", [(5, 20), (20, 100), (3, 3)])
def test_the_papers_setting_is_lookahead_with_alpha_above_one(k, n):
    g = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(9)), torch.nn.Parameter(torch.ones(2, 3))] for _ in range(2))
    rule = {"extra_every": k, "extra_steps": n, "extra_beta": 0.0, "extra_gate": None, "extra_kl": None}
    optimizer = ExtraAdam(ours, lr=1e-2, **rule)
    adamw, slow = torch.optim.AdamW(theirs, lr=1e-2), [p.detach().clone() for p in theirs]
    for t in range(1, 3 * k + 2):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
        if t % k == 0:
            for q, s in zip(theirs, slow):
                q.data.copy_(s.lerp(q.data, 1 + n / k))  # Lookahead: slow + alpha * (fast - slow)
                s.copy_(q.data)
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert math.isclose(optimizer.last_jump.gate, 1.0) and optimizer.last_jump.step == 3 * k
