"""extraopt.wrap: the cycle around other optimizers than AdamW."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler

pytest.register_assert_rewrite("contract")

from contract import (  # noqa: E402
    CHECKS,
    EVERY,
    FLAGS,
    HYPERPARAMETERS,
    STEPS,
    clones,
    give_gradients,
    no_warnings,
    parameters,
    through_a_file,
    train,
)
from helpers import assert_same  # noqa: E402

from extraopt import ExtraAdam  # noqa: E402
from extraopt.wrap import Extra  # noqa: E402

RULE: dict[str, Any] = {"extra_every": EVERY, "extra_steps": STEPS, "extra_kl": None}
PAPER: dict[str, Any] = {**RULE, "extra_beta": 0.0, "extra_gate": None}
RULES = {"gated": RULE, "ungated": {**RULE, "extra_gate": None}, "paper": PAPER}
KEYS = {"extra_anchor", "extra_estimate", "extra_step", "extra_origin", "extra_noise_cov", "extra_noise_var"}

Base = Callable[[Sequence[Tensor]], Optimizer]


def of_library(module: str, name: str, **options: Any) -> Base:
    return lambda params: getattr(pytest.importorskip(module), name)(params, **options)


def of_torch(name: str, **options: Any) -> Base:
    kind = getattr(torch.optim, name, None)
    return partial(kind, **options) if kind else lambda params: pytest.skip(f"torch {torch.__version__} has no {name}")


BASES: dict[str, Base] = {
    "SGD": partial(torch.optim.SGD, lr=0.01),
    "SGD with momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True),
    "SGD fused": partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True),
    "SGD foreach": partial(torch.optim.SGD, lr=0.01, momentum=0.9, foreach=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "AdamW fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "RAdam": partial(torch.optim.RAdam, lr=0.01),
    "Adamax": partial(torch.optim.Adamax, lr=0.01),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "Rprop": partial(torch.optim.Rprop, lr=0.01),
    "ASGD": partial(torch.optim.ASGD, lr=0.01),
    "Adadelta": partial(torch.optim.Adadelta, lr=1.0),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01),  # its state is there before the first step
    "Adafactor": partial(torch.optim.Adafactor, lr=0.01),
    "Muon": of_torch("Muon", lr=0.01),
    "transformers' Adafactor": of_library(
        "transformers.optimization", "Adafactor"
    ),  # lr=None, and a Python int for step
    "schedule-free AdamW": of_library("schedulefree", "AdamWScheduleFree", lr=0.01, warmup_steps=4),
    "schedule-free SGD": of_library("schedulefree", "SGDScheduleFree", lr=0.01),
    "schedule-free RAdam": of_library("schedulefree", "RAdamScheduleFree", lr=0.01),
    "schedule-free reference": of_library("schedulefree", "AdamWScheduleFreeReference", lr=0.01),
}
SCHEDULE_FREE = [name for name in BASES if name.startswith("schedule-free")]


def weights(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return parameters(dtype, ((4, 3), (2, 5)))  # Muon takes matrices only


def based(name: str, params: Sequence[Tensor]) -> Optimizer:
    base = BASES[name](params)
    if hasattr(base, "train"):
        base.train()
    return base


def wrapped(name: str, params: Sequence[Tensor], **hyperparameters: Any) -> Extra:
    return Extra(based(name, params), **{**RULE, **hyperparameters})


def make(base: type[Optimizer], params: Any, **options: Any) -> Extra:
    """As the constructor of ExtraAdam, for the contract."""
    hyperparameters = {key: options.pop(key) for key in list(options) if key.startswith("extra_")}
    return Extra(base(params, **options), **hyperparameters)


# --- the rule --------------------------------------------------------------------------------------------------------

# An Extra is no AdamW, and leaves unscaling to the scaler: see its note.
NOT_KEPT = {"has_the_signature_of_adamw", "copies_keep_the_fused_scaler_path"}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("check", sorted(CHECKS.keys() - NOT_KEPT))
def test_around_adamw_it_keeps_the_contract(check, rule):
    CHECKS[check](
        lambda params, **options: make(torch.optim.AdamW, params, **{**RULES[rule], "extra_every": 10, **options})
    )


GENERAL = [
    "a_cleared_state_starts_anew",
    "a_group_added_in_mid_run_has_its_own_phase",
    "a_parameter_unfrozen_in_mid_run_has_its_own_phase",
    "a_parameter_with_rare_gradients_has_its_own_phase",
    "going_back_to_a_checkpoint_forgets_what_came_after",
    "hooks_fire_once_and_in_order",
    "hyperparameters_come_from_the_checkpoint",
    "no_state_before_the_first_gradient",
    "no_state_for_parameters_without_gradients",
    "one_call_for_each_group_is_one_step",
    "optimizers_that_loaded_one_state_dict_do_not_share_anchors",
    "parameters_put_in_for_one_call_keep_their_cycle",
    "parameters_replaced_before_the_first_step_are_the_ones_that_jump",
    "parameters_that_take_turns_have_their_own_phases",
    "post_hooks_see_the_weights_after_the_jump",
    "state_and_weights_are_written_in_place",
    "state_has_the_form_of_its_parameter_from_step_1",
    "weights_loaded_before_the_first_step_are_the_anchor",
    "weights_written_by_the_first_closure_are_the_anchor",
]


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop], ids=["SGD", "RMSprop"])
@pytest.mark.parametrize("check", GENERAL)
def test_around_an_optimizer_with_and_without_a_counter_it_keeps_the_contract(check, base):
    CHECKS[check](partial(make, base))


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_around_adamw_the_run_is_that_of_extra_adam(rule, flags):
    """With a warm-up from lr 0, and one tensor that gets its first gradient late and then now and then."""
    runs = []
    for make in (ExtraAdam, lambda params, **options: Extra(torch.optim.AdamW(params, **options), **RULES[rule])):
        leaves = parameters()
        # autograd may not write a leaf in place, so a differentiable step needs tensors that are not leaves
        params: Any = [p.clone() for p in leaves] if flags.get("differentiable") else leaves
        hyperparameters = RULES[rule] if make is ExtraAdam else {}
        optimizer = make(params, **{"lr": 0.01, **copy.deepcopy(flags), **hyperparameters})
        warm_up = lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / 4))
        ends = []
        for step in range(5 * EVERY):
            give_gradients(params, step)
            if step % 4 != 1:
                params[1].grad = None
            optimizer.step()
            ends.append(optimizer.last_jump)
            warm_up.step()
        states = [{k: v for k, v in optimizer.state[p].items() if k != "extra_step"} for p in params]
        runs.append({"weights": [p.detach() for p in params], "state": states, "ends": ends})
    assert_same(*runs)
    assert runs[0]["ends"][-1].jumped > 0


def by_hand(params: Sequence[Tensor], optimizer: Optimizer, steps: int) -> None:
    """The paper's rule around any optimizer."""
    anchors = [p.detach().clone() for p in params]
    for i in range(steps):
        train(optimizer, params, [i])
        if (i + 1) % EVERY == 0:
            for p, a in zip(params, anchors):
                jump = STEPS / EVERY * (p.detach() - a)
                p.data += jump
                for key in optimizer.state[p].keys() & {"x", "y", "z"}:  # schedule-free: all its points move
                    optimizer.state[p][key].add_(jump)
                a.copy_(p.detach())


