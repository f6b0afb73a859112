"""Random sequences of what can happen to an optimizer during a run, each compared with a plain model of all of it.

The model (`Model`) is AdamW from torch, the float64 reference for the end of a cycle, and bookkeeping in words that the
package does not use: cycles since, steps since, lists of reported metrics. It shares no code with `extraopt/`.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import reload
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor
from torch.nn import Parameter

from extraopt import ExtraAdam
from extraopt.kernels import reference

DTYPES = [torch.float16, torch.float32, torch.bfloat16, torch.float64]
SHAPES = [(), (3,), (2, 3), (0,)]
GOOD, BAD = 0.8, 0.2  # levels of the reported metric


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
    scale: float = 1.0

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
    def beta(self) -> float:
        beta = self.options["extra_beta"]
        if beta is None:
            return max(0.0, 1 - self.every / self.horizon) if self.horizon else 0.0
        return float(beta)

    @property
    def estimates(self) -> bool:
        return self.gate is not None or self.beta > 0


@dataclass(eq=False)
class Track:
    """One tensor: what it and its state must be."""

    group: Group
    weight: Tensor
    shadow: Parameter  # stepped by torch's AdamW from where `weight` is
    slope: Tensor
    step: int = 0
    anchor: Tensor | None = None
    drift: Tensor | None = None
    waiting: bool = False  # only steps with lr 0 so far: the first that moves takes the anchor
    cycles: int = 0  # that the estimate has seen
    since: int = 0  # applied steps in this cycle
    ratio: float = 0.0  # of the last jump
    frozen: bool = False


@dataclass
class Report:
    """JumpReport, computed in float64."""

    step: int
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
    before: list[float] = field(default_factory=list)  # metrics reported in the cycle before the last jump
    after: list[float] = field(default_factory=list)
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
            if track.anchor is None or (track.waiting and not standing):
                track.anchor, track.waiting = track.weight.clone(), standing
            if track.group.estimates and track.drift is None:
                track.drift = torch.zeros_like(track.weight)
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
        """End the cycles of these tensors, whose weights and drifts must be those of `landed`, rounded.

        A gate that float32 sums may have put on the next multiple of 1/256 is read off where the weights landed.
        """
        reported = self.before or self.after
        for t in self.tracks if reported else ():
            t.ratio = 0.0
        watched = [t for t in due if t.group.gate is not None] or due
        dot = dd = vv = moved_sq = drift_sq = weight_sq = slack = 0.0
        jumped = refused = 0
        for track, (p, drift) in zip(due, landed):
            group, e, a = track.group, track.weight, track.anchor
            assert a is not None
            k, b, steps = group.every, group.beta, group.horizon * group.scale
            horizon = steps * track.cycles / (track.cycles + 1) if group.gate is not None else steps
            v = track.drift if group.estimates and track.drift is not None else torch.zeros_like(e)
            d = e.double() - a.double()
            track.since, track.cycles = 0, track.cycles + 1
            measured = [squares(t) for t in (e, d.to(work_dtype(e)), v)]
            if not all(map(math.isfinite, measured)):
                refused += 1
                track.anchor = e.clone()
                if group.estimates and not math.isfinite(measured[2]):
                    track.drift, track.cycles = torch.zeros_like(e), 0
                gate = 0.0
            else:
                if track in watched:
                    dot, dd, vv = dot + float((d * v.double()).sum()), dd + measured[1], vv + measured[2]
                allowed = track.step >= group.options["extra_start"]
                (w,), (nv,), (gate,) = reference.end_cycle(
                    [e], [a], [v], every=k, steps=steps, beta=b, gate=group.gate,
                    momentum=group.options["betas"][0], seen=track.cycles - 1, jump=allowed,
                )  # fmt: skip
                moves = allowed and (group.gate is None or min(measured[1:]) > 0)
                size = min(1.0, 100 * math.sqrt(measured[1] / squares(e))) if squares(e) else 1.0
                back = round(256 * (1 - gate) * size) / 512
                length = gate * horizon / k * float(nv.norm()) + back * float(d.norm()) if moves else 0.0
                gates = [gate]
                if length > 0 and float(e.double().norm()) + length > torch.finfo(e.dtype).max:
                    refused += 1
                    moves, gate = False, 0.0
                elif moves and group.gate is not None and e.dtype != torch.float64:
                    gates = [gate, *(g for g in (gate - 1 / 256, gate + 1 / 256) if 0 <= g <= 1)]
                if not moves or not group.horizon:
                    assert same(p, e), "a tensor that may not jump was moved"
                else:
                    exact = [(g, 256 * (1 - g) * size) for g in gates]  # as is the retreat to 1/512
                    backs = [(g, m / 512) for g, x in exact for m in {int(x), math.ceil(x)} if abs(m - x) < 0.501]
                    lands = [(g, w + (g - gate) * horizon / k * nv - (m - back) * d) for g, m in backs]
                    fits = [g for g, at in lands if near(p, at, g * horizon / k, e, a, v)]
                    assert fits, f"landed {(p.double() - w).abs().max()} from where the reference does"
                    gate = fits[0]
                track.weight, track.anchor = p.detach().clone(), p.detach().clone()
                if group.estimates:
                    assert drift is not None and near(drift, nv, 0, e, a, v), "drift"
                    track.drift = drift.clone()
                norm = float(nv.norm())
                slack += b * float(v.double().norm()) + (1 - b) * float(d.norm())
                drift_sq, weight_sq = drift_sq + norm**2, weight_sq + squares(e)
                if moves and gate * horizon > 0:
                    moved_sq, jumped = moved_sq + (norm * gate) ** 2, jumped + 1
            if group.estimates and reported:
                track.ratio = gate * horizon / k
        norms, gate = math.sqrt(dd) * math.sqrt(vv), math.sqrt(moved_sq / drift_sq) if drift_sq else 0.0
        self.last = Report(
            max(t.step for t in due), gate, dot / norms if norms else 0.0,
            math.sqrt(drift_sq), math.sqrt(weight_sq), jumped, refused, slack,
        )  # fmt: skip
        self.before, self.after = self.after, []
        for group in self.groups:
            group.scale = min(1.0, group.scale * 1.1)

    def begin(self, track: Track, every: int, extra_cycles: int = 0) -> None:
        """A new cycle begins; what the estimate has seen counts on, in cycles of the present length that fit."""
        seen = (track.cycles * every + track.since) // track.group.every + extra_cycles
        track.cycles, track.since, track.waiting = min(seen, track.step // track.group.every), 0, False

    def report(self, metric: float) -> bool:
        """Whether a jump has to be taken back."""
        if math.isfinite(metric):
            self.after.append(metric)
        n, m = len(self.before), len(self.after)
        if not any(t.ratio for t in self.tracks) or min(n, m) < 3:
            return False
        before, after = statistics.fmean(self.before), statistics.fmean(self.after)
        spread = sum((x - before) ** 2 for x in self.before) + sum((x - after) ** 2 for x in self.after)
        return after < before - 3 * math.sqrt(spread / (n + m - 2) * (1 / n + 1 / m))


@contextmanager
def refusals() -> Iterator[list[str]]:
    """The warnings of a step, as text."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


