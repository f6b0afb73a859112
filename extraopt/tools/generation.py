"""What `extraopt generate` does: load two checkpoints, and answer prompts with the logits beyond the later one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.utils import logging

from .checkpoints import CheckpointError
from .checkpoints.models import Prompt, base_of, check_tokens, encode_prompt, load_model, load_tokenizer
from .checkpoints.safety import read_text
from .decoding import LogitsExtrapolation


def be_quiet() -> None:
    """Keep transformers' warnings and progress bars out of a command's output."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_pair(
    later: str,
    earlier: str | None,
    alpha: float,
    *,
    base: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any, LogitsExtrapolation]:
    """Load two checkpoints, in the dtype they are stored in, and what carries the one beyond the other.

    Args:
        later: folder or hub id of a model, or folder of a PEFT adapter.
        earlier: the same; None, for an adapter: the model under it. That needs no second copy of the weights, nor does
            an `earlier` that names this model.
        alpha: see `LogitsExtrapolation`.
        base: model under the adapters, instead of the one that their configs name.
        device: default: the first CUDA device, else the CPU.
        trust_remote_code: run code that comes with the checkpoints.

    Returns:
        model, in eval mode; tokenizer; processor for the model's `generate`.

    Raises:
        CheckpointError: a model can't be loaded, or the two don't fit together.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    under = base_of(later, base)
    if earlier is None and under is None:
        raise CheckpointError(f"{later}: a whole model, so say with --earlier which model to go beyond")
    if earlier is not None and (earlier == later or os.path.realpath(earlier) == os.path.realpath(later)):
        raise CheckpointError(f"{later} and --earlier {earlier} are the same: give an earlier checkpoint")
    tokenizer = load_tokenizer(later, base, trust_remote_code)
    if tokenizer is None:
        raise CheckpointError(f"no tokenizer in {later}{f' nor in {under}' if under else ''}")
    model = load_model(later, base, "auto", device, trust_remote_code)
    try:
        if under is not None and (
            earlier is None or earlier == under or Path(earlier).resolve() == Path(under).resolve()
        ):
            return model, tokenizer, LogitsExtrapolation.adapter_off(model, alpha)
        assert earlier is not None
        theirs = load_tokenizer(earlier, base, trust_remote_code)
        ours = tokenizer.get_vocab()
        if theirs is not None and any(ours.get(token) != i for token, i in theirs.get_vocab().items()):
            raise CheckpointError(f"{earlier}: its tokens are not those of {later}")
        processor = LogitsExtrapolation(load_model(earlier, base, "auto", device, trust_remote_code), alpha)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{earlier or later}: {error}") from error
    return model, tokenizer, processor


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts from a file.

    Args:
        path: `.jsonl`: objects with "prompt" (a text or messages) or "messages"; any other text file: one on each line.

    Raises:
        CheckpointError: what is wrong, and in which line.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: can't be read as text ({error})") from error
    if path.suffix != ".jsonl":
        found: list[Prompt] = [line for line in lines if line.strip()]
    else:
        found = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                prompt = row["messages"] if "messages" in row else row["prompt"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(f'{path}, line {number}: no object with "prompt" or "messages"') from error
            if not isinstance(prompt, (str, list)) or not prompt:
                raise CheckpointError(f"{path}, line {number}: the prompt is neither a text nor messages")
            found.append(prompt)
    if not found:
        raise CheckpointError(f"{path}: no prompts in it")
    return found


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """What ends an answer: the model's stop tokens and the tokenizer's, which a chat or an adapter may have changed."""
    stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(stops if isinstance(stops, list) else [stops]) | {tokenizer.eos_token_id}
    return sorted(found - {None})


@contextmanager
def _defaults_of(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Put a model's own generation defaults aside: `generate` takes from them all that its arguments leave open."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    holders = [holder for holder in {id(m): m for m in (model, inner)}.values() if hasattr(holder, "generation_config")]
    theirs = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = config
        yield
    finally:
        for holder, its in zip(holders, theirs):
            holder.generation_config = its


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    processor: LogitsProcessor,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    chat: bool | None = None,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Answer prompts with a processor in the chain. Of the model's own generation defaults only its stop tokens count.

    An answer ends at one of them, or at the tokenizer's end of text.

    Args:
        model: a causal language model of transformers or PEFT.
        tokenizer: the model's.
        prompts: texts or messages.
        processor: such as `LogitsExtrapolation`.
        max_new_tokens: at most, for each prompt.
        temperature: 0: greedy, or plain beam search.
        top_p: sample from the most likely tokens that together have this probability.
        num_beams: 1: no beam search.
        seed: of the samples, which also depend on the batch size.
        batch_size: prompts at once.
        chat: put texts into the tokenizer's chat template as a user's message; None: if it has one.
        progress: called with (tokens done, tokens at most).

    Returns:
        For each prompt: "prompt", "completion", "tokens" (generated, with the stop token) and "stopped" (before the
        limit).

    Raises:
        CheckpointError: prompts that the tokenizer or the model can't take.
    """
    if chat or (chat is None and getattr(tokenizer, "chat_template", None)):
        asked: list[Prompt] = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    else:
        asked = list(prompts)
    rows = [encode_prompt(tokenizer, prompt) for prompt in asked]
    if empty := [prompt for prompt, row in zip(prompts, rows) if not row]:
        raise CheckpointError(f"the prompt {empty[0]!r} has no tokens")
    check_tokens(model, rows, max(map(len, rows)) + max_new_tokens)

    stops = stop_tokens(model, tokenizer)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "eos_token_id": stops or None}
    if temperature > 0:
        how |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    else:
        how |= {"do_sample": False}
    how["pad_token_id"] = 0  # any will do: the mask says what is padding, and what follows a stop token is cut off
    config = GenerationConfig(**how)  # type: ignore[no-untyped-call]
    torch.manual_seed(seed)
    results = []
    for begin in range(0, len(rows), batch_size):
        batch = rows[begin : begin + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)

        if isinstance(processor, LogitsExtrapolation):
            processor.reset(mask)

        def tick(now: Tensor, _: Any, begin: int = begin, rows_now: int = len(batch), width: int = width) -> Tensor:
            done = begin * max_new_tokens + rows_now * (now.shape[1] - width)
            progress(done, len(rows) * max_new_tokens)
            return torch.zeros(len(now), dtype=torch.bool, device=now.device)

        with _defaults_of(model, config):
            output = model.generate(
                input_ids=ids, attention_mask=mask, logits_processor=[processor], stopping_criteria=[tick],
                generation_config=config,
            )  # fmt: skip
        for prompt, tokens in zip(prompts[begin:], output[:, width:].tolist()):
            end = next((i for i, token in enumerate(tokens, 1) if token in stops), None)
            results.append(
                {
                    "prompt": prompt,
                    "completion": tokenizer.decode(tokens[:end], skip_special_tokens=True),
                    "tokens": end or len(tokens),
                    "stopped": end is not None,
                }
            )
    return results
