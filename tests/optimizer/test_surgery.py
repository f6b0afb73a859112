"""Parameters that are pruned, grown or cast in mid-run, with AdamW's entries of their state cut by hand."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import GATED, PAPER, RULES, K, assert_same, reload, rule_name
from torch import Tensor
from torch.nn import Parameter

from extraopt import ExtraAdam
from extraopt.wrap import Extra

ROWS, STEPS = 8, 4 * K
Surgery = Callable[[torch.optim.Optimizer, Parameter], Parameter]


def adam(groups: Any, **rule: Any) -> ExtraAdam:
    return ExtraAdam(groups, lr=0.01, extra_watch=False, **rule)


def fused(groups: Any, **rule: Any) -> ExtraAdam:
    return ExtraAdam(groups, lr=0.01, extra_watch=False, fused=True, **rule)


def around_adamw(groups: Any, **rule: Any) -> Extra:
    return Extra(torch.optim.AdamW(groups, lr=0.01), extra_watch=False, **rule)


def around_sgd(groups: Any, **rule: Any) -> Extra:
    return Extra(torch.optim.SGD(groups, lr=0.01, momentum=0.9), extra_watch=False, **rule)


MAKERS = {"ExtraAdam": adam, "fused": fused, "Extra of AdamW": around_adamw, "Extra of SGD": around_sgd}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
TWO = "ExtraAdam", "Extra of SGD"
two_of_the_makers = pytest.mark.parametrize(
    "make", [pytest.param(m, id=n, marks=[] if n in TWO else [pytest.mark.slow]) for n, m in MAKERS.items()]
)
both_rules = pytest.mark.parametrize("rule", RULES, ids=rule_name)


def parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in ((ROWS, 3), (5,), (ROWS, 2))]


def named(params: list[Parameter]) -> list[dict[str, Any]]:
    names = "embed.weight", "norm.weight", "head.weight"
    groups = list(zip(names, params))
    return [{"params": groups[:2]}, {"params": groups[2:]}]


def step(optimizer: torch.optim.Optimizer, params: list[Parameter], i: int) -> None:
    """Of step number i, the rows of one large gradient that the parameter still has."""
    for j, p in enumerate(params):
        g = torch.Generator().manual_seed(100 * i + j)
        grad = 1 + 0.3 * torch.randn((4 * ROWS, *p.shape[1:]), generator=g)
        p.grad = grad[: p.shape[0]].to(p.dtype)
    optimizer.step()


@contextmanager
def one_warning(*says: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    ours = [w for w in seen if str(w.message).startswith("extraopt: ")]
    assert len(ours) == bool(says) and all(w.category is RuntimeWarning for w in ours), [str(w.message) for w in ours]
    assert all(words in str(w.message) for w in ours for words in says), str(ours[0].message)


# --- what a user does ---


def cut(t: Tensor) -> Tensor:
    return t[: ROWS // 2].clone()


def grow(t: Tensor) -> Tensor:
    return torch.cat([t, torch.zeros_like(t)])


def cast(t: Tensor) -> Tensor:
    return t.double()


def turn(t: Tensor) -> Tensor:
    """A shape of as many elements."""
    return t.t().clone()


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {"pruned": cut, "grown": grow, "cast": cast, "transposed": turn}


def own_entries(entries: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The base optimizer's, cut by their names."""
    moments = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
    return {k: change(v) if k in moments else v for k, v in entries.items()}


def replace(optimizer: torch.optim.Optimizer, old: Parameter, change: Callable[[Tensor], Tensor]) -> Parameter:
    """By a new parameter, which gets the old one's state."""
    new = Parameter(change(old.detach()))
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    optimizer.state[new] = own_entries(optimizer.state.pop(old), change)
    return new


def replace_keeping_the_dict(
    optimizer: torch.optim.Optimizer, old: Parameter, change: Callable[[Tensor], Tensor]
) -> Parameter:
    new = Parameter(change(old.detach()))
    for group in optimizer.param_groups:
        for j, p in enumerate(group["params"]):
            if p is old:
                group["params"][j] = new
    entries = optimizer.state.pop(old)
    entries.update(own_entries(entries, change))
    optimizer.state[new] = entries
    return new


