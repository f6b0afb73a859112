"""The contract, kept by ExtraAdam under each rule, and broken by the prototype everyone would write first."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch.nn import Parameter
from torch.optim import AdamW

pytest.register_assert_rewrite("contract")

from contract import CHECKS, EVERY, HYPERPARAMETERS, Make, assert_same, parameters, train  # noqa: E402
from naive_prototype import NaiveExtraAdam  # noqa: E402

from extraopt import ExtraAdam  # noqa: E402

RULES: dict[str, Make] = {
    "gated": ExtraAdam,
    "ungated": partial(ExtraAdam, extra_gate=None),
    "paper": partial(ExtraAdam, extra_beta=0.0, extra_gate=None),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("check", CHECKS)
def test_extra_adam_keeps(check: str, rule: str) -> None:
    CHECKS[check](RULES[rule])


# What each of these catches cost somebody a run: see the check of that name.
THE_PROTOTYPE_BREAKS = {
    "a_checkpoint_of_adamw_starts_a_new_cycle",
    "a_cleared_state_starts_anew",
    "a_group_added_in_mid_run_has_its_own_phase",
    "a_jump_that_could_overflow_is_refused",
    "a_parameter_unfrozen_in_mid_run_has_its_own_phase",
    "a_parameter_with_rare_gradients_has_its_own_phase",
    "a_step_skipped_inside_the_fused_kernel_does_not_count",
    "copies_go_on_in_lockstep",
    "copies_keep_the_fused_scaler_path",
    "going_back_to_a_checkpoint_forgets_what_came_after",
    "has_the_signature_of_adamw",
    "hooks_fire_once_and_in_order",
    "hyperparameters_come_from_the_checkpoint",
    "hyperparameters_hold_for_one_group",
    "nan_in_one_tensor_leaves_the_others_alone",
    "one_call_for_each_group_is_one_step",
    "parameters_put_in_for_one_call_keep_their_cycle",
    "parameters_replaced_before_the_first_step_are_the_ones_that_jump",
    "post_hooks_see_the_weights_after_the_jump",
    "parameters_that_take_turns_have_their_own_phases",
    "resume_is_bit_exact_at_every_offset",
    "weights_follow_the_rule_within_one_rounding",
    "weights_loaded_before_the_first_step_are_the_anchor",
    "weights_repaired_after_a_refusal_are_no_drift",
    "weights_written_by_the_first_closure_are_the_anchor",
}


def breaks(make: Make, check: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CHECKS[check](make)
    except Exception:
        return True
    return False


@pytest.mark.parametrize("check", sorted(THE_PROTOTYPE_BREAKS))
def test_the_naive_prototype_breaks(check: str) -> None:
    assert breaks(NaiveExtraAdam, check)


@pytest.mark.parametrize("hooked", [False, True])
def test_hyperparameters_that_a_checkpoint_lacks_stay_those_of_each_group(hooked: bool) -> None:
    params = parameters()
    state = AdamW([{"params": params[:1]}, {"params": params[1:]}]).state_dict()
    optimizer = ExtraAdam([{"params": params[:1], "extra_every": 7}, {"params": params[1:], "extra_gate": None}])
    if hooked:  # a hook may return another dict than it was given: then this is what is loaded
        optimizer.register_load_state_dict_pre_hook(lambda *_: copy.deepcopy(state))
    optimizer.load_state_dict(state)
    assert [group["extra_every"] for group in optimizer.param_groups] == [7, 5]
    assert [group["extra_gate"] for group in optimizer.param_groups] == [0.5, None]


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing() -> None:
    params, others = parameters(), [Parameter(torch.ones(2, 2)) for _ in parameters()]
    optimizer, other = ExtraAdam(params, **HYPERPARAMETERS), ExtraAdam(others, **HYPERPARAMETERS)
    train(optimizer, params, range(EVERY + 1))
    train(other, others, range(EVERY + 1))
    twin, twin_optimizer = copy.deepcopy((params, optimizer))
    with pytest.raises(ValueError, match="shape"):
        optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    train(optimizer, params, range(EVERY + 1, 3 * EVERY))
    train(twin_optimizer, twin, range(EVERY + 1, 3 * EVERY))
    assert_same(params, twin, "after a load that was refused")
