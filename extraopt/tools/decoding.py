"""Logits extrapolation: next-token logits of two checkpoints, carried on along the line from the earlier to the later.

    logits = (1 + alpha) * logits_2 - alpha * logits_1

at every decoding step, in transformers' `generate`: "Linear Dynamics in the RLVR Training of LLMs" (arXiv 2601.04537),
logits extrapolation. With checkpoints of steps t_1 < t_2 it aims at step t_2 + alpha * (t_2 - t_1) of the run. Needs
transformers; `import extraopt` does not import this file.
"""

from __future__ import annotations

import inspect
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


def extrapolate(later: Tensor, earlier: Tensor, alpha: float) -> Tensor:
    """Return `(1 + alpha) * later - alpha * earlier`, for rows that are known up to a constant.

    A normaliser is such a constant, so logits and log-probabilities may be mixed as they come. What only one model can
    say is not extrapolated: a token that `later` rules out (-inf) stays ruled out; a token that `earlier` rules out or
    does not know (fewer columns) keeps the probability that `later` gives it, up to the common normaliser; a token
    that `later` does not know is dropped. Infinities are never subtracted from each other.

    Args:
        later: float [rows, tokens].
        earlier: float [rows, tokens of its model], same device and dtype.
        alpha: how far to go, in distances between the two.

    Returns:
        float [rows, tokens], of `later`'s dtype.
    """
    missing = later.shape[-1] - earlier.shape[-1]
    if missing:  # columns that pad an embedding, or tokens added between the two checkpoints
        earlier = torch.nn.functional.pad(earlier, (0, missing), value=-math.inf)
    silent = earlier == -math.inf
    if silent.any():
        shift = earlier.logsumexp(-1, keepdim=True) - later.logsumexp(-1, keepdim=True)
        earlier = torch.where(silent, later + torch.where(shift.isfinite(), shift, 0), earlier)
    return torch.where(later.isinf(), later, (1 + alpha) * later - alpha * earlier)


