"""Public bug reports about the step: gradient scalers, closures, hooks, schedulers, layouts, odd callers.

Each test is named after the symptom; its docstring names the reports.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from helpers import (
    GATED,
    PAPER,
    RULES,
    K,
    assert_same,
    assert_same_run,
    batch_loss,
    by_hand,
    reload,
    rule_name,
    tiny_model,
    train,
)
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from extraopt import ExtraAdam

both_rules = pytest.mark.parametrize("rule", RULES, ids=rule_name)
fused_or_not = pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])


def make(rule: dict[str, Any] = GATED, **options: Any) -> tuple[torch.nn.Module, ExtraAdam]:
    model = tiny_model()
    return model, ExtraAdam(model.parameters(), **{"lr": 0.01, **rule, **options})


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class Amp:
    """Training with a gradient scaler, some of whose steps overflow."""

    def __init__(self, model: torch.nn.Module, overflow: set[int]) -> None:
        self.model, self.overflow, self.call = model, overflow, 0
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)

    def step(self, optimizer: ExtraAdam, loss: Tensor) -> None:
        self.call += 1
        self.scaler.scale(loss).backward()
        if self.call in self.overflow:
            next(self.model.parameters()).grad[0] = float("inf")
        self.scaler.step(optimizer)
        self.scaler.update()


@fused_or_not
@pytest.mark.parametrize("overflow", [{1}, {2}, {3}, {4}, {3, 4, 5}, {1, 6}], ids=str)
def test_an_overflow_is_counted_as_a_step(fused, overflow):
    """accelerate#4242: with a fused optimizer the scaler always calls step(), and wrappers counted the call.

    Lightning#18828, accelerate#2828, NeMo Speech#3293: counters advanced on skipped steps.
    """
    model, optimizer = make(PAPER, fused=fused)
    amp, applied, jumped_at = Amp(model, overflow), 0, []
    for call in range(1, 13):
        before = weights(model)
        ended = bool(train(model, optimizer, [call], amp.step))
        if call in overflow:
            assert not ended
            assert_same(weights(model), before)
            continue
        applied += 1
        assert ended == (applied % K == 0)
        if ended:
            jumped_at.append(applied)
            assert optimizer.last_jump.jumped == 4 and optimizer.last_jump.step == applied
    assert jumped_at == list(range(K, applied + 1, K))


@both_rules
@fused_or_not
def test_skipped_steps_leave_a_trace_in_the_trajectory(rule, fused):
    """The same reports: a run with overflows is bit-equal to the run of its applied steps alone."""
    model, optimizer = make(rule, fused=fused)
    train(model, optimizer, range(1, 15), Amp(model, overflow={3, 4, 8}).step)
    other, clean = make(rule, fused=fused)
    train(other, clean, [i for i in range(1, 15) if i not in {3, 4, 8}], Amp(other, overflow=set()).step)
    assert_same_run(model, optimizer, other, clean)
    assert optimizer.last_jump.step == 9


@fused_or_not
def test_an_overflow_right_after_a_resume_ends_the_last_cycle_again(fused):
    """The same reports: the counter still stands at a multiple of k, and the drift of that "cycle" is zero."""
    model, optimizer = make(GATED, fused=fused)
    train(model, optimizer, range(2 * K), Amp(model, overflow=set()).step)
    other, resumed = make(GATED, fused=fused)
    other.load_state_dict(reload(model.state_dict()))
    resumed.load_state_dict(reload(optimizer.state_dict()))
    assert train(other, resumed, range(2 * K - 1, 4 * K), Amp(other, overflow={1}).step) == [8, 11]
    train(model, optimizer, range(2 * K, 4 * K), Amp(model, overflow=set()).step)
    assert_same_run(model, optimizer, other, resumed)


def test_the_state_dict_fails_when_the_first_amp_step_was_skipped():
    """mosaicml/composer#3226."""
    model, optimizer = make(PAPER)
    amp = Amp(model, overflow={1})
    train(model, optimizer, [0], amp.step)
    assert len(optimizer.state) == 0
    optimizer.state_dict()
    get_optimizer_state_dict(model, optimizer)  # gradients are there, state is not: torch makes none
    optimizer.zero_grad()
    saved = get_optimizer_state_dict(model, optimizer)
    assert saved["state"].keys() == dict(model.named_parameters()).keys()
    assert train(model, optimizer, range(1, 9), amp.step) == [2, 5, 8]  # torch's own step with lr 0 was the first


