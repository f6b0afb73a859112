"""A run is as it would be without trials: parts of a model that a pass changes, and what comes in the middle of one."""

from __future__ import annotations

import copy
import os
import signal
import threading
import warnings
from collections import defaultdict, deque, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_watched_models import EVERY, Merging, Net, batch, train
from torch import Tensor, nn

from extraopt import ExtraAdam
from extraopt.extrapolation import _Jump


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("by", ["the loop", "its own train"])
def test_a_frozen_part_that_merges_and_is_kept_in_eval_mode_loses_its_weights(by: str) -> None:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(Merging(8, 8), nn.Tanh()).requires_grad_(False)
            nn.init.normal_(self.backbone[0].b)

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            if by == "its own train":
                self.backbone.eval()
            return self

        def forward(self, x: Tensor) -> Any:
            return super().forward(self.backbone(x))

    model = Frozen().train()
    model.backbone.eval()
    before, (x, _) = copy.deepcopy(model.backbone.state_dict()), batch()
    expected = model.backbone(x)
    reports = train(model, ExtraAdam(trained(model), lr=1e-4), 8 * EVERY)
    assert sum(report.length > 0 for report in reports) >= 6
    assert model.backbone[0].merged and not model.backbone.training and model.training
    torch.testing.assert_close(model.backbone.state_dict(), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.backbone(x), expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_part_with_a_buffer_ends_the_run() -> None:
    model = Net()
    model.body.append(torch.jit.script(nn.BatchNorm1d(16)))
    reports = train(model, ExtraAdam(model.parameters(), lr=1e-3), 3 * EVERY)
    assert reports[-1].length > 0 and int(model.body[-1].num_batches_tracked) == 3 * EVERY


def test_a_momentum_encoder_moves_within_trials() -> None:
    """MoCo's forward moves its second encoder in any mode, by assigning `.data`."""

    class MoCo(Net):
        def __init__(self) -> None:
            super().__init__()
            self.key = copy.deepcopy(self.body).requires_grad_(False)

        def forward(self, x: Tensor) -> Any:
            for ours, theirs in zip(self.key.parameters(), self.body.parameters()):
                ours.data = 0.9 * ours.data + 0.1 * theirs.data
            return SimpleNamespace(logits=self.head(self.body(x) + self.key(x)))

    model = MoCo()
    optimizer = ExtraAdam(trained(model), lr=1e-3)
    for _ in range(3 * EVERY):
        x, y = batch()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).logits, y).backward()
        key = copy.deepcopy(model.key.state_dict())
        optimizer.step()
        torch.testing.assert_close(model.key.state_dict(), key, rtol=0, atol=0)
    assert optimizer.last_jump.length > 0


def test_a_part_that_its_own_train_freezes_again_is_no_longer_trained() -> None:
    class Staged(Net):
        def train(self, mode: bool = True) -> Staged:
            super().train(mode)
            self.body[0].requires_grad_(False)
            return self

    model = Staged()
    optimizer = ExtraAdam(model.parameters(), lr=1e-3)
    train(model, optimizer, EVERY)
    model.body.requires_grad_(True)
    before = model.body[0].weight.clone()
    train(model, optimizer, 2 * EVERY)
    assert model.body[0].weight.requires_grad
    assert (model.body[0].weight - before).abs().max() > 1e-3


def test_a_batch_in_a_named_tuple_is_written_to_within_the_step() -> None:
    Batch = namedtuple("Batch", "x mask")

    class Writing(Net):
        def forward(self, batch: Any, extra: Any = None) -> Any:
            return super().forward(batch.x.mul_(1.5))

    model = Writing()
    optimizer = ExtraAdam(model.parameters(), lr=1e-3)
    for _ in range(2 * EVERY):
        x, y = batch()
        given = Batch(x.clone(), torch.ones(3))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(given).logits, y).backward()
        optimizer.step()
        assert torch.equal(given.x, 1.5 * x)
    assert optimizer.last_jump.length > 0