@pytest.mark.parametrize("name", BASES)
def test_the_jump_is_that_of_the_rule(name):
    ours, theirs, plain = (weights(torch.float64) for _ in range(3))
    optimizer = wrapped(name, ours, **PAPER)
    train(optimizer, ours, range(4 * EVERY + 1))
    by_hand(theirs, based(name, theirs), 4 * EVERY + 1)
    train(based(name, plain), plain, range(4 * EVERY + 1))
    for p, q, r in zip(ours, theirs, plain):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(p, r, rtol=1e-3)


@pytest.mark.parametrize("name", BASES)
def test_with_a_gate_a_straight_path_jumps_from_the_second_cycle_on(name):
    params = weights()
    optimizer = wrapped(name, params)
    cycles = 3 if name == "schedule-free RAdam" else 2  # its first five steps are of lr 0
    for step in range(cycles * EVERY):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        report = optimizer.last_jump
        assert (report is None) == (step < EVERY - 1)
        if step == EVERY - 1:
            assert (report.step, report.gate, report.jumped) == (EVERY, 0.0, 0)
    assert (report.step, report.gate, report.jumped) == (cycles * EVERY, 1.0, 2)


@pytest.mark.parametrize("name", BASES)
def test_without_a_horizon_it_is_its_base(name):
    ours, theirs = weights(), weights()
    optimizer, base = wrapped(name, ours, extra_steps=0), based(name, theirs)
    train(optimizer, ours, range(3 * EVERY))
    train(base, theirs, range(3 * EVERY))
    assert_same([*ours], [*theirs])
    assert_same(optimizer.state_dict()["state"], base.state_dict()["state"])
    assert optimizer.last_jump is None


