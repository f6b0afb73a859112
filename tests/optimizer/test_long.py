"""Long runs and long lists of parameters: what leaks, drifts or slows down only after a million steps."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers import reload
from torch import Tensor

from extraopt import ExtraAdam
from extraopt.wrap import Extra

K = 7
LIMIT = 2**24  # a float32 counter goes no further: LIMIT + 1 is rounded back


def two_tensors() -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters, and gradients to take in turn: 16 of noise around a slope, 16 around the opposite one."""
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 3), (5,)
    slopes = [0.3] * 16 + [-0.3] * 16
    grads = [[slope + torch.randn(shape, generator=generator) for shape in shapes] for slope in slopes]
    return [torch.randn(shape, generator=generator) for shape in shapes], grads


def memory() -> dict[str, int]:
    """What a leak adds to: objects that the collector knows, blocks of Python's allocator, bytes of the process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"objects": len(gc.get_objects()), "blocks": sys.getallocatedblocks(), "bytes": pages * 4096}


def long_run(steps: int, window: int, settled: int) -> None:
    """So many steps, timed over a window at both ends; after `settled` of them the caches are full."""
    params, grads = two_tensors()
    optimizer = ExtraAdam(
        params, lr=1e-3, fused=True, extra_every=K, extra_steps=3 * K, extra_kl=None
    )  # the fastest here
    first: list[float] = []
    last: list[float] = []
    early: dict[str, int] = {}
    jumped, retreated, report = 0, 0, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(1, steps + 1):
            for p, g in zip(params, grads[i % 16 + 16 * (i // 100 % 2)]):
                p.grad = g
            begun = time.perf_counter()
            optimizer.step()
            spent = time.perf_counter() - begun
            if K < i <= window + K:
                first.append(spent)
            elif i > steps - window:
                last.append(spent)
            if i % K:
                assert optimizer.last_jump is report, f"a jump at step {i}"
            else:
                assert optimizer.last_jump is not report, f"no jump at step {i}"
                report = optimizer.last_jump
                assert report.step == i
                jumped += report.jumped > 0
                retreated += report.gate < 1
            if i == settled:
                last = [0.0] * window  # as much memory as the list will take
                early = memory()
                last.clear()
        late = memory()
    assert [int(optimizer.state[p]["step"]) for p in params] == [steps, steps]
    assert [optimizer.state[p]["extra_origin"] for p in params] == [0, 0]
    assert jumped > steps / K / 50 and retreated > steps / K / 50 and all(bool(p.isfinite().all()) for p in params)
    assert not caught, caught[0]
    assert late["objects"] - early["objects"] < 100
    assert late["blocks"] - early["blocks"] < window + 2000, "each time that was taken is a block, too"
    assert late["bytes"] - early["bytes"] < 8_000_000, "torch 2.7 settles 4 MB later, AdamW alone, too"
    # the fastest tenth: what else the machine does comes and goes
    assert statistics.quantiles(last, n=10)[0] < 1.5 * statistics.quantiles(first, n=10)[0]


@pytest.mark.parametrize(
    "steps, window, settled",
    [(20_000, 1000, 10_000), pytest.param(1_000_000, 10_000, 100_000, marks=pytest.mark.slow)],
    ids=["20,000", "a million"],
)
def test_a_long_run_keeps_memory_speed_and_the_cycle(steps: int, window: int, settled: int) -> None:
    """In a process of its own: what others have allocated before would come and go in its bytes."""
    code = f"from test_long import long_run; long_run({steps}, {window}, {settled})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def ends_from(optimizer: ExtraAdam | Extra, params: list[Tensor], steps: int) -> list[int]:
    """In which of so many steps a cycle ended."""
    _, grads = two_tensors()
    ends = []
    for i in range(1, steps + 1):
        before = optimizer.last_jump
        for p, g in zip(params, grads[i % 16]):
            p.grad = g.clone()
        optimizer.step()
        if optimizer.last_jump is not before:
            ends.append(i)
    return ends


def near_the_limit(every: int) -> tuple[list[Tensor], ExtraAdam]:
    """A run whose state, five steps before the counter's limit, has been saved and loaded."""
    params, _ = two_tensors()
    optimizer = ExtraAdam(params, extra_every=every, extra_steps=2 * every, extra_kl=None)
    ends_from(optimizer, params, 1)
    state = reload(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"].fill_(LIMIT - 5)
    optimizer.load_state_dict(state)
    return params, optimizer


def test_adamw_steps_on_where_its_counter_ends() -> None:
    """It does not: the counter stands still, which bias corrections of 1 do not notice, and it goes on to step."""
    params, grads = two_tensors()
    optimizer = torch.optim.AdamW(params)
    for i in range(20):
        before = [p.clone() for p in params]
        for p, g in zip(params, grads[i % 16]):
            p.grad = g.clone()
        optimizer.step()
        assert not any(torch.equal(p, b) for p, b in zip(params, before))
        if i == 0:
            for p in params:
                optimizer.state[p]["step"].fill_(LIMIT - 5)
    assert {float(optimizer.state[p]["step"]) for p in params} == {LIMIT}


@pytest.mark.parametrize("every", [3, 4, 7, 8])
def test_cycles_keep_their_phase_up_to_the_counters_limit(every: int) -> None:
    params, optimizer = near_the_limit(every)
    assert ends_from(optimizer, params, 5) == [i for i in range(1, 6) if (LIMIT - 5 + i) % every == 0]


@pytest.mark.parametrize("every", [3, 4, 7, 8])
def test_past_the_counters_limit_it_trains_on_as_adamw(every: int) -> None:
    """AdamW's float32 count stands still there, so no cycle ends any more: what is left is AdamW."""
    params, optimizer = near_the_limit(every)
    assert all(i <= 5 for i in ends_from(optimizer, params, 40))
    before = [p.clone() for p in params]
    assert not ends_from(optimizer, params, 1) and not any(map(torch.equal, params, before))


def test_the_wrappers_own_counter_has_no_limit() -> None:
    """It is an int."""
    params, _ = two_tensors()
    optimizer = Extra(torch.optim.SGD(params, lr=0.01), extra_every=K, extra_steps=2 * K, extra_kl=None)
    ends_from(optimizer, params, 1)
    for p in params:
        optimizer.state[p]["extra_step"] = LIMIT - 5
    assert ends_from(optimizer, params, 40) == [i for i in range(1, 41) if (LIMIT - 5 + i) % K == 0]


def many(kind: type[torch.optim.AdamW], **options: object) -> torch.optim.AdamW:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, generator=generator)) for _ in range(10_000)]
    for p in params:
        p.grad = torch.randn(4, generator=generator)
    return kind(params, **options)


