"""Random sequences of what can happen to an optimizer during a run, each compared with a plain model of all of it.

The model (`Model`) is AdamW from torch, the float64 reference for the end of a cycle, and bookkeeping in words that the
package does not use: cycles since, steps since, the shares of drifts. It shares no code with `extraopt/`.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import Ending, endings, reload
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor
from torch.nn import Parameter

from extraopt import ExtraAdam
from extraopt.kernels import reference

DTYPES = [torch.float16, torch.float32, torch.bfloat16, torch.float64]
SHAPES = [(), (3,), (2, 3), (0,)]
UNWATCHED = 20  # steps: the longest jump of a group with a trust region that has no model to look at


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, but for the bits of a NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def work_dtype(t: Tensor) -> torch.dtype:
    """In which the rule's arithmetic is done."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def near(got: Tensor, want: Tensor, ratio: float, *terms: Tensor, slack: Tensor | None = None) -> bool:
    """Within one rounding into the dtype, and the roundings of the arithmetic before it."""
    info = torch.finfo(got.dtype)
    arithmetic = 4 * torch.finfo(work_dtype(got)).eps * (1 + ratio) * sum(t.abs().double() for t in terms)
    arithmetic = arithmetic if slack is None else arithmetic + slack.abs()
    allowed = info.eps / 2 * (want.abs() + arithmetic) + arithmetic + info.smallest_normal * info.eps
    return bool((((got.double() - want).abs() <= allowed) | (got == want.to(got.dtype))).all())


def squares(t: Tensor) -> float:
    """Their sum; not finite where it cannot be measured in the dtype of the arithmetic."""
    total = float(t.double().square().sum())
    return total if total <= torch.finfo(work_dtype(t)).max else math.inf if total == total else math.nan


@dataclass(eq=False)
class Group:
    """Options of a parameter group, by their names in AdamW and ExtraAdam."""

    options: dict[str, Any]
    known: float = 0.0  # extra_length

    def __post_init__(self) -> None:
        self.known = UNWATCHED

    @property
    def every(self) -> int:
        return int(self.options["extra_every"])

    @property
    def horizon(self) -> int:
        return int(self.options["extra_steps"])

    @property
    def gate(self) -> float | None:
        return self.options["extra_gate"]

    @property
    def limited(self) -> bool:
        return self.options["extra_kl"] is not None

    @property
    def length(self) -> int:
        """Of its jumps, in steps."""
        return min(UNWATCHED, self.horizon) if self.limited else self.horizon

    @property
    def beta(self) -> float:
        return float(self.options["extra_beta"])

    @property
    def momentum(self) -> float:
        return float(self.options["betas"][0])

    @property
    def estimates(self) -> bool:
        return self.gate is not None or self.beta > 0 or self.limited


@functools.cache
def neighbouring_drifts(every: int, momentum: float) -> tuple[float, float]:
    """Of sums of `every` steps that momentum makes of white noise: their correlation, and how it fades."""
    lags = torch.arange(3 * every, dtype=torch.float64)
    cov = (momentum ** (lags[:, None] - lags).abs()).view(3, every, 3, every).sum((1, 3))
    near, far = float(cov[0, 1] / cov[0, 0]), float(cov[0, 2] / cov[0, 0])
    return near, far / near if near else 0.0


@dataclass(eq=False)
class Track:
    """One tensor: what it and its state must be."""

    group: Group
    weight: Tensor
    shadow: Parameter  # stepped by torch's AdamW from where `weight` is
    slope: Tensor
    step: int = 0
    anchor: Tensor | None = None
    estimate: Tensor | None = None
    waiting: bool = False  # only steps with lr 0 so far: the first that moves takes the anchor
    cycles: int = 0  # that the estimate has seen
    since: int = 0  # applied steps in this cycle
    shares: list[float] = field(default_factory=list)  # by which the estimate took in its drifts, where `even`
    even: bool = True  # all its cycles were of one length, and none was left out
    noise: tuple[float, float] = (0.0, 0.0)  # what it would be without a direction: cov(D, V), var(V)
    frozen: bool = False


@dataclass
class Report:
    """JumpReport, computed in float64."""

    step: int
    length: float
    gate: float
    coherence: float
    drift_norm: float
    weight_norm: float
    jumped: int
    refused: int
    slack: float


