"""Which rows of a model's logits are looked at, and the logits in what a model returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LOGITS_BYTES = 1 << 28  # of float32 logits at most, of the positions that are looked at
# what only makes a loss: without these a model returns its logits and spends no memory on more
DROPPED = {"labels", "shift_labels", "num_items_in_batch", "fused_lm_head", "n_items", "output_router_logits"}


class Unusable(Exception):
    """Why the outputs of this model can't be watched, in words for the user."""


class Positions:
    """Rows of a model's logits that a label or a token of the prompt belongs to, by a fixed stride where they are many.

    Logits at t belong to the token at t + 1, but where labels lie beside their logits: in encoder-decoders, masked
    language models and classifiers of tokens. Outputs of one row a sequence (classifiers) count as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: tuple[Any, ...],
        named: dict[str, Any],
        logits: Callable[[Any], Tensor] | None,
    ) -> None:
        self._logits = logits
        config = getattr(model, "config", None)
        self._decodes = bool(getattr(config, "is_encoder_decoder", False))
        # virtual tokens come first, in a prompt that it makes: it is for it alone to say which logits lie behind them
        self._prompted = bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))
        self._classes = getattr(config, "num_labels", None)
        self._problem = getattr(config, "problem_type", None)
        self._given: tuple[int, ...] | None = None  # shape of its tokens
        self._beside = self._decodes or getattr(model, "loss_type", None) in ("ForMaskedLM", "ForTokenClassification")
        self._uses_cache = getattr(config, "use_cache", None) is not None
        self._accepts = _accepted(model)
        self._own = _parameters(model)
        embeddings = getattr(model, "get_output_embeddings", lambda: None)() if config is not None else None
        weight = getattr(embeddings, "weight", None)
        self._width = int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 2 else None
        self._tokens = False  # given to it; without any, labels need not lie along its logits: those of CTC do not
        self._valid: Tensor | None = None
        self._columns: Tensor | None = None
        if logits is None:
            self._choose(arguments, named)

    def _choose(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        takes = (name for name, p in self._own.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        whole = [x for x in arguments if isinstance(x, Mapping)]  # a batch that is given as one argument
        named = {key: x for batch in whole for key, x in batch.items()} | dict(zip(takes, arguments)) | named
        side = "decoder_" if self._decodes else ""
        names = f"{side}input_ids", f"{side}inputs_embeds"
        ids: Any = next((named[name] for name in names if isinstance(named.get(name), Tensor)), None)
        if ids is None and arguments and isinstance(arguments[0], Tensor) and not arguments[0].is_floating_point():
            ids = None if self._decodes else arguments[0]
        self._tokens = ids is not None
        if ids is not None:
            self._given = tuple(ids.shape[:2])
        labels, mask = named.get("labels"), named.get(f"{side}attention_mask")
        if isinstance(labels, Tensor) and labels.dim() == 2:
            valid = labels != -100
        elif isinstance(mask, Tensor) and mask.dim() == 2:
            valid = mask != 0
        elif ids is not None and ids.dim() >= 2:
            valid = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
        else:
            return
        shown = valid
        if not self._beside:
            valid = torch.cat([valid[:, 1:], torch.zeros_like(valid[:, :1])], 1)
        if (keep := named.get("logits_to_keep")) is not None:
            kept = _kept(keep, next((x for x in (ids, mask) if isinstance(x, Tensor)), valid), valid.device)
            if valid.shape[1] < kept.shape[1]:  # labels of these positions alone
                valid = torch.zeros_like(kept).masked_scatter(kept, valid)
            elif isinstance(labels, Tensor) or bool((valid & kept).any()):
                valid = valid & kept
            else:  # only the prediction of what comes after the sequence
                valid = shown & kept
        columns = valid.any(0).nonzero().flatten()
        if not len(columns):  # one that is not looked at costs less than all logits
            columns = columns.new_zeros(1)
        if self._width is not None:
            room = max(1, LOGITS_BYTES // (4 * self._width * len(valid)))
            columns = columns[:: -(-len(columns) // room) or 1]
        self._valid, self._columns = valid, columns

    def named(self, named: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments that make the model return logits of these positions, and nothing that a loss needs."""
        needed = {name for name, p in self._own.items() if p.default is p.empty}
        if self._decodes:
            needed.add("labels")
        kept = {k: v for k, v in named.items() if k not in DROPPED or k in needed}
        if self._uses_cache and ("use_cache" in kept or self._accepts("use_cache")):
            kept["use_cache"] = False
        # with labels it makes a loss, which takes logits of all of them
        able = self._columns is not None and "labels" not in kept and not self._prompted
        self._cut = able and self._accepts("logits_to_keep")
        if self._columns is not None:
            kept.pop("logits_to_keep", None)
        if self._cut:
            kept["logits_to_keep"] = self._columns
        return kept

    def rows(self, output: Any) -> tuple[Tensor, Tensor]:
        """The logits that the model returned, [P, V], and which of its rows count, int64 [R]: a copy would be large.

        Raises:
            Unusable: it holds no logits.
        """
        if self._logits is not None:
            return _all(self._logits(output))
        logits: Any = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise Unusable("its output has no `.logits`: give watch(model, logits=...) a function that makes them")
        if logits.dim() < 2 or (tuple(logits.shape) == self._given and logits.shape[1] != self._classes):
            raise Unusable(
                f"`.logits` of its output, of shape {tuple(logits.shape)}, are one number for each sample or token, "
                "which is no distribution: give watch(model, logits=...) a function that makes logits of the output"
            )
        if logits.dim() > 3:
            raise Unusable(
                f"`.logits` of its output have {logits.dim()} dimensions, of which any may be that of the classes: "
                "give watch(model, logits=...) a function that moves it to the end"
            )
        if logits.shape[-1] < 2 or (self._width is not None and logits.shape[-1] != self._width):
            raise Unusable(
                f"`.logits` of its output have {logits.shape[-1]} columns, which are no distribution over classes or "
                f"tokens{f' ({self._width})' * (self._width is not None)}: give watch(model, logits=...) a function "
                "that makes logits of the output"
            )
        if self._problem in ("regression", "multi_label_classification"):
            raise Unusable(
                f"`.logits` of its output are no distribution, by its config's problem_type={self._problem!r}: give "
                "watch(model, logits=...) a function that makes logits of the output"
            )
        if logits.dim() != 3 or self._valid is None or self._columns is None:
            return _all(logits)
        rows, columns = self._valid[:, self._columns].nonzero().unbind(1)
        if not self._cut or logits.shape[1] != len(self._columns):
            # virtual tokens of prompt tuning come first, and make the logits longer than the tokens
            first = logits.shape[1] - self._valid.shape[1]
            if first and not self._tokens:
                return _all(logits)
            if first < 0:
                raise Unusable("it returned logits of fewer positions than it was given tokens")
            columns = self._columns[columns] + first
        return _few(logits.reshape(-1, logits.shape[-1]), rows * logits.shape[1] + columns)


