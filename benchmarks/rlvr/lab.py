"""A toy-scale benchmark of RL with verifiable rewards: tasks, a policy of 0.31M weights, and losses.

Everything runs on one CPU thread. A policy is pre-trained on a corpus in which most answers are wrong, so that it knows
the task but seldom says so, as base models do; then GRPO, REINFORCE++ or GSPO trains it on a reward that a program
checks. Its accuracy is not estimated from samples: each prompt has one right answer, so the chance that a sample
(temperature 1) is right is the product of the answer's token probabilities, averaged over held-out prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD, END = 0, 1
ALPHABET = "\0\1" + "0123456789+=<abcdefghijklmnopqrstuvwxyz"
CODE = {c: i for i, c in enumerate(ALPHABET)}


# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """Prompts of one length and their only right answers.

    Attributes:
        prompts: int64 [n, P], padded on the left.
        answers: int64 [n, T], ended by END and padded on the right.
        held_out: how many of them, the last, are never trained on.
        wrong: fraction of wrong answers in the corpus of pre-training.
    """

    prompts: Tensor
    answers: Tensor
    held_out: int
    wrong: float

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.prompts) - self.held_out, (n,), generator=generator)
        return self.prompts[chosen], self.answers[chosen]


def _encode(questions: list[str], answers: list[str], wrong: float, held_out: int, seed: int) -> Task:
    longest = max(map(len, questions))
    prompts = torch.tensor([[CODE[c] for c in q.rjust(longest, "\0")] for q in questions])
    longest = max(map(len, answers)) + 1
    right = torch.tensor([[CODE[c] for c in (a + "\1").ljust(longest, "\0")] for a in answers])
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed))
    return Task(prompts[order], right[order], held_out, wrong)


def _addition(seed: int, wrong: float = 0.7) -> Task:
    terms = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    return _encode([f"{a}+{b}=" for a, b in terms], [str(a + b) for a, b in terms], wrong, 500, seed)


def _spelling(seed: int) -> Task:
    import reasoning_gym

    words = reasoning_gym.create_dataset("spell_backward", size=40000, seed=1, min_word_len=4, max_word_len=5)
    pairs = {e["metadata"]["word"].lower(): e["answer"].lower() for e in words}
    pairs = {w: a for w, a in sorted(pairs.items()) if w.isascii() and w.isalpha()}
    return _encode([w + "<" for w in pairs], list(pairs.values()), 0.7, 500, seed)


TASKS: dict[str, Callable[[int], Task]] = {
    "addition": _addition,
    "spell_backward": _spelling,
    "near_zero": lambda seed: _addition(seed, 0.98),
    "supervised": _addition,
}


# --- policy -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, past: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        b, n, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        kv = torch.stack([k, v])
        if past is not None:
            kv = torch.cat([past, kv], 3)
        mixed = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)))), kv


class Policy(nn.Module):
    """A decoder-only transformer. Several answers to one prompt lie side by side and share the prompt's keys."""

    def __init__(self, length: int, width: int = 128, layers: int = 2, heads: int = 4, hidden: int = 320) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, len(ALPHABET), bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 if p.shape[1] == width else 0.02 / math.sqrt(2 * layers))

    def _hidden(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, past: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [b, n, width] and keys and values of tokens [b, n], after those in `past`."""
        x = self.tokens(tokens) + self.positions(positions)
        kept = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, None if past is None else past[i], mask)
            kept.append(kv)
        return self.norm(x), kept

    def _prompt(self, prompts: Tensor) -> list[Tensor]:
        n = prompts.shape[1] - 1  # the last token of the prompt is the first input of each answer
        return self._hidden(prompts[:, :-1], torch.arange(n), torch.ones(n, n, dtype=torch.bool).tril())[1]

    def forward(self, prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the tokens of answers [b, g, T] to prompts [b, P], float32 [b, g, T, V], and which tokens count."""
        b, g, t = answers.shape
        n = prompts.shape[1] - 1
        inputs = torch.cat([prompts[:, None, -1:].expand(b, g, 1), answers[:, :, :-1]], 2).reshape(b, g * t)
        own, time = torch.arange(g).repeat_interleave(t), torch.arange(t).repeat(g)
        mask = (own[:, None] == own) & (time[:, None] >= time)
        mask = torch.cat([torch.ones(g * t, n, dtype=torch.bool), mask], 1)
        hidden, _ = self._hidden(inputs, n + time, mask, self._prompt(prompts))
        ended = (answers == END).cumsum(2)
        return self.head(hidden).view(b, g, t, -1), (ended == 0) | ((ended == 1) & (answers == END))

    def log_probs(self, prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of answers [b, g, T] to prompts [b, P], float32 [b, g, T], and which tokens count."""
        logits, counts = self(prompts, answers)
        logp = -F.cross_entropy(logits.flatten(0, 2), answers.flatten(), reduction="none").view(answers.shape)
        return logp, counts

    @torch.no_grad()
    def sample(self, prompts: Tensor, g: int, t: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """`g` answers of at most `t` tokens to each prompt, at temperature 1: int64 [b, g, t], padded after END.

        Their tokens' log-probabilities, float32 [b, g, t], and which tokens count, bool [b, g, t], come with them.
        """
        b, n = prompts.shape[0], prompts.shape[1] - 1
        past, tokens = self._prompt(prompts), prompts[:, -1:].expand(b, g)
        answers, logp = torch.full((b, g, t), PAD), torch.zeros(b, g, t)
        counts = torch.zeros(b, g, t, dtype=torch.bool)
        done = torch.zeros(b, g, dtype=torch.bool)
        same = torch.eye(g, dtype=torch.bool)
        for i in range(t):
            mask = torch.cat([torch.ones(g, n, dtype=torch.bool), same.repeat(1, i + 1)], 1)
            hidden, past = self._hidden(tokens, torch.full((g,), n + i), mask, past)
            p = self.head(hidden).softmax(-1).flatten(0, 1)
            tokens = torch.multinomial(p, 1, generator=generator).view(b, g)
            logp[:, :, i] = p.gather(1, tokens.view(-1, 1)).view(b, g).log()
            answers[:, :, i] = torch.where(done, PAD, tokens)
            counts[:, :, i] = ~done
            done = done | (tokens == END)
            if done.all():
                break
        return answers, logp, counts

    @torch.no_grad()
    def accuracy(self, task: Task) -> float:
        """The expected accuracy of a sample at temperature 1 over all held-out prompts, exactly."""
        prompts, answers = task.prompts[-task.held_out :], task.answers[-task.held_out :, None]
        logp, counts = self.log_probs(prompts, answers)
        return float((logp * counts).sum(2).exp().mean())


def corrupted(answers: Tensor, wrong: float, generator: torch.Generator) -> Tensor:
    """`answers` [n, T] of which a fraction `wrong` has one character, drawn at random, replaced by another."""
    n = len(answers)
    place = (torch.rand(n, generator=generator) * (answers == END).int().argmax(1)).long()
    low, high = int(answers[answers > END].min()), int(answers.max())
    shift = torch.randint(1, high - low + 1, (n,), generator=generator)
    rows = torch.arange(n)[torch.rand(n, generator=generator) < wrong]
    answers = answers.clone()
    answers[rows, place[rows]] = low + (answers[rows, place[rows]] - low + shift[rows]) % (high - low + 1)
    return answers


def pretrain(task: Task, seed: int, steps: int = 500, rate: float = 3e-3) -> Policy:
    """A policy that has learnt the task from a corpus in which a fraction `task.wrong` of the answers is wrong."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    policy = Policy(task.prompts.shape[1] + task.answers.shape[1])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        prompts, answers = task.batch(256, generator)
        supervised_loss(policy, prompts, corrupted(answers, task.wrong, generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return policy


# --- losses -----------------------------------------------------------------------------------------------------------


def supervised_loss(policy: Policy, prompts: Tensor, answers: Tensor) -> Tensor:
    """Mean negative log-probability of the right answers' tokens."""
    logp, counts = policy.log_probs(prompts, answers[:, None])
    return -(logp * counts).sum() / counts.sum()


@dataclass
class Rollouts:
    """Answers to score: prompts [b, P], answers [b, g, T], log-probabilities when sampled [b, g, T], advantages [b, g].

    `size` answers were sampled, with a mean reward of `reward`. Prompts whose answers all have advantage 0 add nothing
    to a gradient and are left out.
    """

    prompts: Tensor
    answers: Tensor
    logp: Tensor
    counts: Tensor
    advantages: Tensor
    size: int
    reward: float

    def split(self, parts: int) -> list[Rollouts]:
        pieces = []
        whole = self.prompts, self.answers, self.logp, self.counts, self.advantages
        for piece in zip(*(x.chunk(parts) for x in whole)):
            told = (piece[-1] != 0).any(1)
            told[0] = True  # a loss needs something to stand on
            pieces.append(Rollouts(*(x[told] for x in piece), size=piece[-1].numel(), reward=self.reward))
        return pieces


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO's and GSPO's: against the other answers to the same prompt, in their standard deviations."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def batch_advantages(rewards: Tensor) -> Tensor:
    """REINFORCE++'s: against the whole batch, in its standard deviations; prompts have one answer each."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def token_loss(policy: Policy, r: Rollouts) -> Tensor:
    """GRPO's and REINFORCE++'s: clipped ratio of each token, clip range 0.2 below and 0.28 above, no KL term."""
    logp, _ = policy.log_probs(r.prompts, r.answers)
    ratio = (logp - r.logp).exp()
    a = r.advantages[..., None]
    gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
    return -((gain * r.counts).sum(2) / r.counts.sum(2)).sum() / r.size


def sequence_loss(policy: Policy, r: Rollouts) -> Tensor:
    """GSPO's: clipped length-normalised ratio of each answer, clip range 3e-4 below and 4e-4 above."""
    logp, _ = policy.log_probs(r.prompts, r.answers)
    ratio = (((logp - r.logp) * r.counts).sum(2) / r.counts.sum(2)).exp()
    gain = torch.minimum(ratio * r.advantages, ratio.clamp(1 - 3e-4, 1 + 4e-4) * r.advantages)
    return -gain.sum() / r.size


@dataclass
class Algorithm:
    """`group` answers to each prompt, how they become advantages, and the loss."""

    group: int
    advantages: Callable[[Tensor], Tensor]
    loss: Callable[[Policy, Rollouts], Tensor]


ALGORITHMS = {
    "GRPO": Algorithm(8, group_advantages, token_loss),
    "REINFORCE++": Algorithm(1, batch_advantages, token_loss),
    "GSPO": Algorithm(8, group_advantages, sequence_loss),
}
STEPS_PER_GENERATION = 2  # as in the paper's runs: the second step is one step off-policy


def generate(policy: Policy, task: Task, algorithm: Algorithm, rollouts: int, generator: torch.Generator) -> Rollouts:
    """Sample and score the answers of one generation: `STEPS_PER_GENERATION` optimizer steps of `rollouts` each."""
    prompts, right = task.batch(STEPS_PER_GENERATION * rollouts // algorithm.group, generator)
    answers, logp, counts = policy.sample(prompts, algorithm.group, right.shape[1], generator)
    rewards = (answers == right[:, None]).all(2).float()
    return Rollouts(
        prompts, answers, logp, counts, algorithm.advantages(rewards), rewards.numel(), float(rewards.mean())
    )


def losses(
    policy: Policy, task: Task, algorithm: str, rollouts: int, generator: torch.Generator
) -> Iterator[tuple[Callable[[], Tensor], float | None]]:
    """The losses of the next optimizer steps, to be called one after the other, each with a reward or None.

    They are those of one generation, whose mean reward stands beside the first, or that of one batch, without a reward.
    """
    if algorithm == "cross-entropy":
        batch = task.batch(rollouts, generator)
        yield lambda: supervised_loss(policy, *batch), None
        return
    chosen = ALGORITHMS[algorithm]
    for i, part in enumerate(generate(policy, task, chosen, rollouts, generator).split(STEPS_PER_GENERATION)):
        yield (lambda part=part: chosen.loss(policy, part)), part.reward if i == 0 else None


def add_lora(policy: Policy, seed: int, rank: int = 8) -> None:
    """Freeze `policy` and give every matrix of its blocks a LoRA adapter, by PEFT."""
    import peft

    torch.manual_seed(seed)
    matrices = ["qkv", "out", "up", "down"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=matrices), policy)
