"""Logits extrapolation: next-token logits of two checkpoints, carried on along the line from the earlier to the later.

    logits = (1 + alpha) * logits_2 - alpha * logits_1

at every decoding step, in transformers' `generate`: "Linear Dynamics in the RLVR Training of LLMs" (arXiv 2601.04537),
logits extrapolation. With checkpoints of steps t_1 < t_2 it aims at step t_2 + alpha * (t_2 - t_1) of the run. Needs
transformers; `import extraopt` does not import this file.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor

CACHES = ("cache", "past_key_values", "cache_params", "past_buckets_states", "mems")  # as models name it
OTHER_STATES = {"state"}  # rwkv's, which nothing reorders
NO_INPUTS = {"logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"}


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
    """Let `generate` choose tokens by `(1 + alpha) * logits_2 - alpha * logits_1` (arXiv 2601.04537)::

        extrapolation = LogitsExtrapolation(earlier_model, alpha=0.5, attention_mask=inputs["attention_mask"])
        model.generate(**inputs, logits_processor=[extrapolation])

    logits_2 are the generating model's, logits_1 the earlier model's for the same tokens, computed here with a KV cache
    of its own: one forward pass of one token for each step, with the inputs that the earlier model's own `generate`
    would give it. Works in greedy decoding, sampling, beam search and assisted decoding, with batches padded on the
    left and with several returned sequences. Models whose forward takes no cache, and those whose cache can't follow
    the beams, are run over the whole sequence where they must.

    An object serves one call of `generate`. It may serve another one for the same prompts, or for prompts without
    padding; for others give it their mask by `reset`, which also frees the cache. After a change of the earlier model's
    weights call `reset` too.

    `generate` applies its processors in this order: those that its configuration asks for (`repetition_penalty`,
    `min_new_tokens`, `bad_words_ids`, ...), then the list given to it, then temperature, top-k, top-p and their like.
    So temperature and top-p act on the extrapolated logits. Tokens ruled out before stay ruled out, but finite changes
    made before (`repetition_penalty`, `sequence_bias`) are extrapolated too, (1 + alpha) times as strong: to have them
    act on the extrapolated logits, put their processor into the list behind this one instead of into the configuration.

    What comes out has the normaliser (log-sum-exp) of what came in: in beam search, whose scores are log-probabilities,
    it is log-probabilities again.

    Text only: the earlier model sees the token ids, not images or embeddings. Both models should be in eval mode, and
    be two models: between a model and itself there is nothing to extrapolate.

    Args:
        earlier_model: a transformers causal language model, or a PEFT one, with the same tokens as the generating
            model; on any device, offloaded or not, in any dtype (logits are mixed in float32, on the generating
            model's device). For an adapter's own base model use `LogitsExtrapolation.adapter_off`: it needs no second
            copy.
        alpha: how far beyond the generating model, in distances between the two; 0 is plain `generate`, -1 the earlier
            model. No default: it depends on the run.
        attention_mask: int or bool [prompts, tokens], 0 for padding; None: no prompt is padded.

    Raises:
        ValueError: an encoder-decoder model, soft prompts (PEFT prompt learning), or an alpha that is not finite.
    """

    def __init__(self, earlier_model: torch.nn.Module, alpha: float, attention_mask: Tensor | None = None):
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
        self._keepers: list[Any] = [module for module in self._model.modules() if "rope_deltas" in vars(module)]
        self._switch: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.reset(attention_mask)

    @classmethod
    def adapter_off(cls, model: Any, alpha: float, attention_mask: Tensor | None = None) -> LogitsExtrapolation:
        """Take a PEFT model without its adapter for the earlier model, while the model itself generates::

            model.generate(**inputs, logits_processor=[LogitsExtrapolation.adapter_off(model, alpha=0.5)])

        There is one copy of the weights; the adapter is off during the earlier model's forward passes only, also when
        one of them fails.

        Args:
            model: `peft.PeftModel` with an adapter that can be switched off (LoRA and its like).
            alpha: see the class.
            attention_mask: see the class.

        Raises:
            TypeError: not a PEFT model.
            ValueError: see the class.
        """
        if not hasattr(model, "disable_adapter"):
            raise TypeError(f"adapter_off takes a peft.PeftModel, not a {type(model).__name__}")
        processor = cls(model, alpha, attention_mask)
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
        """Forget the sequences so far and free the cache: before other prompts.

        Args:
            attention_mask: int or bool [prompts, tokens], of the prompts that come next; None: none of them is padded.
        """
        self._mask = attention_mask
        self._prompt: Tensor | None = None  # int [rows, tokens] that the mask belongs to
        self._padding: Tensor | None = None  # bool [rows, tokens], False for padding; None: nothing is padding
        self._ids: Tensor | None = None  # int [rows, tokens] that the earlier model has seen
        self._inputs: dict[str, Any] = {}  # what its `generate` would carry from step to step: cache, positions, mask
        self._kept: list[Any] = [None] * len(self._keepers)  # what it holds in modules between two steps

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mix.

        Args:
            input_ids: int [rows, tokens], prompts and what was generated so far.
            scores: float [rows, vocabulary], the generating model's logits or log-probabilities for the next token.

        Returns:
            float [rows, vocabulary], of `scores`' dtype and on its device.

        Raises:
            ValueError: the ids or the mask can't tell what the generating model saw.
        """
        earlier = self._logits(input_ids).to(scores.device, scores.dtype)
        mixed = extrapolate(scores, earlier, self.alpha)
        shift = scores.logsumexp(-1, keepdim=True) - mixed.logsumexp(-1, keepdim=True)
        return mixed + torch.where(shift.isfinite(), shift, 0)

    def _logits(self, ids: Tensor) -> Tensor:
        """The earlier model's logits for the next token, [rows, its vocabulary]."""
        parents = None if self._ids is None else _parents(self._ids, ids, self._padding)
        first = parents is None or not self._follow(parents)
        if first:  # a new prompt, or a decoding method that goes back
            self._start(ids)
        self._ids = ids
        return self._forward(ids, first)

    def _follow(self, parents: Tensor) -> bool:
        """Let the cache follow the beams; False if it can't."""
        if torch.equal(parents, torch.arange(len(parents), device=parents.device)):
            return True
        held = [name for name in CACHES if self._inputs.get(name) is not None]
        for name in held:
            cache = self._inputs[name]
            if hasattr(self._model, "_reorder_cache"):
                self._inputs[name] = self._model._reorder_cache(cache, parents)
            elif hasattr(cache, "reorder_cache"):
                cache.reorder_cache(parents)
            else:
                return False
        return not self._inputs.keys() & OTHER_STATES

    def _start(self, ids: Tensor) -> None:
        """Take up a prompt, or take it up again."""
        if not ids.shape[1]:
            raise ValueError("a prompt without token ids: pass the whole prompt as input_ids, no embeddings")
        prompt = self._prompt
        if prompt is None or len(prompt) != len(ids) or not torch.equal(prompt, ids[:, : prompt.shape[1]]):
            if prompt is not None and self._mask is not None:
                raise ValueError("other prompts than the attention mask is for: call reset(attention_mask) before them")
            self._prompt, self._padding = ids, self._read_mask(ids)
        inner = self._model
        if not hasattr(inner, "prepare_inputs_for_generation"):
            raise TypeError(f"{type(inner).__name__} gives no logits: load it with its language-model head")
        device = _device(inner, ids.device)
        ids = ids.to(device)
        mask = torch.ones_like(ids)
        if self._padding is not None:
            mask[:, : self._padding.shape[1]] = self._padding.to(device, ids.dtype)
        takes = set(inspect.signature(inner.forward).parameters)
        given = {"input_ids": ids, **({"attention_mask": mask} if "attention_mask" in takes else {})}
        if self._padding is not None and "attention_mask" not in takes:
            raise ValueError(f"{type(inner).__name__} takes no attention mask: give it prompts one by one")
        with self._switch(), self._modules_state(fresh=True):
            self._inputs = _prepared(inner, given)

    def _read_mask(self, ids: Tensor) -> Tensor | None:
        """What of the ids is no padding, by row; None if nothing is."""
        if self._mask is None:
            self._refuse_doubtful_padding(ids)
            return None
        mask = self._mask != 0
        if mask.shape[1] > ids.shape[1]:
            raise ValueError(
                f"the attention mask has {mask.shape[1]} positions, but there are {ids.shape[1]} token ids: pass the "
                "whole prompt as input_ids, no embeddings and no cache of tokens that are not among them"
            )
        if ids.shape[0] % mask.shape[0] or mask.shape[1] != ids.shape[1]:
            raise ValueError(f"attention mask of shape {tuple(mask.shape)} for ids of shape {tuple(ids.shape)}")
        return None if mask.all() else mask.repeat_interleave(ids.shape[0] // mask.shape[0], 0).to(ids.device)

    def _refuse_doubtful_padding(self, ids: Tensor) -> None:
        """Without a mask nobody says what is padding, and prompts may begin with the very token that pads."""
        config = getattr(self._model, "generation_config", None)
        for name in ("pad_token_id", "eos_token_id"):
            tokens = getattr(config, name, None)
            for token in tokens if isinstance(tokens, list) else [tokens]:
                if token is not None and (ids[:, 0] == token).any():
                    raise ValueError(
                        f"a prompt begins with {name} {token}, which may be padding: give LogitsExtrapolation the "
                        "prompts' attention_mask, or call reset(attention_mask) before them"
                    )

    def _forward(self, ids: Tensor, first: bool) -> Tensor:
        model = self._model
        ids = ids.to(_device(model, ids.device))
        one = None if first or not self._inputs.get("use_cache") else 1
        with self._switch(), self._modules_state():
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=one, is_first_iteration=first, **self._inputs
            )
            outputs = model(**inputs, return_dict=True)
        if getattr(outputs, "logits", None) is None:
            raise TypeError(f"{type(model).__name__} gives no logits: load it with its language-model head")
        self._inputs = model._update_model_kwargs_for_generation(outputs, self._inputs, is_encoder_decoder=False)
        logits: Tensor = outputs.logits[:, -1]
        return logits

    @contextmanager
    def _modules_state(self, fresh: bool = False) -> Iterator[None]:
        """Keep apart what a model keeps in its modules between steps: it may answer others meanwhile.

        Vision-language models keep there how far an image moved the positions behind it.
        """
        theirs = [module.rope_deltas for module in self._keepers]
        try:
            for module, value in zip(self._keepers, self._kept):
                module.rope_deltas = None if fresh else value
            yield
            self._kept = [module.rope_deltas for module in self._keepers]
        finally:
            for module, value in zip(self._keepers, theirs):
                module.rope_deltas = value


def _prepared(model: Any, given: dict[str, Tensor]) -> dict[str, Any]:
    """What a model's own `generate` would start its decoding loop with: cache, positions, mask.

    `custom_generate` hands them to a function in the loop's place: https://huggingface.co/docs/transformers/generation_strategies.
    The model's generation defaults are put aside: they are those of its own answers.
    """
    found: dict[str, Any] = {}

    def keep(_: Any, input_ids: Tensor, **inputs: Any) -> Tensor:
        found.update({name: value for name, value in inputs.items() if name not in NO_INPUTS})
        return input_ids

    defaults = model.generation_config
    try:
        model.generation_config = GenerationConfig(pad_token_id=0, max_new_tokens=1)  # type: ignore[no-untyped-call]
        GenerationMixin.generate(model, **given, generation_config=model.generation_config, custom_generate=keep)
    finally:
        model.generation_config = defaults
    return found


def _device(model: Any, default: torch.device) -> torch.device:
    """Where a model takes its inputs; its weights may lie elsewhere, or on no device until a layer runs."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), default)


def _inner(model: Any) -> Any:
    """The transformers model inside wrappers: PEFT (whose layers run all the same), torch.compile, data parallel."""
    if hasattr(model, "get_base_model"):
        return _inner(model.get_base_model())
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return _inner(model.module)
    return _inner(model._orig_mod) if hasattr(model, "_orig_mod") else model


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
