"""Load the models, adapters and tokenizers that checkpoints hold, by transformers and PEFT."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .read import open_checkpoint
from .safety import CheckpointError, read_json

Prompt = str | list[dict[str, str]]  # a text, or messages with role and content


def base_of(source: str, base: str | None) -> str | None:
    """The model under an adapter: `base`, or the one that its config names; None for a whole model.

    Raises:
        CheckpointError: The adapter's config can't be read or names none.
    """
    config = Path(source) / "adapter_config.json"
    if not os.path.isfile(config):
        return None
    try:
        named = base or read_json(config)["base_model_name_or_path"]
    except KeyError as error:
        raise CheckpointError(f"{config}: can't be read ({error})") from error
    if not named:
        raise CheckpointError(f"{source}: the adapter names no base model; give it with --base")
    return str(named)


def load_model(source: str, base: str | None, dtype: str | torch.dtype, device: str, trust_remote_code: bool) -> Any:
    """A causal language model in eval mode, with its adapter if `source` is one.

    Args:
        source: Folder or hub id of a model, or folder of an adapter.
        base: Model under the adapter, instead of the one that its config names.
        dtype: Of the weights; "auto" as they are stored.
        device: Where to.
        trust_remote_code: Run code that comes with the checkpoint.

    Raises:
        CheckpointError: It can't be loaded.
    """
    from transformers import AutoModelForCausalLM

    under = base_of(source, base)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            under or source, dtype=dtype, trust_remote_code=trust_remote_code
        )
        if under is not None:
            from peft import PeftModel

            _resize(model, Path(source), trust_remote_code)
            model = PeftModel.from_pretrained(model, source)
        return model.to(device).eval()
    except Exception as error:  # whatever a damaged folder makes the libraries under this raise
        of = f" on {under}" if under else ""
        raise CheckpointError(f"{source}{of}: no causal language model can be loaded ({str(error)[:300]})") from error


def _resize(model: Any, adapter: Path, trust_remote_code: bool) -> None:
    """Give a base model the rows for tokens that were added in an adapter's training, as PEFT's AutoPeftModel does.

    The adapter's own tensors tell how many, padding included; where it has none of the embeddings, its tokenizer does.
    """
    places: list[tuple[str, int]] = []  # what a name goes on with, and which dimension counts tokens
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for name in (name for name, module in model.named_modules() if module is layer and layer is not None):
            ends = (("weight", 0), ("base_layer.weight", 0), ("lora_B.weight", 0), ("lora_embedding_A", 1))
            places += [(f"base_model.model.{name}.{end}", dim) for end, dim in ends]
    held = open_checkpoint(adapter)
    sizes = [held.shape(name)[dim] for name, dim in places if name in held.infos]
    size = model.get_input_embeddings().weight.shape[0]
    if not sizes and os.path.isfile(adapter / "tokenizer_config.json"):
        tokenizer = load_tokenizer(str(adapter), None, trust_remote_code)
        sizes = [len(tokenizer)] if tokenizer is not None and len(tokenizer) > size else []
    if sizes and sizes[0] != size:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # rows that no adapter holds are drawn: the same for every adapter of a run
            model.resize_token_embeddings(sizes[0])


def load_tokenizer(source: str, base: str | None, trust_remote_code: bool) -> Any | None:
    """The tokenizer of a checkpoint, or else of the model under it; None if neither has one."""
    from transformers import AutoTokenizer

    for folder in filter(None, (source, base_of(source, base))):
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception:  # none there; an adapter's may lie with the model under it
            continue
    return None


def check_tokens(model: Any, rows: Iterable[list[int]], longest: int) -> None:
    """Refuse prompts that are too long for a model, or hold tokens that it does not know.

    Raises:
        CheckpointError: They do.
    """
    room = getattr(model.config, "max_position_embeddings", None)
    if room and longest > room:
        raise CheckpointError(f"the longest prompt and its response make {longest} tokens; the model takes {room}")
    highest, size = max(map(max, rows)), model.get_input_embeddings().weight.shape[0]
    if highest >= size:
        raise CheckpointError(f"the tokenizer gives token {highest}, but the model knows {size}")


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The tokens of a text, as the tokenizer begins one, or of messages, through its chat template.

    An end of text that the tokenizer appends is left out: a prompt goes on.

    Raises:
        CheckpointError: There is no chat template, or it refuses the messages.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        bare = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ends = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)} - {None}
        while len(ids) > len(bare) and ids[-1] in ends and ids[-len(bare) :] != bare:
            ids.pop()
        return ids
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError("the tokenizer has no chat template: give texts, not messages")
    try:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template can raise anything
        raise CheckpointError(f"the chat template refuses a prompt: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
