"""The entries of a parameter's state: how they are made, and what loaded ones must be."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .gate import plain_noise
from .hyperparameters import MAX_COUNT
from .sharding import same_parts
from .trust import UNWATCHED

TENSORS = {"extra_anchor", "extra_estimate"}
COUNTS = {"extra_origin", "extra_step"}
NUMBERS = {"extra_noise_cov", "extra_noise_var"} | COUNTS

# what torch and Python raise over a state that is none
MALFORMED = TypeError, KeyError, IndexError, AttributeError, OverflowError, AssertionError, RecursionError


def keeps_estimate(group: Mapping[str, Any]) -> bool:
    """Whether the rule of this group needs an estimate besides the anchor: not for the paper's.

    That is ``extra_beta=0, extra_gate=None, extra_kl=None``.
    """
    return group["extra_gate"] is not None or group["extra_kl"] is not None or group["extra_beta"] > 0


def new_anchor(p: Tensor, offload: bool = False) -> Tensor:
    """A copy of `p`: same shape, dtype and strides (a DTensor of one), on its device or, offloaded, in host memory."""
    return to_host(p.detach()) if offload and p.is_cuda else p.detach().clone(memory_format=torch.preserve_format)


def new_estimate(p: Tensor, offload: bool = False) -> Tensor:
    """An estimate of no drifts: zeros like `p`, on its device or, offloaded, in host memory."""
    if offload and p.is_cuda:
        return to_host(p.detach()).zero_()
    return torch.zeros_like(p, memory_format=torch.preserve_format, requires_grad=False)


def number(value: float, p: Tensor) -> Tensor | float:
    """A number as an entry of the state of `p`: a 0-dim tensor in host memory, as AdamW's own `step`, exact to 2**53.

    Who prunes or moves a parameter maps over the entries of its state as over tensors. Only what DeepSpeed steps, flat
    partitions that are no Parameters, keeps plain numbers: its converter of checkpoints cuts all tensors but `step`.
    """
    if type(p) is Tensor and _deepspeed_runs():
        return value
    return torch.full((), value, dtype=torch.float64, device="cpu")


def _deepspeed_runs() -> bool:
    comm = getattr(sys.modules.get("deepspeed"), "comm", None)
    return comm is not None and bool(comm.is_initialized())


def read_numbers(states: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """An entry of each of these states, as int or float.

    What a trainer took to a device, as some do with all tensors of a state, comes back in one transfer, and stays.
    """
    entries = [state[key] for state in states]
    kind = int if key in COUNTS else float
    if set(map(type, entries)) == {Tensor} and all(map(Tensor.is_cpu.__get__, entries)):  # type: ignore[attr-defined]
        return list(map(kind, map(Tensor.item, entries)))
    away = [i for i, entry in enumerate(entries) if isinstance(entry, Tensor) and not entry.is_cpu]
    if away:
        there = torch.stack([entries[i].to(entries[away[0]].device) for i in away]).cpu()
        for i, entry in zip(away, there.unbind()):
            states[i][key] = entries[i] = entry.clone()
    return list(map(kind, entries))


def write_numbers(
    states: Iterable[dict[str, Any]], key: str, values: Iterable[float], params: Iterable[Tensor]
) -> None:
    """Set an entry of the state of each parameter, in place where it is there: a compiled step knows that tensor."""
    for state, value, p in zip(states, values, params):
        entry = state.get(key)
        if isinstance(entry, Tensor):
            entry.fill_(value)
        else:
            state[key] = number(value, p)


def _plain(key: str, entry: Any) -> Any:
    """A loaded number as int or float; what is none stays."""
    if not isinstance(entry, Tensor) or entry.numel() != 1 or entry.is_complex():
        return entry
    value = entry.item()
    return int(value) if key in COUNTS and is_number(value) and value % 1 == 0 else value


def fits(t: Tensor, p: Tensor) -> bool:
    """Whether an anchor or estimate can be one of `p` as it is now: not where `p` was pruned, grown or cast since."""
    alike = t.shape == p.shape and t.dtype == p.dtype and (t.device == p.device or t.is_cpu)
    return alike and same_parts(t, p)


def whole(state: Mapping[str, Any], p: Tensor) -> bool:
    """Whether this is the state of a cycle that `p` can go on with."""
    if "extra_anchor" not in state or "extra_origin" not in state:
        return False
    anchor = state["extra_anchor"]
    estimate = state.get("extra_estimate", anchor)
    return fits(anchor, p) and (estimate is anchor or fits(estimate, p) and estimate.device == anchor.device)


def shaped(state: Mapping[str, Any], p: Tensor) -> bool:
    """Whether its anchor and estimate are of the shape of `p`; what it has not got is."""
    return all(getattr(state[key], "shape", None) == p.shape for key in TENSORS & state.keys())


def _of_another(state: Mapping[str, Any]) -> bool:
    """Whether an entry of the optimizer's own has the shape of the anchor or estimate: all are of that parameter."""
    shapes = [state[key].shape for key in TENSORS & state.keys() if isinstance(state[key], Tensor)]
    return any(isinstance(t, Tensor) and t.dim() and t.shape in shapes for k, t in state.items() if k not in TENSORS)


