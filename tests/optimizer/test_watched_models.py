"""Models and runs that a trial could harm, or that would leave a jump unmeasured."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_same, reload
from torch import Tensor, nn

from extraopt import ExtraAdam
from extraopt.wrap import Extra

EVERY = 5


class Net(nn.Module):
    """A classifier whose outputs have `.logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.body(x)))


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    return x, x[:, :5].argmax(1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Any]:
    """The reports of the cycles that ended."""
    x, y = batch()
    reports: list[Any] = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(x)
        nn.functional.cross_entropy(getattr(output, "logits", output), y).backward()
        before = optimizer.last_jump  # type: ignore[attr-defined]
        optimizer.step()
        now = optimizer.last_jump  # type: ignore[attr-defined]
        reports += [now] if now is not before else []
    return reports


# --- what a trial must leave as it was --------------------------------------------------------------------------------


class Merging(nn.Linear):
    """Adds its low-rank part to its frozen weight in eval mode and takes it out in train mode, as loralib does."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        self.weight.requires_grad_(False)
        self.merged = False
        self.a = nn.Parameter(torch.randn(2, inner) * 0.3)
        self.b = nn.Parameter(torch.zeros(outer, 2))

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.a.T @ self.b.T


def test_weights_that_are_merged_in_eval_mode_are_parted_by_what_was_merged() -> None:
    model = Net()
    model.head = Merging(16, 5)
    before = model.head.weight.clone()
    reports = train(model, ExtraAdam([p for p in model.parameters() if p.requires_grad], lr=1e-3), 8 * EVERY)
    assert sum(report.length > 0 for report in reports) >= 6 and not model.head.merged
    torch.testing.assert_close(model.head.weight, before, rtol=0, atol=1e-5)


class Writing(Net):
    """Writes into its inputs, and builds a buffer at its first pass in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", None)
        self.note = (seen := []).append  # a list of its own would be put back
        self.seen = lambda: seen

    def forward(self, x: Tensor) -> Any:
        self.note((self.training, x.clone()))
        if not self.training and self.cache is None:
            self.cache = x.sum(0)
        return super().forward(x.mul_(1.5))


def test_a_model_that_writes_into_its_inputs_finds_in_each_trial_what_it_was_given_and_the_batch_is_left_alone() -> (
    None
):
    model = Writing()
    optimizer = ExtraAdam(model.parameters(), lr=1e-3)
    x, y = batch()
    for _ in range(2 * EVERY):
        given = x.clone()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(given).logits, y).backward()
        optimizer.step()
        assert torch.equal(given, x * 1.5)  # once, by the model's own pass
    trials = [seen for training, seen in model.seen() if not training]
    assert len(trials) >= 2 and all(torch.equal(seen, x) for seen in trials)
    assert model.cache is None and math.isfinite(optimizer.last_jump.kl)


def test_a_buffer_made_in_inference_mode_is_as_before() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                scaled = x * self.scale
            if not self.training:
                self.scale = self.scale.clone()
            return super().forward(scaled)

    model = Scaled()
    with torch.inference_mode():
        model.register_buffer("scale", torch.ones(8))
    reports = train(model, ExtraAdam(model.parameters(), lr=1e-3), 3 * EVERY)
    assert reports[-1].length > 0
    assert torch.equal(model.scale, torch.ones(8)) and model.scale.is_inference()


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("steps", [0, 200])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_torchscript_model_is_trained_without_a_trust_region_and_says_so(how: str, steps: int) -> None:
    plain = nn.Linear(8, 5)
    model = torch.jit.script(plain) if how == "script" else torch.jit.trace(plain, batch()[0])
    optimizer = ExtraAdam(model.parameters(), extra_steps=steps)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        reports = train(model, optimizer, 3 * EVERY)
    said = [str(w.message) for w in seen if "extraopt" in str(w.message)]
    assert [report.length for report in reports][1:] == [20.0] * 2 * bool(steps)
    assert len(said) == bool(steps) and all("TorchScript's modules can't be watched" in words for words in said)


def test_positions_that_cannot_be_told_leave_the_jump_out() -> None:
    class Odd(Net):
        config = SimpleNamespace(use_cache=True)

        def get_output_embeddings(self) -> nn.Module:
            raise RuntimeError("not built yet")

    model = Odd()
    with pytest.warns(RuntimeWarning, match="the model failed on its last inputs.*not built yet"):
        reports = train(model, ExtraAdam(model.parameters(), lr=1e-3), 3 * EVERY)
    assert [report.length for report in reports] == [0, 0, 0]


def test_a_search_for_the_model_asks_for_the_parameters_once_a_step() -> None:
    model, other = Net(), nn.Sequential(*(nn.Linear(8, 8) for _ in range(50)))
    optimizer = ExtraAdam(model.parameters(), lr=1e-3)
    asked, own = [], optimizer._trust.watch.own
    optimizer._trust.watch.own = lambda: asked.append(1) or own()  # type: ignore[func-returns-value]
    for _ in range(3):
        other(torch.zeros(2, 8))  # another model, whose calls must not become slow
    assert len(asked) <= 1
    assert math.isfinite(train(model, optimizer, 2 * EVERY)[-1].kl)


# --- jumps that must be measured --------------------------------------------------------------------------------------


def measured(reports: list[Any]) -> list[bool]:
    return [math.isfinite(report.kl) for report in reports if report.length]


def test_jumps_are_measured_when_most_parameters_are_frozen_in_mid_run() -> None:
    model = Net()
    optimizer = ExtraAdam(model.parameters(), lr=1e-5)
    train(model, optimizer, 12 * EVERY)
    assert optimizer.param_groups[0]["extra_length"] > 100
    model.body.requires_grad_(False)
    optimizer.param_groups[0]["lr"] = 1e-2
    reports = train(model, optimizer, 6 * EVERY)
    assert len(reports) == 6 and len(measured(reports)) >= 4 and all(measured(reports))
    assert all(report.kl <= 0.02 for report in reports if report.length)


def test_jumps_are_measured_when_layers_are_unfrozen_one_by_one() -> None:
    model = Net()
    model.body.requires_grad_(False)
    optimizer = ExtraAdam(model.parameters(), lr=1e-3)
    train(model, optimizer, EVERY + 2)
    model.body[2].requires_grad_(True)
    train(model, optimizer, EVERY + 1)
    model.body[0].requires_grad_(True)
    reports = train(model, optimizer, 6 * EVERY)
    assert len({int(optimizer.state[p]["step"]) % EVERY for p in model.parameters()}) == 3
    assert len(measured(reports)) >= 9 and all(measured(reports))


def test_jumps_are_measured_when_replaced_parameters_leave_their_state_behind() -> None:
    model = Net()
    optimizer = ExtraAdam(model.parameters(), lr=1e-3)
    train(model, optimizer, 2 * EVERY)
    model.body = Net().body
    optimizer.param_groups[0]["params"] = list(model.parameters())
    reports = train(model, optimizer, 6 * EVERY)
    assert len(measured(reports)) >= 4 and all(measured(reports))


@pytest.mark.parametrize("wrap", [False, True], ids=["ExtraAdam", "Extra"])
def test_a_step_without_gradients_before_the_end_of_a_cycle_changes_no_jump_and_no_resumed_run(wrap: bool) -> None:
    def make(model: nn.Module) -> Any:
        if wrap:
            return Extra(torch.optim.AdamW(model.parameters(), lr=1e-3))
        return ExtraAdam(model.parameters(), lr=1e-3)

    def run(without: set[int], resume: int | None = None) -> tuple[nn.Module, list[Any]]:
        torch.manual_seed(0)
        model = Net()
        optimizer = make(model)
        reports: list[Any] = []
        for t in range(6 * EVERY):
            if t in without:
                optimizer.zero_grad()
                optimizer.step()
            if t == resume:
                other = Net()
                other.load_state_dict(model.state_dict())
                again = make(other)
                again.load_state_dict(reload(optimizer.state_dict()))
                model, optimizer = other, again
            reports += train(model, optimizer, 1)
        return model, reports

    plain, reports = run(set())
    ends = {3 * EVERY - 1, 5 * EVERY - 1}
    for resume in (None, 3 * EVERY - 1):
        model, found = run(ends, resume)
        assert found == reports and all(measured(found))
        assert_same([*plain.parameters()], [*model.parameters()])


def test_after_another_number_of_steps_in_a_cycle_the_very_next_end_is_measured() -> None:
    model = Net()
    optimizer = ExtraAdam(model.parameters(), lr=1e-3)
    train(model, optimizer, 2 * EVERY + 2)
    optimizer.param_groups[0]["extra_every"] = 1
    optimizer.reset_anchor()
    reports = train(model, optimizer, 3)
    assert len(reports) == 3 and all(measured(reports))


def test_a_jump_that_could_not_be_measured_is_no_longer_than_one_without_a_trust_region() -> None:
    model = Net()
    optimizer = ExtraAdam(model.parameters(), lr=1e-5, extra_gate=None)
    train(model, optimizer, 12 * EVERY)
    assert optimizer.param_groups[0]["extra_length"] > 100
    train(model, optimizer, 2)
    assert optimizer.jump().length == 20
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(RuntimeWarning, match="not longer than 20 steps"):
        for _ in range(EVERY):  # no forward pass
            optimizer.step()
    assert 0 < optimizer.last_jump.length <= 20


def test_the_horizon_of_a_group_without_a_trust_region_lengthens_no_search() -> None:
    model = Net()
    limited = {"params": model.body.parameters(), "extra_steps": 10}
    optimizer = ExtraAdam([limited, {"params": model.head.parameters(), "extra_kl": None}], lr=1e-6)
    train(model, optimizer, 6 * EVERY)
    assert optimizer.param_groups[0]["extra_length"] == 10


@pytest.mark.parametrize("call", ["jump", "reset_anchor"])
def test_cycles_that_were_switched_off_and_forgotten_are_left_alone(call: str) -> None:
    p = nn.Parameter(torch.randn(6, 3))
    optimizer = Extra(torch.optim.AdamW([p], lr=1e-3), extra_watch=False)
    for _ in range(2 * EVERY + 2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    optimizer.param_groups[0]["extra_steps"] = 0
    p.grad = None
    p.data = p.data[:4].clone()
    moments = {key: value[:4] for key, value in optimizer.state[p].items() if key.startswith("exp_avg")}
    optimizer.state[p].update(copy.copy(moments))
    getattr(optimizer, call)()
    getattr(optimizer, call)()
    assert "extra_anchor" not in optimizer.state[p]


# --- what the real steps count --------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"extra_kl": None, "extra_steps": 1}, {"extra_start": 10**9}], ids=["free", "shut"])
def test_longer_cycles_of_parameters_that_do_not_jump_shorten_no_jump(other: dict[str, Any]) -> None:
    lengths = []
    for group in ({}, {"extra_every": 4 * EVERY, **other}):
        torch.manual_seed(0)
        model, beside = Net(), nn.Parameter(torch.ones(3))
        optimizer = ExtraAdam([{"params": model.parameters()}, {"params": [beside], **group}], lr=1e-4, extra_gate=None)
        beside.register_hook(torch.zeros_like)
        model.register_forward_hook(lambda m, x, out, w=beside: setattr(out, "logits", out.logits + 0 * w.sum()))
        lengths.append([report.length for report in train(model, optimizer, 5 * EVERY)])
    assert lengths[0] == pytest.approx(lengths[1]) and all(lengths[0])


def test_a_noisy_tensor_with_an_old_estimate_does_not_stop_all_others_after_the_learning_rate_has_fallen() -> None:
    """Its gate is shut, so that it does not jump: how far it went does not count."""
    model, noise = Net(), nn.Parameter(torch.zeros(50_000))
    optimizer = ExtraAdam([*model.parameters(), noise], lr=1e-2)
    noise.register_hook(torch.randn_like)
    model.register_forward_hook(lambda m, x, out: setattr(out, "logits", out.logits + 0 * noise.sum()))
    train(model, optimizer, 6 * EVERY)
    optimizer.param_groups[0]["lr"] = 1e-5
    reports = train(model, optimizer, 20 * EVERY)
    assert min(report.length for report in reports[8:]) >= 20 and all(report.gate < 0.25 for report in reports[8:])


def test_a_jump_by_hand_after_cycles_without_a_length_does_not_jump_either() -> None:
    model = Net()
    optimizer = ExtraAdam(model.parameters(), lr=1e-2, extra_gate=None, extra_fall=1e-3)
    reports = train(model, optimizer, 2 * EVERY)
    assert [report.length for report in reports] == [0, 0]
    train(model, optimizer, EVERY - 1)
    before = [p.clone() for p in model.parameters()]
    report = optimizer.jump()
    assert report is not None and report.length == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_an_error_before_the_first_trial_leaves_weights_and_anchors_together() -> None:
    model = Net()
    optimizer = ExtraAdam(model.parameters(), lr=1e-2)
    train(model, optimizer, 3 * EVERY - 1)
    x, y = batch()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x).logits, y).backward()
    optimizer._trust.watch.release()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="without a forward pass"):
            optimizer.step()
    for p in model.parameters():
        assert torch.equal(p, optimizer.state[p]["extra_anchor"])
