"""Public bug reports that need a CUDA device: misplaced state, hidden waits, captured graphs, huge tensors, FSDP1.

Each test is named after the symptom; its docstring names the reports.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import GATED, PAPER, RULES, K, assert_same, assert_same_run, reload, rule_name, tiny_model, train
from torch import Tensor

from extraopt import ExtraAdam

pytestmark = pytest.mark.gpu
both_rules = pytest.mark.parametrize("rule", RULES, ids=rule_name)
FLAGS: dict[str, dict[str, Any]] = {
    "default": {},
    "loop": {"foreach": False},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}
any_flags = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)


def make(rule: dict[str, Any] = GATED, device: str = "cuda", **options: Any) -> tuple[torch.nn.Module, ExtraAdam]:
    model = tiny_model(device=device)
    return model, ExtraAdam(model.parameters(), lr=0.01, **rule, **options)


def assert_state_lies_with_its_parameters(optimizer: ExtraAdam) -> None:
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step":
                assert value.device == p.device and value.shape == p.shape, key


@any_flags
def test_slow_copy_made_before_model_cuda(flags):
    """kozistr/pytorch_optimizer#306: tensors on different devices."""
    model, optimizer = make(device="cpu", **flags)
    model.cuda()
    assert train(model, optimizer, range(7)) == [2, 5] and optimizer.last_jump.jumped == 4
    assert_state_lies_with_its_parameters(optimizer)
    other, after = make(**flags)
    train(other, after, range(7))
    assert_same_run(model, optimizer, other, after)


@any_flags
@both_rules
def test_the_step_is_on_the_wrong_device_after_a_resume(rule, flags, tmp_path):
    """pytorch#80809, #103256, #124133, transformers#24708: saved on the GPU, loaded with map_location="cpu"."""
    model, optimizer = make(rule, **flags)
    train(model, optimizer, range(5))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "5.pt")
    saved = torch.load(tmp_path / "5.pt", map_location="cpu", weights_only=True)
    other, resumed = make(rule, **flags)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert_state_lies_with_its_parameters(resumed)
    for p, q in zip(model.parameters(), other.parameters()):
        assert resumed.state[q]["step"].device == optimizer.state[p]["step"].device
    assert train(model, optimizer, range(5, 12)) == train(other, resumed, range(5, 12)) == [5, 8, 11]
    assert_same_run(model, optimizer, other, resumed)


def test_custom_state_of_parameters_without_gradients_stays_on_the_cpu(tmp_path):
    """wochenlong/lora-scripts-next#320: state rebuilt beside torch's cast, by position over filtered parameters."""
    model, optimizer = make(fused=True)
    model[0].requires_grad_(False)
    train(model, optimizer, range(4))
    torch.save(optimizer.state_dict(), tmp_path / "4.pt")
    other, resumed = make(fused=True)
    other[0].requires_grad_(False)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(torch.load(tmp_path / "4.pt", map_location="cpu", weights_only=True))
    assert resumed.state.keys() == set(list(other.parameters())[2:])
    assert_state_lies_with_its_parameters(resumed)
    assert train(other, resumed, range(4, 10)) == train(model, optimizer, range(4, 10))
    assert_same_run(model, optimizer, other, resumed)