@both_rules
def test_a_two_phase_optimizer_cannot_work_with_a_scaler(rule):
    """davda54/sam#11, #79, #97, juntang-zhuang/GSAM#2: unscale, clip, step; a scale of 2^n must change no bit."""
    model, optimizer = make(rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)

    def scaled(optimizer: ExtraAdam, loss: Tensor) -> None:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()

    other, plain = make(rule)

    def unscaled(optimizer: ExtraAdam, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()

    assert train(model, optimizer, range(9), scaled) == train(other, plain, range(9), unscaled) == [2, 5, 8]
    assert_same_run(model, optimizer, other, plain)


@both_rules
def test_the_closure_is_ignored_or_runs_after_the_anchor_is_taken(rule):
    """davda54/sam PR #91, sail-sg/Adan#11, Ranger#46: gradients come from step(closure) alone."""
    model, optimizer = make(rule)
    other, plain = make(rule)
    before, calls = weights(model), []

    def step(optimizer: ExtraAdam, loss: Tensor) -> None:
        def closure() -> Tensor:
            calls.append(1)
            assert torch.is_grad_enabled()
            loss.backward()
            return loss

        assert optimizer.step(closure) is loss

    train(model, optimizer, [0], step)
    assert len(calls) == 1
    assert_same([optimizer.state[p]["extra_anchor"] for p in model.parameters()], before)
    assert train(model, optimizer, range(1, 9), step) == [2, 5, 8] and len(calls) == 9
    train(other, plain, range(9))
    assert_same_run(model, optimizer, other, plain)


def test_weights_loaded_by_the_closure_are_extrapolated():
    """The anchor of the first cycle is the weights after the closure ran, just before the first step."""
    model, optimizer = make(PAPER)
    loaded = tiny_model(seed=1).state_dict()

    def step(optimizer: ExtraAdam, loss: Tensor) -> None:
        def closure() -> None:
            model.load_state_dict(loaded)
            batch_loss(model, 0).backward()

        optimizer.step(closure)

    train(model, optimizer, [0], step)
    assert_same([optimizer.state[p]["extra_anchor"] for p in model.parameters()], list(loaded.values()))


def test_backward_inside_a_closure_fails_under_no_grad():
    """Lightning#18254: step() must switch gradients on for the closure, whatever was on around it."""
    model, optimizer = make(PAPER)
    for i in range(K):

        def closure(i: int = i) -> Tensor:
            optimizer.zero_grad()
            loss = batch_loss(model, i)
            loss.backward()
            return loss

        with torch.no_grad():
            assert optimizer.step(closure).requires_grad
            assert not torch.is_grad_enabled()
    assert optimizer.last_jump.step == K and optimizer.last_jump.jumped == 4


def test_a_closure_that_skips_its_batch_counts_as_a_step():
    """Lightning: training_step returned None, so that no parameter has a gradient."""
    model, optimizer = make(PAPER)
    assert optimizer.step(lambda: None) is None and len(optimizer.state) == 0
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    before = weights(model)
    assert optimizer.step(lambda: None) is None and optimizer.last_jump is None
    assert_same(weights(model), before)
    assert train(model, optimizer, range(2, 6)) == [2, 5]


def test_a_wrapper_that_takes_on_the_class_loses_attributes():
    """Lightning's LightningOptimizer: of our class, without our attributes: what we assign lands on the wrapper."""
    model, optimizer = make(PAPER)

    class Wrapper:
        def __init__(self, inner: ExtraAdam) -> None:
            self.inner = inner
            self.__class__ = type("Wrapped", (Wrapper, type(inner)), {})

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    wrapper = Wrapper(optimizer)
    assert isinstance(wrapper, ExtraAdam)
    assert train(model, wrapper, range(5)) == [2]
    early = wrapper.jump()
    assert early.step == 5 and wrapper.last_jump is early
    assert optimizer.last_jump is early
    assert train(model, wrapper, range(5, 9)) == [7]
    assert wrapper.last_jump is optimizer.last_jump and wrapper.last_jump.step == 8
    wrapper.reset_anchor()
    assert train(model, wrapper, range(9, 16)) == [11, 14]


def test_schedulers_crash_because_step_is_a_plain_function():
    """NVIDIA/apex#552, torchtune#2931, #2263: schedulers look for step.__func__, at any time."""
    model, optimizer = make(PAPER)
    train(model, optimizer, range(4))
    optimizer.jump()
    optimizer.reset_anchor()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.step.__func__.__qualname__ == "ExtraAdam.step"
    torch.compile(optimizer.step, backend="eager")
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=20),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20),
    ]
    ends = []
    for i in range(4, 12):
        ends += train(model, optimizer, [i])
        for scheduler in schedulers:
            scheduler.step()
    assert ends == [6, 9]