def in_place(optimizer: torch.optim.Optimizer, p: Parameter, change: Callable[[Tensor], Tensor]) -> Parameter:
    p.grad = None
    p.data = change(p.data)
    entries = optimizer.state[p]
    entries.update(own_entries(entries, change))
    return p


WAYS = {"a new parameter": replace, "a new parameter, the old dict": replace_keeping_the_dict, "in place": in_place}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def fresh(make: Any, rule: dict[str, Any], optimizer: Any, params: list[Parameter]) -> tuple[list[Parameter], Any]:
    """Another optimizer that goes on from here, whose first parameter comes without a cycle, as from AdamW."""
    ours = [Parameter(p.detach().clone()) for p in params]
    other = make(named(ours), **rule)
    saved = reload(optimizer.state_dict())
    saved["state"][0] = {k: v for k, v in saved["state"][0].items() if not k.startswith("extra_")}
    other.load_state_dict(saved)
    return ours, other


def weights_and_cycles(optimizer: torch.optim.Optimizer, params: list[Parameter]) -> list[Any]:
    # around an optimizer that counts no steps those of before are unknown to another, and so where a cycle began
    counts = {"step", "extra_step", "extra_origin"}
    states = [{k: v for k, v in optimizer.state[p].items() if k not in counts} for p in params]
    return [[p.detach() for p in params], states]


@two_of_the_makers
@both_rules
@every_way
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_parameter_starts_a_new_cycle_and_the_others_go_on(
    change: Any, way: Any, rule: dict[str, Any], make: Any
) -> None:
    """Bit for bit as from a state without a cycle of it, and as if nothing had been changed; at any step of a cycle."""
    for at in range(1, K + 3):
        params, untouched = parameters(), parameters()
        optimizer, witness = make(named(params), **rule), make(named(untouched), **rule)
        for i in range(at):
            step(optimizer, params, i)
        params[0] = way(optimizer, params[0], change)
        # of as many elements as before, and in place: that is seen only when the cycle is about to end
        late = (K - 1 - at) % K if change in (cast, turn) and way is in_place else 0
        with one_warning():
            for i in range(at, at + late):
                step(optimizer, params, i)
        theirs, control = fresh(make, rule, optimizer, params)
        at += late
        with one_warning("embed.weight is ", str(tuple(params[0].shape)), f"its anchor ({ROWS}, 3)"):
            step(optimizer, params, at)
        step(control, theirs, at)
        with one_warning():
            for i in range(at + 1, at + STEPS):
                step(optimizer, params, i)
                step(control, theirs, i)
                assert_same(weights_and_cycles(optimizer, params), weights_and_cycles(control, theirs))
        for i in range(at + STEPS):
            step(witness, untouched, i)
        assert_same([p.detach() for p in params[1:]], [p.detach() for p in untouched[1:]])
        assert optimizer.last_jump.refused == 0 and optimizer.last_jump.jumped > 0


@every_maker
@pytest.mark.parametrize("rows", [256, 384, 640])
def test_a_large_embedding_whose_size_changes_by_whole_blocks_jumps_by_its_own_drift(rows: int, make: Any) -> None:
    """128 rows are a block to the kernels. It jumped by its distance from other rows of its anchor, with no word."""
    generator = torch.Generator().manual_seed(0)
    p = Parameter(torch.randn(512, 1024, generator=generator))
    optimizer = make([p], **PAPER)
    for _ in range(K - 1):
        p.grad = torch.ones_like(p)
        optimizer.step()

    def change(t: Tensor) -> Tensor:
        return t[:rows].clone() if rows < 512 else torch.cat([t, t[: rows - 512]])

    p = replace(optimizer, p, change)
    before = p.detach().clone()
    with one_warning(f"parameter 0 in group 0 is ({rows}, 1024)", "its anchor (512, 1024)"):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert float((p - before).detach().abs().max()) < 0.1
    for _ in range(K - 1):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.last_jump.jumped == 1 and optimizer.last_jump.weight_norm > 0


