"""What a pass through a model may change beside its buffers, kept and put back: dice, attributes, modes, compilers."""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn


def random_states(devices: Iterable[torch.device]) -> list[tuple[Callable[[Any], Any], Any]]:
    """Random states, each with what sets it again."""
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    if (numpy := getattr(sys.modules.get("numpy"), "random", None)) is not None:
        states.append((numpy.set_state, numpy.get_state()))
    return states + [(partial(torch.cuda.set_rng_state, device=d), torch.cuda.get_rng_state(d)) for d in devices]


def set_random_states(states: Iterable[tuple[Callable[[Any], Any], Any]]) -> None:
    """Set each of them again."""
    for put, state in states:
        put(state)


_TORCHS = set(vars(nn.Module()))  # attributes that torch gives a module


def attributes(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, tuple[Any, Any]]]]:
    """Of each module its attributes, and what they are now: with a copy of each list, dict and set."""
    return [
        (vars(module), {name: (x, _copied(x)) for name, x in vars(module).items() if name not in _TORCHS})
        for module in model.modules()
    ]


def _copied(x: Any) -> Any:
    return type(x)(x) if type(x) in (list, dict, set) else None


def put_back(kept: Iterable[tuple[dict[str, Any], dict[str, tuple[Any, Any]]]]) -> None:
    """Make them again what they were."""
    for now, before in kept:
        for name in now.keys() - before.keys() - _TORCHS:
            del now[name]
        for name, (x, copy) in before.items():
            if copy is not None and not _same(x, copy):
                x.clear()
                x.extend(copy) if type(x) is list else x.update(copy)
            if name not in now or now[name] is not x:
                now[name] = x


def _same(x: Any, copy: Any) -> bool:
    """Whether two lists, dicts or sets hold the very same objects, in the same order."""
    if len(x) != len(copy):
        return False
    if isinstance(x, dict) and not all(a is b for a, b in zip(x.values(), copy.values())):
        return False
    return all(a is b for a, b in zip(x, copy))


def train(model: nn.Module, mode: bool = True) -> None:
    """Switch to training or eval mode, also where a module's own `train` is a loop that trains it."""
    takes = "mode" in inspect.signature(model.train).parameters
    model.train(mode) if takes else nn.Module.train(model, mode)


def eagerly(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Compiled parts run as they were written: no graph is made for two passes in a cycle.

    But flex attention: as it was written it makes a matrix of all scores.
    """
    flex = getattr(getattr(model, "config", None), "_attn_implementation", None) == "flex_attention"
    return torch.compiler.set_stance("default" if flex else "force_eager")  # type: ignore[no-any-return]
