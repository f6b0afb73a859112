"""Lightning's Trainer, beside plain loops that do by hand what it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GATED, PAPER, K, N, assert_same, assert_same_run, batch_loss, tiny_model
from test_bugs_trainers import OPEN
from torch import Tensor
from torch.optim.lr_scheduler import StepLR

pytest.importorskip("lightning", reason="lightning is not installed: pip install '.[test]'")

import lightning
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision

from extraopt import ExtraAdam

pytestmark = pytest.mark.filterwarnings("ignore")
BATCHES = 5  # of an epoch, where there are epochs


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class Module(lightning.LightningModule):
    """Automatic optimization. Notes each batch's learning rate, the weights after it, and the ends of cycles."""

    def __init__(self, scheduled: bool = False, norm: bool = False, **options: Any) -> None:
        super().__init__()
        self.model = tiny_model()
        if norm:
            self.model.insert(1, torch.nn.BatchNorm1d(8))
        self.scheduled, self.options = scheduled, {"lr": 0.01, **OPEN, **options}
        self.after: list[list[Tensor]] = []
        self.lrs: list[float] = []
        self.ends: list[int] = []
        self.last: Any = None
        self.norms: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = ExtraAdam(self.model.parameters(), **self.options)
        if not self.scheduled:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 4, 0.5), "interval": "step"}}

    def training_step(self, batch: int, index: int) -> Tensor:
        self.lrs.append(self.optimizers().param_groups[0]["lr"])
        return batch_loss(self.model, self.current_epoch * BATCHES + index)

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.after.append(weights(self.model))
        raw = self.optimizers(use_pl_optimizer=False)
        if raw.last_jump is not self.last:
            self.last = raw.last_jump
            self.ends.append(raw.last_jump.step)
            self.norms.append(raw.last_jump.drift_norm)

    def validation_step(self, batch: int, index: int) -> None:
        batch_loss(self.model, 1000 + index)


class Manual(Module):
    """Manual optimization, with a step after every `accumulate` batches."""

    def __init__(self, accumulate: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False
        self.accumulate = accumulate

    def training_step(self, batch: int, index: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(batch_loss(self.model, index) / self.accumulate)
        if (index + 1) % self.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            if self.scheduled:
                self.lr_schedulers().step()


def fit(
    module: Any, folder: Path, resume: Path | None = None, callbacks: Sequence[Any] = (), batches: int = 100,
    **options: Any,
) -> lightning.Trainer:  # fmt: skip
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **options}
    )
    loader = torch.utils.data.DataLoader(range(batches), batch_size=None)
    trainer.fit(module, loader, loader, ckpt_path=resume, weights_only=True)
    return trainer


def saving(folder: Path, every: int) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)


