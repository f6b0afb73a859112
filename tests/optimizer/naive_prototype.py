"""The prototype everyone would write first: it shows that the contract's checks catch what is wrong with it."""

from collections.abc import Callable
from typing import Any

import torch


class NaiveExtraAdam(torch.optim.AdamW):
    """AdamW's step, then the ungated jump: calls counted on the instance, anchors in a dict beside the state."""

    def __init__(
        self, *args: Any, extra_every: int = 20, extra_steps: int = 100, extra_kl: None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.every, self.horizon, self.calls = extra_every, extra_steps, 0
        self.anchors = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        self.calls += 1
        if self.horizon and self.calls % self.every == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p - self.anchors[p], alpha=self.horizon / self.every)
                    self.anchors[p].copy_(p)
        return loss