@dataclass
class Model:
    """All that an ExtraAdam does, tensor by tensor."""

    groups: list[Group]
    tracks: list[Track]
    adamw: torch.optim.AdamW
    last: Report | None = None

    def step(self, grads: list[Tensor | None], skipped: bool = False) -> list[Track]:
        """One call of `step`; returns the tensors whose cycle ends by it, standing where AdamW left them."""
        for track, grad in zip(self.tracks, grads):
            track.shadow.data.copy_(track.weight)
            track.shadow.grad = None if grad is None else grad.clone()
            if grad is None or not track.group.horizon:
                continue
            standing = track.group.options["lr"] == 0
            if track.anchor is None:
                track.waiting, track.cycles, track.since = standing, 0, 0
                track.shares, track.even = [], True
            if track.anchor is None or (track.waiting and not standing):
                track.anchor, track.waiting = track.weight.clone(), standing
            if track.group.estimates and track.estimate is None:
                track.estimate, track.noise = torch.zeros_like(track.weight), (0.0, 0.0)
        self.adamw.step()
        due = []
        for track, grad in zip(self.tracks, grads):
            if grad is None or skipped:
                continue
            track.weight = track.shadow.detach().clone()
            track.step += 1
            if track.anchor is not None:
                track.since += 1
                due += [track] if track.since == track.group.every else []
        return due

    def end(self, due: list[Track], landed: list[tuple[Tensor, Tensor | None]]) -> None:
        """End the cycles of these tensors, whose weights and estimates must be those of `landed`, rounded.

        A gate that float32 sums may have put on the next multiple of 1/256 is read off where the weights landed.
        """
        watched = [t for t in due if t.group.gate is not None] or due
        dot = dd = vv = moved_sq = drift_sq = weight_sq = slack = length = 0.0
        jumped = refused = 0
        searched = False
        for track, (p, drift) in zip(due, landed):
            group, e, a = track.group, track.weight, track.anchor
            assert a is not None
            k, ratio = group.every, group.length / group.every
            v = track.estimate if group.estimates and track.estimate is not None else torch.zeros_like(e)
            d = e.double() - a.double()
            seen = track.cycles
            track.since, track.cycles = 0, track.cycles + 1
            measured = [squares(t) for t in (e, d.to(work_dtype(e)), v)]
            if not all(map(math.isfinite, measured)):
                refused += 1
                assert same(p, e), "a tensor that may not jump was moved"
                track.anchor, track.even = e.clone(), False
                if group.estimates and not math.isfinite(measured[2]):
                    track.estimate, track.cycles, track.noise = torch.zeros_like(e), 0, (0.0, 0.0)
                    track.shares, track.even = [], True
                continue
            if track in watched:
                dot, dd, vv = dot + float((d * v.double()).sum()), dd + measured[1], vv + measured[2]
            moves = track.step >= group.options["extra_start"] and group.horizon > 0
            moves &= group.gate is None or measured[2] > 0
            gate, share, least = self.decide(track, d, v, seen, moves)
            nv = v.double() + share * (d - v.double())
            size = min(1.0, 100 * math.sqrt(measured[1] / squares(e))) if squares(e) else 1.0
            back = round(256 * (1 - gate) * size) / 512 if moves else 0.0
            furthest = group.horizon if not group.limited else max(UNWATCHED, 2 * self.known)
            reach = (
                gate * min(furthest, group.horizon) / k * float(nv.norm()) + back * float(d.norm()) if moves else 0.0
            )
            if reach and group.estimates:
                reach = max(reach, float(nv.norm()))  # it is stored, too
            fits = float(e.double().norm()) + reach <= torch.finfo(e.dtype).max
            if reach and not fits:
                refused += 1
            ways = endings(e, a, v, gate, share, moves and group.gate is not None, least)
            if not moves or not fits:
                assert same(p, e), "a tensor that may not jump was moved"
                ways = [way for way in ways if not group.estimates or near(drift, way.estimate, 0, e, a, v)]
                assert ways, "estimate"
                gate = 0.0
            else:
                gate = self.way(ways, ratio, p, drift if group.estimates else None, e, a, v).gate
                ways = [way for way in ways if way.gate == gate]
                searched |= group.limited and gate > 0
            share = ways[0].share
            track.weight, track.anchor = p.detach().clone(), p.detach().clone()
            if group.estimates:
                assert drift is not None
                track.estimate = drift.clone()
                track.noise = self.noise(track, share)
                track.shares.append(share)
            norm = float(ways[0].estimate.norm())
            slack += (1 - share) * float(v.double().norm()) + share * float(d.norm())
            drift_sq, weight_sq = drift_sq + norm**2, weight_sq + squares(e)
            if gate > 0:
                moved_sq, jumped, length = moved_sq + (norm * gate) ** 2, jumped + 1, max(length, group.length)
        norms, gate = math.sqrt(dd) * math.sqrt(vv), math.sqrt(moved_sq / drift_sq) if drift_sq else 0.0
        self.last = Report(
            max(t.step for t in due), length, gate, dot / norms if norms else 0.0,
            math.sqrt(drift_sq), math.sqrt(weight_sq), jumped, refused, slack,
        )  # fmt: skip
        if searched:  # and nothing found out
            known = self.known
            for group in self.groups:
                group.known = known

    @property
    def known(self) -> float:
        """The length that a search would start from: the least of the groups with a trust region."""
        return min(group.known for group in [g for g in self.groups if g.limited] or self.groups)

    @staticmethod
    def decide(track: Track, d: Tensor, v: Tensor, seen: int, moves: bool) -> tuple[float, float, float]:
        """The gate, the share of the drift in the estimate, and what the share is where the gate is shut."""
        group = track.group
        norms = float(d.norm()) * float(v.double().norm())
        cosine = float((d * v.double()).sum()) / norms if norms else 0.0
        floor = track.noise[0] / math.sqrt(track.noise[1]) if track.noise[1] else 0.0
        gate = 1.0
        if group.gate is not None:
            gate = round(256 * min(max((cosine - floor) / (group.gate * (1 - floor)), 0.0), 1.0)) / 256
        least = max(1 / (seen + 1), 1 - group.beta)
        share = max(least, gate * gate) if moves and group.gate is not None else least
        if track.even and group.estimates:  # then the reference says so, too
            assert len(track.shares) == seen
            rule = {"every": group.every, "length": 0, "beta": group.beta, "gate": group.gate}
            *_, (g,), (w,) = reference.end_cycle(
                [d], [torch.zeros_like(d)], [v], [track.shares], momentum=group.momentum, jump=moves, **rule
            )
            assert math.isclose(w, share, abs_tol=1e-9) and (not moves or math.isclose(g, gate, abs_tol=1e-9))
        return gate if moves else 0.0, share, least

    @staticmethod
    def noise(track: Track, share: float) -> tuple[float, float]:
        """The covariances of a path without a direction after one more drift."""
        (cov, var), kept = track.noise, 1 - share
        near, fade = neighbouring_drifts(track.group.every, track.group.momentum)
        return kept * fade * cov + share * near, kept**2 * var + 2 * kept * share * cov + share**2

    @staticmethod
    def way(
        ways: list[Ending], ratio: float, p: Tensor, drift: Tensor | None, e: Tensor, a: Tensor, v: Tensor
    ) -> Ending:
        """The one of them by which a tensor came to where it is; an estimate is stored before it is jumped by."""
        for way in ways:
            length, estimate, stored = way.gate * ratio, way.estimate, torch.zeros(())
            if drift is not None:
                if not near(drift, way.estimate, 0, e, a, v):
                    continue
                info = torch.finfo(p.dtype)
                estimate, stored = drift.double(), info.eps * (way.landed.abs() / 2 + info.smallest_normal)
            terms = way.landed + length * estimate if length else way.landed
            if near(p, terms, length, e, a, v, slack=stored):
                return way
        raise AssertionError(f"landed {(p.double() - ways[0].landed).abs().max()} from where the retreat does")

    def begin(self, track: Track, every: int, extra_cycles: int = 0) -> None:
        """A new cycle begins; what the estimate has seen counts on, in cycles of the present length that fit."""
        track.even &= every == track.group.every
        seen = (track.cycles * every + track.since) // track.group.every + extra_cycles
        track.cycles, track.since, track.waiting = min(seen, track.step // track.group.every), 0, False
        track.even &= track.cycles == len(track.shares)


@contextmanager
def refusals() -> Iterator[list[str]]:
    """The warnings of a step, as text."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


groups_of_hyperparameters = st.fixed_dictionaries(
    {
        "extra_every": st.sampled_from([3, 2, 4, 1]),
        "extra_steps": st.sampled_from([20, 6, 60, 3]),
        "extra_beta": st.sampled_from([0.9, 0.5, 0.0]),
        "extra_gate": st.sampled_from([0.5, None, 1.0, 0.2]),
        "extra_start": st.sampled_from([0, 0, 5]),
        "extra_kl": st.sampled_from([None, None, 0.02]),
        "lr": st.sampled_from([0.01, 0.05]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.99), (0.5, 0.9)]),
        "weight_decay": st.sampled_from([0.01, 0.0, 2.0]),
        "eps": st.just(1e-4),  # one that float16 can hold
        "amsgrad": st.sampled_from([False, False, True]),
        "maximize": st.sampled_from([False, False, True]),
    }
)
kinds = st.tuples(st.sampled_from(SHAPES[1:3] + SHAPES), st.sampled_from(DTYPES))
which = st.integers(0, 7)  # a tensor or a group, modulo their number


def event(**arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """A rule after which training goes on for some steps."""

    def decorate(what: Callable[..., None]) -> Any:
        @functools.wraps(what)
        def happen(self: Run, then: int, cure: bool, **chosen: Any) -> None:
            what(self, **chosen)
            for _ in range(then):
                self.step(0.1)
            if cure:
                self.cure()

        happen.__dict__.pop("__wrapped__")  # hypothesis would look for the arguments there
        return rule(then=st.integers(0, 4), cure=st.booleans(), **arguments)(happen)

    return decorate


class Run(RuleBasedStateMachine):
    """An ExtraAdam, its parameters, and the model."""

    @initialize(
        members=st.lists(st.lists(kinds, min_size=1, max_size=2), min_size=1, max_size=2),
        hyperparameters=st.lists(groups_of_hyperparameters, min_size=2, max_size=2),
        implementation=st.sampled_from(["fused", "forloop", "foreach"]),
        seed=st.integers(0, 2**20),
    )
    def begin(
        self, members: list[list[Any]], hyperparameters: list[dict[str, Any]], implementation: str, seed: int
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.flags = {"foreach": implementation == "foreach", "fused": implementation == "fused"}
        self.model = Model([], [], None)  # type: ignore[arg-type]
        self.params: list[Parameter] = []
        dicts = [self.new_group(kinds, options) for kinds, options in zip(members, hyperparameters)]
        self.optimizer = ExtraAdam([{**ours} for ours, _ in dicts], extra_watch=False, **self.flags)
        self.model.adamw = torch.optim.AdamW([theirs for _, theirs in dicts], **self.flags)

    def noise(self, like: Tensor, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(like.shape, dtype=torch.float64, generator=self.random)).to(like.dtype)

    def new_group(self, members: list[Any], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """For ExtraAdam and for the model's AdamW, of tensors with equal values."""
        group = Group(dict(options))
        self.model.groups.append(group)
        params = [Parameter(self.noise(torch.empty(shape, dtype=dtype))) for shape, dtype in members]
        shadows = [Parameter(p.detach().clone()) for p in params]
        self.params += params
        for p, q in zip(params, shadows):
            self.model.tracks.append(Track(group, p.detach().clone(), q, self.noise(p)))
        plain = {key: value for key, value in options.items() if not key.startswith("extra_")}
        return {"params": params, **options}, {"params": shadows, **plain}

    def track(self, i: int) -> tuple[Parameter, Track]:
        i %= len(self.params)
        return self.params[i], self.model.tracks[i]

    def position(self, i: int) -> int:
        return i % len(self.model.groups)

    def set_option(self, i: int, key: str, value: Any) -> None:
        """In both optimizers and the model."""
        self.model.groups[i].options[key] = value
        self.optimizer.param_groups[i][key] = value
        if not key.startswith("extra_"):
            self.model.adamw.param_groups[i][key] = value

    # --- what a comparison is ---

    def end(self, due: list[Track], texts: list[str], early: bool = False) -> None:
        """Compare the end of the cycles of `due`, and what was said about it."""
        landed = {id(t): p for p, t in zip(self.params, self.model.tracks)}
        refused = 0
        if due:
            here = [landed[id(t)] for t in due]
            self.model.end(due, [(p.detach(), self.optimizer.state[p].get("extra_estimate")) for p in here])
            assert self.model.last is not None
            refused = self.model.last.refused
            if early:  # not by the count of steps
                for track in due:
                    self.model.begin(track, track.group.every)
            said = f"{refused} of {len(due)} tensors did not jump at applied step {self.model.last.step}:"
            assert not refused or said in texts[0], texts
        assert len(texts) == bool(refused), texts
        self.check()

    def check(self) -> None:
        optimizer, model = self.optimizer, self.model
        for p, track in zip(self.params, model.tracks):
            assert same(p.detach(), track.weight), "weights"
            state, theirs = optimizer.state.get(p, {}), model.adamw.state.get(track.shadow, {})
            wanted = set(theirs)
            wanted |= set() if track.anchor is None else {"extra_anchor", "extra_origin"}
            wanted |= set() if track.estimate is None else {"extra_estimate", "extra_noise_cov", "extra_noise_var"}
            assert set(state) == wanted
            assert all(same(state[key], theirs[key]) for key in theirs), "AdamW's own state"
            assert not state or int(state["step"]) == track.step
            if track.estimate is not None:
                assert same(state["extra_estimate"], track.estimate), "drift"
                noise = state["extra_noise_cov"], state["extra_noise_var"]
                assert all(math.isclose(*pair, rel_tol=1e-9) for pair in zip(noise, track.noise)), "noise"
            if track.anchor is not None:
                assert same(state["extra_anchor"], track.anchor), "anchor"
                origin = track.step - track.cycles * track.group.every - track.since
                assert state["extra_origin"] == origin
        for ours, group in zip(optimizer.param_groups, model.groups):
            assert {key: ours[key] for key in group.options} == group.options
            assert ours["extra_length"] == group.known
        self.check_report()

    def check_report(self) -> None:
        got, want = self.optimizer.last_jump, self.model.last
        assert (got is None) == (want is None)
        if got is None or want is None:
            return
        assert (got.step, got.jumped, got.refused) == (want.step, want.jumped, want.refused)
        assert got.length == want.length and math.isnan(got.kl) and math.isnan(got.fall)
        assert math.isclose(got.coherence, want.coherence, abs_tol=1e-4)
        assert math.isclose(got.weight_norm, want.weight_norm, rel_tol=1e-4)
        assert math.isclose(got.drift_norm, want.drift_norm, rel_tol=1e-4, abs_tol=1e-5 * want.slack)
        assert math.isclose(got.gate, want.gate, abs_tol=1e-3)

    # --- steps ---

    def step(self, scale: float = 0.3, sign: float = 1.0, without: Iterable[int] = (), poison: Any = None) -> None:
        """One step along each tensor's slope with noise; `poison` is a tensor and what its first gradient is."""
        grads: list[Tensor | None] = []
        for i, (p, track) in enumerate(zip(self.params, self.model.tracks)):
            if track.frozen or i in without:
                p.grad = None
            else:
                p.grad = sign * track.slope + self.noise(p.detach(), scale)
                if poison and poison[0] == i:
                    p.grad.view(-1)[:1] = poison[1]
            grads.append(p.grad)
        due = self.model.step(grads)
        with refusals() as texts:
            self.optimizer.step()
        for p, track in zip(self.params, self.model.tracks):
            left = p.detach().isfinite() | ~track.weight.isfinite()
            assert bool(left.all()), "a weight that AdamW left finite is no longer"
        self.end(due, texts)

    @event(n=st.integers(1, 6), sign=st.sampled_from([1.0, 1.0, 1.0, -1.0]), scale=st.sampled_from([0.1, 0.3, 3.0]))
    def walk(self, n: int, sign: float, scale: float) -> None:
        for _ in range(n):
            self.step(scale, sign)

    @event(n=st.integers(1, 5), without=st.sets(which, min_size=1, max_size=3))
    def walk_with_some_gradients_missing(self, n: int, without: set[int]) -> None:
        for _ in range(n):
            self.step(0.3, 1.0, without)

    @event(i=which, bad=st.sampled_from([math.nan, math.inf, -math.inf]))
    def step_on_a_gradient_that_is_not_finite(self, i: int, bad: float) -> None:
        self.step(poison=(i % len(self.params), bad))

    @event(jump=st.booleans())
    def skip_as_a_gradient_scaler_does(self, jump: bool) -> None:
        if jump:  # then every cycle has just ended, and must not end once more
            self.end_cycles()
        if not self.flags["fused"]:  # the scaler does not call step
            return
        grads: list[Tensor | None] = []
        for p, track in zip(self.params, self.model.tracks):
            p.grad = None if track.frozen else torch.full_like(p, math.inf)
            grads.append(p.grad)
        for optimizer in self.optimizer, self.model.adamw:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)  # type: ignore[attr-defined]
        assert not self.model.step(grads, skipped=True)
        with refusals() as texts:
            self.optimizer.step()
        for optimizer in self.optimizer, self.model.adamw:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        self.end([], texts)

    @event(i=which, freeze=st.booleans())
    def freeze_or_thaw(self, i: int, freeze: bool) -> None:
        p, track = self.track(i)
        track.frozen = freeze
        p.requires_grad_(not freeze)

    # --- options ---

    @event(i=which, lr=st.sampled_from([0.0, 0.01, 0.1, 0.0, 100.0, 1e25]), tensor=st.booleans())
    def set_the_learning_rate(self, i: int, lr: float, tensor: bool) -> None:
        tensor = tensor and not self.flags["foreach"]  # which takes none on a CPU
        self.set_option(self.position(i), "lr", torch.tensor(lr) if tensor else lr)

    @event(i=which, decay=st.sampled_from([0.0, 0.01, 5.0]))
    def set_the_weight_decay(self, i: int, decay: float) -> None:
        self.set_option(self.position(i), "weight_decay", decay)

    @event(i=which, horizon=st.sampled_from([0, 20, 0, 60]))
    def set_the_horizon(self, i: int, horizon: int) -> None:
        self.set_option(self.position(i), "extra_steps", horizon)

    @event(i=which, every=st.sampled_from([3, 2, 4, 1]))
    def set_the_length_of_a_cycle(self, i: int, every: int) -> None:
        group = self.model.groups[self.position(i)]
        before = group.every
        self.set_option(self.position(i), "extra_every", every)
        self.restart({id(group): before})

    # --- what a user calls ---

    def restart(self, every: dict[int, int]) -> None:
        """reset_anchor, with the lengths that cycles had."""
        for track in self.model.tracks:
            if track.anchor is not None:
                track.anchor = track.weight.clone()
                self.model.begin(track, every.get(id(track.group), track.group.every))
        self.optimizer.reset_anchor()
        self.check()

    @event()
    def reset_anchor(self) -> None:
        self.restart({})

    @event()
    def jump(self) -> None:
        self.end_cycles()

    def end_cycles(self) -> None:
        due = [t for t in self.model.tracks if t.since]
        with refusals() as texts:
            done = self.optimizer.jump()
        assert (done is not None) == bool(due)
        self.end(due, texts, early=True)

    @precondition(lambda self: len(self.model.groups) < 3)
    @event(kind=kinds, options=groups_of_hyperparameters)
    def add_param_group(self, kind: Any, options: dict[str, Any]) -> None:
        ours, theirs = self.new_group([kind], options)
        self.optimizer.add_param_group(ours)
        self.model.adamw.add_param_group(theirs)
        self.check()

    # --- weights and state changed from outside ---

    @event(i=which, size=st.sampled_from([1.0, 0.9, 0.3]), swap=st.booleans(), reset=st.booleans())
    def edit_weights(self, i: int, size: float, swap: bool, reset: bool) -> None:
        """Other weights; with a size below 1, that part of their dtype's range."""
        p, track = self.track(i)
        other = self.noise(p.detach()) if size == 1 else torch.full_like(p, size * torch.finfo(p.dtype).max)
        if swap:
            p.data = other.clone()
        else:
            p.detach().copy_(other)
        track.weight = other
        if reset:
            self.restart({})

    @event(i=which, bad=st.sampled_from([math.nan, math.inf]), where=st.sampled_from(["weight", "anchor", "estimate"]))
    def spoil(self, i: int, bad: float, where: str) -> None:
        p, track = self.track(i)
        ours = p.detach() if where == "weight" else self.optimizer.state.get(p, {}).get(f"extra_{where}")
        theirs = getattr(track, where)
        if theirs is not None:
            ours.view(-1)[:1] = bad
            theirs.view(-1)[:1] = bad

    @event()
    def cure_and_reset_anchor(self) -> None:
        self.cure()
        self.restart({})

    def cure(self) -> None:
        """As a user who restores what has diverged: weights and AdamW's moments, and the learning rate."""
        for p, track in zip(self.params, self.model.tracks):
            if not bool((p.detach().abs() < 100).all()):
                track.weight = self.noise(p.detach())
                p.detach().copy_(track.weight)
            for state in self.optimizer.state.get(p, {}), self.model.adamw.state.get(track.shadow, {}):
                for key in {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"} & state.keys():
                    state[key].nan_to_num_(0.0, 0.0, 0.0)
        for i, group in enumerate(self.model.groups):
            if group.options["lr"] > 1:
                self.set_option(i, "lr", 0.01)

    # --- saved, loaded, copied ---

    def fresh(self) -> tuple[list[Parameter], ExtraAdam]:
        """Parameters with these values in an optimizer that knows nothing, not even the hyperparameters."""
        params = [Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in self.params]
        mine = dict(zip(self.params, params))
        groups = [{"params": [mine[p] for p in group["params"]]} for group in self.optimizer.param_groups]
        return params, ExtraAdam(groups, lr=0.5, extra_watch=False, **self.flags)

    def gone_on_with(self, params: list[Parameter], optimizer: ExtraAdam) -> None:
        """In another process: what waited for its first step that moves has the anchor that it had."""
        self.params, self.optimizer, self.model.last = params, optimizer, None
        for track in self.model.tracks:
            track.waiting = False
        self.check()

    @event()
    def resume_from_a_file(self) -> None:
        params, optimizer = self.fresh()
        optimizer.load_state_dict(reload(self.optimizer.state_dict()))
        self.gone_on_with(params, optimizer)

    @event()
    def load_what_another_optimizer_loads_too(self) -> None:
        saved = copy.deepcopy(self.optimizer.state_dict())
        params, optimizer = self.fresh()
        others, twin = self.fresh()
        optimizer.load_state_dict(saved)
        twin.load_state_dict(saved)
        for p in others:
            p.detach().fill_(1.0)
        with refusals():
            twin.jump()
        twin.reset_anchor()
        self.gone_on_with(params, optimizer)

    @event()
    def load_weights_after_a_step_with_lr_0_made_the_state(self) -> None:
        """As torch.distributed.checkpoint does: the first step that moves takes the anchor."""
        self.load_adamw()
        for lr in 0.0, 0.01:
            for i in range(len(self.model.groups)):
                self.set_option(i, "lr", lr)
            self.step()
            if lr == 0:
                for p, track in zip(self.params, self.model.tracks):
                    track.weight = self.noise(p.detach())
                    p.detach().copy_(track.weight)

    @event()
    def load_the_state_of_a_plain_adamw(self) -> None:
        self.load_adamw()

    def load_adamw(self) -> None:
        self.optimizer.load_state_dict(reload(self.model.adamw.state_dict()))
        for track in self.model.tracks:
            track.anchor, track.estimate, track.noise = None, None, (0.0, 0.0)
            track.cycles = track.since = 0
        for group in self.model.groups:
            group.known = UNWATCHED
        self.model.last = None
        self.check()

    @event(by=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, by: str) -> None:
        pair = self.params, self.optimizer
        self.gone_on_with(*(copy.deepcopy(pair) if by == "deepcopy" else pickle.loads(pickle.dumps(pair))))


def test_no_order_of_events_takes_weights_or_state_away_from_the_rule() -> None:
    run_state_machine_as_test(
        Run,
        settings=settings(
            derandomize=True, deadline=None, max_examples=25, stateful_step_count=20, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
