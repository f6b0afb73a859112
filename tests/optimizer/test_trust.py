"""The trust region: how a length is searched, what is measured of a model, and whole runs that jump by it."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, assert_same_run, reload
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from extraopt import ExtraAdam, trust
from extraopt.trust import Length, Limits, Reach, TrustRegion, search

EVERY = 3
OPEN: dict[str, Any] = {"lr": 1e-3, "extra_every": EVERY, "extra_gate": None}
lengths = st.one_of(st.just(0.0), st.floats(0.5, 500))
ways = st.floats(0, 100)  # of the real steps, in steps of the jump
limits = st.builds(Limits, st.integers(1, 400).map(float), st.floats(1e-4, 1), st.floats(1e-3, 3))


class Measured:
    """Notes each trial."""

    def __init__(self, of: Callable[[float], tuple[float, float]]) -> None:
        self.of = of
        self.trials: dict[float, tuple[float, float]] = {}
        self.count = 0

    def __call__(self, length: float) -> tuple[float, float]:
        self.count += 1
        self.trials[length] = self.of(length)
        return self.trials[length]


def start(limits: Limits, real: float) -> float:
    return min(max(real, 1.0), trust.UNWATCHED, limits.steps)


def shortest(limits: Limits, real: float) -> float:
    return start(limits, real) / 2


def check(found: Length, measured: Measured, known: float, limits: Limits, real: float) -> None:
    """What holds whatever the model does."""
    assert 1 <= measured.count <= 3
    first = min(max(2 * known, start(limits, real)), limits.steps)
    assert all(shortest(limits, real) <= tried <= first * (1 + 1e-12) for tried in measured.trials)
    if found.steps:
        kl, fall = measured.trials[found.steps]
        cycle = 1 + real / found.steps  # real steps and jump, in jumps
        assert found.kl == pytest.approx(kl * cycle**2, rel=1e-9) and found.kl <= limits.kl * (1 + 1e-12)
        assert found.fall == pytest.approx(fall * cycle, rel=1e-9) and found.fall <= limits.fall
        assert 0 < found.known <= found.steps
    else:
        assert math.isnan(found.kl) and math.isnan(found.fall) and found.known == 0


# --- the search ------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 2), min_size=3, max_size=3),
    lengths,
    limits,
    ways,
    st.floats(0, 1),
)
def test_no_length_is_taken_of_a_rough_or_broken_model_that_was_not_measured_within_the_limits(
    outcomes: list[tuple[float, float]], known: float, limits: Limits, real: float, gate: float
) -> None:
    left = iter(outcomes)
    measured = Measured(lambda length: next(left))
    check(search(measured, known, limits, real, gate), measured, known, limits, real)


@given(st.floats(1e-9, 1e3), st.floats(1e-6, 1e3), lengths, limits, ways)
def test_the_length_is_near_the_longest_by_which_the_cycle_stays_within_the_limits(
    kl: float, fall: float, known: float, limits: Limits, real: float
) -> None:
    """Of a model whose KL grows as the square of the way along the line, and whose fall in proportion to it."""
    measured = Measured(lambda h: (kl * h * h, fall * h))
    found = search(measured, known, limits, real, 1.0)
    check(found, measured, known, limits, real)
    least = shortest(limits, real)
    most = min(max(2 * known, least), limits.steps)
    way = min(math.sqrt(limits.kl / kl), limits.fall / fall)  # of real steps and jump
    assert measured.count <= 2
    assert found.steps <= max(way - real, 0.0) * (1 + 1e-9)
    if 0.94 * way - real >= least:
        assert found.steps >= min(0.94 * way - real, most) * (1 - 1e-9)


@given(st.floats(1.01, 100), lengths, limits, st.floats(1, 100))
def test_nothing_jumps_where_the_real_steps_use_the_limits_up(
    times: float, known: float, limits: Limits, real: float
) -> None:
    """As at a learning rate at which AdamW itself moves the outputs by the limit in a cycle."""
    a_step = times * limits.fall / (real + shortest(limits, real))
    measured = Measured(lambda h: (0.0, a_step * h))
    found = search(measured, known, limits, real, 1.0)
    check(found, measured, known, limits, real)
    assert found.steps == 0 and measured.count <= 2
    measured = Measured(lambda h: (0.0, a_step * h))
    assert search(measured, found.known, limits, real, 1.0).steps == 0 and measured.count <= 2


@given(st.floats(1.4, 3), st.floats(0.7, 3), lengths, limits, ways)
def test_a_model_that_bends_otherwise_jumps(kl: float, fall: float, known: float, limits: Limits, real: float) -> None:
    """However far from it the first trial was: the shortest length is tried before nothing is taken."""
    least = shortest(limits, real)
    share = least / (least + real)
    measured = Measured(
        lambda h: (limits.kl * share**2 * 0.98 * (h / least) ** kl, limits.fall * share * 0.99 * (h / least) ** fall)
    )
    found = search(measured, known, limits, real, 1.0)
    check(found, measured, known, limits, real)
    assert found.steps >= least or measured.count == 3


@given(lengths, limits, ways, st.floats(0, trust.OPEN, exclude_max=True))
def test_lengths_fall_back_where_gates_are_shut(known: float, limits: Limits, real: float, gate: float) -> None:
    """There any length is within the limits, and would be too long by far when the gates open."""
    for _ in range(12):
        found = search(lambda h: (0.0, 0.0), known, limits, real, gate)
        assert found.steps == min(max(2 * known, start(limits, real)), limits.steps)
        known = found.known
    assert known <= min(trust.UNWATCHED, limits.steps)


@given(lengths, limits, ways, st.floats(trust.OPEN, 1))
def test_lengths_grow_to_the_horizon_where_gates_are_open_and_nothing_is_felt(
    known: float, limits: Limits, real: float, gate: float
) -> None:
    """At a tiny learning rate no length that is measured comes near a limit, at first."""
    for _ in range(12):
        found = search(lambda h: (0.0, 0.0), known, limits, real, gate)
        known = found.known
    assert found.steps == limits.steps


@given(st.floats(0, 1e6), st.floats(1, 20))
def test_lengths_recover_from_searches_that_found_none(far: float, real: float) -> None:
    """After cycles in which all was far outside of the limits."""
    limits, known = Limits(200, 0.02, 0.4), 50.0
    for _ in range(20):
        known = search(lambda h: (far * h, 1 + far * h), known, limits, real, 1.0).known
    assert known == 0
    for _ in range(8):
        known = search(lambda h: (1e-8 * h * h, 2e-4 * h), known, limits, real, 1.0).known
    assert known > 100


@pytest.mark.parametrize("real", [5.0, 20.0])
def test_rounding_that_no_length_escapes_stops_no_jump_for_good(real: float) -> None:
    """Under bfloat16 autocast outputs of a language model differ by so much (KL 1e-3, fall 0.1) however near it is.

    At a short length the cycle's real steps would make many times as much of it.
    """
    limits, known = Limits(200, 0.02, 0.8), 0.0
    for _ in range(8):
        found = search(lambda h: (1e-3 + 3e-6 * h * h, 0.1 + 5e-3 * h), known, limits, real, 1.0)
        known = found.known
        assert found.steps >= real
    assert found.steps > 25


@given(
    st.sampled_from([math.nan, math.inf]),
    st.booleans(),
    lengths,
    limits,
    ways,
)
def test_a_model_that_failed_is_not_run_again(
    bad: float, first: bool, known: float, limits: Limits, real: float
) -> None:
    measured = Measured(lambda h: (bad, 0.0) if first else (0.0, bad))
    found = search(measured, known, limits, real, 1.0)
    check(found, measured, known, limits, real)
    assert measured.count == 1 and found.steps == 0


# --- what is measured ------------------------------------------------------------------------------------------------


class Outputs(trust.Outputs):
    """All rows are looked at."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits, torch.arange(len(logits)))

    def compare(self, logits: Tensor) -> Tensor:  # type: ignore[override]
        return super().compare(logits, torch.arange(len(logits)))


