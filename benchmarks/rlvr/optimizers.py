"""Every optimizer of the comparison, behind one interface: train with it, then look at the weights one would keep."""

from __future__ import annotations

import ast
import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

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


class Ahead(Trained):
    """EMA-Nesterov (arXiv 2605.25395): before each gradient the weights go ahead by an average of their last moves."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, gamma: float, beta: float, rest: tuple[int, int]
    ) -> None:
        super().__init__(model, optimizer)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.before = [p.detach().clone() for p in self.params]
        self.moves = [torch.zeros_like(p) for p in self.params]
        self.gamma, self.beta, self.rest, self.taken = gamma, beta, rest, 0

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.taken += 1
        for p, before, move in zip(self.params, self.before, self.moves):
            move.lerp_(p - before, 1 - self.gamma)
            before.copy_(p)
            if self.rest[0] <= self.taken < self.rest[1]:
                p.add_(move, alpha=self.beta)

    @contextlib.contextmanager
    def kept(self) -> Iterator[nn.Module]:
        """Without the part that is ahead."""
        ahead = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            for p, before in zip(self.params, self.before):
                p.copy_(before)
        yield self.model
        with torch.no_grad():
            for p, a in zip(self.params, ahead):
                p.copy_(a)


class KLAdapted(Trained):
    """AdamW whose learning rate is 1.5 times higher after a step that changed the policy by less than half of a target,
    and 1.5 times lower after one that changed it by more than twice: the adaptive schedule of rsl_rl, with its target
    of 0.01 and its range of 1e-5 to 1e-2 widened to what this grid has. Change is KL(before || after), the mean over
    the tokens of the step's own answers.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, target: float) -> None:
        super().__init__(model, optimizer)
        self.target = target
        self.seen: tuple[Any, Tensor, Tensor] | None = None
        model.register_forward_hook(self._remember)

    def _remember(self, model: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():
            self.seen = inputs, output[0].detach(), output[1]

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        assert self.seen is not None
        inputs, before, counts = self.seen
        before, after = before.log_softmax(-1)[counts], self.model(*inputs)[0].log_softmax(-1)[counts]
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        for group in self.optimizer.param_groups:
            if kl > 2 * self.target:
                group["lr"] = max(1e-6, group["lr"] / 1.5)
            elif 0 < kl < self.target / 2:
                group["lr"] = min(1e-2, group["lr"] * 1.5)


_as_shipped: dict[tuple[str, str], Any] = {}  # constants of extraopt that a run before has changed


def _set_constants(values: dict[str, Any]) -> None:
    for (module, name), value in _as_shipped.items():
        setattr(importlib.import_module(module), name, value)
    for key, value in values.items():
        module, name = f"extraopt.{key.split('.')[0]}", key.split(".")[1]
        _as_shipped.setdefault((module, name), getattr(importlib.import_module(module), name))
        setattr(importlib.import_module(module), name, value)


def _rl_extra(k: int, n: int, params: list[Tensor], lr: float) -> ExtraAdam:
    rule = {"extra_every": k, "extra_steps": n, "extra_beta": 0.0, "extra_gate": None, "extra_kl": None}
    return ExtraAdam(params, lr, **rule, **ADAMW)


def build(name: str, model: nn.Module, lr: float) -> Trained:
    """The optimizer called `name` in the results, for `model`'s trainable parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    _set_constants({})
    if name == "AdamW":
        return Trained(model, AdamW(params, lr, **ADAMW))
    if name.startswith("ExtraAdam"):  # ExtraAdam extra_kl=.01 extra_every=5 gate.RETREAT=0
        given = {k: ast.literal_eval(v) for k, v in (part.split("=") for part in name.split()[1:])}
        _set_constants({k: v for k, v in given.items() if "." in k})
        optimizer = ExtraAdam(params, lr, **ADAMW, **{k: v for k, v in given.items() if "." not in k})
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
    if name.startswith("EMA-Nesterov"):  # EMA-Nesterov (0.99,0.5,400): of so many steps, off in the first and last
        gamma, beta, steps = map(float, name[name.index("(") + 1 : name.index(")")].split(","))
        rest = round(0.13 * steps), round(0.72 * steps)
        return Ahead(model, AdamW(params, lr, **ADAMW), gamma, beta, rest)
    if name == "AdEMAMix":
        from pytorch_optimizer import AdEMAMix

        return Trained(
            model, AdEMAMix(params, lr, betas=(0.9, 0.999, 0.99), alpha=8.0, weight_decay=0.01, weight_decouple=True)
        )
    if name == "KL-adapted":
        return KLAdapted(model, AdamW(params, lr, **ADAMW), 0.01)
    if name == "EMA":
        return Averaged(model, AdamW(params, lr, **ADAMW), 0.95)
    raise ValueError(f"no optimizer is called {name!r}")