@pytest.mark.parametrize(["source", "target"], [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_tensor_in_a_group_is_not_moved_on_resume(source, target):
    """NVIDIA/apex#458, #459: crash after a resume on another device."""
    model, optimizer = make(PAPER, device=source)
    train(model, optimizer, range(5))
    other, resumed = make(PAPER, device=target)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(reload(optimizer.state_dict()))
    assert_state_lies_with_its_parameters(resumed)
    assert train(other, resumed, range(5, 12)) == train(model, optimizer, range(5, 12)) == [5, 8, 11]
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p.cpu(), q.cpu(), rtol=1e-3, atol=1e-4)


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@both_rules
@pytest.mark.parametrize("original", [False, True], ids=["flat", "use_orig_params"])
@pytest.mark.filterwarnings("ignore")
def test_state_cannot_be_gathered_by_fsdp1(one_rank, original, rule):
    """bitsandbytes#89, #1403, axolotl#2744, accelerate#1362 (shapes); pytorch#99079 (non-tensor entries dropped)."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    def build(seed: int, lr: float) -> tuple[Any, ExtraAdam]:
        model = FSDP(tiny_model(seed, "cuda"), use_orig_params=original, device_id=torch.cuda.current_device())
        return model, ExtraAdam(model.parameters(), lr=lr, **rule)

    model, optimizer = build(seed=0, lr=0.01)
    train(model, optimizer, range(4))
    optimizer.jump()  # the next cycle begins at 4: a lost origin would show
    train(model, optimizer, range(4, 5))
    weights, state = reload(model.state_dict()), reload(FSDP.optim_state_dict(model, optimizer))
    assert [s["extra_origin"].tolist() for s in state["state"].values()] == 4 * [1]
    assert all("extra_anchor" in s for s in state["state"].values())

    other, resumed = build(seed=1, lr=0.5)
    other.load_state_dict(weights)
    resumed.load_state_dict(FSDP.optim_state_dict_to_load(other, resumed, state))
    assert train(model, optimizer, range(5, 12)) == train(other, resumed, range(5, 12)) == [6, 9]
    assert_same(list(model.parameters()), list(other.parameters()))


def test_elements_past_two_to_the_31_are_left_alone_or_crash():
    """apex#1825, TransformerEngine#2918, DeepSpeed#7640: sizes and offsets overflowed an int32."""
    numel = 2**31 + 8
    if torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("needs 22 GB of device memory")
    p = torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = ExtraAdam([p], lr=0.25, weight_decay=0, fused=True, **PAPER)
    for _ in range(K):
        optimizer.step()
    assert optimizer.last_jump.jumped == 1 and optimizer.last_jump.refused == 0
    low, high = p.detach().aminmax()
    assert low.item() == high.item() == pytest.approx(-3 * K * 0.25, rel=0.02)
    anchor = optimizer.state[p]["extra_anchor"]
    for part in (slice(0, 16), slice(2**31 - 16, None)):
        assert torch.equal(anchor[part], p.detach()[part])


@both_rules
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_a_graph_replay_freezes_host_scalars_silently(rule, fused):
    """tracel-ai/burn#5779, microsoft/dion PR #104: replayed steps, with cycles ended between, are those of no graph."""

    def run(captured: bool) -> tuple[torch.nn.Module, ExtraAdam, list[int]]:
        model, optimizer = make(rule, capturable=True, fused=fused)
        grads = [torch.zeros_like(p) for p in model.parameters()]
        for p, g in zip(model.parameters(), grads):
            p.grad = g

        def set_gradients(i: int) -> None:
            generator = torch.Generator().manual_seed(i)
            for g in grads:
                g.copy_(1 + 0.1 * torch.randn(g.shape, generator=generator))

        side, ends, graph = torch.cuda.Stream(), [], torch.cuda.CUDAGraph()
        for i in range(4 * K):
            set_gradients(i)
            if i == 2 and captured:  # a captured step is not taken
                side.wait_stream(torch.cuda.current_stream())
                with pytest.warns(RuntimeWarning, match="end_due_cycles"), torch.cuda.graph(graph, stream=side):
                    optimizer.step()
                torch.cuda.current_stream().wait_stream(side)
            before = optimizer.last_jump
            if i < 2 or not captured:
                optimizer.step()
            else:
                graph.replay()
                torch.cuda.set_sync_debug_mode("default" if (i + 1) % K == 0 or i == 2 else "error")
            try:
                optimizer.end_due_cycles()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if optimizer.last_jump is not before:
                ends.append(i)
        return model, optimizer, ends

    model, optimizer, ends = run(captured=True)
    other, eager, expected = run(captured=False)
    assert ends == expected == [2, 5, 8, 11] and optimizer.last_jump.jumped == 4
    assert_same_run(model, optimizer, other, eager)


@both_rules
def test_a_captured_backward_with_an_eager_step_trains_on_other_weights(rule):
    """The same reports: what does get captured, forward and backward, must see each jump and each learning rate."""

    def run(captured: bool) -> tuple[torch.nn.Module, ExtraAdam, list[int]]:
        model, optimizer = make(rule)
        x, ends = torch.zeros(16, 4, device="cuda"), []

        def backward() -> None:
            optimizer.zero_grad(set_to_none=False)
            (model(x) - x[:, :2].sin() - 2).square().mean().backward()

        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            backward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                backward()
        for i in range(3 * K):
            x.copy_(torch.randn(16, 4, generator=torch.Generator().manual_seed(i)))
            graph.replay() if captured else backward()
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + i)
            before = optimizer.last_jump
            optimizer.step()
            if optimizer.last_jump is not before:
                ends.append(i)
        return model, optimizer, ends

    model, optimizer, ends = run(captured=True)
    other, eager, expected = run(captured=False)
    assert ends == expected == [2, 5, 8]
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@both_rules
@any_flags
def test_a_step_without_a_jump_waits_for_the_device(rule, flags):
    """allenai/OLMo-core#309: a host-device synchronisation in every step."""
    model, optimizer = make(rule, **flags)
    grads = [torch.randn_like(p) for p in model.parameters()]
    for step in range(1, 3 * K + 1):
        for p, g in zip(model.parameters(), grads):
            p.grad = g.clone()
        torch.cuda.set_sync_debug_mode("default" if step % K == 0 else "error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.last_jump.step == 3 * K and optimizer.last_jump.jumped == 4


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@both_rules
def test_an_overflow_on_the_gpu_is_counted_as_a_step(rule, fused):
    """accelerate#4242, Lightning#18828: on a GPU the fused counter cannot be read without waiting."""

    def run(overflow: set[int], numbers: list[int]) -> tuple[torch.nn.Module, ExtraAdam, list[int]]:
        model, optimizer = make(rule, fused=fused)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=10**6)

        def step(optimizer: ExtraAdam, loss: Tensor) -> None:
            scaler.scale(loss).backward()
            if number in overflow:
                model[0].bias.grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()

        ends = []
        for number in numbers:
            ends += train(model, optimizer, [number], step)
        return model, optimizer, ends

    overflow = {3, 4, 8}
    model, optimizer, ends = run(overflow, list(range(1, 15)))
    other, clean, _ = run(set(), [i for i in range(1, 15) if i not in overflow])
    assert ends == [5, 9, 12]
    assert_same_run(model, optimizer, other, clean)