def test_constructing_a_scheduler_overwrites_the_loaded_learning_rate():
    """pytorch#119168, #156846, Lightning#18588: torch's order is scheduler first, then load both."""
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for i in range(4):
        train(model, optimizer, [i])
        scheduler.step()
    state, schedule = optimizer.state_dict(), scheduler.state_dict()
    other = tiny_model()
    other.load_state_dict(model.state_dict())
    resumed = ExtraAdam(other.parameters(), lr=0.01, **GATED)
    rescheduled = torch.optim.lr_scheduler.StepLR(resumed, step_size=1, gamma=0.5)
    resumed.load_state_dict(state)
    rescheduled.load_state_dict(schedule)
    assert resumed.param_groups[0]["lr"] == 0.01 / 16
    train(other, resumed, [4])
    rescheduled.step()
    assert resumed.param_groups[0]["lr"] == 0.01 / 32


def test_step_hooks_fire_twice_or_never():
    """pytorch#119300, #182605: an override that calls super().step() is hooked once more if an AdamW was ever made."""
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    model, optimizer = make(PAPER)
    seen: list[int] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append(0)),
        optimizer.register_step_pre_hook(lambda *_: seen.append(1)),
        optimizer.register_step_post_hook(lambda *_: seen.append(2)),
        register_optimizer_step_post_hook(lambda *_: seen.append(5)),
    ]
    try:
        for i in range(2 * K):
            seen.clear()
            train(model, optimizer, [i])
            assert seen == [0, 1, 2, 5]
    finally:
        for handle in handles:
            handle.remove()


def test_a_post_hook_sees_the_weights_before_the_jump():
    """Trainers sync, save and average weights after the step: the jump must be behind them."""
    model, optimizer = make(PAPER)
    seen: list[list[Tensor]] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(weights(model)))
    for i in range(2 * K):
        train(model, optimizer, [i])
        assert_same(seen[-1], weights(model))


def test_small_tensors_are_left_out_by_a_size_threshold():
    """bitsandbytes#2080: a threshold on the local size makes sharded runs another method. There is none."""
    params = [torch.nn.Parameter(torch.ones(n)) for n in (1, 2, 5000)]
    optimizer = ExtraAdam(params, lr=0.01, **PAPER)
    for _ in range(K):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.last_jump.jumped == 3
    assert params[0].item() == params[1][0].item() == params[2][-1].item()


