"""How good a policy is at one-digit sums, exactly: every question there is, every way to be right that matters.

The task, `chain_sum` of reasoning-gym with two terms of one digit, has 200 different questions, so all are asked. A
completion has four tokens at most, so the ways to be right are few: the number's tokens, then the end of text or one
of `SEPARATORS` and whatever the task's verifier lets pass behind it. Their probabilities are computed, not sampled;
other ways (leading zeros, say) are left out, and `sample` tells how much they weigh.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import reasoning_gym
import torch
from torch import Tensor
from transformers import DynamicCache

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TOKENS = 4  # of a completion, as in training
SEPARATORS = (".", ",", "\n", "\n\n", " ")


def forward(model: Any, ids: Tensor, cache: DynamicCache, keep: int = 1) -> Tensor:
    """Logits, float32 [rows, keep, vocabulary], of the last tokens of `ids`; the cache grows by these ids."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # as versions say
    return model(input_ids=ids, logits_to_keep=keep, **{name: cache}).logits.float()


@dataclass
class Task:
    """Every question, with its answer's tokens, and which tokens may follow.

    Attributes:
        entries: reasoning-gym's, sorted by question.
        prompts: int64 [questions, tokens]; all are as long.
        answers: the tokens of each answer: " 7" and " -7" are two, " 12" three.
        last: int64, tokens that may take a completion's fourth place right behind a number.
        after: for each separator's token, tokens that may take the fourth place behind number and separator.
        stop: the token that ends a text.
    """

    entries: list[dict[str, Any]]
    prompts: Tensor
    answers: list[list[int]]
    last: Tensor
    after: dict[int, Tensor]
    stop: int
    tokenizer: Any
    made: Any

    def right(self, question: int, completion: str) -> bool:
        """Whether the task's own verifier gives full marks."""
        return self.made.score_answer(completion.strip(), self.entries[question]) == 1


def load_task(tokenizer: Any) -> Task:
    """All questions in a fixed order."""
    made = reasoning_gym.create_dataset("chain_sum", size=4000, seed=1, **ONE_DIGIT)
    entries = sorted({entry["question"]: entry for entry in made}.values(), key=lambda entry: entry["question"])
    rows = tokenizer([entry["question"] for entry in entries])["input_ids"]
    if len(entries) != 200 or len(set(map(len, rows))) != 1:
        raise ValueError(f"{len(entries)} questions of {set(map(len, rows))} tokens: not the task that this scores")
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=True)
    number = next(entry for entry in entries if entry["answer"] == "17")

    def passing(before: str) -> Tensor:
        score = made.score_answer
        return torch.tensor([i for i, text in enumerate(texts) if score((before + text).strip(), number) == 1])

    stop = tokenizer.eos_token_id
    separators = {tokenizer.encode(text, add_special_tokens=False)[0]: text for text in SEPARATORS}
    answers = [tokenizer.encode(f" {entry['answer']}", add_special_tokens=False) for entry in entries]
    after = {token: passing("17" + text) for token, text in separators.items()}
    return Task(entries, torch.tensor(rows), answers, passing("17"), after, stop, tokenizer, made)


@dataclass
class Walk:
    """A policy's logits along the right answers, float32 [questions, vocabulary] each.

    Attributes:
        along: of the answer's first token, its second, ...; a list for each length of answer.
        behind: after each separator, for answers of two tokens: those of three leave no room.
        groups: the questions with an answer of so many tokens.
    """

    along: dict[int, list[Tensor]]
    behind: dict[int, Tensor]
    groups: dict[int, list[int]]


@torch.inference_mode()
def walk(model: Any, task: Task) -> Walk:
    """Three forward passes share one cache: what all prompts begin with is read once."""
    same = int((task.prompts == task.prompts[0]).all(0).int().cumprod(0).sum())
    groups = {n: [i for i, answer in enumerate(task.answers) if len(answer) == n] for n in (2, 3)}
    along, behind = {}, {}
    for length, chosen in groups.items():
        cache = DynamicCache(config=model.config)
        forward(model, task.prompts[:1, :same], cache)
        cache.batch_repeat_interleave(len(chosen))
        ids = torch.cat([task.prompts[chosen, same:], torch.tensor([task.answers[i] for i in chosen])], 1)
        along[length] = list(forward(model, ids, cache, length + 1).unbind(1))
        for token in task.after if length == 2 else ():
            behind[token] = forward(model, torch.full((len(chosen), 1), token), cache)[:, -1]
            cache.crop(-1)
    return Walk(along, behind, groups)