def test_a_base_with_low_precision_weights_gets_anchors_of_their_form():
    for dtype in torch.bfloat16, torch.float16:
        params = weights(dtype)
        optimizer = wrapped("SGD with momentum", params)
        train(optimizer, params, range(2 * EVERY))
        for p in params:
            for key in "extra_anchor", "extra_estimate":
                assert (optimizer.state[p][key].dtype, optimizer.state[p][key].shape) == (dtype, p.shape)
        assert optimizer.last_jump.jumped == 2


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", range(EVERY))
@pytest.mark.parametrize("name", BASES)
def test_a_resumed_run_is_the_same_run(name, offset):
    """Through a file, read with weights_only, into an optimizer with other hyperparameters."""
    whole, first = weights(), weights()
    optimizer, before = wrapped(name, whole), wrapped(name, first)
    stop = 2 * EVERY + offset
    train(optimizer, whole, range(4 * EVERY))
    train(before, first, range(stop))
    second = clones(first)
    after = wrapped(name, second, extra_every=7, extra_gate=None)
    after.load_state_dict(through_a_file(before.state_dict()))
    train(after, second, range(stop, 4 * EVERY))
    assert_same([*whole], [*second])
    assert_same(optimizer.state_dict(), after.state_dict())
    assert after.last_jump == optimizer.last_jump and after.last_jump.step == 4 * EVERY


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, through_torch_save])
@pytest.mark.parametrize("name", BASES)
def test_a_copy_goes_the_same_way(name, copied):
    params = weights()
    optimizer = wrapped(name, params)
    train(optimizer, params, range(EVERY + 1))
    twins, twin = copied((params, optimizer))
    assert type(twin) is Extra and twin.param_groups[0]["params"][0] is twins[0]
    fired = []
    twin.register_step_post_hook(lambda *_: fired.append(1))
    train(optimizer, params, range(EVERY + 1, 3 * EVERY))
    train(twin, twins, range(EVERY + 1, 3 * EVERY))
    assert_same([*params], [*twins])
    assert_same(optimizer.state_dict(), twin.state_dict())
    assert len(fired) == 2 * EVERY - 1


@pytest.mark.parametrize("name", BASES)
def test_a_checkpoint_of_the_base_alone_starts_a_new_cycle(name):
    before, ours = weights(), weights()
    base = based(name, before)
    train(base, before, range(EVERY + 1))
    optimizer = wrapped(name, ours, **PAPER)
    train(optimizer, ours, range(2))  # its anchors are of no use any more
    for p, q in zip(ours, before):
        p.data.copy_(q)
    optimizer.load_state_dict(through_a_file(base.state_dict()))
    assert optimizer.param_groups[0]["extra_every"] == EVERY
    twins = clones(ours)
    twin = based(name, twins)
    twin.load_state_dict(base.state_dict())
    train(optimizer, ours, range(20, 20 + EVERY))
    train(twin, twins, range(20, 20 + EVERY))
    counted = "step" in base.state[before[0]]
    assert optimizer.last_jump.step == EVERY + (EVERY + 1 if counted else 0) and optimizer.last_jump.jumped == 2
    for p, q, start in zip(ours, twins, before):
        torch.testing.assert_close(p, q + STEPS / EVERY * (q - start), rtol=1e-4, atol=1e-5)


def test_hyperparameters_that_a_checkpoint_lacks_stay_those_of_each_group():
    params = weights()
    state = torch.optim.SGD([{"params": [p]} for p in params]).state_dict()
    optimizer = Extra(torch.optim.SGD([{"params": params[:1], "extra_every": 7}, {"params": params[1:]}]), **RULE)
    optimizer.param_groups[1]["extra_gate"] = None  # set in mid-run
    optimizer.load_state_dict(state)
    assert [group["extra_every"] for group in optimizer.param_groups] == [7, EVERY]
    assert optimizer.param_groups[1]["extra_gate"] is None
    assert optimizer.param_groups[0]["extra_gate"] == optimizer.defaults["extra_gate"]


def test_a_base_that_has_stepped_before_it_was_wrapped_keeps_its_state():
    params, twins = weights(), weights()
    base, twin = torch.optim.RMSprop(params, lr=0.01), torch.optim.RMSprop(twins, lr=0.01)
    train(base, params, range(4))
    train(twin, twins, range(4))
    optimizer = Extra(base, **PAPER)
    train(optimizer, params, range(4, 6))
    train(twin, twins, range(4, 6))
    assert_same([*params], [*twins])
    train(optimizer, params, [6])
    assert optimizer.last_jump.step == 7 and optimizer.last_jump.jumped == 2