LAYOUTS = {
    "a view with gaps": lambda: torch.randn(5, 4, 2)[..., 0],
    "transposed": lambda: torch.randn(6, 4).T,
    "channels_last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 2, 2, 3).contiguous(memory_format=torch.channels_last_3d),
    "every second row": lambda: torch.randn(6, 4)[::2],
    "with an offset": lambda: torch.randn(9)[1:],
    "a stride of a dimension of size one": lambda: torch.randn(4, 3).as_strided((1, 3), (7, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
def test_tensors_that_are_not_contiguous_get_a_wrong_update_or_none(layout, foreach):
    """bitsandbytes#1185, ROCm/apex#97, apex#1176, pytorch#106951, ultralytics#26013, axolotl PR #3785.

    Wrong order of elements, or an update of a contiguous copy that never reached the weights.
    """
    torch.manual_seed(0)
    view = LAYOUTS[layout]()
    p = torch.nn.Parameter(view)
    assert p.data_ptr() == view.data_ptr() and p.stride() == view.stride()
    start = p.detach().clone()
    grads = [[torch.randn_like(start) + 1] for _ in range(2 * K + 1)]
    optimizer = ExtraAdam([p], lr=0.01, foreach=foreach, **PAPER)
    for i, (grad,) in enumerate(grads, 1):
        p.grad = grad
        optimizer.step()
        if i == K:
            torch.testing.assert_close(p.detach(), by_hand([start], grads[:K], lr=0.01)[0])
    assert optimizer.last_jump.step == 2 * K
    assert optimizer.state[p]["extra_anchor"].stride() == start.stride()  # of a copy that keeps what order it can
    assert p.data_ptr() == view.data_ptr() and torch.equal(view, p)
    torch.testing.assert_close(view, by_hand([start], grads, lr=0.01)[0])


@both_rules
def test_memory_beside_a_view_is_overwritten(rule):
    """axolotl PR #3785, the other half: elements between the gaps are someone else's."""
    torch.manual_seed(0)
    whole = torch.randn(5, 4, 2)
    beside, p = whole[..., 1].clone(), torch.nn.Parameter(whole[..., 0])
    optimizer = ExtraAdam([p], lr=0.01, **rule)
    for _ in range(3 * K):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.last_jump.jumped == 1
    assert torch.equal(whole[..., 1], beside)


def test_more_elements_than_an_int32_can_count():
    """apex#1825, TransformerEngine#2918, DeepSpeed#7640: the tables of the fused kernel hold 64 bits."""
    multi_tensor = pytest.importorskip("extraopt.kernels.multi_tensor", reason="needs triton", exc_type=ImportError)
    numel = 2**31 + 8
    addresses = [torch.tensor([2**i, 2**i + 16]) for i in (45, 46, 47)]
    numels, index = torch.tensor([numel, 5]), torch.tensor([0, 1])
    tensors, chunks = multi_tensor._tables(torch.device("cpu"), addresses, numels, index)
    assert tensors.dtype == torch.int64
    n_chunks = -(-numel // multi_tensor.CHUNK)
    assert tensors.tolist() == [
        [2**45, 2**46, 2**47, numel, 0, 0],
        [2**45 + 16, 2**46 + 16, 2**47 + 16, 5, n_chunks, 1],
    ]
    assert len(chunks) == n_chunks + 1 and chunks[-2:].tolist() == [0, 1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: no g++ found")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_compiled_step_finds_a_stride_mismatch(device):
    """pytorch#126585: fused optimizer, channels_last convolution, inductor."""

    def run(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(device, memory_format=torch.channels_last)
        optimizer = ExtraAdam(model.parameters(), lr=0.01, fused=True, **PAPER)
        forward, step = (torch.compile(f) if compiled else f for f in (model, optimizer.step))
        for i in range(2 * K):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            (forward(x.to(device, memory_format=torch.channels_last)) - 1).square().mean().backward()
            step()
        assert optimizer.last_jump.step == 2 * K and optimizer.last_jump.jumped == 2
        assert model.weight.stride() == optimizer.state[model.weight]["extra_anchor"].stride() == (27, 1, 9, 3)
        return weights(model)

    for a, b in zip(run(compiled=True), run(compiled=False)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_cycles_end_twice_or_not_at_all_beside_a_graph(rule, monkeypatch):
    """microsoft/dion PR #104, on a CPU: a captured step is AdamW's alone; the rest can be done after each replay."""
    from extraopt import adam

    model, optimizer = make(rule)
    other, plain = make(rule)
    third, adamw = make({**rule, "extra_steps": 0})
    for i in range(4 * K):
        expected = train(other, plain, [i])
        before = optimizer.last_jump
        if i % 4 == 1:  # a step like any other
            train(model, optimizer, [i])
        else:
            with monkeypatch.context() as captured, pytest.warns(RuntimeWarning, match="end_due_cycles"):
                captured.setattr(adam, "_capturing", lambda counters: True)
                assert train(model, optimizer, [i]) == []
            optimizer.end_due_cycles()
        if i % 5 == 4:
            for o in optimizer, plain:
                o.jump()
                o.reset_anchor()
        for _ in range(3):  # nothing more to do
            optimizer.end_due_cycles()
        assert i % 5 == 4 or (optimizer.last_jump is not before) == bool(expected)
        assert_same_run(model, optimizer, other, plain)

    monkeypatch.setattr(adam, "_capturing", lambda counters: True)
    model, optimizer = make(rule)
    with pytest.warns(RuntimeWarning):
        assert train(model, optimizer, range(3 * K)) == []
    train(third, adamw, range(3 * K))
    assert_same(list(model.parameters()), list(third.parameters()))


def test_a_missing_gradient_at_the_jump_step_shifts_or_drops_the_cycle():
    """A parameter counts its own applied steps: one that misses the jump step has its cycle end one step later."""
    model, optimizer = make(PAPER)
    late = model[2].bias

    def without_late(optimizer: ExtraAdam, loss: Tensor) -> None:
        loss.backward()
        late.grad = None
        optimizer.step()

    train(model, optimizer, range(2))
    anchor = optimizer.state[late]["extra_anchor"].clone()
    before = late.detach().clone()
    assert train(model, optimizer, [2], without_late) == [2] and optimizer.last_jump.jumped == 3
    assert torch.equal(late, before) and torch.equal(optimizer.state[late]["extra_anchor"], anchor)
    assert train(model, optimizer, [3]) == [3] and optimizer.last_jump.jumped == 1
    assert torch.equal(optimizer.state[late]["extra_anchor"], late)
    assert train(model, optimizer, range(4, 10)) == [5, 6, 8, 9]


@both_rules
def test_a_learning_rate_of_zero_moves_the_weights(rule):
    model, optimizer = make(rule)
    train(model, optimizer, range(2 * K))
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(model)
    assert train(model, optimizer, range(6, 12)) == [8, 11]
    assert_same(weights(model), before)
    assert optimizer.last_jump.refused == 0
    optimizer.param_groups[0]["lr"] = 0.01
    train(model, optimizer, range(12, 18))
    assert all(p.isfinite().all() for p in model.parameters()) and optimizer.last_jump.jumped == 4


def test_a_group_added_in_mid_run_shares_the_phase_of_the_others():
    """Each parameter has its own phase; the old one's trajectory does not change."""
    model, optimizer = make(PAPER)
    new = torch.nn.Parameter(torch.ones(3))
    train(model, optimizer, range(4))
    optimizer.add_param_group({"params": [new], "lr": 0.1})
    assert optimizer.param_groups[1]["extra_every"] == K

    def step(optimizer: ExtraAdam, loss: Tensor) -> None:
        loss.backward()
        new.grad = torch.ones_like(new)
        optimizer.step()

    ends = {}
    for i in range(4, 11):
        if train(model, optimizer, [i], step):
            ends[i] = optimizer.last_jump.jumped
    assert ends == {5: 4, 6: 1, 8: 4, 9: 1}
    other, alone = make(PAPER)
    train(other, alone, range(11))
    assert_same(weights(model), weights(other))


@both_rules
def test_one_step_counter_for_groups_that_are_stepped_one_by_one(rule):
    """DeepSpeed#1823, ZeRO-1 and 2: param_groups is swapped for a list of one group for each call."""
    params = [torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(5))]
    optimizer = ExtraAdam([{"params": [p]} for p in params], lr=0.01, **rule)
    groups, jumps = optimizer.param_groups, []
    for i in range(1, 8):
        for group in groups:
            before = optimizer.last_jump
            group["params"][0].grad = torch.ones_like(group["params"][0])
            optimizer.param_groups = [group]
            optimizer.step()
            optimizer.param_groups = groups
            group["params"][0].grad = None
            if optimizer.last_jump is not before:
                jumps.append((i, optimizer.last_jump.step, optimizer.last_jump.jumped))
    moved = 0 if rule is GATED else 1
    assert jumps == [(3, 3, moved), (3, 3, moved), (6, 6, 1), (6, 6, 1)]
    whole = [torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(5))]
    together = ExtraAdam(whole, lr=0.01, **rule)
    for _ in range(7):
        for p in whole:
            p.grad = torch.ones_like(p)
        together.step()
    assert_same([p.detach() for p in params], [p.detach() for p in whole])


@both_rules
def test_one_step_counter_for_sub_groups_that_are_stepped_one_by_one(rule):
    """DeepSpeed#1823, ZeRO-3: one group whose list of parameters is filled for each call and emptied after it."""
    group_param = torch.nn.Parameter(torch.empty(1))
    optimizer = ExtraAdam([group_param], lr=0.01, **rule)
    partitions = [torch.nn.Parameter(torch.ones(n)) for n in (8, 5, 3)]
    group, jumps = optimizer.param_groups[0], []
    for i in range(1, 8):
        for p in partitions:
            before = optimizer.last_jump
            p.grad = torch.ones_like(p)
            group["params"] = [p]
            optimizer.step()
            group["params"] = []
            p.grad = None
            if optimizer.last_jump is not before:
                jumps.append((i, optimizer.last_jump.step, optimizer.last_jump.jumped))
    moved = 0 if rule is GATED else 1
    assert jumps == 3 * [(3, 3, moved)] + 3 * [(6, 6, 1)]
    for p in partitions[1:]:
        assert p[0].item() == partitions[0][0].item()
    assert optimizer.state.keys() == set(partitions)


def test_a_step_taken_before_training_shifts_the_counters():
    """DeepSpeed#5104: step() at initialisation, with zero gradients, is a step to AdamW: the first cycle is shorter."""
    model, optimizer = make(PAPER)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(model)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01
    assert_same(weights(model), before)
    assert train(model, optimizer, range(8)) == [1, 4, 7]


def test_bf16_weights_at_a_tiny_learning_rate_have_no_drift():
    """Not ours to mend: AdamW's own updates are less than half of the distance between two bfloat16 numbers."""
    moved = {}
    for lr in 1e-6, 1e-4:
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter((0.02 * torch.randn(100_000, generator=generator)).bfloat16())
        before, gradient = p.detach().clone(), torch.randn(100_000, generator=generator).bfloat16()
        optimizer = torch.optim.AdamW([p], lr=lr, weight_decay=0)
        for _ in range(200):
            p.grad = gradient
            optimizer.step()
        moved[lr] = float((p != before).float().mean())
    assert moved[1e-6] < 0.03 and moved[1e-4] > 0.8, moved