def _kept(keep: Any, whole: Tensor, device: torch.device) -> Tensor:
    """Positions whose logits training asked for, as transformers' `logits_to_keep` says it: bool [B, T], on `device`.

    Args:
        keep: so many of the last ones, 0 for all; a slice or indices, int64 [K] or [B, K]; or bool [T] or [B, T].
        whole: [B, T, ...], what the model was given.
    """
    kept = torch.zeros(whole.shape[:2], dtype=torch.bool, device=device)
    if isinstance(keep, Tensor) and keep.dim():
        keep = keep.to(device)
        if keep.dtype == torch.bool:
            return kept.logical_or_(keep)
        return kept.scatter_(1, keep.remainder(kept.shape[1]).expand(len(kept), -1), True)
    kept[:, keep if isinstance(keep, (slice, list)) else slice(-int(keep), None)] = True
    return kept


def _few(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """As many of the rows as there is room for, by a fixed stride."""
    room = max(1, LOGITS_BYTES // (4 * logits.shape[-1]))
    return logits, rows[:: -(-len(rows) // room) or 1]


def _all(logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.reshape(-1, logits.shape[-1])
    return _few(logits, torch.arange(len(logits), device=logits.device))


def _accepted(model: nn.Module) -> Callable[..., bool]:
    """Whether the model's forward takes a keyword argument: itself, or the inner one to which it passes them on."""
    own: list[Mapping[str, inspect.Parameter]] = []
    inner: Any = model
    for _ in range(4):
        own.append(_parameters(inner))
        inner = getattr(inner, "base_model", None)
        inner = getattr(inner, "model", inner)
        if not isinstance(inner, nn.Module) or not _passes_on(own[-1]):
            break

    def accepts(name: str) -> bool:
        if name in own[0]:
            return True
        return _passes_on(own[0]) and any(name in parameters for parameters in own)

    return accepts


def _parameters(module: Any) -> Mapping[str, inspect.Parameter]:
    """Of its forward."""
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # one that is not written in Python
        return {}


def _passes_on(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())