def test_a_checkpoint_of_extra_adam_or_for_it_goes_on():
    whole = weights()
    train(ExtraAdam(whole, **HYPERPARAMETERS), whole, range(4 * EVERY))
    for first, second in (ExtraAdam, partial(make, torch.optim.AdamW)), (partial(make, torch.optim.AdamW), ExtraAdam):
        params = weights()
        before, after = first(params, **HYPERPARAMETERS), second(params, **HYPERPARAMETERS)
        train(before, params, range(2 * EVERY + 1))
        after.load_state_dict(through_a_file(before.state_dict()))
        train(after, params, range(2 * EVERY + 1, 4 * EVERY))
        assert_same([*whole], [*params])


def test_a_refused_checkpoint_changes_nothing():
    params, others = weights(), parameters(shapes=((4, 3), (5, 2)))
    optimizer, other = wrapped("SGD with momentum", params), wrapped("SGD with momentum", others)
    train(optimizer, params, range(EVERY + 1))
    train(other, others, range(EVERY + 1))
    twins, twin = copy.deepcopy((params, optimizer))
    wrong_hyperparameter = copy.deepcopy(optimizer.state_dict())
    wrong_hyperparameter["param_groups"][0]["extra_every"] = 0
    for state, message in (
        (other.state_dict(), "parameter 1 in group 0 has shape"),
        (wrong_hyperparameter, "extra_every"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
    assert optimizer.state is optimizer.base_optimizer.state
    train(optimizer, params, range(EVERY + 1, 3 * EVERY))
    train(twin, twins, range(EVERY + 1, 3 * EVERY))
    assert_same([*params], [*twins])


def test_a_step_that_raises_begins_no_cycle():
    params = weights()
    optimizer = wrapped("schedule-free AdamW", params)
    optimizer.eval()
    with pytest.raises(Exception, match="train mode"):  # schedulefree's own
        train(optimizer, params, [0])
    assert not any(KEYS & optimizer.state[p].keys() for p in params)
    optimizer.train()
    train(optimizer, params, range(EVERY))
    assert optimizer.last_jump.step == EVERY


def test_the_template_step_of_distributed_checkpoint_is_no_anchor():
    """It fills a fresh state by a step with lr 0; weights loaded after that are no drift."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def model() -> torch.nn.Module:
        return torch.nn.Linear(3, 2)

    for name in "SGD with momentum", "RMSprop":
        first, second = model(), model()
        before, after = wrapped(name, [*first.parameters()]), wrapped(name, [*second.parameters()])
        get_optimizer_state_dict(second, after)
        assert all("extra_anchor" in after.state[p] for p in second.parameters())
        second.load_state_dict({key: value + 100 for key, value in second.state_dict().items()})
        train(after, [*second.parameters()], range(2 * EVERY - 1))
        assert after.last_jump.weight_norm > 100 and after.last_jump.drift_norm < 1

        train(before, [*first.parameters()], range(EVERY + 1))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        second.zero_grad()
        set_optimizer_state_dict(second, after, copy.deepcopy(get_optimizer_state_dict(first, before)))
        train(before, [*first.parameters()], range(EVERY + 1, 3 * EVERY))
        train(after, [*second.parameters()], range(EVERY + 1, 3 * EVERY))
        assert_same(list(first.parameters()), list(second.parameters()))


# --- groups and hyperparameters --------------------------------------------------------------------------------------


def test_the_base_and_its_wrapper_share_their_groups():
    (a, b, c), optimizer = parameters(shapes=((3,), (3,), (3,))), None
    base = torch.optim.SGD([{"params": [a], "extra_every": 7}, {"params": [b], "lr": 0.5}], lr=0.01)
    optimizer = Extra(base, **RULE)
    assert [group["extra_every"] for group in base.param_groups] == [7, EVERY]
    optimizer.add_param_group({"params": [c], "extra_steps": 0})
    assert base.param_groups is optimizer.param_groups and base.state is optimizer.state
    assert base.param_groups[2]["lr"] == 0.01 and base.param_groups[2]["extra_every"] == EVERY
    train(optimizer, [a, b, c], range(EVERY))
    assert optimizer.last_jump.step == EVERY and optimizer.state[a]["extra_step"] == EVERY
    assert c not in optimizer.state or not KEYS & optimizer.state[c].keys()
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert base.param_groups is optimizer.param_groups and base.state is optimizer.state
    optimizer.param_groups[1]["lr"] = 0.25
    assert base.param_groups[1]["lr"] == 0.25


@pytest.mark.parametrize(
    "hyperparameters", [{"extra_every": 0}, {"extra_steps": -1}, {"extra_gate": 2.0}, {"extra_beta": 1.0}]
)
def test_a_wrong_hyperparameter_is_refused_and_leaves_the_base_alone(hyperparameters):
    (p, q), name = weights(), next(iter(hyperparameters))
    base = torch.optim.SGD([p])
    before = copy.deepcopy((base.defaults, base.param_groups))
    with pytest.raises(ValueError, match=name):
        Extra(base, **hyperparameters)
    with pytest.raises(ValueError, match=name):
        Extra(torch.optim.SGD([{"params": [p], **hyperparameters}]))
    assert (base.defaults, base.param_groups[0].keys()) == (before[0], before[1][0].keys())
    with pytest.raises(ValueError, match=name):
        Extra(base).add_param_group({"params": [q], **hyperparameters})
    assert len(base.param_groups) == 1


def test_its_defaults_are_those_of_extra_adam():
    theirs = inspect.signature(ExtraAdam).parameters
    ours = inspect.signature(Extra).parameters
    assert {k: v.default for k, v in ours.items() if k != "base_optimizer"} == {
        k: v.default for k, v in theirs.items() if k.startswith("extra_")
    }


def test_an_optimizer_without_single_steps_or_with_jumps_is_refused():
    params = weights()
    with pytest.raises(TypeError, match="dict is not a torch.optim.Optimizer"):
        Extra({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LBFGS calls a closure within its step"):
        Extra(torch.optim.LBFGS(params))
    for base in ExtraAdam(params), Extra(torch.optim.SGD(params)):
        with pytest.raises(ValueError, match="jumps already"):
            Extra(base)


# --- torch's machinery -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "SGD fused", "AdamW fused", "RMSprop", "schedule-free AdamW"])
def test_a_step_that_a_scaler_skips_counts(name):
    def run(overflow_before: int | None) -> tuple[list[Parameter], list[int]]:
        params, ends = weights(), []
        optimizer = wrapped(name, params)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
        scaler.scale(torch.zeros(()))
        for step in range(2 * EVERY + 1):
            for infinite in [True, False] if step == overflow_before else [False]:
                give_gradients(params, step)
                for p in params:
                    p.grad *= scaler.get_scale()
                if infinite:
                    params[0].grad[0, 0] = torch.inf
                before = optimizer.last_jump
                scaler.step(optimizer)
                scaler.update()
                if optimizer.last_jump is not before:
                    ends.append(step)
        return params, ends

    plain, ends = run(None)
    assert ends == [EVERY - 1, 2 * EVERY - 1]
    for at in range(2 * EVERY + 1):
        params, same_ends = run(at)
        assert same_ends == ends
        assert_same([*params], [*plain], f"overflow before step {at + 1}")


def test_hooks_fire_twice_or_before_the_jump():
    """Those of all optimizers, and those that were registered on the base, before or after it was wrapped."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    params = weights()
    base = torch.optim.SGD(params, lr=0.01)
    torch.optim.AdamW(weights())  # a class whose step has its hooks, whatever else has run in this process
    seen: list[tuple[str, Any, Any]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda optimizer, args, kwargs: seen.append((name, optimizer, optimizer.last_jump))

    handles = [base.register_step_post_hook(note("base before"))]
    optimizer = Extra(base, **{**PAPER, "extra_every": 1})
    handles += [
        register_optimizer_step_pre_hook(note("all, pre")),
        register_optimizer_step_post_hook(note("all, post")),
        optimizer.register_step_pre_hook(note("own, pre")),
        optimizer.register_step_post_hook(note("own, post")),
        base.register_step_pre_hook(note("base after")),
    ]
    try:
        train(optimizer, params, [0])
    finally:
        for handle in handles:
            handle.remove()
    assert [name for name, _, _ in seen] == [
        "all, pre",
        "own, pre",
        "base after",
        "base before",
        "own, post",
        "all, post",
    ]
    assert all(o is optimizer for _, o, _ in seen)
    assert [jump is not None for _, _, jump in seen] == [False] * 3 + [True] * 3
    train(optimizer, params, [1])
    assert len(seen) == 6


def test_hooks_around_state_dicts_get_the_base_or_do_not_fire():
    params = weights()
    optimizer = wrapped("SGD", params)
    train(optimizer, params, range(EVERY))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("pre", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": seen.append(("post", o))})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append(("load pre", o)) or state["inner"])
    optimizer.register_load_state_dict_post_hook(lambda o: (seen.append(("load post", o)), o.reset_anchor()))
    state = optimizer.state_dict()
    assert "note" in state
    optimizer.load_state_dict({"inner": copy.deepcopy(state)})
    assert [name for name, _ in seen] == ["pre", "post", "load pre", "load post"]
    assert all(o is optimizer for _, o in seen)


def test_a_closure_runs_twice_or_without_gradients():
    params, twins = weights(), weights()
    optimizer, twin = wrapped("transformers' Adafactor", params), wrapped("transformers' Adafactor", twins)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        calls.append(loss)
        return loss

    for i in range(2 * EVERY):
        with torch.no_grad():
            assert optimizer.step(closure) is calls[i]
        twin.zero_grad()
        sum(p.square().sum() for p in twins).backward()
        twin.step()
    assert len(calls) == 2 * EVERY and optimizer.last_jump.step == 2 * EVERY
    assert_same([*params], [*twins])


def test_a_closure_that_gives_no_gradients_counts():
    params = weights()
    optimizer = wrapped("SGD", params)
    train(optimizer, params, range(EVERY - 1))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    assert optimizer.step(lambda: None) is None and optimizer.last_jump is None
    train(optimizer, params, [EVERY])
    assert optimizer.last_jump.step == EVERY


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, 3),  # cycles the momentum, too
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=12),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.001, anneal_epochs=4),
}


