"""The study behind the defaults: ExtraAdam's rule with one part at a time switched, on cells of the comparison.

    python benchmarks/rlvr/study.py --json benchmarks/results/rlvr-study.json     # what is missing, then a table
    python benchmarks/rlvr/study.py --json FILE --rules default "n=100 b=.9" --places 64@3e-4 --seeds 0

A rule is named by what differs from the default, in the words of `Rule`; "told=entropy" is ExtraAdam whose jumps are
taken back where the entropy of the policy falls. What helped is in ExtraAdam; what did not is found here only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from concurrent.futures import as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import compare
import lab
import optimizers
import report
import torch
from compare import Cell
from rich.progress import Progress
from torch import nn

from extraopt.gate import momentum_coherence

TOLD = "told=entropy"
lab_generate = lab.generate
FULL = Cell("addition", "GRPO", 512, "full", 240, (), (), ())
NOISY = Cell("addition", "GRPO", 64, "full", 400, (), (), ())
LORA = Cell("addition", "GRPO", 512, "LoRA", 160, (), (), ())
SUPERVISED = Cell("supervised", "cross-entropy", 64, "full", 400, (), (), ())
PLACES = {  # learning rates: a third of AdamW's best, three times its best, its best
    "64@3e-5": (NOISY, 3e-5, ""),
    "64@3e-4": (NOISY, 3e-4, ""),
    "64@3e-4, linear decay": (NOISY, 3e-4, "linear"),
    "512@3e-4": (FULL, 3e-4, ""),
    "512@1e-3": (FULL, 1e-3, ""),
    "supervised@1e-3": (SUPERVISED, 1e-3, ""),
    "LoRA@1e-3": (LORA, 1e-3, ""),
}
PARTS = (  # all measured before the retreat faded with the size of the drift
    "scope=shut",
    "scope=row",
    "scope=global",
    "scope=both",
    "scope=wiener",
    "low=0",
    "retreat=0",
    "retreat=.3",
    "retreat=.7",
    "n=100 b=.9",
    "n=400 b=.95",
    "n=400 b=.975",
    "n=200 b=.975",
    "k=5 n=50 b=.9",
    "moments=first",
    "moments=all",
    "moments=count",
    "lr_units=1",
    "auto=.1",
    "forget=0",
    "trust=.02",
    "decay=.05",
    "start=50",
    "end=40",
    "doubt=0",
    "doubt=0 skip=1",
    "doubt=0 warm=6",
    "doubt=2",
    "damp=1",
    "damp=2",
    "slow=1",
    "spread=1",
    "turn=1",
    "exclude=norm|tokens|positions|head",
    "product=1",
)
RULES = ("AdamW", "default", "size=.003", TOLD, "size=0", *(f"size=0 {part}" for part in PARTS))


class Rule(optimizers.Trained):
    """AdamW and a jump with switches; all at their defaults it is ExtraAdam.

    Args:
        scope: what has a gate: each "tensor"; each "row" of a matrix; "global", all together; "both", the lower of a
            tensor's and this; "wiener", each tensor, its gate being the share of V's square that is signal, by the
            covariances of `momentum_coherence`; "none", always open; "shut".
        low, gate: the gate is clip((cos - low) / (gate * (1 - low)), 0, 1); low -1: what momentum alone shows.
        k, n, b: steps in a cycle, steps jumped, averaging of the drift.
        retreat: part of the drift that is taken back where a gate is shut.
        under: the same where the coherence lies under `low`, in proportion.
        moments: what a jump does to AdamW's: "keep"; "first", reset the first; "all", and the second and the counter;
            "count", reset the counter.
        lr_units: average drifts in units of the learning rate, and jump at the present one.
        auto: the horizon grows by this factor for each cycle with open gates and shrinks with shut ones.
        forget: an estimate begins anew where its coherence with the drift is below this part of `low`.
        trust: longest jump as a part of a tensor's norm.
        decay: the horizon shrinks to 1 / (1 + decay * cycles).
        start: steps without a jump at first.
        end: likewise, at last, of a run of `steps` steps.
        skip: first drifts that the estimate does not take in.
        early: part of them that is taken back, but for the very first.
        warm: the horizon is short at first: N * (1 - b**(warm * drifts seen)).
        doubt: likewise, N * seen / (seen + doubt), as ExtraAdam's.
        damp: a jump is shortened where the newest drift falls short of the estimate along it, by damp * <D, V> / V^2.
        spread: a jump is taken in `k` parts, one after each step of the next cycle, whose drift leaves them out.
        slow: likewise, where it is shorter than the estimate, by (|D| / |V|)^slow.
        size: the retreat fades where a drift is shorter than this part of its weights, times |D| / (size * |W|).
        turn: nothing is taken back of a drift that turned against the estimate: the retreat fades to 0 at cos = -low.
        exclude: parameters whose names have one of these never jump.
        product: B of a LoRA pair lands where B A moves as the jumps of A and of B say to first order, as near as its
            rank allows, without the jumps' own product.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, scope: str = "tensor", low: float = -1.0,
        gate: float = 0.5, k: int = 10, n: float = 200, b: float = 0.95, retreat: float = 0.5, under: float = 0.0,
        size: float = 0.01, turn: bool = False, moments: str = "keep", lr_units: bool = False, auto: float = 0.0,
        forget: float = -math.inf, trust: float = 0.0, decay: float = 0.0, start: int = 0, end: int = 0, steps: int = 0,
        skip: int = 0, early: float = 0.0, warm: float = 0.0, doubt: float = 1.0, damp: float = 0.0, slow: float = 0.0,
        spread: bool = False, exclude: str = "", product: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer)
        self.scope, self.low, self.gate, self.k, self.n, self.b = scope, low, gate, k, n, b
        self.retreat, self.under, self.size, self.turn = retreat, under, size, turn
        self.moments, self.lr_units, self.auto = moments, lr_units, auto
        self.forget, self.trust, self.decay, self.start = forget, trust, decay, start
        self.until = steps - end if end else math.inf
        self.skip, self.early, self.warm, self.doubt = skip, early, warm, doubt
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.params = [p for _, p in named]
        self.damp, self.slow, self.spread = damp, slow, spread
        self.parts: list[tuple[int, torch.Tensor]] = []  # what is left to do after each step
        self.excluded = [bool(exclude) and any(word in name for word in exclude.split("|")) for name, _ in named]
        self.anchors = [p.detach().clone() for p in self.params]
        self.drifts = [torch.zeros_like(p) for p in self.params]
        at = {name: i for i, (name, _) in enumerate(named)}
        self.pairs = [(at[n], at[n.replace("lora_A", "lora_B")]) for n in at if product and "lora_A" in n]
        self.begun = [0] * len(self.params)  # cycles that the estimate of each does not know
        self.steps, self.lr, self.factor = 0, 0.0, 1.0

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % self.k == 0:
            self.parts = []
            self._end_cycle(self.steps // self.k - 1 - self.skip)
        for i, part in self.parts:
            self.params[i].add_(part)
            self.anchors[i].add_(part)

    def _end_cycle(self, seen: int) -> None:
        if seen < 0:
            for p, a in zip(self.params, self.anchors):
                if seen > -self.skip:
                    p.sub_(p - a, alpha=self.early)
                a.copy_(p)
            return
        lr = self.optimizer.param_groups[0]["lr"]
        scale = lr / self.lr if self.lr_units and self.lr else 1.0
        self.lr = lr
        moved = [p - a for p, a in zip(self.params, self.anchors)]
        pairs = zip(moved, self.drifts)
        sums = [[float((d * v).sum()), float(d.square().sum()), float(v.square().sum())] for d, v in pairs]
        whole = [sum(column) for column in zip(*sums)]
        horizon = self.n * self.factor / (1 + self.decay * seen)
        cycle = seen
        open_sq = norm_sq = 0.0
        ends = [p.clone() for p in self.params] if self.pairs else []
        for i, (p, a, d, v, own) in enumerate(zip(self.params, self.anchors, moved, self.drifts, sums)):
            seen = cycle - self.begun[i]
            dv, dd, vv = whole if self.scope == "global" else own
            g: Any = self._gate(dv, dd, vv, seen) if seen and dd * vv > 0 else 0.0
            if self.scope == "row" and p.dim() > 1 and seen:
                rows = [x.flatten(1).sum(1).tolist() for x in (d * v, d.square(), v.square())]
                opens = [self._gate(*row, seen) if row[1] * row[2] > 0 else 0.0 for row in zip(*rows)]
                g = d.new_tensor(opens).view(-1, *[1] * (p.dim() - 1))
            if self.scope == "both" and g:
                g = min(g, self._gate(*whole, seen))
            known = self.scope == "none" or (seen > 0 and own[1] * own[2] > 0)
            if seen == 0 and self.skip:  # no estimate yet, as in the cycles skipped
                p.sub_(d, alpha=self.early)
            floor = self._floor(max(1, seen)) if self.low < 0 else self.low
            cosine = own[0] / math.sqrt(own[1] * own[2]) if own[1] * own[2] > 0 else 0.0
            if known and cosine < self.forget * floor:
                v.zero_()
                self.begun[i] = cycle
            v.mul_(self.b * scale).add_(d, alpha=1 - self.b)
            open_sq, norm_sq = open_sq + float((g * v.square()).sum()), norm_sq + float(v.square().sum())
            if known and self.start < self.steps <= self.until and not self.excluded[i]:
                grown = 1 - self.b ** (self.warm * seen) if self.warm else 1.0
                grown *= seen / (seen + self.doubt) if seen else 1.0
                jump, opened = v * (g * grown * horizon / self.k), bool(torch.as_tensor(g).any())
                if self.damp:
                    jump *= min(1.0, max(0.0, self.damp * (1 - self.b**seen) * own[0] / own[2]))
                if self.slow and seen:
                    jump *= min(1.0, (1 - self.b**seen) * math.sqrt(own[1] / own[2])) ** self.slow
                if self.trust and opened:
                    jump *= min(1.0, self.trust * float(p.norm()) / float(jump.norm()))
                below = 1 - min(1.0, max(0.0, cosine / floor)) if self.under else 0.0
                retreat = self.retreat * (min(1.0, max(0.0, 1 + cosine / floor)) if self.turn else 1.0)
                if self.size:
                    retreat *= min(1.0, math.sqrt(own[1]) / (self.size * max(1e-30, float(p.norm()))))
                if self.spread:
                    self.parts.append((i, jump / self.k))
                    jump = torch.zeros_like(jump)
                p.add_(jump - (retreat * (1 - g) + self.under * below) * d)
                if opened:
                    self._reset(self.optimizer.state[p])
            a.copy_(p)
        for i, j in self.pairs:
            A, B, E = self.params[i], self.params[j], ends[i]
            mixed = torch.linalg.lstsq((A @ A.T).double(), (A @ E.T).double()).solution.T.to(B.dtype)  # E A'(A' A')^-1
            B.copy_(ends[j] + (B - ends[j]) @ mixed)
            self.anchors[j].copy_(B)
        if self.auto and seen:
            factor = self.factor * math.exp(self.auto * (2 * open_sq / norm_sq - 1))
            self.factor = min(10.0, max(0.1, factor))

    def _floor(self, seen: int) -> float:
        return momentum_coherence(self.k, self.b, 0.9, seen)

    def _gate(self, dv: float, dd: float, vv: float, seen: int) -> float:
        if self.scope in ("none", "shut"):
            return float(self.scope == "none")
        if self.scope == "wiener":
            # cos(D, V) of noise is share * |D| / |V|; a signal adds its square to <D, V>, as far as V has grown
            grown = 1 - self.b**seen
            share = (1 - self.b) * momentum_coherence(self.k) * sum((self.b * 0.9**self.k) ** i for i in range(seen))
            return min(1.0, max(0.0, grown**2 * (dv / dd - share) / (grown - share) * dd / vv))
        low = self._floor(seen) if self.low < 0 else self.low
        return min(1.0, max(0.0, (dv / math.sqrt(dd * vv) - low) / (self.gate * (1 - low))))

    def _reset(self, state: dict[str, torch.Tensor]) -> None:
        reset = {"first": ("exp_avg",), "all": ("exp_avg", "exp_avg_sq", "step"), "count": ("step",)}
        for key in reset.get(self.moments, ()):
            state[key].zero_()


def build(name: str, model: nn.Module, lr: float, steps: int = 0) -> optimizers.Trained:
    """`Rule` with the switches that `name` lists, or an optimizer of the comparison, for a run of `steps` steps."""
    if name in ("AdamW", "ExtraAdam"):
        return optimizers.build(name, model, lr)
    if name == TOLD:
        return optimizers.build("ExtraAdam, told the reward", model, lr)  # but `one` puts the entropy in its place
    knobs: dict[str, Any] = {}
    kinds = dict.fromkeys(("k", "start", "end", "skip"), int) | dict.fromkeys(("scope", "moments", "exclude"), str)
    for word in name.split() if name != "default" else ():
        key, value = word.split("=")
        knobs[key] = kinds.get(key, float)(value)
    params = [p for p in model.parameters() if p.requires_grad]
    return Rule(model, torch.optim.AdamW(params, lr, **optimizers.ADAMW), steps=steps, **knobs)


def entropic(*args: Any) -> lab.Rollouts:
    """`lab.generate` whose reward is the policy's entropy over the answers, in nats for each token."""
    rollouts = lab_generate(*args)
    return replace(rollouts, reward=-float((rollouts.logp * rollouts.counts).sum() / rollouts.counts.sum()))


def one(place: str, rule: str, seed: int) -> dict[str, Any]:
    cell, lr, schedule = PLACES[place]
    with mock.patch.object(lab, "generate", entropic if rule == TOLD else lab_generate):
        row = compare.run(cell, rule, lr, seed, partial(build, steps=cell.steps), schedule)
    return {"place": place, "rule": rule, "seed": seed} | {key: row[key] for key in ("curve", "collapsed")}


def table(rows: list[dict[str, Any]]) -> str:
    """Ends of each rule in each place, seed by seed, and the median of AdamW's steps to its end over the rule's."""
    adamw = {(r["place"], r["seed"]): r for r in rows if r["rule"] == "AdamW"}
    places = [place for place in PLACES if any(r["place"] == place for r in rows)]
    lines = ["| rule | " + " | ".join(places) + " |", "|" + "---|" * (len(places) + 1)]
    order = {rule: i for i, rule in enumerate(RULES)}
    for rule in sorted({r["rule"] for r in rows}, key=lambda rule: (order.get(rule, len(order)), rule)):
        cells = []
        for place in places:
            own = sorted((r for r in rows if (r["rule"], r["place"]) == (rule, place)), key=lambda r: r["seed"])
            ends = " ".join(f"{report.final(r):.2f}".lstrip("0") for r in own)
            told = [report.speedup([adamw[place, r["seed"]]], [r])[0] for r in own if (place, r["seed"]) in adamw]
            cells.append(f"{ends} ({statistics.median(told):.1f}x)" if told else ends)
        lines.append(" | ".join(["", rule.replace("|", "\\|"), *cells, ""]).strip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--places", nargs="+", default=list(PLACES), metavar="PLACE")
    parser.add_argument("--rules", nargs="+", default=list(RULES), metavar="RULE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    known = {(row["place"], row["rule"], row["seed"]) for row in rows}
    todo = [(c, r, s) for s in args.seeds for r in args.rules for c in args.places if (c, r, s) not in known]
    with compare.workers(args.workers) as pool, Progress() as progress:
        bar = progress.add_task("runs", total=len(todo))
        for future in as_completed([pool.submit(one, *run) for run in todo]):
            rows.append(future.result())
            compare.write(rows, args.json)
            progress.advance(bar)
    text = table(rows)
    args.json.with_suffix(".md").write_text(f"{table.__doc__}\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