def by_hand(before: Tensor, after: Tensor) -> list[float]:
    """Sums of KL and fall and the number of positions, of all and of those with a choice, one by one, in float64."""
    every, choice = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for b, a in zip(before.double(), after.double()):
        p, q = b.softmax(-1), a.softmax(-1)
        plausible = [i for i in range(len(p)) if p[i] >= trust.PLAUSIBLE]
        kl = sum(float(p[i] * (p[i] / q[i]).log()) for i in range(len(p)) if p[i] > 0)
        fall = max(0.0, *(float((p[i] / q[i]).log()) for i in plausible))
        for sums in [every, choice] if len(plausible) > 1 else [every]:
            sums[:] = sums[0] + kl, sums[1] + fall, sums[2] + 1
    return every + choice


def drawn(seed: int, rows: int = 40, width: int = 30, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    before = scale * torch.randn(rows, width)
    return before, before + 0.3 * torch.randn(rows, width)


@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_outputs_are_compared_as_by_hand(scale: float) -> None:
    before, after = drawn(0, scale=scale)
    sums = Outputs(before).compare(after)
    assert sums.dtype == torch.float64 and sums.is_cpu
    torch.testing.assert_close(sums, torch.tensor(by_hand(before, after), dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert Outputs(before).compare(before).tolist()[:2] == [0.0, 0.0]


def test_positions_with_a_choice_are_counted_apart() -> None:
    before, after = drawn(1)
    before[::2, 0] += 40
    sums = Outputs(before).compare(after)
    torch.testing.assert_close(sums, torch.tensor(by_hand(before, after), dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert sums[2] == 40 and 0 < sums[5] <= 20
    assert Outputs(before[::2]).compare(after[::2])[3:].tolist() == [0, 0, 0]
    assert Outputs(before[:0]).compare(after[:0]).tolist() == [0] * 6


def test_the_larger_of_both_means_is_what_the_limits_hold() -> None:
    assert trust._means([1.0, 4.0, 10.0, 0.9, 3.0, 2.0]) == (0.45, 1.5)
    assert trust._means([8.0, 40.0, 10.0, 0.9, 3.0, 2.0]) == (0.8, 4.0)
    assert trust._means([8.0, 40.0, 10.0, 0.0, 0.0, 0.0]) == (0.8, 4.0)
    assert trust._means([-1e-9, 0.0, 10.0, 0.0, 0.0, 0.0]) == (0.0, 0.0)
    assert all(map(math.isnan, trust._means([0.0] * 6)))


def test_a_policy_without_a_choice_left_is_not_ruined() -> None:
    """Its outputs change at no position that has a choice, since none has: a jump of any length would be allowed."""
    before, after = drawn(1)
    before[:, 0] += 40
    after[:, 1] += 60
    kl, fall = trust._means(Outputs(before).compare(after).tolist())
    assert kl > 1 and fall > 1


def test_two_plausible_tokens_are_a_choice() -> None:
    even = torch.tensor([[0.0, 0.0, -20.0], [0.0, -30.0, -30.0], [0.0, math.log(0.02), -30.0]])
    assert Outputs(even).compare(even)[5] == 2


def test_tokens_that_are_ruled_out_do_not_count() -> None:
    before, after = drawn(2)
    before[:, 3:9] = after[:, 3:9] = -math.inf
    sums = Outputs(before).compare(after)
    torch.testing.assert_close(sums, torch.tensor(by_hand(before, after), dtype=torch.float64), rtol=1e-5, atol=1e-6)
    after[:, 1] = -math.inf
    assert math.isinf(Outputs(before).compare(after)[0]), "what could be said can't be any more"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_outputs_that_are_not_finite_are_told(bad: float, when: str) -> None:
    logits = dict(zip(("before", "after"), drawn(3)))
    for name in logits if when == "both" else [when]:
        logits[name][7] = bad
    assert not Outputs(logits["before"]).compare(logits["after"])[:2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = (x.to(dtype) for x in drawn(4))
    whole = Outputs(before).compare(after)
    torch.testing.assert_close(whole, torch.tensor(by_hand(before, after), dtype=torch.float64), rtol=1e-5, atol=1e-6)
    for rows in (1, 7, 40):
        monkeypatch.setattr(trust, "CHUNK_BYTES", rows * 30 * 4)
        torch.testing.assert_close(Outputs(before).compare(after), whole, rtol=1e-6, atol=0)


def test_outputs_of_another_shape_are_refused() -> None:
    before, after = drawn(5)
    with pytest.raises(trust.Unusable, match="another shape"):
        Outputs(before).compare(after[1:])


# --- whole runs ------------------------------------------------------------------------------------------------------


def llama(seed: int = 0, vocabulary: int = 16, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"num_key_value_heads": 1, "max_position_embeddings": 256, "pad_token_id": 0, **sizes, **options}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocabulary, **config))


def batch(step: int, rows: int = 2, width: int = 8) -> dict[str, Tensor]:
    ids = (torch.arange(width).repeat(rows, 1) * (step % 5 + 1) + step + torch.arange(rows)[:, None]) % 13 + 3
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def take(model: Any, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    model(**batch(step)).loss.backward()
    optimizer.step()


class Passes:
    """Counts the forward passes of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


def measured_by_hand(before: Any, after: Any, step: int) -> tuple[float, float]:
    ids, labels = batch(step).values()
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits[:, :-1][labels[:, 1:] != -100] for model in (before, after)]
    return trust._means(by_hand(*logits))


def real_steps(before: dict[str, Any], optimizer: Any, landed: torch.nn.Module) -> float:
    """How many steps of the jump the cycle's real steps went along it, by all numbers; gates are open."""
    along, step_sq = 0.0, 0.0
    for (i, p), q in zip(enumerate(optimizer.param_groups[0]["params"]), landed.parameters()):
        drift = q.detach() - before["state"][i]["extra_anchor"]
        a_step = optimizer.state[p]["extra_estimate"] / EVERY
        along, step_sq = along + float((drift * a_step).sum()), step_sq + float(a_step.square().sum())
    return along / step_sq


@pytest.mark.parametrize("options", [{}, {"attention_dropout": 0.5}], ids=["plain", "dropout"])
def test_what_is_measured_at_a_jump_is_what_the_jump_does(options: dict[str, Any]) -> None:
    """Beside an AdamW that takes the same step from the same weights, and copies of the model before and after."""
    model = llama(**options)
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    for step in range(8 * EVERY):
        twin = copy.deepcopy(model)
        adamw = torch.optim.AdamW(twin.parameters(), lr=OPEN["lr"])
        state = copy.deepcopy(optimizer.state_dict())
        adamw.load_state_dict({**adamw.state_dict(), "state": state["state"]})
        take(model, optimizer, step)
        for p, q in zip(model.parameters(), twin.parameters()):
            q.grad = p.grad
        adamw.step()
        last = optimizer.last_jump
        if (step + 1) % EVERY == 0 and last.length:
            kl, fall = measured_by_hand(twin, copy.deepcopy(model), step)
            cycle = 1 + real_steps(state, optimizer, twin) / last.length  # real steps and jump, in jumps
            assert last.kl == pytest.approx(cycle**2 * kl, rel=1e-3, abs=1e-6)
            assert last.fall == pytest.approx(cycle * fall, rel=1e-3)
            assert 0 < last.kl <= 0.02 and 0 < last.fall <= 0.8
            for p, q in zip(model.parameters(), twin.parameters()):
                estimate = optimizer.state[p]["extra_estimate"]
                torch.testing.assert_close(p - q, last.length / EVERY * estimate, rtol=1e-3, atol=1e-6)
        else:
            assert_same(list(model.parameters()), list(twin.parameters()))
    assert last.length > 2 * EVERY


def test_limits_of_the_group_hold() -> None:
    """Tight ones make short jumps, and each of the two can be the tighter one."""

    def jumps(**limits: float) -> list[Any]:
        model = llama()
        optimizer = ExtraAdam(model.parameters(), extra_steps=5, **{**OPEN, "lr": 3e-4}, **limits)
        reports = {}
        for step in range(8 * EVERY):
            take(model, optimizer, step)
            reports[step // EVERY] = optimizer.last_jump
        return [report for report in reports.values() if report and report.length]

    free = jumps(extra_kl=1.0, extra_fall=10.0)
    assert free and all(jump.length == 5 for jump in free)
    for name in "kl", "fall":
        most = 0.8 * max(getattr(jump, name) for jump in free)
        tight = jumps(**{"extra_kl": 1.0, "extra_fall": 10.0, f"extra_{name}": most})
        assert tight and all(getattr(jump, name) <= most for jump in tight), (name, tight)
        assert min(jump.length for jump in tight) < 5, (name, tight)


def test_a_cycle_whose_real_steps_use_up_the_limits_is_adamws_and_still_tells_its_gate() -> None:
    """At a learning rate at which five steps of AdamW change the outputs by more than a cycle may."""
    model, twin = llama(), llama()
    optimizer = ExtraAdam(model.parameters(), extra_fall=1e-3, **OPEN)
    adamw = torch.optim.AdamW(twin.parameters(), lr=OPEN["lr"])
    for step in range(3 * EVERY):
        take(model, optimizer, step)
        take(twin, adamw, step)
    report = optimizer.last_jump
    assert report.length == 0 == report.jumped and report.gate == 1 and math.isnan(report.kl)
    assert_same(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("options", [{"extra_kl": None}, {"extra_watch": False}], ids=["no limit", "not watched"])
def test_a_rule_without_a_trust_region_neither_runs_the_model_nor_warns(options: dict[str, Any]) -> None:
    model = llama()
    optimizer = ExtraAdam(model.parameters(), extra_steps=30, **OPEN, **options)
    passes = Passes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4 * EVERY):
            take(model, optimizer, step)
    assert passes.count == 4 * EVERY
    last = optimizer.last_jump
    assert last.length == (30 if "extra_kl" in options else 20) and math.isnan(last.kl) and math.isnan(last.fall)


def test_a_jump_by_hand_runs_no_model() -> None:
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **{**OPEN, "extra_every": 100})
    passes = Passes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(12):
            take(model, optimizer, step)
            if step % 4 == 3:
                report = optimizer.jump()
    assert passes.count == 12 and report.length == trust.UNWATCHED and report.jumped and math.isnan(report.kl)


def test_steps_that_end_no_cycle_do_not_run_the_model() -> None:
    """And one that does runs it twice, where the first length tried is within the limits."""
    model = llama()
    optimizer = ExtraAdam(model.parameters(), extra_steps=6, **{**OPEN, "lr": 1e-5})
    passes = Passes(model)
    counts = []
    for step in range(4 * EVERY):
        before = passes.count
        take(model, optimizer, step)
        counts.append(passes.count - before)
    assert counts == 4 * [1, 1, 3]


@pytest.mark.parametrize("stop", range(1, 2 * EVERY + 1))
@pytest.mark.parametrize("same_process", [False, True], ids=["new", "same"])
def test_a_resumed_run_takes_jumps_of_other_lengths(stop: int, same_process: bool) -> None:
    """At every offset in a cycle; the first step after it may be the one that ends it. Or into a run that goes on."""
    whole = llama()
    whole_opt = ExtraAdam(whole.parameters(), **OPEN)
    for step in range(5 * EVERY):
        if step == stop:
            saved = reload({"model": whole.state_dict(), "optimizer": whole_opt.state_dict()})
        take(whole, whole_opt, step)
    model = llama(seed=1)
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    if same_process:
        take(model, optimizer, 99)  # of which nothing may be left
        assert not optimizer._trust.watch.captured
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(stop, 5 * EVERY):
            take(model, optimizer, step)
    assert_same_run(whole, whole_opt, model, optimizer)
    assert repr(optimizer.last_jump) == repr(whole_opt.last_jump) and whole_opt.last_jump.kl > 0


def peak(run: Callable[[], None], folder: Path) -> int:
    """The most bytes that torch held at a time, beyond those that it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def test_the_trust_region_needs_more_memory_than_training(tmp_path: Path) -> None:
    """At a vocabulary of 150,000: logits of half of these positions would be more than all weights."""
    peaks = []
    for watched in (False, True):
        model = llama(vocabulary=150_000)
        optimizer = ExtraAdam(model.parameters(), extra_watch=watched, **{**OPEN, "extra_every": 1})
        passes = Passes(model)
        data = batch(0, rows=2, width=64)

        def step(model: Any = model, optimizer: Any = optimizer, data: Any = data) -> None:
            optimizer.zero_grad()
            model(**data).loss.backward()
            optimizer.step()

        for _ in range(2):  # which make the state
            step()
        passes.count = 0
        peaks.append(peak(step, tmp_path))
        assert (passes.count > 1) == watched and optimizer.last_jump.length > 0
    assert peaks[1] <= 1.05 * peaks[0], peaks


def test_a_failing_choice_leaves_the_weights_elsewhere() -> None:
    """Whatever raises: the weights are those at 0, and it is not swallowed unless the model raised it."""
    moves = []
    region = TrustRegion()
    model = llama()
    region.watch.attach(model, None)
    model(**batch(0))

    def move(length: float) -> None:
        moves.append(length)
        if length == 2.0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        region.choose(move, Reach(1, 1, 1, 1, 1), list(model.parameters()), 1.0, Limits(10, 1, 1), True)
    assert moves == [0.0, 2.0, 0.0] and not region.watch.captured and model.training