def forget_cycle(state: dict[str, Any]) -> None:
    """Leave of a parameter's state what its optimizer put there, and its count of applied steps."""
    for key in TENSORS | NUMBERS - {"extra_step"}:
        state.pop(key, None)


def to_host(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy in pinned host memory, of the same strides; of a DTensor, its local part there."""
    return torch.empty_like(t, dtype=dtype, device="cpu", pin_memory=torch.cuda.is_available()).copy_(t)


def offload(state: dict[str, Any]) -> None:
    """Bring a parameter's anchor and estimate back to host memory, from where trainers and loaders may take them."""
    for key in TENSORS & state.keys():
        if state[key].is_cuda:
            state[key] = to_host(state[key])


@contextmanager
def all_or_nothing(optimizer: Any) -> Iterator[None]:
    """Around the loading of a state: where it fails, the optimizer keeps the state and the groups that it had.

    Raises:
        ValueError: instead of what torch makes of a state that is malformed.
    """
    own = optimizer.state, optimizer.param_groups
    try:
        yield
    except BaseException as error:
        optimizer.state, optimizer.param_groups = own
        if isinstance(error, MALFORMED):
            words = f"This is not the state dict of such an optimizer ({type(error).__name__}: {str(error)[:200]})."
            raise ValueError(words) from error
        raise


class Opaque:
    """A tensor that torch's load_state_dict hands on as it is, instead of bringing it to its parameter's device."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def shielded(state_dict: dict[str, Any], offload: bool) -> dict[str, Any]:
    """A state dict as torch's load_state_dict may have it, which brings tensors to their parameters' dtype and device.

    In bfloat16 a count of 1001 is 1000, so that numbers must be plain. The device may not have room for all anchors
    and estimates, so that they are hidden from it with `offload`.
    """

    def entry(key: str, value: Any) -> Any:
        if key in NUMBERS:
            return _plain(key, value)
        return Opaque(value) if offload and key in TENSORS and isinstance(value, Tensor) else value

    state = {
        key: {k: entry(k, v) for k, v in entries.items()} if isinstance(entries, dict) else entries
        for key, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def copy_to_place(entries: dict[str, Any], p: Tensor, offload: bool) -> None:
    """Bring loaded anchors and estimates to where and what they must be, as copies.

    torch keeps the very tensors of a dict where dtype and device fit: another optimizer that loads the same dict would
    then move this one's anchors.
    """
    for key in entries.keys() & TENSORS:
        t = entries[key].detach()
        entries[key] = to_host(t, p.dtype) if offload and p.is_cuda else t.to(p.device, p.dtype, copy=True)


def is_number(value: Any, least: float = -math.inf, below: float = math.inf) -> bool:
    """Whether it is a finite number, or a tensor of one, in [least, below)."""
    if isinstance(value, (str, bytes)) or (isinstance(value, Tensor) and value.numel() != 1):
        return False
    try:
        return math.isfinite(value) and least <= float(value) < below
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _is_count(value: Any) -> bool:
    return is_number(value, 0, MAX_COUNT) and float(value).is_integer()


def check_cycle(state: dict[str, Any], p: Tensor, name: str, counter: str) -> None:
    """Check the entries of a parameter's cycles. Without one that they need it has none, and will start a new one.

    So it does, with a warning, where anchor or estimate are of another shape and no entry of the optimizer's own is.

    Args:
        state: of the parameter, as loaded.
        p: the parameter.
        name: what to call it.
        counter: key of its applied steps.

    Raises:
        ValueError: an entry is not what it must be.
    """
    for key in TENSORS & state.keys():
        if isinstance(state[key], Opaque):
            state[key] = state[key].tensor
    for key in NUMBERS & state.keys():
        state[key] = _plain(key, state[key])
    if not shaped(state, p) and not _of_another(state):
        warnings.warn(
            f"extraopt: {name} was pruned or grown after its last step and then saved: a new cycle starts there.",
            RuntimeWarning,
            stacklevel=5,
        )
        forget_cycle(state)
    for key in TENSORS & state.keys():
        _check_like(state[key], p, f"{key} of {name}")
    step, origin = state.get(counter), state.get("extra_origin", 0)
    if step is not None and not _is_count(step):
        raise ValueError(f"{counter} of {name} is {step!r:.80}. It must be a count from 0 to {MAX_COUNT}.")
    if type(origin) is not int or step is not None and not 0 <= (origin if origin >= 0 else ~origin) <= int(step):
        raise ValueError(f"extra_origin of {name} is {origin!r:.80}. It must be an integer up to its applied steps.")
    for key in ("extra_noise_cov", "extra_noise_var"):
        if not isinstance(state.get(key, 0.0), (int, float)) or not is_number(state.get(key, 0.0), 0):
            raise ValueError(f"{key} of {name} is {state[key]!r:.80}. It must be a finite number >= 0.")
    # a negative origin, its complement, is that of a parameter that had not moved yet: the next step takes its anchor
    if step is None or not {"extra_anchor", "extra_origin"} <= state.keys() or origin < 0:
        state.pop("extra_anchor", None)
        state.pop("extra_origin", None)
    if step is None:
        state.pop("extra_step", None)
    for key in NUMBERS & state.keys():
        state[key] = number(state[key], p)


def check_group(group: dict[str, Any]) -> None:
    """Check a group's length, what the last search of the trust region found; where there was none, as if unwatched.

    From the start: torch.distributed.checkpoint reads only what a fresh optimizer has.

    Raises:
        ValueError: it is no finite number >= 0.
    """
    length = group.setdefault("extra_length", UNWATCHED)
    if not is_number(length) or length < 0:
        raise ValueError(f"Invalid extra_length: {length!r:.80}. It must be a finite number >= 0.")
    group["extra_length"] = float(length)
    for key in ("extra_scale", "extra_reports"):  # of a rule before this one
        group.pop(key, None)


def here(known: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that no loaded state changes: they are for this machine and this trainer to say."""
    return {key: known[key] for key in ("extra_offload", "extra_watch") if key in known}


def upgraded(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's hyperparameters, those of a rule before this one in the words of this one."""
    group = dict(group)
    if "extra_every" in group and "extra_kl" not in group:
        if group.get("extra_gate") is None and group.get("extra_beta") == 0:
            group["extra_kl"] = None  # the paper's rule stays what it is
        if group.get("extra_beta", 0) is None:
            del group["extra_beta"]  # it followed from k and N
    return group


def modernize(state: dict[str, Any], group: Mapping[str, Any], counter: str, momentum: float) -> None:
    """Turn the entries of a rule before this one into what this one goes on from.

    Its estimate, ``extra_drift``, was biased towards 0, and its averaging followed from k and N where none was given.

    Args:
        state: of a parameter, as loaded; written in place.
        group: that it came in.
        counter: key of its applied steps.
        momentum: decay of the optimizer's.
    """
    state.pop("extra_ratio", None)
    old = state.pop("extra_drift", None)
    if not isinstance(old, Tensor) or not _is_count(state.get(counter)) or not _is_count(state.get("extra_origin")):
        return
    every, steps, beta = (group.get(f"extra_{key}") for key in ("every", "steps", "beta"))
    if every is None or steps is None or not is_number(every, 1) or not is_number(steps, 1):
        return
    beta = max(0.0, 1 - every / steps) if beta is None else beta
    if not is_number(beta, 0, 1):
        return  # the check of hyperparameters says what is wrong with it
    beta = float(beta)
    seen = int(state[counter] - state["extra_origin"]) // int(every)
    state["extra_estimate"] = old / (1 - beta**seen) if seen else old.clone()
    cov, var = plain_noise(every, beta, momentum, seen)
    state["extra_noise_cov"], state["extra_noise_var"] = float(cov), float(var)


def _check_like(loaded: Any, p: Tensor, name: str) -> None:
    if not isinstance(loaded, Tensor):
        raise ValueError(f"{name} is a {type(loaded).__name__}, but must be a tensor.")
    if loaded.shape != p.shape:
        raise ValueError(
            f"{name} has shape {tuple(loaded.shape)}, but the parameter has {tuple(p.shape)}: the state dict is of "
            "another model or another order of parameters."
        )
    if loaded.layout != p.layout or loaded.is_complex() != p.is_complex() or loaded.is_quantized:
        raise ValueError(f"{name} is {loaded.dtype}, {loaded.layout}, but the parameter {p.dtype}, {p.layout}.")
