"""Every optimizer of the comparison, behind one interface: train with it, then look at the weights one would keep."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from extraopt import ExtraAdam

ADAMW = {"weight_decay": 0.01, "fused": True}


class Trained:
    """An optimizer and the model it trains."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def step(self) -> None:
        """One real step, and whatever the method does after it."""
        self.optimizer.step()

    @contextlib.contextmanager
    def kept(self) -> Iterator[nn.Module]:
        """The model with the weights that the method would evaluate and save."""
        yield self.model


class ResetAtJump(Trained):
    """RL-Extra as released: each cycle restarts the trainer, so moments and step counters begin anew after a jump."""

    def step(self) -> None:
        report = self.optimizer.last_jump
        self.optimizer.step()
        if self.optimizer.last_jump is not report:
            self.optimizer.state.clear()


class OuterNesterov(Trained):
    """SNOO, DiLoCo: an outer SGD with Nesterov momentum over the drift of every `every` steps."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int, lr: float, mu: float) -> None:
        super().__init__(model, optimizer)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.anchors = [p.detach().clone() for p in self.params]
        self.outer = torch.optim.SGD(self.anchors, lr=lr, momentum=mu, nesterov=True)
        self.every, self.left = every, every

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.left -= 1
        if self.left:
            return
        self.left = self.every
        for a, p in zip(self.anchors, self.params):
            a.grad = a - p
        self.outer.step()
        for a, p in zip(self.anchors, self.params):
            p.copy_(a)


class Averaged(Trained):
    """AdamW, evaluated with an exponential moving average of its weights."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float) -> None:
        super().__init__(model, optimizer)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def step(self) -> None:
        self.optimizer.step()
        self.average.update_parameters(self.model)

    @contextlib.contextmanager
    def kept(self) -> Iterator[nn.Module]:
        yield self.average.module


class ScheduleFree(Trained):
    """Schedule-free AdamW keeps the average that it would save beside the weights that it trains with."""

    @contextlib.contextmanager
    def kept(self) -> Iterator[nn.Module]:
        self.optimizer.eval()
        yield self.model
        self.optimizer.train()


def _rl_extra(k: int, n: int, params: list[Tensor], lr: float) -> ExtraAdam:
    rule = {"extra_every": k, "extra_steps": n, "extra_beta": 0.0, "extra_gate": None, "extra_kl": None}
    return ExtraAdam(params, lr, **rule, **ADAMW)


def build(name: str, model: nn.Module, lr: float) -> Trained:
    """The optimizer called `name` in the results, for `model`'s trainable parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "AdamW":
        return Trained(model, AdamW(params, lr, **ADAMW))
    if name.startswith("ExtraAdam"):  # ExtraAdam extra_kl=.01 extra_every=5
        options = dict(part.split("=") for part in name.split()[1:])
        optimizer = ExtraAdam(params, lr, **ADAMW, **{k: ast.literal_eval(v) for k, v in options.items()})
        if optimizer.defaults["extra_watch"]:
            optimizer.watch(model, logits=lambda output: output[0][output[1]])
        return Trained(model, optimizer)
    if name.startswith("RL-Extra"):  # RL-Extra (20,100) kept
        k, n = map(int, name[name.index("(") + 1 : name.index(")")].split(","))
        return (ResetAtJump if name.endswith("reset") else Trained)(model, _rl_extra(k, n, params, lr))
    if name == "Lookahead":
        from pytorch_optimizer import Lookahead

        return Trained(model, Lookahead(AdamW(params, lr, **ADAMW), k=5, alpha=0.5))
    if name == "Schedule-free":
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(params, lr, weight_decay=ADAMW["weight_decay"])
        optimizer.train()
        return ScheduleFree(model, optimizer)
    if name.startswith("Outer Nesterov"):  # Outer Nesterov (0.7,0.9)
        outer_lr, mu = map(float, name[name.index("(") + 1 : name.index(")")].split(","))
        return OuterNesterov(model, AdamW(params, lr, **ADAMW), 10, outer_lr, mu)
    if name == "EMA":
        return Averaged(model, AdamW(params, lr, **ADAMW), 0.95)
    raise ValueError(f"no optimizer is called {name!r}")
