"""Ask a model's class what its weights can't tell: which of them are tied, and which tensors are buffers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .safety import check_size

if TYPE_CHECKING:
    from .read import Checkpoint

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
MANY = 1000  # layers or experts that a config may name without a tensor for each


@dataclass(frozen=True)
class ModelFacts:
    """What only the model's class knows; `unknown` says why it could not be asked, or is empty.

    Names are those of the model, with and without the prefix of its base model: checkpoints come with either.
    """

    tied: tuple[tuple[str, ...], ...]
    buffers: frozenset[str]
    unknown: str


def ask_model(checkpoint: Checkpoint) -> ModelFacts:
    """What the model ties and which tensors are buffers, asked of its class, built without memory for weights."""
    if checkpoint.is_adapter:
        return ModelFacts((), frozenset(), "")
    storages: dict[tuple[Path, int], list[str]] = {}  # a .bin says itself which tensors are one
    for name, info in checkpoint.infos.items():
        if info.file.suffix == ".bin" and info.numel:
            storages.setdefault((info.file, info.offset), []).append(name)
    shared = [tuple(group) for group in storages.values() if len(group) > 1]
    try:
        check_size(checkpoint.config, max(MANY, len(checkpoint.infos)))
        model = _model_on_meta(checkpoint)
    except Exception as error:  # whatever a config or a class may raise: the weights themselves are still there
        return ModelFacts(tuple(shared), frozenset(), f"{type(error).__name__}: {' '.join(str(error).split())}")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    parameters: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameters.setdefault(id(parameter), []).append(name)
    groups = [group for group in parameters.values() if len(group) > 1]
    both = ([form for name in group for form in (name, name.removeprefix(prefix))] for group in groups)
    held: dict[str, set[str]] = {}
    for name in checkpoint.infos:
        held.setdefault(unwrapped(name), set()).add(name)

    def stored(names: Iterable[str]) -> tuple[str, ...]:
        """With what the checkpoint calls them."""
        return tuple(dict.fromkeys(form for name in names for form in (name, *sorted(held.get(name, ())))))

    tied = [stored(group) for group in both]
    tied += [group for group in shared if not any(set(group) <= set(other) for other in tied)]
    buffers = [name for name, _ in model.named_buffers()]
    both_names = (form for name in buffers for form in (name, name.removeprefix(prefix)))
    return ModelFacts(tuple(tied), frozenset(stored(both_names)), "")


def unwrapped(name: str) -> str:
    """A tensor's name without what parallel, compiled and checkpointed modules put into it."""
    return (
        ".".join(part for part in name.split(".") if part not in WRAPPERS) if any(w in name for w in WRAPPERS) else name
    )


def _model_on_meta(checkpoint: Checkpoint) -> torch.nn.Module:
    """The checkpoint's model without weights. Runs code from the checkpoint's folder only where that is trusted."""
    import transformers

    trust = checkpoint.trust_remote_code
    config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust, local_files_only=True)
    known: Any = getattr(transformers, (config.architectures or [""])[0], None)
    auto: Any = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model: torch.nn.Module = known(config) if known else auto.from_config(config, trust_remote_code=trust)
    model.tie_weights()  # type: ignore[operator]
    return model