def plain(
    steps: int, accumulate: int = 1, autocast: bool = False, dtype: torch.dtype = torch.float32, clip: Any = None,
    scheduled: bool = False, **options: Any,
) -> tuple[torch.nn.Module, ExtraAdam]:  # fmt: skip
    """The same by hand."""
    model = tiny_model().to(dtype)
    optimizer = ExtraAdam(model.parameters(), **{"lr": 0.01, **OPEN, **options})
    scheduler = StepLR(optimizer, 4, 0.5) if scheduled else None
    for step in range(steps):
        for micro in range(accumulate):
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                loss = batch_loss(model, step * accumulate + micro)
            (loss / accumulate).backward()
        if clip is not None:
            clip(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return model, optimizer


# how the module is built; what Lightning's Trainer is told; what that means
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "bf16-mixed": (Module, {}, {"precision": "bf16-mixed"}, {"autocast": True}),
    "bf16-true": (Module, {}, {"precision": "bf16-true"}, {"dtype": torch.bfloat16}),
    "accumulation": (Module, {}, {"accumulate_grad_batches": 3}, {"accumulate": 3}),
    "clipping": (Module, {}, {"gradient_clip_val": 0.1}, {"clip": torch.nn.utils.clip_grad_norm_}),
    "clipping by value": (
        Module, {}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"clip": torch.nn.utils.clip_grad_value_},
    ),
    "scheduler": (Module, {"scheduled": True}, {}, {"scheduled": True}),
    "fused": (Module, {"fused": True}, {}, {"fused": True}),
    "gated": (Module, GATED | {"extra_gate": 0.5}, {}, GATED | {"extra_gate": 0.5}),
    "manual": (Manual, {"scheduled": True}, {}, {"scheduled": True}),
    "manual accumulation": (Manual, {"accumulate": 3}, {}, {"accumulate": 3}),
    "manual bf16-mixed": (Manual, {}, {"precision": "bf16-mixed"}, {"autocast": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_lightning_trains_otherwise_than_a_plain_loop_or_resumes_with_another_path(case: str, tmp_path: Path) -> None:
    """From the checkpoint of step 5, in mid-cycle, that its own callback saved."""
    make, built, told, meant = CASES[case]
    limits = {"max_steps": 12, "limit_val_batches": 0}
    whole = make(**built)
    one = fit(whole, tmp_path, callbacks=[saving(tmp_path, 5)], **limits, **told)
    assert whole.ends == [3, 6, 9, 12] and whole.last.jumped > 0
    resumed = make(**built)
    two = fit(resumed, tmp_path, tmp_path / "step=5.ckpt", enable_checkpointing=False, **limits, **told)
    assert resumed.ends == [6, 9, 12]
    assert_same_run(whole.model, one.optimizers[0], resumed.model, two.optimizers[0])
    model, optimizer = plain(12, **meant)
    assert_same_run(whole.model, one.optimizers[0], model, optimizer)


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_lightning_counts_a_step_that_its_scaler_skipped(fused: bool, tmp_path: Path) -> None:
    """float16 with a scale that overflows three times: 12 calls, 9 applied steps. A resumed run knows."""

    def run(resume: Path | None = None, callbacks: Sequence[Any] = ()) -> tuple[Module, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-10, growth_interval=1000)
        module = Module(fused=fused)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        trainer = fit(module, tmp_path, resume, callbacks, max_steps=12, limit_val_batches=0, plugins=[plugin])
        return module, trainer.optimizers[0]

    whole, optimizer = run(callbacks=[saving(tmp_path, 5)])
    assert {int(state["step"]) for state in optimizer.state.values()} == {9} and whole.ends == [3, 6, 9]
    assert_same(whole.after[2], weights(tiny_model()))
    resumed, again = run(tmp_path / "step=5.ckpt")
    assert resumed.ends == [3, 6, 9]
    assert_same_run(whole.model, optimizer, resumed.model, again)


def test_two_optimizers_share_a_cycle(tmp_path: Path) -> None:
    """A generator that is trained every second batch, as in an adversarial network."""

    class Pair(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.one, self.two = tiny_model(1), tiny_model(2)

        def configure_optimizers(self) -> list[ExtraAdam]:
            return [ExtraAdam(self.one.parameters(), **OPEN), ExtraAdam(self.two.parameters(), lr=0.01, **PAPER)]

        def training_step(self, batch: int, index: int) -> None:
            for model, optimizer, every in zip((self.one, self.two), self.optimizers(), (1, 2)):
                if index % every == 0:
                    self.toggle_optimizer(optimizer)
                    optimizer.zero_grad()
                    self.manual_backward(batch_loss(model, index))
                    optimizer.step()
                    self.untoggle_optimizer(optimizer)

    pair = Pair()
    trainer = fit(pair, tmp_path, limit_train_batches=14, max_epochs=1, limit_val_batches=0)
    for model, optimizer, seed, every, hyperparameters in (
        (pair.one, trainer.optimizers[0], 1, 1, OPEN),
        (pair.two, trainer.optimizers[1], 2, 2, {"lr": 0.01, **PAPER}),
    ):
        alone = tiny_model(seed)
        wanted = ExtraAdam(alone.parameters(), **hyperparameters)
        for i in range(0, 14, every):
            wanted.zero_grad()
            batch_loss(alone, i).backward()
            wanted.step()
        assert optimizer.last_jump.step == {1: 12, 2: 6}[every]
        assert_same_run(model, optimizer, alone, wanted)


def averaged(norm: bool, folder: Path, epochs: int = 4, resume: Path | None = None, **hooks: Any) -> tuple[Any, Any]:
    module = Module(norm=norm, **PAPER)
    for name, hook in hooks.items():
        setattr(module, name, hook.__get__(module))
    swa = StochasticWeightAveraging(0.004, swa_epoch_start=2, annealing_epochs=2, annealing_strategy="linear")
    options = {"max_epochs": epochs, "batches": BATCHES, "limit_val_batches": 0}
    trainer = fit(module, folder, resume, [] if resume else [swa], enable_checkpointing=False, **options)
    return module, trainer


def mean_of_epochs(module: Any) -> list[Tensor]:
    """Of the weights with which the averaged epochs began."""
    begun = [module.after[i - 1] for i in range(BATCHES, 4 * BATCHES, BATCHES)]
    return [torch.stack(of).mean(0) for of in zip(*begun)]


def test_stochastic_weight_averaging_changes_the_path_or_averages_weights_before_the_jump(tmp_path: Path) -> None:
    module, trainer = averaged(False, tmp_path)
    assert module.ends == [3, 6, 9, 12, 15, 18] and len(set(module.lrs)) > 1
    by_hand = tiny_model()
    wanted = ExtraAdam(by_hand.parameters(), **PAPER)
    for i, lr in enumerate(module.lrs):
        wanted.param_groups[0]["lr"] = lr
        wanted.zero_grad()
        batch_loss(by_hand, i).backward()
        wanted.step()
        assert_same(module.after[i], weights(by_hand), f"after step {i + 1}")
    assert_same(trainer.optimizers[0].state_dict()["state"], wanted.state_dict()["state"])
    for p, mean in zip(weights(module.model), mean_of_epochs(module)):
        torch.testing.assert_close(p, mean)


@pytest.mark.parametrize("told", [False, True], ids=["not told", "reset_anchor"])
def test_the_pass_for_batch_norm_jumps_away_from_the_average(told: bool, tmp_path: Path) -> None:
    """Lightning lets the optimizer step once in that pass, by old gradients, when the average has been written.

    Where a cycle ends with this step, `self.optimizers().reset_anchor()` before keeps it a small one.
    """

    def on_train_epoch_start(self: Any) -> None:
        if told and self.trainer.fit_loop._skip_backward:
            self.optimizers().reset_anchor()

    module, trainer = averaged(True, tmp_path, on_train_epoch_start=on_train_epoch_start)
    steps = 4 * BATCHES + 1
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {steps} and steps % K == 0
    away = max(float((p - mean).abs().max()) for p, mean in zip(weights(module.model), mean_of_epochs(module)))
    assert (away < 3 * module.lrs[-1]) == told


@pytest.mark.parametrize("told", [False, True], ids=["not told", "reset_anchor"])
def test_a_run_that_goes_on_from_averaged_weights_is_told_so(told: bool, tmp_path: Path) -> None:
    """A checkpoint saved after the average was written holds anchors of other weights: the next cycle would span both.

    `self.optimizers().reset_anchor()` in `on_train_start` begins a new one.
    """
    before, first = averaged(False, tmp_path)
    first.save_checkpoint(tmp_path / "averaged.ckpt")
    begun: list[list[Tensor]] = []

    def on_train_start(self: Any) -> None:
        begun.append(weights(self.model))
        if told:
            self.optimizers().reset_anchor()

    module, _ = averaged(False, tmp_path, 5, tmp_path / "averaged.ckpt", on_train_start=on_train_start)
    end = 3 if told else 1  # 20 steps were taken before, 2 of them since the last cycle
    assert module.ends[0] == 20 + end
    moved = torch.stack([(p - q).norm() for p, q in zip(module.after[end - 1], begun[0])]).norm()
    taken = float(moved) / (1 + N / K)  # the drift, if it began where the run did
    assert (abs(module.norms[0] - taken) < 1e-4 * taken) == told
    if not told:
        assert module.norms[0] > 5 * max(before.norms[-2:])


@pytest.mark.parametrize("stop", [4, 6])
def test_an_average_that_is_swapped_in_for_validation_changes_the_path(stop: int, tmp_path: Path) -> None:
    """Lightning#18828's kin: EMAWeightAveraging evaluates its average after every epoch, and saves both."""
    limits = {"max_epochs": 3, "batches": BATCHES, "limit_val_batches": 1}

    def run(resume: Path | None = None, *callbacks: Any, **options: Any) -> tuple[Module, Any]:
        module = Module()
        trainer = fit(module, tmp_path, resume, callbacks, **limits, **options)
        return module, trainer.optimizers[0]

    bare, optimizer = run(enable_checkpointing=False)
    whole, ours = run(None, EMAWeightAveraging(decay=0.5), saving(tmp_path, stop))
    resumed, theirs = run(tmp_path / f"step={stop}.ckpt", EMAWeightAveraging(decay=0.5), enable_checkpointing=False)
    assert_same(whole.after, bare.after)
    assert_same(ours.state_dict(), optimizer.state_dict())
    assert bare.ends == whole.ends == [3, 6, 9, 12, 15] and resumed.ends == [end for end in whole.ends if end > stop]
    assert_same(resumed.after, whole.after[stop:])
    assert_same_run(whole.model, ours, resumed.model, theirs)
    assert not torch.equal(whole.after[-1][0], weights(whole.model)[0]), "the average has been written at the end"
