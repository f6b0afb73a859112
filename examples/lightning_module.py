"""Lightning, automatic optimization: `configure_optimizers` returns ExtraAdam, nothing else changes.

Stops in the middle of a cycle and resumes from Lightning's checkpoint.

python examples/lightning_module.py
"""

from __future__ import annotations

import logging
import tempfile
import warnings

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from extraopt import ExtraAdam


class Curve(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def configure_optimizers(self) -> ExtraAdam:
        # a regression has no logits that a trust region could look at
        return ExtraAdam(self.parameters(), lr=1e-3, extra_every=5, extra_steps=20, extra_kl=None)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)

    def on_train_batch_end(self, outputs: dict[str, torch.Tensor], batch: list[torch.Tensor], index: int) -> None:
        jump = self.optimizers().last_jump
        line = f"step {self.global_step:3}: loss {outputs['loss'].item():.4f}"
        if jump and jump.step == self.global_step:
            line += f", coherence {jump.coherence:.2f}, gate {jump.gate:.2f}, {jump.jumped} tensors jumped"
        if self.trainer.is_global_zero and self.global_step % 5 == 0:
            print(line)


def fit(folder: str, steps: int, checkpoint: str | None = None) -> lightning.Trainer:
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 512)[:, None]
    data = DataLoader(TensorDataset(x, torch.sin(2 * x) * x), batch_size=512)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=steps, default_root_dir=folder, enable_checkpointing=False, **quiet)
    trainer.fit(Curve(), data, ckpt_path=checkpoint)
    return trainer


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    with tempfile.TemporaryDirectory() as folder:
        fit(folder, steps=48).save_checkpoint(f"{folder}/48.ckpt")
        print("resuming from the checkpoint of step 48")
        fit(folder, steps=100, checkpoint=f"{folder}/48.ckpt")
