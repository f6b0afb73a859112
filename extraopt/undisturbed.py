"""What a pass through a model may change beside its weights, kept and put back, and what must not come in between."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import signal
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_TORCHS = set(vars(nn.Module()))  # attributes that torch gives a module
_CONTAINERS = list, deque, set, dict, defaultdict, OrderedDict, Counter
_AT_ONCE = {getattr(signal, name, None) for name in ("SIGINT", "SIGALRM", "SIGVTALRM", "SIGPROF")}


class Kept:
    """All of a model but its weights: modes, buffers, attributes of modules, and the random states it draws from.

    Of attributes that are lists, dicts, sets or deques, and of those within, it keeps what they hold; of tensors and
    generators their values. Of parameters it keeps whether they are trained, and which memory they lie in.

    Args:
        model: of any modules; its buffers and its modules' tensors are copied, on the devices that they lie on.
        given: what it is called with: objects of a class of the user's own may carry a state from call to call.

    Raises:
        torch.OutOfMemoryError: no memory for these copies; nothing was changed.
    """

    def __init__(self, model: nn.Module, given: Iterable[Any] = ()) -> None:
        self._model = model
        self._modes = [(module, module.training) for module in model.modules()]
        self._buffers = [
            (module, [(name, b, None if b is None else _Values(b)) for name, b in module._buffers.items()])
            for module in model.modules()
        ]
        self._params = [
            (p, p.requires_grad, p.detach() if type(p) is nn.Parameter else None) for p in model.parameters()
        ]
        own = {id(x): x for module in model.modules() for x in vars(module).values() if _has_state(x)}
        own |= {id(x): x for x in given if _has_state(x)}
        self._attributes = [
            (vars(of), {name: (x, _keep(x)) for name, x in vars(of).items() if name not in _TORCHS})
            for of in (*model.modules(), *own.values())
        ]
        self._random = _random_states({p.device for p in model.parameters() if p.is_cuda})

    def begin(self) -> None:
        """Before a pass: what it draws, and what the model has kept from earlier calls, is the same for each."""
        self._put_modes_back()
        for put, state in self._random:
            put(state)
        self._put_attributes_back()

    def put_back(self) -> None:
        """Make all of it again what it was."""
        try:
            self._put_modes_back()
        finally:
            self._put_attributes_back()
            for module, mode in self._modes:
                module.training = mode
            for p, requires_grad, data in self._params:
                if p.requires_grad != requires_grad:
                    p.requires_grad_(requires_grad)
                if data is not None and p.data_ptr() != data.data_ptr():
                    p.data = data
            for module, buffers in self._buffers:
                for name, b, values in buffers:
                    b = None if values is None else values.put_back()
                    if name not in module._buffers or module._buffers[name] is not b:
                        module._buffers[name] = b
                for name in set(module._buffers.keys()) - {name for name, *_ in buffers}:
                    del module._buffers[name]
            for put, state in self._random:
                put(state)

    def _put_modes_back(self) -> None:
        # by modules' own `train`: those that merge weights in eval mode part them, and have it in an attribute
        train(self._model)
        for module, mode in self._modes:
            if module.training != mode:
                train(module, mode)

    def _put_attributes_back(self) -> None:
        for now, before in self._attributes:
            for name in now.keys() - before.keys() - _TORCHS:
                del now[name]
            for name, (x, again) in before.items():
                if again is not None:
                    again()
                if name not in now or now[name] is not x:
                    now[name] = x


class _Values:
    """A tensor and what is in it."""

    def __init__(self, x: Tensor) -> None:
        self._x, self._before, self._version = x, x.detach().clone(), None if x.is_inference() else x._version

    def put_back(self) -> Tensor:
        """The tensor, written to if it has changed; a copy where nothing may write to it outside of inference mode."""
        x = self._x
        if type(x) is Tensor and x.layout is torch.strided and not (x.is_meta or x.is_quantized):
            changed = not torch.equal(x, self._before)  # some fused operations do not count a version up
        else:
            changed = not x.is_inference() and x._version != self._version
        if not changed:
            return x
        if x.is_inference():
            return self._before
        x.detach().copy_(self._before)
        return x


def _random_states(devices: Iterable[torch.device]) -> list[tuple[Callable[[Any], Any], Any]]:
    """Random states, each with what sets it again."""
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    if (numpy := getattr(sys.modules.get("numpy"), "random", None)) is not None:
        states.append((numpy.set_state, numpy.get_state()))
    return states + [(partial(torch.cuda.set_rng_state, device=d), torch.cuda.get_rng_state(d)) for d in devices]


def _has_state(x: Any) -> bool:
    """Whether it is an object of a class of the user's own, which may hold what a model keeps from call to call.

    Not those of torch, and of Python's library only the plain one: other threads may write to its queues and loggers.
    """
    if isinstance(x, (nn.Module, Tensor, Optimizer, type, ModuleType)) or callable(x) or not hasattr(x, "__dict__"):
        return False
    of = type(x).__module__.partition(".")[0]
    return type(x) is SimpleNamespace or of not in {"torch", *sys.stdlib_module_names}


def _keep(x: Any, depth: int = 3) -> Callable[[], Any] | None:
    """What makes it hold again what it holds now; None for what is left alone."""
    if isinstance(x, torch.Generator):
        return partial(x.set_state, x.get_state())
    if type(x) is Tensor and depth == 3:  # a list of tensors may be as large as a replay buffer
        return _Values(x).put_back
    if type(x) not in _CONTAINERS or not depth:
        return None
    shallow = copy.copy(x)
    each = (_keep(value, depth - 1) for value in (x.values() if isinstance(x, dict) else x))
    within = [again for again in each if again is not None]

    def again() -> None:
        if not _same(x, shallow):
            x.clear()
            x.extend(shallow) if isinstance(x, (list, deque)) else x.update(shallow)
        for again_within in within:
            again_within()

    return again


def _same(x: Any, shallow: Any) -> bool:
    """Whether two containers hold the very same objects, in the same order."""
    if len(x) != len(shallow):
        return False
    if isinstance(x, dict) and not all(a is b for a, b in zip(x.values(), shallow.values())):
        return False
    return all(a is b for a, b in zip(x, shallow))


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


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Handlers of signals run afterwards: one that saves the model at once would save weights that are on trial.

    Those of Ctrl-C and of timers run at once, since what they do is to raise.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread, and only there they can be set
        return
    came: dict[int, None] = {}
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals() - _AT_ONCE}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda of, frame: came.setdefault(of))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for came_number in came:
            signal.raise_signal(came_number)