groups_of_knobs = st.fixed_dictionaries(
    {
        "extra_every": st.sampled_from([3, 2, 4, 1]),
        "extra_steps": st.sampled_from([20, 6, 60, 3]),
        "extra_beta": st.sampled_from([None, 0.5, 0.9, 0.0]),
        "extra_gate": st.sampled_from([0.5, None, 1.0, 0.2]),
        "extra_start": st.sampled_from([0, 0, 5]),
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
    """A rule after which training goes on for some steps, with the metrics that a trainer would report."""

    def decorate(what: Callable[..., None]) -> Any:
        @functools.wraps(what)
        def happen(self: Run, then: int, metric: float | None, cure: bool, **chosen: Any) -> None:
            what(self, **chosen)
            for _ in range(then):
                if metric is not None:
                    self.report(2, metric)
                self.step(0.1)
            if cure:
                self.cure()

        happen.__dict__.pop("__wrapped__")  # hypothesis would look for the arguments there
        levels = st.sampled_from([None, GOOD])
        return rule(then=st.integers(0, 4), metric=levels, cure=st.booleans(), **arguments)(happen)

    return decorate


class Run(RuleBasedStateMachine):
    """An ExtraAdam, its parameters, and the model."""

    @initialize(
        members=st.lists(st.lists(kinds, min_size=1, max_size=2), min_size=1, max_size=2),
        knobs=st.lists(groups_of_knobs, min_size=2, max_size=2),
        implementation=st.sampled_from(["fused", "forloop", "foreach"]),
        seed=st.integers(0, 2**20),
    )
    def begin(self, members: list[list[Any]], knobs: list[dict[str, Any]], implementation: str, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.flags = {"foreach": implementation == "foreach", "fused": implementation == "fused"}
        self.model = Model([], [], None)  # type: ignore[arg-type]
        self.params: list[Parameter] = []
        dicts = [self.new_group(kinds, options) for kinds, options in zip(members, knobs)]
        self.optimizer = ExtraAdam([{**ours} for ours, _ in dicts], **self.flags)
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
            self.model.end(due, [(p.detach(), self.optimizer.state[p].get("extra_drift")) for p in here])
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
            wanted |= set() if track.drift is None else {"extra_drift", "extra_ratio"}
            assert set(state) == wanted
            assert all(same(state[key], theirs[key]) for key in theirs), "AdamW's own state"
            assert not state or int(state["step"]) == track.step
            if track.drift is not None:
                assert same(state["extra_drift"], track.drift), "drift"
            if track.anchor is not None:
                assert same(state["extra_anchor"], track.anchor), "anchor"
                origin = track.step - track.cycles * track.group.every - track.since
                assert state["extra_origin"] == origin
            if track.drift is not None:
                assert math.isclose(state["extra_ratio"], track.ratio, rel_tol=1e-12)
        for ours, group in zip(optimizer.param_groups, model.groups):
            assert {key: ours[key] for key in group.options} == group.options
            assert math.isclose(ours["extra_scale"], group.scale)
        windows = optimizer.param_groups[0]["extra_reports"]
        assert [windows[0], windows[3]] == [len(model.before), len(model.after)]
        for mean, values in (windows[1], model.before), (windows[4], model.after):
            assert math.isclose(mean, statistics.fmean(values) if values else 0.0)
        self.check_report()

    def check_report(self) -> None:
        got, want = self.optimizer.last_jump, self.model.last
        assert (got is None) == (want is None)
        if got is None or want is None:
            return
        assert (got.step, got.jumped, got.refused) == (want.step, want.jumped, want.refused)
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
                if track.ratio:
                    track.ratio = 0.0
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

    @event(n=st.sampled_from([3, 4]), level=st.sampled_from([GOOD, BAD, math.nan]))
    def evaluate(self, n: int, level: float) -> None:
        self.report(n, level)

    @event()
    def get_worse_in_the_next_cycle(self) -> None:
        self.report(3, GOOD)
        for _ in range(4):
            self.step(0.1)
            if not self.model.after:
                break
        self.report(4, BAD)

    def report(self, n: int, level: float) -> None:
        for i in range(n):
            self.report_one(level + 0.01 * (-1) ** i)

    def report_one(self, metric: float) -> None:
        model = self.model
        if not all(group.estimates for group in model.groups):
            with pytest.raises(RuntimeError, match="extra_beta=0, extra_gate=None"):
                self.optimizer.report(metric)
            return
        moved = [(p, t) for p, t in zip(self.params, model.tracks) if t.ratio]
        back = []
        for _, t in moved:
            assert t.drift is not None and t.anchor is not None
            jump = t.ratio * t.drift.double()
            # what is not finite, or could leave the dtype's range, stays
            fits = (
                bool(t.anchor.isfinite().all())
                and float(t.weight.double().norm() + jump.norm()) <= torch.finfo(t.weight.dtype).max
            )
            back.append([x.double() - jump if fits else x.double() for x in (t.weight, t.anchor)])
        worse = model.report(metric)
        with refusals() as texts:
            assert self.optimizer.report(metric) == worse
        assert [("rolled back" in text) for text in texts] == [True] * worse
        if worse:
            for (p, t), (weight, anchor) in zip(moved, back):
                assert t.drift is not None and t.anchor is not None
                got = self.optimizer.state[p]["extra_anchor"]
                assert near(p.detach(), weight, t.ratio, t.weight, t.drift), "weights taken back"
                assert near(got, anchor, t.ratio, t.anchor, t.drift), "anchor taken back"
                t.weight, t.anchor, t.ratio = p.detach().clone(), got.clone(), 0.0
            for group in model.groups:
                group.scale *= 0.5
            model.after = []
        self.check()

    @precondition(lambda self: len(self.model.groups) < 3)
    @event(kind=kinds, options=groups_of_knobs)
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

    @event(i=which, bad=st.sampled_from([math.nan, math.inf]), where=st.sampled_from(["weight", "anchor", "drift"]))
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
        """Parameters with these values in an optimizer that knows nothing, not even the knobs."""
        params = [Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in self.params]
        mine = dict(zip(self.params, params))
        groups = [{"params": [mine[p] for p in group["params"]]} for group in self.optimizer.param_groups]
        return params, ExtraAdam(groups, lr=0.5, **self.flags)

    @event()
    def resume_from_a_file(self) -> None:
        params, optimizer = self.fresh()
        optimizer.load_state_dict(reload(self.optimizer.state_dict()))
        self.params, self.optimizer, self.model.last = params, optimizer, None
        self.check()

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
        self.params, self.optimizer, self.model.last = params, optimizer, None
        self.check()

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
            track.anchor, track.drift, track.ratio = None, None, 0.0
            track.cycles = track.since = 0
        for group in self.model.groups:
            group.scale = 1.0
        self.model.before, self.model.after, self.model.last = [], [], None
        self.check()

    @event(by=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, by: str) -> None:
        pair = self.params, self.optimizer
        self.params, self.optimizer = copy.deepcopy(pair) if by == "deepcopy" else pickle.loads(pickle.dumps(pair))
        self.model.last = None
        self.check()


def test_no_order_of_events_takes_weights_or_state_away_from_the_rule() -> None:
    run_state_machine_as_test(
        Run,
        settings=settings(
            derandomize=True, deadline=None, max_examples=25, stateful_step_count=20, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