class Keeping(Net):
    """Keeps much from call to call, in ways that count no version up or hide within containers."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)
        self.seen = defaultdict(list)
        self.last = deque(maxlen=2)
        self.total = torch.zeros(8)
        self.register_buffer("average", torch.zeros(8))
        self.observer = torch.ao.quantization.FusedMovingAvgObsFakeQuantize()

    def forward(self, x: Tensor) -> Any:
        noise = torch.rand(x.shape, generator=self.generator)
        self.seen["noise"].append(float(noise.mean()))
        self.last.append(len(self.seen["noise"]))
        self.total.add_(x.sum(0).detach() + 1)
        self.average.data += x.mean(0)
        if not self.training and "late" not in self._buffers:
            self.register_buffer("late", x[0])
        return SimpleNamespace(logits=self.head(self.observer(self.body(x + 0.01 * noise))))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:Please use")
def test_what_a_pass_changes_without_a_new_version_is_that_of_a_trial() -> None:
    model = Keeping()
    optimizer = ExtraAdam(model.parameters(), lr=1e-3)

    def state() -> Any:
        kept = [model.generator.get_state(), model.total.clone(), copy.deepcopy(model.state_dict())]
        return [*kept, dict(copy.deepcopy(model.seen)), list(model.last)]

    for _ in range(3 * EVERY):
        x, y = batch()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).logits, y).backward()
        weights = {name for name, _ in model.named_parameters()}
        before = state()
        optimizer.step()
        after = state()
        for each in before[2], after[2]:
            for name in weights:
                del each[name]
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert optimizer.last_jump.length > 0


@pytest.mark.parametrize("told", [False, True], ids=["found", "told"])
def test_a_decoder_is_measured_and_what_jumps_in_its_encoder_is_not(told: bool) -> None:
    encoder, decoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), Net()
    both = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    call = Both(encoder, decoder)
    optimizer = ExtraAdam(both.parameters(), lr=1e-3)
    if told:
        optimizer.watch(call)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        reports = train(call if told else (lambda x: decoder(encoder(x))), optimizer, 4 * EVERY)  # type: ignore[arg-type]
    said = [str(w.message) for w in seen if "extraopt" in str(w.message)]
    assert [report.length <= 20 for report in reports].count(False) == 0 or told
    assert len(said) == (not told) and all("are made by other parameters of the optimizer" in words for words in said)
    assert all(report.kl == report.kl for report in reports if report.length) == told


class Both(nn.Module):
    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor) -> Any:
        return self.decoder(self.encoder(x))


# --- signals ----------------------------------------------------------------------------------------------------------


class Interrupted(Net):
    """Sends a signal to its own process in a trial."""

    number: int | None = None

    def forward(self, x: Tensor) -> Any:
        if self.number is not None and not self.training:
            os.kill(os.getpid(), self.number)
            self.number = None
        return super().forward(x)


def test_a_handler_that_saves_at_once_saves_weights_that_are_on_trial() -> None:
    model = Interrupted()
    optimizer = ExtraAdam(model.parameters(), lr=3e-3)
    saved: list[Any] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: saved.append((copy.deepcopy(model.state_dict()), model.training)))
    try:
        train(model, optimizer, 2 * EVERY - 1)
        model.number = signal.SIGUSR1
        train(model, optimizer, 1)
        assert len(saved) == 1, "the handler runs once the cycle has ended"
        weights, training = saved[0]
        torch.testing.assert_close(weights, model.state_dict(), rtol=0, atol=0)
        assert training and optimizer.last_jump.length > 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(saved) == 2, "and is in its place again"
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_in_a_trial_waits_for_its_end_or_leaves_weights_on_trial() -> None:
    model = Interrupted()
    optimizer = ExtraAdam(model.parameters(), lr=3e-3)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        train(model, optimizer, 2 * EVERY - 1)
        model.number = signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            train(model, optimizer, 1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert model.training and optimizer.last_jump.step == EVERY
    torch.manual_seed(0)
    plain = Interrupted()
    train(plain, ExtraAdam(plain.parameters(), lr=3e-3), 2 * EVERY - 1)
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), plain.parameters()))
    assert moved < 2 * 3e-3, "by more than a step"


def test_a_step_in_another_thread_cannot_set_handlers() -> None:
    model = Net()
    reports: list[Any] = []
    thread = threading.Thread(
        target=lambda: reports.extend(train(model, ExtraAdam(model.parameters(), lr=1e-3), 2 * EVERY))
    )
    thread.start()
    thread.join()
    assert len(reports) == 2 and reports[-1].length > 0


def test_ctrl_c_once_a_length_is_chosen_makes_the_next_drift_hold_a_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = ExtraAdam(model.parameters(), lr=1e-3)
    train(model, optimizer, 2 * EVERY - 1)
    move, choose = _Jump.move, optimizer._trust.choose
    chosen: list[Any] = []

    def interrupted(self: _Jump, length: float) -> None:
        move(self, length)
        if chosen:
            chosen.clear()
            raise KeyboardInterrupt

    monkeypatch.setattr(_Jump, "move", interrupted)
    monkeypatch.setattr(optimizer._trust, "choose", lambda *args: chosen.append(choose(*args)) or chosen[0])
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, 1)
    assert all(torch.equal(p, optimizer.state[p]["extra_anchor"]) for p in model.parameters())