def scores(found: Walk, task: Task) -> tuple[list[float], list[bool]]:
    """For each question: the probability of full marks at temperature 1, and whether the greedy completion has them."""
    chance, greedy = [0.0] * len(task.entries), [False] * len(task.entries)
    for length, chosen in found.groups.items():
        logs = [logits.log_softmax(-1) for logits in found.along[length]]
        tokens = torch.tensor([task.answers[i] for i in chosen])
        number = sum(log.gather(1, tokens[:, j : j + 1]).squeeze(1) for j, log in enumerate(logs[:-1])).exp()
        said = torch.stack([log.argmax(1) == tokens[:, j] for j, log in enumerate(logs[:-1])]).all(0)
        next_, first = logs[-1].exp(), logs[-1].argmax(1)
        if length == 3:
            rest, ends = next_[:, task.last].sum(1), torch.isin(first, task.last)
        else:
            rest, ends = next_[:, task.stop], first == task.stop
            for token, passing in task.after.items():
                log = found.behind[token].log_softmax(-1)
                rest = rest + next_[:, token] * log[:, passing].exp().sum(1)
                ends |= (first == token) & torch.isin(log.argmax(1), passing)
        for i, p, good in zip(chosen, (number * rest).tolist(), (said & ends).tolist()):
            chance[i], greedy[i] = min(p, 1.0), good
    return chance, greedy


def sample(model: Any, task: Task, count: int, seed: int, together: int = 10) -> tuple[list[list[str]], float]:
    """Draw completions at temperature 1: `count` for each question, and the policy's mean entropy over their tokens.

    Completions that begin alike share their forward passes, so a hundred cost little more than those that differ.
    `together` questions are drawn at once: a gigabyte of logits.

    Returns:
        Texts, and nats a token, up to and with the one that ends a text.
    """
    dice, texts, entropies, tokens = torch.Generator().manual_seed(seed), [], 0.0, 0
    for begin in range(0, len(task.entries), together):
        drawn, entropy, number = _sample(model, task.prompts[begin : begin + together], task.stop, count, dice)
        entropies, tokens = entropies + entropy, tokens + number
        for each in drawn:
            decoded = {ids: task.tokenizer.decode(ids, skip_special_tokens=True) for ids in each}
            texts.append([decoded[ids] for ids, times in each.items() for _ in range(times)])
    return texts, entropies / tokens


@torch.inference_mode()
def _sample(
    model: Any, prompts: Tensor, stop: int, count: int, dice: torch.Generator
) -> tuple[list[Counter[tuple[int, ...]]], float, int]:
    """How often each completion was drawn to each prompt, the sum of entropies over all tokens drawn, their number."""
    cache = DynamicCache(config=model.config)
    logits = forward(model, prompts, cache)[:, -1]
    rows = [(own, (), count) for own in range(len(prompts))]  # the prompt, the tokens so far, completions with these
    done: list[Counter[tuple[int, ...]]] = [Counter() for _ in rows]
    entropies, tokens = 0.0, 0
    for place in range(TOKENS):
        chances = logits.softmax(-1)
        entropy = torch.special.entr(chances).sum(-1).tolist()
        parents, grown = [], []
        for row, (own, prefix, times) in enumerate(rows):
            entropies, tokens = entropies + times * entropy[row], tokens + times
            drawn = torch.multinomial(chances[row], times, replacement=True, generator=dice).tolist()
            for token, often in Counter(drawn).items():
                if token == stop or place == TOKENS - 1:
                    done[own][(*prefix, token)] += often
                else:
                    parents.append(row)
                    grown.append((own, (*prefix, token), often))
        if not grown:
            break
        rows = grown
        cache.batch_select_indices(torch.tensor(parents))
        logits = forward(model, torch.tensor([[prefix[-1]] for _, prefix, _ in rows]), cache)[:, -1]
    return done, entropies, tokens


def combine(later: Walk, earlier: Walk, how: Callable[[Tensor, Tensor], Tensor]) -> Walk:
    """Another policy along the same answers: its logits from two policies' (`how`: later, earlier -> mixed)."""
    along = {n: [how(b, a) for b, a in zip(later.along[n], earlier.along[n])] for n in later.along}
    behind = {token: how(later.behind[token], earlier.behind[token]) for token in later.behind}
    return Walk(along, behind, later.groups)


def entropy(found: Walk) -> float:
    """Mean entropy, in nats, where a right answer's tokens are to be chosen and right behind them."""
    each = torch.cat([torch.special.entr(logits.softmax(-1)).sum(-1) for of in found.along.values() for logits in of])
    return float(each.mean())
