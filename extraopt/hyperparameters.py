"""The hyperparameters of the rule: their names, defaults and ranges."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

DEFAULTS: dict[str, Any] = {
    "extra_every": 5,
    "extra_steps": 200,
    "extra_beta": 0.9,
    "extra_gate": 0.5,
    "extra_start": 0,
    "extra_kl": 0.02,
    "extra_fall": 0.4,
    "extra_watch": True,
    "extra_offload": False,
}
MAX_COUNT = 2**53  # steps: a float tells no more of them apart


def _count(name: str, value: Any, least: int) -> int:
    try:
        if not isinstance(value, bool) and least <= operator.index(value) <= MAX_COUNT:
            return operator.index(value)
    except (TypeError, RuntimeError):
        pass
    raise ValueError(f"Invalid {name}: {value!r:.200}. It must be an integer >= {least} and <= 2**53.")


def _fraction(name: str, value: Any, allowed: str, fits: Callable[[float], bool]) -> float | None:
    if value is None:
        return None
    try:
        if not isinstance(value, (bool, str)) and fits(float(value)):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # of numbers too large, tensors of none or several
        pass
    raise ValueError(f"Invalid {name}: {value!r:.200}. It must be None or a number in {allowed}.")


def _required(name: str, value: Any, allowed: str, fits: Callable[[float], bool]) -> float:
    number = _fraction(name, value, allowed, fits)
    if number is None:
        raise ValueError(f"Invalid {name}: None. It must be a number in {allowed}.")
    return number


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"Invalid {name}: {value!r:.200}. It must be True or False.")
    return value


def check_hyperparameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters as plain int, float, bool or None, which `torch.load(weights_only=True)` reads back.

    Raises:
        ValueError: one is outside its range.
    """
    return {
        "extra_every": _count("extra_every", given["extra_every"], 1),
        "extra_steps": _count("extra_steps", given["extra_steps"], 0),
        "extra_beta": _required("extra_beta", given["extra_beta"], "[0, 1)", lambda b: 0 <= b < 1),
        "extra_gate": _fraction("extra_gate", given["extra_gate"], "(0, 1]", lambda g: 0 < g <= 1),
        "extra_start": _count("extra_start", given["extra_start"], 0),
        "extra_kl": _fraction("extra_kl", given["extra_kl"], "(0, inf)", lambda x: 0 < x < math.inf),
        "extra_fall": _required("extra_fall", given["extra_fall"], "(0, inf]", lambda x: x > 0),
        "extra_watch": _switch("extra_watch", given["extra_watch"]),
        "extra_offload": _switch("extra_offload", given["extra_offload"]),
    }