class LogitsExtrapolation(LogitsProcessor):
    """Let `generate` choose tokens by `(1 + alpha) * logits_2 - alpha * logits_1` (arXiv 2601.04537).

        model.generate(**inputs, logits_processor=[LogitsExtrapolation(earlier_model, alpha=0.5)])

    logits_2 are the generating model's, logits_1 the earlier model's for the same tokens, computed here with a KV cache
    of its own: one forward pass of one token for each step. Works in greedy decoding, sampling and beam search, with
    batches padded on the left, with several returned sequences, and again and again with the same object; a new call of
    `generate` starts afresh, and the cache is dropped when the call ends. Models whose forward takes no cache are run
    over the whole sequence at every step.

    `generate` applies its processors in this order: those that its configuration asks for (`repetition_penalty`,
    `min_new_tokens`, `bad_words_ids`, ...), then the list given to it, then temperature, top-k, top-p and their like.
    So temperature and top-p act on the extrapolated logits. Tokens ruled out before stay ruled out, but finite changes
    made before (`repetition_penalty`, `sequence_bias`) are extrapolated too, (1 + alpha) times as strong: to have them
    act on the extrapolated logits, put their processor into the list behind this one instead of into the configuration.

    In beam search scores are log-probabilities, and what comes out is normalised again over the tokens still allowed.

    Text only: the earlier model sees the token ids, not images or embeddings. Both models should be in eval mode.

    Args:
        earlier_model: a transformers causal language model, or a PEFT one, with the same tokens as the generating
            model; on any device, in any dtype (logits are mixed in float32, on the generating model's device).
            For an adapter's own base model use `LogitsExtrapolation.adapter_off`: it needs no second copy.
        alpha: how far beyond the generating model, in distances between the two; 0 is plain `generate`, -1 the earlier
            model. No default: it depends on the run.

    Raises:
        ValueError: an encoder-decoder model, soft prompts (PEFT prompt learning), or an alpha that is not finite.
    """

    def __init__(self, earlier_model: torch.nn.Module, alpha: float):
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}: give a finite number")
        for config in getattr(earlier_model, "peft_config", {}).values():
            if config.is_prompt_learning:
                raise ValueError(f"{config.peft_type} adapters put soft prompts before the tokens: not supported here")
        self.earlier_model = earlier_model
        self.alpha = alpha
        self._model: Any = _inner(earlier_model)
        if getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"{type(self._model).__name__} is an encoder-decoder model: give a causal language model")
        self._takes = set(inspect.signature(self._model.forward).parameters)
        self._cache_name = next((name for name in ("cache", "past_key_values") if name in self._takes), None)
        self._switch: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.reset()

    @classmethod
    def adapter_off(cls, model: Any, alpha: float) -> LogitsExtrapolation:
        """Take a PEFT model without its adapter for the earlier model, while the model itself generates.

            model.generate(**inputs, logits_processor=[LogitsExtrapolation.adapter_off(model, alpha=0.5)])

        There is one copy of the weights; the adapter is off during the earlier model's forward passes only, also when
        one of them fails.

        Args:
            model: `peft.PeftModel` with an adapter that can be switched off (LoRA and its like).
            alpha: see the class.

        Raises:
            TypeError: not a PEFT model.
            ValueError: see the class.
        """
        if not hasattr(model, "disable_adapter"):
            raise TypeError(f"adapter_off takes a peft.PeftModel, not a {type(model).__name__}")
        processor = cls(model, alpha)
        layers = [layer for layer in model.modules() if hasattr(layer, "_disable_adapters")]
        plain = ("peft.tuners.tuners_utils", "peft.utils.other")  # switching is a flag, not a rewrite of weights
        if not layers or any(type(layer).enable_adapters.__module__ not in plain for layer in layers):
            kinds = sorted({str(config.peft_type) for config in model.peft_config.values()})
            raise ValueError(f"adapters of kind {', '.join(kinds)} can't be switched off and on between two tokens")
        if any(getattr(layer, "merged", False) for layer in layers):
            raise ValueError("the adapter is merged into the weights: call model.unmerge_adapter() first")
        for name, config in model.peft_config.items():
            if getattr(config, "bias", "none") != "none":
                raise ValueError(f"adapter {name} trained biases of the model itself (bias={config.bias!r})")
        processor._switch = lambda: _switched_off(layers)
        return processor

    def reset(self, attention_mask: Tensor | None = None) -> None:
        """Forget the sequences so far and free the cache.

        `generate` needs no such call. In a loop of your own, call it before each prompt.

        Args:
            attention_mask: int or bool [rows, tokens], of the prompt that comes next, if it is padded.
        """
        self._call: Callable[[], Any] = lambda: None  # a weak reference to what lives as long as a call of generate
        self._ids: Tensor | None = None  # int [rows, tokens] that the earlier model has seen
        self._mask = attention_mask  # of the prompt; None: nothing is padding
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mix.

        Args:
            input_ids: int [rows, tokens], prompts and what was generated so far.
            scores: float [rows, vocabulary], the generating model's logits or log-probabilities for the next token.

        Returns:
            float [rows, vocabulary], of `scores`' dtype and on its device.

        Raises:
            ValueError: the ids can't tell what the generating model saw, or the generating model is the earlier model.
        """
        loop = _generate_loop()
        earlier = self._logits(input_ids, loop).to(scores.device, scores.dtype)
        mixed = extrapolate(scores, earlier, self.alpha)
        return mixed.log_softmax(-1) if loop is not None and loop.beams > 1 else mixed

    def _logits(self, ids: Tensor, loop: _Loop | None) -> Tensor:
        """The earlier model's logits for the next token, [rows, its vocabulary]."""
        parents = None
        if self._ids is not None and self._call() is (loop and loop.config):
            parents = _parents(self._ids, ids, self._mask)
        if parents is None:  # a new prompt, or a decoding method that goes back
            self._start(ids, loop)
        elif self._cache is not None and not torch.equal(parents, torch.arange(len(parents), device=parents.device)):
            self._cache.reorder_cache(parents.to(self._model.device))
        self._ids = ids
        return self._forward(ids if self._cache is None else ids[:, -1:])

    def _start(self, ids: Tensor, loop: _Loop | None) -> None:
        """Take up a new prompt: what in it is padding?"""
        if loop is not None:
            if _inner(loop.model) is self._model and self._switch is nullcontext:
                raise ValueError(
                    "the earlier model is the generating model itself: give a copy with the earlier weights, or "
                    "LogitsExtrapolation.adapter_off(model, alpha) to go beyond an adapter"
                )
            if loop.length > ids.shape[1]:
                raise ValueError(
                    f"generate has seen {loop.length} positions but {ids.shape[1]} token ids: pass the whole prompt as "
                    "input_ids, no embeddings and no cache of tokens that are not among them"
                )
            self.reset(loop.mask)
            self._call = weakref.ref(loop.config, lambda _: self.reset())
        elif self._ids is not None or self._mask is None:
            self.reset()
            self._refuse_doubtful_padding(ids)
        if self._mask is not None:
            mask = self._mask[:, : ids.shape[1]] != 0
            if ids.shape[0] % mask.shape[0] or (loop is None and mask.shape[1] != ids.shape[1]):
                raise ValueError(f"attention mask of shape {tuple(mask.shape)} for ids of shape {tuple(ids.shape)}")
            mask = mask.repeat_interleave(ids.shape[0] // mask.shape[0], 0).to(self._model.device)
            self._mask = None if mask.all() else mask
            if self._mask is not None and "attention_mask" not in self._takes:
                raise ValueError(f"{type(self._model).__name__} takes no attention mask: give it prompts one by one")

    def _refuse_doubtful_padding(self, ids: Tensor) -> None:
        """Outside `generate` nobody says what is padding, and prompts may begin with the very token that pads."""
        config = getattr(self._model, "generation_config", None)
        for name in ("pad_token_id", "eos_token_id"):
            tokens = getattr(config, name, None)
            for token in tokens if isinstance(tokens, list) else [tokens]:
                if token is not None and (ids[:, 0] == token).any():
                    raise ValueError(
                        f"a prompt begins with {name} {token}, which may be padding: outside generate, say so by "
                        "reset(attention_mask) before each prompt"
                    )

    def _forward(self, ids: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids.to(self._model.device)}
        if self._mask is not None:  # as generate does it: an attention mask only if something is masked
            assert self._ids is not None
            mask = torch.nn.functional.pad(self._mask, (0, self._ids.shape[1] - self._mask.shape[1]), value=True)
            inputs["attention_mask"] = mask.long()
            if "position_ids" in self._takes:
                inputs["position_ids"] = (mask.long().cumsum(-1) - 1).masked_fill(~mask, 0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        if self._cache_name is not None:
            inputs |= {self._cache_name: self._cache, "use_cache": True}
        with self._switch():
            outputs = self._model(**inputs, return_dict=True)
        if getattr(outputs, "logits", None) is None:
            raise TypeError(f"{type(self._model).__name__} gives no logits: load it with its language-model head")
        if self._cache_name is not None:
            self._cache = getattr(outputs, self._cache_name, None)
        logits: Tensor = outputs.logits[:, -1]
        return logits


@dataclass(frozen=True)
class _Loop:
    """What a decoding loop of `generate` knows and does not tell its logits processors."""

    model: Any
    config: Any  # of this call of generate only, and gone when it ends
    mask: Tensor | None  # int [rows, tokens or more], of the prompt; None: nothing is padding
    length: int  # tokens that the model has seen
    beams: int


def _generate_loop() -> _Loop | None:
    """Look up the call stack for the decoding loop that is asking; None outside `generate`.

    A logits processor is handed neither the attention mask nor a sign that a new prompt begins, and token ids don't
    tell: prompts may begin with the very token that pads (GPT-2, Qwen and Llama 3 pad with an end-of-text token). So
    the loop's own variables are read, once for each step, and never written.
    """
    frame = sys._getframe(1)
    while (caller := frame.f_back) is not None:
        frame, names = caller, caller.f_code.co_varnames
        if "model_kwargs" in names and "generation_config" in names:
            found = frame.f_locals
            inputs, positions = found["model_kwargs"], found["model_kwargs"].get("position_ids")
            return _Loop(
                model=found.get("self", found.get("model")),
                config=found["generation_config"],
                mask=inputs.get("attention_mask"),
                length=0 if positions is None else positions.shape[-1] - 1,  # the next token has its position already
                beams=found["generation_config"].num_beams or 1,
            )
    return None


def _inner(model: Any) -> Any:
    """The transformers model inside of PEFT's and torch.compile's wrappers, whose forward runs PEFT's layers too."""
    if hasattr(model, "get_base_model"):
        return _inner(model.get_base_model())
    return getattr(model, "_orig_mod", model)


@contextmanager
def _switched_off(layers: list[Any]) -> Iterator[None]:
    """Run without these PEFT layers' adapters.

    `PeftModel.disable_adapter` would do, but it asks every layer for its status first and rewrites every
    `requires_grad`, which at each token takes longer than a small model's forward pass, and leaves the adapter
    trainable that was not.
    """
    were = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, were):
            layer._disable_adapters = was


def _parents(before: Tensor, now: Tensor, mask: Tensor | None) -> Tensor | None:
    """Find the row of `before` that each row of `now` continues by one token; None if some row continues none.

    Beam search reorders its rows, and beams may share a prefix. Rows with the same ids and the same padding have the
    same keys and values, so any of them will do.
    """
    if now.shape != (before.shape[0], before.shape[1] + 1):
        return None
    prefix = now[:, :-1]
    if torch.equal(prefix, before):
        return torch.arange(len(now), device=now.device)
    same = torch.stack([(before == row).all(-1) for row in prefix])
    if mask is not None:  # a row never leaves the beams of its prompt, so its padding stays
        same &= torch.stack([(mask == row).all(-1) for row in mask]).to(same.device)
    return same.int().argmax(-1) if same.any(-1).all() else None