@pytest.mark.parametrize("held", ["base before", "base after", "wrapper"])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR's own
def test_a_scheduler_reaches_the_base_without_a_warning(name, held):
    """The lr, with a state dict loaded on the way, is that of the base alone, and steps are seen to be made."""
    lrs: list[list[Any]] = [[], []]
    for run, wrap in enumerate([False, True]):
        params = weights()
        base = torch.optim.SGD(params, lr=0.01, momentum=0.9)
        before = SCHEDULERS[name](base) if held == "base before" or not wrap else None
        optimizer = Extra(base, **{**RULE, "extra_steps": 0}) if wrap else base
        scheduler = before or SCHEDULERS[name](base if held == "base after" else optimizer)
        with no_warnings():
            for step in range(9):
                train(optimizer, params, [step])
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                if step == 4:
                    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
                lrs[run].append((base.param_groups[0]["lr"], base.param_groups[0]["momentum"]))
        lrs[run] += [p.detach().clone() for p in params]
    assert_same(*lrs)
    assert len({lr for lr in lrs[1][:9]}) > 1


def test_a_profile_shows_the_step_once():
    params = weights()
    optimizer = wrapped("SGD", params)
    train(optimizer, params, [0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.zero_grad()
        train(optimizer, params, [1])
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.")]
    assert sorted(names) == ["Optimizer.step#Extra.step", "Optimizer.zero_grad#Extra.zero_grad"]


def test_a_compiled_step_makes_the_same_run():
    params, twins = weights(), weights()
    optimizer, twin = wrapped("SGD with momentum", params), wrapped("SGD with momentum", twins)
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3 * EVERY):
        give_gradients(params, i)
        step()
    train(twin, twins, range(3 * EVERY))
    assert_same([*params], [*twins])
    assert optimizer.last_jump == twin.last_jump


def test_gradients_pass_through_the_jump_of_a_differentiable_step():
    start = torch.ones(3, dtype=torch.float64, requires_grad=True)
    p = start * 1.0
    p.retain_grad()
    base = torch.optim.SGD([p], lr=0.1, weight_decay=0.5, differentiable=True)
    optimizer = Extra(base, extra_every=1, extra_steps=3, extra_gate=None, extra_beta=0.0)
    p.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    assert optimizer.last_jump.jumped == 1
    p.sum().backward()
    torch.testing.assert_close(start.grad, torch.full((3,), 1 - 0.1 * 0.5, dtype=torch.float64))


def test_sparse_gradients_do_not_stop_the_jump():
    table = torch.nn.Embedding(6, 3, sparse=True)
    optimizer = Extra(torch.optim.SparseAdam(table.parameters(), lr=0.01), **PAPER)
    for _ in range(EVERY):
        optimizer.zero_grad()
        table(torch.tensor([1, 4])).sum().backward()
        optimizer.step()
    assert optimizer.last_jump.jumped == 1


# --- jump, reset_anchor ----------------------------------------------------------------------------------------------


def test_jump_ends_the_cycle_early_and_the_next_one_is_whole():
    params = weights()
    optimizer = wrapped("SGD", params, **PAPER)
    assert optimizer.jump() is None and optimizer.last_jump is None
    train(optimizer, params, range(2))
    end, anchor = clones(params), [optimizer.state[p]["extra_anchor"].clone() for p in params]
    report = optimizer.jump()
    assert report is optimizer.last_jump and (report.step, report.jumped) == (2, 2)
    for p, e, a in zip(params, end, anchor):
        torch.testing.assert_close(p, e + STEPS / EVERY * (e - a))
        assert torch.equal(optimizer.state[p]["extra_anchor"], p)
    assert optimizer.jump() is None
    train(optimizer, params, range(2, 2 + EVERY - 1))
    assert optimizer.last_jump is report
    train(optimizer, params, [9])
    assert optimizer.last_jump.step == 2 + EVERY


def test_an_edit_from_outside_is_not_extrapolated_after_reset_anchor():
    params = weights()
    optimizer = wrapped("SGD", params, **PAPER)
    train(optimizer, params, range(EVERY + 1))
    with torch.no_grad():
        for p in params:
            p.fill_(100.0)
    optimizer.reset_anchor()
    train(optimizer, params, range(EVERY - 1))
    assert optimizer.last_jump.step == EVERY
    train(optimizer, params, [EVERY])
    assert optimizer.last_jump.step == 2 * EVERY + 1 and optimizer.last_jump.jumped == 2
    assert all(float((p.detach() - 100).abs().max()) < 1 for p in params)


def test_no_jump_before_extra_start_counts_the_steps_before_a_resume():
    params = weights()
    optimizer = wrapped("SGD", params, **PAPER, extra_start=2 * EVERY)
    train(optimizer, params, range(EVERY + 1))
    assert optimizer.last_jump.jumped == 0
    second = wrapped("SGD", params)
    second.load_state_dict(through_a_file(optimizer.state_dict()))
    train(second, params, range(EVERY + 1, 2 * EVERY))
    assert second.last_jump.jumped == 2


def test_weights_gone_bad_are_not_jumped():
    params = weights()
    optimizer = wrapped("SGD", params, **PAPER)
    train(optimizer, params, range(EVERY - 1))
    with torch.no_grad():
        params[0][0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="1 of 2 tensors did not jump"):
        train(optimizer, params, [EVERY])
    assert (optimizer.last_jump.jumped, optimizer.last_jump.refused) == (1, 1)
    assert int(params[0].isnan().sum()) == 1


# --- schedule-free ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_a_jump_moves_the_schedule_free_average_with_its_weights(name):
    """Weights, their average and z move by the same displacement, so that nothing pulls the jump back."""

    def points() -> list[list[Tensor]]:
        train_mode = clones(params)
        optimizer.eval()
        average = clones(params)
        optimizer.train()
        return [train_mode, average, [optimizer.state[p]["z"].clone() for p in params]]

    params = weights(torch.float64)
    optimizer = wrapped(name, params, **{**PAPER, "extra_every": 100})
    train(optimizer, params, range(5))
    before = points()
    drift = [p.detach() - optimizer.state[p]["extra_anchor"] for p in params]
    assert optimizer.jump().jumped == 2
    for old, new in zip(before, points()):
        for a, b, d in zip(old, new, drift):
            torch.testing.assert_close(b - a, STEPS / 100 * d, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_evaluation_in_the_middle_of_a_cycle_is_no_drift(name):
    params, twins = weights(torch.float64), weights(torch.float64)
    optimizer, twin = wrapped(name, params), wrapped(name, twins)
    for step in range(3 * EVERY):
        train(optimizer, params, [step])
        optimizer.eval()
        optimizer.train()
        train(twin, twins, [step])
    assert optimizer.last_jump.jumped == 2
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_the_average_is_not_taken_for_the_weights_in_eval_mode():
    params = weights()
    optimizer = wrapped("schedule-free AdamW", params)
    train(optimizer, params, range(EVERY + 1))
    optimizer.eval()
    for method in optimizer.jump, optimizer.reset_anchor:
        with pytest.raises(RuntimeError, match="call train\\(\\) first"):
            method()
    give_gradients(params, 9)
    with pytest.raises(Exception, match="train mode"):  # schedulefree's own
        optimizer.step()
    optimizer.train()
    assert optimizer.jump().step == EVERY + 1


def test_train_and_eval_are_found_only_where_the_base_has_them():
    """transformers' Trainer and accelerate call them where hasattr finds them."""
    params = weights()
    for name, there in ("SGD", False), ("schedule-free AdamW", True):
        optimizer = wrapped(name, params)
        assert hasattr(optimizer, "train") == hasattr(optimizer, "eval") == there


# --- 8 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_an_8_bit_state_keeps_its_form_and_its_anchor_on_resume(library):
    optim = pytest.importorskip(f"{library}.optim", reason=f"needs {library}: pip install {library}")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def model() -> list[Parameter]:  # one tensor that is large enough to be quantized
        return [Parameter(p.detach().to(device)) for p in parameters(shapes=((64, 80), (5,)))]

    whole, first, plain = model(), model(), model()
    optimizer, before = (Extra(optim.AdamW8bit(params, lr=0.01), **RULE) for params in (whole, first))
    train(optimizer, whole, range(3 * EVERY))
    train(optim.AdamW8bit(plain, lr=0.01), plain, range(3 * EVERY))
    assert optimizer.last_jump.jumped == 2
    assert not torch.allclose(whole[0], plain[0], rtol=1e-3)
    train(before, first, range(EVERY + 1))
    second = clones(first)
    after = Extra(optim.AdamW8bit(second, lr=0.01), **RULE)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    assert all(after.state[p]["extra_anchor"].device == p.device for p in second)
    train(after, second, range(EVERY + 1, 3 * EVERY))
    assert_same([*whole], [*second])
    assert after.last_jump == optimizer.last_jump


# --- trainers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD with momentum", "transformers' Adafactor", "schedule-free AdamW"])
def test_accelerate_keeps_the_cycle(name):
    accelerate = pytest.importorskip("accelerate")

    def run(prepare: bool, steps: Iterable[int], state: Any = None, start: Any = None) -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        if start is not None:
            model.load_state_dict(start)
        optimizer: Any = wrapped(name, [*model.parameters()])
        backward: Any = Tensor.backward
        if prepare:
            accelerator = accelerate.Accelerator(cpu=True)
            model, optimizer = accelerator.prepare(model, optimizer)
            backward = accelerator.backward
        if state is not None:
            optimizer.load_state_dict(state)
        for i in steps:
            optimizer.zero_grad()
            backward(model(torch.linspace(-1, 1 + i, 8).view(2, 4)).square().mean())
            optimizer.step()
        return model, optimizer

    try:
        plain_model, plain = run(False, range(3 * EVERY))
        model, optimizer = run(True, range(3 * EVERY))
        assert type(optimizer.optimizer) is Extra and optimizer.optimizer.last_jump == plain.last_jump
        assert_same([*plain_model.parameters()], [*model.parameters()])
        half_model, half = run(True, range(EVERY + 1))
        state = through_a_file([half.state_dict(), half_model.state_dict()])
        resumed, _ = run(True, range(EVERY + 1, 3 * EVERY), *state)
        assert_same([*plain_model.parameters()], [*resumed.parameters()])
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("name", ["SGD with momentum", "schedule-free AdamW"])
def test_the_trainer_of_transformers_keeps_the_cycle_on_resume(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.layer(x) - labels).square().mean()}

    data = [{"x": torch.linspace(-1, 1 + i, 4), "labels": torch.ones(2)} for i in range(24)]

    def run(folder: str, resume: str | None) -> Any:
        model = Model()
        args = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=3 * EVERY, save_steps=EVERY + 1, per_device_train_batch_size=2,
            lr_scheduler_type="linear", report_to=[], disable_tqdm=True, logging_strategy="no", use_cpu=True,
        )  # fmt: skip
        optimizer = wrapped(name, [*model.parameters()])
        trainer = transformers.Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        return model, optimizer, trainer

    model, optimizer, trainer = run("whole", None)
    assert optimizer.last_jump.step == 3 * EVERY and optimizer.last_jump.gate > 0
    assert optimizer.param_groups[0]["lr"] < 0.005  # the schedule arrived
    resumed, after, _ = run("resumed", str(tmp_path / "whole" / f"checkpoint-{EVERY + 1}"))
    assert after.last_jump == optimizer.last_jump
    assert_same([*model.parameters()], [*resumed.parameters()])


def test_lightning_keeps_the_cycle():
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return (self.layer(batch[0]) - 1).square().mean()

        def configure_optimizers(self) -> Optimizer:
            self.optimizer = wrapped("SGD with momentum", [*self.parameters()])
            return self.optimizer

    rows = torch.linspace(-1, 1, 2 * EVERY * 8).view(2 * EVERY, 2, 4)
    ours, theirs = Module(), Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows.flatten(0, 1)), batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers, short epochs and missing loggers
        lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(ours, loader)  # fmt: skip
    optimizer = theirs.configure_optimizers()
    for row in rows:
        optimizer.zero_grad()
        theirs.training_step([row], 0).backward()
        optimizer.step()
    assert ours.optimizer.last_jump == optimizer.last_jump and optimizer.last_jump.step == 2 * EVERY
    assert_same([*ours.parameters()], [*theirs.parameters()])
