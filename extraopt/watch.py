"""The model behind an optimizer: found, its last inputs remembered, and run on them again, leaving all as it was."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from .positions import Positions, Unusable
from .undisturbed import Kept, eagerly, train


class _Hook:
    """A forward pre-hook that is inert wherever a model was copied or unpickled to, and within a compiled graph.

    When the object that it calls is gone it removes itself by the next call. A finalizer would do so whenever the
    garbage collector runs, and Dynamo fails where a hook goes while it compiles.
    """

    def __init__(self, act: Callable[..., None], register: Callable[[_Hook], RemovableHandle]) -> None:
        self.act = weakref.WeakMethod(act)
        self.handle = register(self)

    def __call__(self, *arguments: Any) -> None:
        if not torch.compiler.is_compiling():  # else it would break the graph
            self.look(*arguments)

    @_disable_dynamo
    def look(self, *arguments: Any) -> None:
        """What a call that is not compiled does."""
        act = self.act()
        if act is None:
            self.handle.remove()
        else:
            act(*arguments)

    def __deepcopy__(self, memo: Any) -> Callable[..., Any]:
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (contextlib.nullcontext(), "__exit__")  # does nothing, and a file needs no package of ours


with contextlib.suppress(AttributeError, TypeError):  # private; without it, compiled models are not seen
    # Dynamo calls the hooks of a module that it compiles outside of the graph, and would compile each by itself. This
    # is what its own `skip_code` does, without the import of all of it.
    _frames = torch._C._dynamo.eval_frame
    _frames.set_code_exec_strategy(
        _Hook.__call__.__code__, _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT)
    )


def _map(what: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `what` done to each tensor in its dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return what(value)
    if isinstance(value, Mapping):
        made = {key: _map(what, x) for key, x in value.items()}
        return made if type(value) is dict else _like(value, made)
    if type(value) in (list, tuple):
        return type(value)(_map(what, x) for x in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(what, x) for x in value))
    return value


def _like(value: Any, made: dict[Any, Any]) -> Any:
    try:
        return type(value)(made)
    except Exception:  # a class of the user's own, which may be made of anything
        return made


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        yield value
        return
    for x in value:
        yield from _leaves(x)


def _named(kind: type, name: str) -> bool:
    return any(base.__name__ == name and base.__module__.startswith("torch.") for base in kind.__mro__)


def unwrapped(model: nn.Module) -> tuple[nn.Module, Any]:
    """The module to call again and whose inputs to remember, and the process group of a DDP around it, or None.

    Raises:
        Unusable: its inputs are no inputs of one model, or its parameters not where an optimizer can move them.
    """
    group = None
    while True:
        kind = type(model)
        if isinstance(model, torch.jit.ScriptModule):
            raise Unusable("TorchScript's modules can't be watched: train the module that it was made from")
        if _named(kind, "DataParallel"):
            raise Unusable("nn.DataParallel runs throw-away copies of it: use DistributedDataParallel")
        if _named(kind, "FullyShardedDataParallel"):
            raise Unusable("FSDP1 keeps its gathered weights after a forward pass: use FSDP2 (fully_shard)")
        if kind.__name__ == "DeepSpeedEngine" or kind.__name__ == "PipelineEngine":
            raise Unusable("DeepSpeed steps a flat copy of the weights, not those that the model computes with")
        if _named(kind, "DistributedDataParallel"):
            group, model = model.process_group, model.module  # type: ignore[assignment]
        elif kind.__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model, group


@dataclass(frozen=True)
class _Call:
    """A training forward pass: what is needed to run it again, and to see whether it can be.

    Attributes:
        arguments, named: its inputs, detached and copied.
        fed: whether gradients flow back into them.
        autocast: dtype of each kind of device where it was on.
        attention: torch's, or what context_parallel puts in its place.
        forward: what was called: Lightning puts `training_step` there for a call.
    """

    arguments: tuple[Any, ...]
    named: dict[str, Any]
    fed: bool
    autocast: dict[str, torch.dtype]
    attention: Any
    forward: Any


_WATCHES: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Watch]] = weakref.WeakKeyDictionary()


class Watch:
    """Remembers the inputs of a training forward pass in the last step of a cycle, and runs the model on them again.

    Attributes:
        model: what is called again; None as long as it was not found.
        group: process group of the DDP around it.
        refused: why nothing can be watched, or None.
        logits: of the model's output, or None for `.logits`.
        own: says the ids of the optimizer's parameters.
    """

    def __init__(self) -> None:
        self._armed = True
        self.own: Callable[[], set[int]] = set
        self.model: nn.Module | None = None
        self.group: Any = None
        self.refused: str | None = None
        self.logits: Callable[[Any], Tensor] | None = None
        self._hooks: list[_Hook] = []
        self._sought = set[int]()  # what `own` returned
        self._first = -1  # id of the hook that remembers the call by which a model was found
        self._kept: Kept | None = None
        self._around: Any = None  # weak reference to what `attach` was given
        self._captured: _Call | None = None

    @property
    def armed(self) -> bool:
        """Whether the next step may end a cycle: only then inputs are kept."""
        return self._armed

    @armed.setter
    def armed(self, value: bool) -> None:
        self._armed = value
        self._sought = set()
        self.release()  # inputs of the step before say nothing of the next one

    @property
    def searching(self) -> bool:
        """Whether a model is still to be found."""
        return self.model is None and bool(self._hooks)

    @property
    def captured(self) -> bool:
        """Whether there are inputs to run the model on."""
        return self._captured is not None

    def attach(self, model: nn.Module, logits: Callable[[Any], Tensor] | None) -> None:
        """Watch this model.

        Args:
            model: as it is called for training, or what DDP or `torch.compile` wraps.
            logits: of its output, float [..., V]; None takes `.logits` of an output of transformers.
        """
        self.detach()
        self.logits, self._around = logits, weakref.ref(model)
        try:
            self.model, self.group = unwrapped(model)
        except Unusable as reason:
            self.refused = str(reason)
            return
        _WATCHES.setdefault(self.model, weakref.WeakSet()).add(self)
        register = partial(self.model.register_forward_pre_hook, prepend=True, with_kwargs=True)
        self._hooks.append(_Hook(self._remember, register))

    def find(self, logits: Callable[[Any], Tensor] | None) -> None:
        """Watch the outermost module that is called for training and has most of the optimizer's parameters."""
        self.detach()
        self.logits, self._sought = logits, set()
        self._hooks += [_Hook(act, register_module_forward_pre_hook) for act in (self._look, self._remember_first)]
        self._first = self._hooks[-1].handle.id

    def computes_with(self, params: Iterable[Tensor]) -> list[bool]:
        """Of each of these parameters, whether it is the model's; none is where there is no model."""
        if self.model is not None:
            _reshard(self.model)
        own = set() if self.model is None else set(map(id, self.model.parameters()))
        return [id(p) in own for p in params]

    @property
    def joining(self) -> bool:
        """Whether DDP's `join` is at work: ranks that have ended answer its collectives, and none beside."""
        around = None if self._around is None else self._around()
        return bool(getattr(getattr(around, "_join_config", None), "enable", False))

    @property
    def partial(self) -> bool:
        """Whether DDP is around the model and trains parameters that the optimizer does not have."""
        if self.model is None or self.group is None:
            return False
        own = self.own()
        return any(p.requires_grad and id(p) not in own for p in self.model.parameters())

    def sharers(self) -> int:
        """How many optimizers watch this model, each with parameters of its own; this one is the first."""
        own = self.own()
        watches = () if self.model is None else _WATCHES.get(self.model, ())
        return 1 + sum(watch is not self and own.isdisjoint(watch.own()) for watch in list(watches))

    def _has_most(self, module: nn.Module) -> bool:
        # asked for each call of each module of the process, as long as this one's model was not called
        self._sought = self._sought or self.own()
        return 2 * sum(id(p) in self._sought for p in module.parameters()) > len(self._sought)

    def detach(self) -> None:
        """Watch nothing any more."""
        for hook in self._hooks:
            hook.handle.remove()
        self._hooks.clear()
        if self.model is not None:
            _WATCHES.get(self.model, weakref.WeakSet()).discard(self)
        self.model = self.group = self.refused = None
        self.release()

    def release(self) -> None:
        """Let go of the inputs."""
        self._captured = None

    def _look(self, module: nn.Module, *_: Any) -> None:
        if self._armed and torch.is_grad_enabled() and self._has_most(module):
            # The hook that is put on it now does not see this very call, whose keyword arguments the next of the global
            # hooks is given if the module says so.
            takes: Any = getattr(module, "_forward_pre_hooks_with_kwargs", {})
            takes[self._first] = True
            self.attach(module, self.logits)

    def _remember_first(self, module: nn.Module, arguments: tuple[Any, ...], *named: dict[str, Any]) -> None:
        if named:
            del module._forward_pre_hooks_with_kwargs[self._first]
            if module is self.model:  # else it is called within this one
                self._remember(module, arguments, *named)

    def _remember(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not self.armed or self.refused or not torch.is_grad_enabled() or getattr(module, "_is_replica", False):
            return
        leaves = list(_leaves((arguments, named)))
        if any(isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x) for x in leaves):
            return  # of a transform, as vmap, which will have ended
        if not any(isinstance(x, Tensor) for x in leaves) or any(isinstance(x, nn.Module) for x in leaves):
            return
        if any(named.get(of) is not None and not isinstance(named[of], bool) for of in ("past_key_values", "cache")):
            return  # each pass would lengthen it
        if self._captured is not None and _empty(named.get("labels")):
            return  # an earlier micro-batch says more
        autocast = {
            device: torch.get_autocast_dtype(device)
            for device in {x.device.type for x in (*leaves, next(module.parameters(), None)) if isinstance(x, Tensor)}
            if torch.is_autocast_enabled(device)
        }
        attention = nn.functional.scaled_dot_product_attention
        fed = any(isinstance(x, Tensor) and x.grad_fn is not None for x in leaves)
        arguments, named = _map(_copy, (arguments, dict(named)))  # this very pass may write into them
        self._captured = _Call(arguments, named, fed, autocast, attention, module.forward)

    # --- again -------------------------------------------------------------------------------------------------------

    def positions(self) -> Positions:
        """Which rows of the model's logits are looked at, for the inputs remembered.

        Raises:
            Unusable: they were a part of a sequence, the rest of which lay on other ranks, those of another method, or
                made by weights that move, too, and that the model does not have.
        """
        assert self.model is not None and self._captured is not None
        if self._captured.attention is not nn.functional.scaled_dot_product_attention:
            raise Unusable(
                "its forward pass was within torch's context_parallel, which has ended: what is left is one rank's "
                "part of a sequence"
            )
        if self._captured.forward != self.model.forward:
            raise Unusable(
                f"another method was called in place of {type(self.model).__name__}'s forward, as by Lightning under "
                "DDP: tell the optimizer the model that it calls in turn, by watch(model, "
                "process_group=torch.distributed.group.WORLD)"
            )
        if self._captured.fed and not self.own() <= set(map(id, self.model.parameters())):
            raise Unusable(
                f"the inputs of {type(self.model).__name__} are made by other parameters of the optimizer, whose jumps "
                "change them: put both into one module, call that for training, and tell the optimizer by watch(module)"
            )
        return Positions(self.model, self._captured.arguments, self._captured.named, self.logits)

    def run(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """Logits with the weights as they are, [P, V] in the model's own dtype, and their rows at these positions.

        Raises:
            Unusable: the model gives none.
        """
        assert self.model is not None and self._captured is not None and self._kept is not None
        call = self._captured
        arguments, named = _map(Tensor.clone, (call.arguments, call.named))  # a model may write into its inputs
        with contextlib.ExitStack() as stack:
            for device, dtype in call.autocast.items():
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
            torch.clear_autocast_cache()  # else a model under autocast would compute with the weights of the run before
            self._kept.begin()
            # modules that cache what they made of their weights in eval mode let go of it when training begins
            train(self.model)
            train(self.model, False)
            try:
                output = self.model(*arguments, **positions.named(named))
                return positions.rows(output)
            finally:
                torch.clear_autocast_cache()
                train(self.model)  # those that merge weights in eval mode part them by the weights they merged
                _reshard(self.model)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """In eval mode, without gradients; afterwards all but the weights is as before, bit for bit: see `Kept`."""
        assert self.model is not None
        with torch.no_grad(), eagerly(self.model):
            call = self._captured
            self._kept = Kept(self.model, () if call is None else _leaves((call.arguments, call.named)))
            try:
                yield
            except BaseException:
                _reset(self.model)
                raise
            finally:
                kept, self._kept = self._kept, None
                kept.put_back()


def _empty(labels: Any) -> bool:
    """Whether there are labels, none of them valid."""
    try:
        return isinstance(labels, Tensor) and not bool((labels != -100).any())
    except RuntimeError:  # within vmap or fake tensors, which have no values to ask for
        return False


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone()


def sharded(model: nn.Module) -> list[Any]:
    """Its modules that FSDP2 shards."""
    return [m for m in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(m).__mro__)]


def _reshard(model: nn.Module) -> None:
    # FSDP2's root keeps its gathered weights after a forward pass, and would compute with them again
    for module in sharded(model):
        module.reshard()


def _reset(model: nn.Module) -> None:
    for module in sharded(model)[:1]:
        with contextlib.suppress(Exception):
            module.reset_iter_state()
