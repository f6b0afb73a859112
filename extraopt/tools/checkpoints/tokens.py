"""How straight did a run's outputs move? Log-probabilities of given responses, token by token, over its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .models import check_tokens, encode_prompt, load_model, load_tokenizer
from .paths import Filter, fit, measure
from .safety import CheckpointError, read_text

MOVED = Filter(min_move=0.2, min_values=0)  # the paper's: tokens whose log-probability moved by more than this, in nats
SHOWN = 50  # tokens and words listed
CONTEXT = 6  # tokens shown before a token


@dataclass(frozen=True)
class Example:
    """A prompt and a response to it, as token ids."""

    prompt: list[int]
    response: list[int]


def read_prompts(path: Path, tokenizer: Any) -> list[Example]:
    """Read responses to score: a JSON object a line.

    Args:
        path: lines with "prompt" and "response" (or TRL's "completion"), or with "messages" whose last is the response.
            A prompt is a text, or a list of messages that goes through the tokenizer's chat template.
        tokenizer: of the checkpoints.

    Raises:
        CheckpointError: what is wrong, and in which line.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: can't be read as text ({error})") from None
    examples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                examples.append(_example(json.loads(line), tokenizer))
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{path}, line {number}: {error}") from None
    if not examples:
        raise CheckpointError(f"{path}: no prompts in it")
    return examples


def _example(row: Any, tokenizer: Any) -> Example:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    prompt: Any
    if "messages" in row:
        if not (isinstance(row["messages"], list) and len(row["messages"]) > 1):
            raise ValueError('"messages" must be a list of two at least')
        *prompt, response = row["messages"]
    else:
        prompt, response = row.get("prompt", 0), row.get("response", row.get("completion"))
        if not isinstance(prompt, (str, list)) or not isinstance(response, (str, list)):
            raise ValueError('needs "prompt" and "response", or "messages"')
    if isinstance(response, list):
        response = response[-1] if response else ""
    if isinstance(response, dict):
        response = response.get("content")
    if not isinstance(response, str):
        raise ValueError("the response has no text")
    ids = encode_prompt(tokenizer, prompt)
    if not ids:  # nothing before the first token of the response to predict it from
        ids = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    answer = tokenizer(response, add_special_tokens=False)["input_ids"]
    if not answer:
        raise ValueError("the response is empty")
    return Example(ids, answer)


def log_probs(model: Any, examples: Sequence[Example], *, batch_size: int = 8) -> Tensor:
    """Teacher-forced log-probabilities of the responses' tokens, in nats.

    Args:
        model: a transformers causal language model, in the mode and dtype to score it in.
        examples: prompts and responses.
        batch_size: sequences at once, padded on the right and masked.

    Returns:
        float64 [tokens of all responses], in the order of the examples.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt) + len(examples[i].response))
    found: dict[int, Tensor] = {}
    device = next(model.parameters()).device
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        rows = [examples[i].prompt + examples[i].response for i in batch]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for i, row, scores in zip(batch, rows, logits):
                start = len(examples[i].prompt)
                before = scores[start - 1 : len(row) - 1].float()  # a token's scores stand at the one before it
                answer = torch.tensor(row[start:], device=device).unsqueeze(1)
                found[i] = (before.gather(1, answer).squeeze(1) - before.logsumexp(1)).double().cpu()
    return torch.cat([found[i] for i in range(len(examples))])


def token_linearity(
    checkpoints: Sequence[tuple[int, Path]],
    prompts: Path,
    *,
    base: str | None = None,
    batch_size: int = 8,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure how straight the log-probabilities of given responses moved. One model in memory at a time, in float32.

    Args:
        checkpoints: (optimizer step, folder) of a transformers model or of a PEFT adapter.
        prompts: file of `read_prompts`.
        base: model under the adapters, instead of the one that their config names.
        batch_size: sequences at once.
        device: default: the first CUDA device, else the CPU.
        trust_remote_code: run code that comes with the checkpoints.
        progress: called with (checkpoints done, checkpoints in all).

    Returns:
        Plain numbers, ready for JSON: "total" (see `Paths.summary`; the "weights" are tokens, in nats), "words" and
        "tokens" that moved most along their line, with log-probabilities at each checkpoint.

    Raises:
        CheckpointError: a model, a tokenizer or the prompts can't be read, or don't fit together.
    """
    checkpoints = sorted(checkpoints)
    if len(checkpoints) < 3:
        raise CheckpointError(f"{len(checkpoints)} checkpoints given: a path takes three at least")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    last = str(checkpoints[-1][1])
    tokenizer = load_tokenizer(last, base, trust_remote_code)
    if tokenizer is None:
        raise CheckpointError(f"no tokenizer in {last}, nor under it: save it with the checkpoints")
    examples = read_prompts(prompts, tokenizer)
    rows = [example.prompt + example.response for example in examples]
    steps, scored = [float(step) for step, _ in checkpoints], []
    for done, (_, folder) in enumerate(checkpoints):
        progress(done, len(checkpoints))
        model = load_model(str(folder), base, torch.float32, device, trust_remote_code)
        check_tokens(model, rows, max(map(len, rows)))
        scored.append(log_probs(model, examples, batch_size=batch_size))
        del model
        if not scored[-1].isfinite().all():
            raise CheckpointError(f"{folder}: log-probabilities of the responses are NaN or infinite")
    values = torch.stack(scored)
    paths = measure([values], steps, values.shape[1], keep=MOVED)
    slope, r2, _, kept = fit(values, torch.tensor(steps, dtype=torch.float64), MOVED)
    change = slope * (steps[-1] - steps[0])
    ids = [token for example in examples for token in example.response]
    return {
        "prompts": str(prompts),
        "examples": len(examples),
        "steps": [step for step, _ in checkpoints],
        "filter": asdict(MOVED),
        "total": paths.summary(),
        "words": _words(tokenizer, ids, change, r2, kept),
        "tokens": _tokens(tokenizer, examples, values, change, r2),
        "histogram": paths.histogram(),
    }


def _words(tokenizer: Any, ids: Sequence[int], change: Tensor, r2: Tensor, kept: Tensor) -> list[dict[str, Any]]:
    """Tokens with the same text together, those with the largest mean change first."""
    places: dict[str, list[int]] = {}
    for place, token in enumerate(ids):
        places.setdefault(tokenizer.decode([token]), []).append(place)
    order = sorted(places, key=lambda word: -abs(float(change[places[word]].mean())))
    return [
        {
            "word": word,
            "count": len(places[word]),
            "moved": int(kept[places[word]].sum()),
            "change": float(change[places[word]].mean()),
            "r2_median": float(r2[places[word]].median()),
        }
        for word in order[:SHOWN]
    ]


def _tokens(
    tokenizer: Any, examples: Sequence[Example], values: Tensor, change: Tensor, r2: Tensor
) -> list[dict[str, Any]]:
    """The single tokens with the largest change, and their paths."""
    places = [(i, j) for i, example in enumerate(examples) for j in range(len(example.response))]
    tokens: dict[tuple[str, str], dict[str, Any]] = {}  # one of those that look the same
    for place in change.abs().argsort(descending=True, stable=True).tolist():
        i, j = places[place]
        text = tokenizer.decode([examples[i].response[j]])
        context = tokenizer.decode((examples[i].prompt + examples[i].response[:j])[-CONTEXT:])
        figures = {"change": float(change[place]), "r2": float(r2[place]), "log_probs": values[:, place].tolist()}
        tokens.setdefault((context, text), {"example": i, "position": j, "text": text, "context": context, **figures})
        if len(tokens) == SHOWN:
            break
    return list(tokens.values())