@every_maker
@pytest.mark.parametrize("through", ["the optimizer", "a state dict"])
@pytest.mark.parametrize("at", range(1, K + 2))
def test_code_that_maps_shapes_over_a_state_keeps_the_cycle(at: int, through: str, make: Any) -> None:
    """The rule of the paper is one of elements: the rows that are left are those of a run that lost none."""

    def mapped(entries: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
        return {k: v[: ROWS // 2] if v.shape == shape else v for k, v in entries.items()}

    params, untouched = parameters(), parameters()
    optimizer, witness = make(named(params), **PAPER), make(named(untouched), **PAPER)
    for i in range(at):
        step(optimizer, params, i)
    old = params[0]
    params[0] = Parameter(cut(old.detach()))
    with one_warning():
        if through == "the optimizer":
            optimizer.param_groups[0]["params"][0] = params[0]
            optimizer.state[params[0]] = mapped(optimizer.state.pop(old), old.shape)
        else:
            saved = reload(optimizer.state_dict())
            saved["state"] = {i: mapped(entries, torch.Size((ROWS, 3))) for i, entries in saved["state"].items()}
            optimizer = make(named(params), **PAPER)
            optimizer.load_state_dict(saved)
        for i in range(at, at + STEPS):
            step(optimizer, params, i)
    for i in range(at + STEPS):
        step(witness, untouched, i)
    close = {"rtol": 1e-5, "atol": 1e-6} if make is fused else {"rtol": 0, "atol": 0}  # its loop has a tail that rounds
    for p, q in zip(params, [untouched[0][: ROWS // 2], *untouched[1:]]):
        torch.testing.assert_close(p.detach(), q.detach(), **close)
    assert optimizer.last_jump.jumped == 3


@every_maker
@both_rules
@pytest.mark.parametrize("way", [replace, in_place])
@pytest.mark.parametrize("ask", ["reset_anchor", "jump"])
@pytest.mark.parametrize("at", [1, K - 1, K])
def test_a_new_cycle_asked_for_after_surgery_starts_with_it(
    at: int, ask: str, way: Any, rule: dict[str, Any], make: Any
) -> None:
    params = parameters()
    optimizer = make(named(params), **rule)
    for i in range(at):
        step(optimizer, params, i)
    params[0] = way(optimizer, params[0], cut)
    before = params[0].detach().clone()
    with one_warning("embed.weight is (4, 3)", "its anchor (8, 3)"):
        getattr(optimizer, ask)()
    assert_same(params[0].detach(), before)
    assert_same(optimizer.state[params[0]]["extra_anchor"], before)
    theirs, control = fresh(make, rule, optimizer, params)
    with one_warning():
        for i in range(at, at + STEPS):
            step(optimizer, params, i)
            step(control, theirs, i)
            assert_same(weights_and_cycles(optimizer, params), weights_and_cycles(control, theirs))


@every_maker
def test_several_changed_parameters_are_named_in_one_warning(make: Any) -> None:
    params = [Parameter(torch.ones(ROWS, 2)) for _ in range(7)]
    optimizer = make([{"params": params[:3]}, {"params": params[3:]}], **GATED)
    for i in range(K - 1):
        step(optimizer, params, i)
    params = [in_place(optimizer, p, cut) for p in params]
    says = [f"parameter {j} in group 0 is (4, 2)" for j in range(3)]
    with one_warning(*says, "parameter 1 in group 1", "its anchor (8, 2)", "; and 2 more"):
        step(optimizer, params, K - 1)
    with one_warning():
        for i in range(K, 2 * K):
            step(optimizer, params, i)
    assert optimizer.last_jump.refused == 0


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@every_maker
def test_a_copy_made_between_surgery_and_the_next_step_goes_on_like_the_optimizer(make: Any, copier: Any) -> None:
    for at, way in itertools.product(range(1, K + 1), WAYS.values()):
        params = parameters()
        optimizer = make(named(params), **GATED)
        for i in range(at):
            step(optimizer, params, i)
        params[0] = way(optimizer, params[0], cut)
        theirs, copied = copier((params, optimizer))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="extraopt: embed.weight")
            for i in range(at, at + STEPS):
                step(optimizer, params, i)
                step(copied, theirs, i)
        assert_same(weights_and_cycles(copied, theirs), weights_and_cycles(optimizer, params))
        assert optimizer.last_jump.jumped == copied.last_jump.jumped > 0


@every_maker
@every_way
def test_a_state_saved_between_surgery_and_the_next_step_loads_and_the_parameter_starts_a_new_cycle(
    make: Any, way: Surgery
) -> None:
    params = parameters()
    optimizer = make(named(params), **GATED)
    for i in range(K + 1):
        step(optimizer, params, i)
    params[0] = way(optimizer, params[0], cut)
    others = [Parameter(p.detach().clone()) for p in params]
    resumed = make(named(others), **GATED)
    with pytest.warns(RuntimeWarning, match="parameter 0 in group 0 was pruned or grown after its last step"):
        resumed.load_state_dict(reload(optimizer.state_dict()))
    assert "extra_anchor" not in resumed.state[others[0]] and "extra_anchor" in resumed.state[others[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the running optimizer tells of its own
        for i in range(K + 1, STEPS):
            step(optimizer, params, i)
            step(resumed, others, i)
    assert_same(params, others)


@every_maker
def test_a_frozen_parameter_is_pruned_without_a_word_until_it_moves(make: Any) -> None:
    params = parameters()
    optimizer = make(named(params), **PAPER)
    for i in range(K + 1):
        step(optimizer, params, i)
    params[0] = in_place(optimizer, params[0], cut)
    with one_warning():
        for i in range(K + 1, 2 * K + 1):
            step(optimizer, params[1:], i)
    with one_warning("embed.weight"):
        step(optimizer, params, 2 * K + 1)
    assert_same(optimizer.state[params[0]]["extra_anchor"].shape, params[0].shape)


def test_without_jumps_nothing_is_said_of_surgery() -> None:
    params = parameters()
    optimizer = adam(named(params), **{**GATED, "extra_steps": 6})
    for i in range(K - 1):
        step(optimizer, params, i)
    for group in optimizer.param_groups:
        group["extra_steps"] = 0
    params[0] = in_place(optimizer, params[0], cut)
    with one_warning():
        for i in range(K - 1, 3 * K):
            step(optimizer, params, i)
        optimizer.jump()
        optimizer.reset_anchor()


@every_maker
@pytest.mark.parametrize("gone", ["extra_anchor", "extra_origin", "all"])
def test_entries_taken_out_of_a_state_start_a_new_cycle_without_a_word(gone: str, make: Any) -> None:
    """In the very dict, which no identity shows."""
    for at in range(1, K + 1):
        params = parameters()
        optimizer = make(named(params), **PAPER)
        for i in range(at):
            step(optimizer, params, i)
        entries = optimizer.state[params[0]]
        for key in [k for k in entries if k == gone or gone == "all" and k.startswith("extra_")]:
            del entries[key]
        with one_warning():
            for i in range(at, at + STEPS):
                step(optimizer, params, i)
        assert optimizer.last_jump.refused == 0
        assert {"extra_anchor", "extra_origin"} <= optimizer.state[params[0]].keys()


def test_a_watched_model_is_pruned_in_mid_run() -> None:
    """Its embedding and its head, in a model whose outputs the trust region looks at."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16))
    optimizer = ExtraAdam(model.named_parameters(), lr=0.001, extra_every=K, extra_steps=6, extra_gate=None)
    optimizer.watch(model, logits=lambda output: output)

    def train(steps: range) -> None:
        for i in steps:
            tokens = torch.arange(8) + i % 2
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(tokens % model[0].num_embeddings), tokens % 8).backward()
            optimizer.step()

    with one_warning():
        train(range(2 * K + 1))
    assert optimizer.last_jump.kl > 0
    half = lambda t: t[:8].clone()  # noqa: E731
    for p in (model[0].weight, model[1].weight, model[1].bias):
        in_place(optimizer, p, half)
    model[0].num_embeddings = 8
    with one_warning("0.weight is (8, 8)", "1.weight is (8, 8)", "1.bias is (8,)"):
        train(range(2 * K + 1, 5 * K))
    assert optimizer.last_jump.jumped == 3 and optimizer.last_jump.kl > 0
