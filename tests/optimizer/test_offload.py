"""Anchors and estimates in host memory: the same weights, bit for bit, and no room taken on the device."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import _kernel_cases as cases
import pytest
import torch
from helpers import GATED, PAPER, RULES, K, assert_same, assert_same_run, reload, rule_name, tiny_model, train

from extraopt import ExtraAdam, kernels
from extraopt.kernels import streamed
from extraopt.trust import Length
from extraopt.wrap import Extra

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
both_rules = pytest.mark.parametrize("rule", RULES, ids=rule_name)


def with_gaps(flat):
    return torch.stack([flat, flat], 1)[:, 0]


@pytest.fixture
def small_buffers(monkeypatch):
    monkeypatch.setattr(streamed, "BUFFER", 1 << 18)  # a list of batches, and the long tensor in pieces


@pytest.mark.parametrize("drift", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_what_passes_through_buffers_is_what_lies_on_the_device(small_buffers, device, dtype, drift):
    wanted = cases.specs(dtype, [*cases.SMALL, 70_000, 3, 300_001]) + [(dtype, 9, with_gaps, (0, 0, 0))]
    there, here = cases.Lists(wanted, device), cases.Lists(wanted)
    if device == "cuda":
        for ts in here.anchors, here.estimates:
            ts[::2] = [t.pin_memory() for t in ts[::2]]  # and some that are not
    here.params = there.copies()[0] if device == "cpu" else [t.clone() for t in there.params]
    n = len(wanted)
    name, *factors = ("retreat_", cases.retreats(n), [0.1] * n) if drift else ("jump_", cases.ratios(n))
    whole = kernels.TensorLists(there.params, there.anchors, there.estimates if drift else None)
    arguments = here.params, here.anchors, here.estimates if drift else None
    assert torch.allclose(cases.sums(streamed, *arguments).cpu(), whole.sums(), rtol=1e-6, atol=1e-12)
    getattr(whole, name)(*factors)
    getattr(cases, name)(streamed, *arguments[: 3 if drift else 2], *factors)
    for name in "params", "anchors", "estimates":
        for i, (got, want) in enumerate(zip(getattr(here, name), getattr(there, name))):
            assert torch.equal(got.cpu(), want.cpu()), (name, i, wanted[i][:2])
            assert got.device.type == (device if name == "params" else "cpu")
    assert here.guards_intact()


def test_a_list_of_nothing_passes():
    empty = [torch.empty(0), torch.empty(3, 0)]
    assert not cases.sums(streamed, empty, empty, empty).any()
    cases.jump_(streamed, empty, empty, [1.0, 1.0])


def test_on_a_cpu_it_changes_nothing():
    model = tiny_model()
    optimizer = ExtraAdam(model.parameters(), lr=0.01, **GATED, extra_offload=True)
    other = tiny_model()
    plain = ExtraAdam(other.parameters(), lr=0.01, **GATED)
    assert train(model, optimizer, range(10)) == train(other, plain, range(10)) == [2, 5, 8]
    assert_same(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("wrapped", [False, True], ids=["ExtraAdam", "Extra"])
@pytest.mark.parametrize("saved, wanted", [(True, False), (False, True)])
def test_a_checkpoint_does_not_decide_where_things_lie(wrapped, saved, wanted):
    """A run goes on on a machine with less, or more, memory."""

    def make(offload: bool) -> tuple[torch.nn.Module, Any]:
        model = tiny_model()
        if wrapped:
            return model, Extra(torch.optim.AdamW(model.parameters(), lr=0.01), **GATED, extra_offload=offload)
        return model, ExtraAdam(model.parameters(), lr=0.01, **GATED, extra_offload=offload)

    model, optimizer = make(saved)
    train(model, optimizer, range(5))
    other, resumed = make(wanted)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(reload(optimizer.state_dict()))
    assert resumed.param_groups[0]["extra_offload"] is wanted
    assert train(model, optimizer, range(5, 12)) == train(other, resumed, range(5, 12)) == [5, 8, 11]
    assert_same(list(model.parameters()), list(other.parameters()))


def test_a_damaged_state_is_still_refused_whole():
    model = tiny_model()
    optimizer = ExtraAdam(model.parameters(), **GATED, extra_offload=True)
    train(model, optimizer, range(4))
    before = copy.deepcopy(optimizer.state_dict())
    for damage in (
        lambda s: s["state"][1].update(extra_anchor=torch.zeros(3)),
        lambda s: s["state"][1].update(extra_estimate="none"),
        lambda s: s.update(state=None),
    ):
        damaged = copy.deepcopy(before)
        damage(damaged)
        with pytest.raises(ValueError):
            optimizer.load_state_dict(damaged)
        assert_same(optimizer.state_dict(), before)


# From here on with a GPU.


def pair(rule: dict[str, Any], **options: Any) -> tuple[torch.nn.Module, ExtraAdam]:
    model = tiny_model(device="cuda")
    return model, ExtraAdam(model.parameters(), lr=0.01, **rule, **options)


def assert_in_host_memory(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for key in {"extra_anchor", "extra_estimate"} & state.keys():
            assert state[key].device.type == "cpu" and state[key].is_pinned(), key


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@both_rules
def test_gpu_the_same_weights_and_all_in_host_memory(rule, fused):
    model, optimizer = pair(rule, extra_offload=True, fused=fused)
    other, plain = pair(rule, fused=fused)
    for steps in range(5), range(5, 14):
        assert train(model, optimizer, steps) == train(other, plain, steps)
        assert_in_host_memory(optimizer)
        for o in optimizer, plain:
            o.jump()
    assert_same(list(model.parameters()), list(other.parameters()))
    assert optimizer.last_jump == plain.last_jump
    assert_in_host_memory(optimizer)


@pytest.mark.gpu
def test_gpu_anchors_are_reset():
    runs = [pair(GATED, extra_offload=True), pair(GATED)]
    for model, optimizer in runs:
        train(model, optimizer, range(4 * K + 1))
        model[0].weight.data.mul_(1.1)
        optimizer.reset_anchor()
        train(model, optimizer, range(4 * K + 1, 8 * K))
    assert_same(*[list(model.parameters()) for model, _ in runs])
    assert_in_host_memory(runs[0][1])


@pytest.mark.gpu
def test_gpu_lengths_are_tried_from_host_memory_as_from_the_device():
    """The weights are moved several times before an anchor is written."""
    runs = [
        pair({"extra_every": K, "extra_steps": 60}, extra_offload=offload, extra_watch=False, betas=(0.5, 0.99))
        for offload in (True, False)
    ]
    for model, optimizer in runs:

        def choose(move, gate, params, known, limits, most):
            for length in (17.0, 0.0, 40.0, 3.0):
                move(length)
            return Length(3.0, known)

        optimizer._trust.choose = choose
        train(model, optimizer, range(5 * K))
        assert optimizer.last_jump.length == 3.0
    assert_same(*[list(model.parameters()) for model, _ in runs])
    assert_in_host_memory(runs[0][1])


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["file", "pickle", "deepcopy"])
def test_gpu_a_resumed_run_is_the_same_and_in_host_memory(way, tmp_path):
    model, optimizer = pair(GATED, extra_offload=True)
    train(model, optimizer, range(5))
    if way == "file":
        other, resumed = pair(GATED, extra_offload=True)
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(reload(optimizer.state_dict()))
    else:
        both = {"model": model, "optimizer": optimizer}
        both = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
        other, resumed = both["model"], both["optimizer"]
    assert_in_host_memory(resumed)
    assert train(model, optimizer, range(5, 12)) == train(other, resumed, range(5, 12)) == [5, 8, 11]
    assert_same_run(model, optimizer, other, resumed)


@pytest.mark.gpu
def test_gpu_what_a_trainer_moves_to_the_device_returns_with_the_next_cycle():
    """verl brings every tensor of the state to the GPU before a step."""
    model, optimizer = pair(GATED, extra_offload=True)
    other, plain = pair(GATED)
    for steps in range(4), range(4, 8), range(8, 12):
        train(model, optimizer, steps)
        train(other, plain, steps)
        for state in optimizer.state.values():
            state.update({key: v.cuda() for key, v in state.items() if isinstance(v, torch.Tensor) and key != "step"})
    train(model, optimizer, range(12, 15))
    train(other, plain, range(12, 15))
    assert_same(list(model.parameters()), list(other.parameters()))
    assert_in_host_memory(optimizer)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [PAPER, GATED], ids=["paper", "gated"])
def test_gpu_no_room_is_taken_by_steps_cycles_or_loading(rule):
    gc.collect()
    before = torch.cuda.memory_allocated()
    shape = 1 << 13, 1 << 13  # 256 MiB
    p = torch.nn.Parameter(torch.randn(shape, device="cuda"))
    optimizer = ExtraAdam([p], lr=1e-3, fused=True, **rule, extra_offload=True)
    p.grad = torch.randn_like(p)
    needed = 4 * p.nbytes  # weights, gradient, two moments

    def peak(call) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before - needed

    buffers = 2 * 2 * streamed.BUFFER + (1 << 20)
    for _ in range(3 * K):
        assert peak(optimizer.step) <= buffers
    state = reload(optimizer.state_dict())
    state["state"] = {0: {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in state["state"][0].items()}}
    optimizer.state.clear()
    assert peak(lambda: optimizer.load_state_dict(state)) <= buffers
    assert_in_host_memory(optimizer)
    assert peak(optimizer.step) <= buffers


@pytest.mark.gpu
def test_gpu_shards_of_a_dtensor_lie_in_host_memory():
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,))
        runs = []
        for offload in True, False:
            p = torch.nn.Parameter(distribute_tensor(torch.arange(64.0, device="cuda").view(8, 8), mesh, [Shard(0)]))
            optimizer = ExtraAdam([p], lr=0.01, **GATED, extra_offload=offload)
            for i in range(4 * K):
                p.grad = torch.ones_like(p) * (1 + 0.1 * (i % 2))
                optimizer.step()
                if i == 2 * K:
                    optimizer.load_state_dict(optimizer.state_dict())
            assert optimizer.last_jump.jumped == 1
            runs.append((p.to_local(), optimizer))
        assert torch.equal(runs[0][0], runs[1][0])
        for state in runs[0][1].state.values():
            for key in "extra_anchor", "extra_estimate":
                assert isinstance(state[key], DTensor)
                assert state[key].to_local().device.type == "cpu" and state[key].to_local().is_pinned()
    finally:
        torch.distributed.destroy_process_group()