def test_10_000_parameters_jump_together() -> None:
    optimizer = many(ExtraAdam, foreach=True, extra_every=3, extra_steps=6, extra_kl=None)
    for _ in range(6):
        optimizer.step()
    assert isinstance(optimizer, ExtraAdam) and optimizer.last_jump is not None
    assert (optimizer.last_jump.step, optimizer.last_jump.jumped, optimizer.last_jump.refused) == (6, 10_000, 0)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_10_000_parameters_cost_a_step_without_a_jump_little_more_than_adamws(implementation: str) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("times beside other tests say nothing")
    flags = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[implementation]
    pair = {
        "adamw": many(torch.optim.AdamW, **flags),
        "extra": many(ExtraAdam, extra_every=K, extra_steps=K, extra_kl=None, **flags),
    }
    times: dict[str, list[float]] = {name: [] for name in pair}
    for i in range(1, 6 * K):
        for name, optimizer in pair.items() if i % 2 else reversed(pair.items()):
            begun = time.perf_counter()
            optimizer.step()
            if i > 1 and i % K:  # the first makes the state
                times[name].append(time.perf_counter() - begun)
    ratio = statistics.median(times["extra"]) / statistics.median(times["adamw"])
    assert ratio <= 1.3, f"{ratio:.2f} times AdamW's"
