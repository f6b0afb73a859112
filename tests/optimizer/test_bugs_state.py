"""Public bug reports about state: what other optimizers lost, shared, cast or misplaced between save and load.

Each test is named after the symptom; its docstring names the reports.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers import GATED, PAPER, RULES, K, assert_same, assert_same_run, reload, rule_name, tiny_model, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from extraopt import ExtraAdam

NUMBERS = {
    "step": torch.float32,
    "extra_origin": torch.float64,
    "extra_noise_cov": torch.float64,
    "extra_noise_var": torch.float64,
}
EXTRA_KEYS = ["extra_anchor", "extra_origin", "extra_estimate", "extra_noise_cov", "extra_noise_var"]
both_rules = pytest.mark.parametrize("rule", RULES, ids=rule_name)
any_layout = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])


def make(rule: dict[str, Any] = GATED, **options: Any) -> tuple[torch.nn.Module, ExtraAdam]:
    model = tiny_model()
    return model, ExtraAdam(model.parameters(), lr=0.01, **rule, **options)


def restart(model: torch.nn.Module, optimizer: ExtraAdam, rule: dict[str, Any]) -> tuple[torch.nn.Module, ExtraAdam]:
    """A new model and optimizer that know nothing but the two state dicts."""
    other = tiny_model(seed=1)
    other.load_state_dict(reload(model.state_dict()))
    resumed = ExtraAdam(other.parameters(), lr=0.5, **rule)
    resumed.load_state_dict(reload(optimizer.state_dict()))
    return other, resumed


def test_a_wrapper_without_super_init_has_no_state_attribute():
    """lonePatient/lookahead_pytorch#3, mgrankin/over9000#6."""
    _, optimizer = make()
    assert isinstance(optimizer, torch.optim.AdamW) and isinstance(optimizer, torch.optim.Optimizer)
    assert len(optimizer.state) == 0 and optimizer.defaults["extra_every"] == K
    saved = optimizer.state_dict()
    assert saved["state"] == {} and saved["param_groups"][0]["extra_every"] == K


IN_A_NEW_PROCESS = """
import sys
import torch
from extraopt import ExtraAdam
from helpers import tiny_model, train

torch.set_num_threads(1)
folder = sys.argv[1]
model = tiny_model(seed=1)
optimizer = ExtraAdam(model.parameters())
saved = torch.load(f"{folder}/5.pt", weights_only=True)
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
ends = train(model, optimizer, range(5, 12))
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ends": ends}, f"{folder}/12.pt")
"""


def test_slow_weights_are_lost_on_resume(tmp_path: Path):
    """kozistr/pytorch_optimizer#310: slow weights keyed by Parameter objects of a process that has ended."""
    model, optimizer = make()
    train(model, optimizer, range(5))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "5.pt")
    ends = train(model, optimizer, range(5, 12))

    subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, tmp_path], check=True, cwd=tmp_path, timeout=120)
    resumed = torch.load(tmp_path / "12.pt", weights_only=True)
    assert resumed["ends"] == ends == [5, 8, 11]
    assert_same(resumed["model"], model.state_dict())
    assert_same(resumed["optimizer"], optimizer.state_dict())


@both_rules
def test_inner_optimizer_state_or_slow_weights_are_not_reloaded(rule):
    """tensorflow/addons#2094: the wrapper came back, the moments did not."""
    model, optimizer = make(rule)
    train(model, optimizer, range(5))
    other, resumed = restart(model, optimizer, rule)
    keys = {"step", "exp_avg", "exp_avg_sq", *EXTRA_KEYS[: None if rule is GATED else 2]}
    for p, q in zip(model.parameters(), other.parameters()):
        assert optimizer.state[p].keys() == keys
        assert_same(optimizer.state[p], resumed.state[q])
    train(model, optimizer, range(5, 12))
    train(other, resumed, range(5, 12))
    assert_same_run(model, optimizer, other, resumed)


@both_rules
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6, 7])
def test_the_iteration_count_is_lost_on_resume(rule, stop):
    """CyberZHG/keras-lookahead#2: the next synchronisation came at another step."""
    model, optimizer = make(rule)
    train(model, optimizer, range(stop))
    other, resumed = restart(model, optimizer, rule)
    ends = train(model, optimizer, range(stop, 12))
    assert ends == [i for i in (2, 5, 8, 11) if i >= stop]
    assert train(other, resumed, range(stop, 12)) == ends


def test_slow_copy_made_before_the_model_was_moved():
    """kozistr/pytorch_optimizer#306, on a CPU: model.double() replaces the weights as model.cuda() does."""
    model, optimizer = make(PAPER)
    model.double()
    assert train(model, optimizer, range(7)) == [2, 5]
    assert optimizer.last_jump.jumped == 4
    for p in model.parameters():
        assert optimizer.state[p]["extra_anchor"].dtype == torch.float64
    moved = tiny_model().double()
    after = ExtraAdam(moved.parameters(), lr=0.01, **PAPER)
    train(moved, after, range(7))
    assert_same_run(model, optimizer, moved, after)


def test_saved_weights_are_not_the_evaluated_weights():
    """facebookresearch/schedule_free#22, #48: which weights one sees depended on the optimizer's mode."""
    model, optimizer = make(PAPER)
    train(model, optimizer, range(K))
    assert optimizer.last_jump.jumped == 4  # the weights are those of a jump just made
    assert not hasattr(optimizer, "train") and not hasattr(optimizer, "eval")
    x = torch.ones(3, 4)
    loaded = tiny_model(seed=1)
    loaded.load_state_dict(reload(model.state_dict()))
    first = model.eval()(x)
    assert torch.equal(first, loaded(x))
    optimizer.state_dict()
    optimizer.zero_grad()
    assert torch.equal(first, model.train()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_state_is_cast_to_the_parameters_dtype_on_load(dtype):
    """pytorch#43706, fairscale#50, pytorch/ao#3314, vllm-project/speculators#899: lossy where the state was float32."""
    model, optimizer = make(eps=1e-4)
    model.to(dtype)
    train(model, optimizer, range(5))
    other = tiny_model(seed=1).to(dtype)
    other.load_state_dict(model.state_dict())
    resumed = ExtraAdam(other.parameters(), **GATED)
    resumed.load_state_dict(reload(optimizer.state_dict()))
    for p, q in zip(model.parameters(), other.parameters()):
        for key in ("extra_anchor", "extra_estimate"):
            assert optimizer.state[p][key].dtype == dtype
            assert torch.equal(optimizer.state[p][key], resumed.state[q][key])
    assert train(model, optimizer, range(5, 12)) == train(other, resumed, range(5, 12)) == [5, 8, 11]
    assert_same_run(model, optimizer, other, resumed)


def test_a_counter_of_1001_comes_back_as_1000_in_bfloat16():
    """pytorch#43706: torch's loader casts a counter under a name that it does not know to the weights' dtype."""
    model, optimizer = make(PAPER)
    model.bfloat16()
    train(model, optimizer, range(1))
    for p in model.parameters():
        optimizer.state[p]["step"].fill_(1001)
        optimizer.state[p]["extra_origin"] = 1001
    optimizer.reset_anchor()
    optimizer.load_state_dict(reload(optimizer.state_dict()))
    assert [optimizer.state[p]["extra_origin"].tolist() for p in model.parameters()] == 4 * [1001]
    assert train(model, optimizer, range(1, 8)) == [3, 6]


def test_loading_in_bfloat16_loses_the_float32_state():
    """huggingface/nanotron#245: float32 all the way keeps every bit."""
    model, optimizer = make()
    train(model, optimizer, range(5))
    saved = reload(optimizer.state_dict())
    _, resumed = restart(model, optimizer, GATED)
    lossy = 0
    for key in ("exp_avg", "exp_avg_sq", "extra_anchor", "extra_estimate"):
        for i, state in saved["state"].items():
            assert state[key].dtype == torch.float32
            assert torch.equal(state[key], resumed.state_dict()["state"][i][key])
            lossy += not torch.equal(state[key], state[key].bfloat16().float())
    assert lossy == 16  # the comparison would notice


def test_reading_the_optimizer_state_advances_the_step():
    """pytorch#164929, pytorch/torchtitan#4382: torch makes missing state by a step with zero gradients and lr 0.

    The weights must not notice. The counters do, as AdamW's do: the first cycle is one real step shorter.
    """
    model, optimizer = make(PAPER)
    before = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer)
    assert_same(model.state_dict(), before)
    assert {int(s["step"]) for s in optimizer.state.values()} == {1}
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["extra_anchor"], p)
    assert train(model, optimizer, range(8)) == [1, 4, 7]


def test_reading_the_optimizer_state_in_mid_run_changes_nothing():
    """pytorch#164929, the case that matters: checkpoints of a run."""
    model, optimizer = make()
    other, watched = make()
    train(model, optimizer, range(4))
    train(other, watched, range(4))
    watched.zero_grad()
    get_optimizer_state_dict(other, watched)
    train(model, optimizer, range(4, 10))
    train(other, watched, range(4, 10))
    assert_same_run(model, optimizer, other, watched)


@both_rules
@any_layout
def test_a_distributed_checkpoint_drops_state_that_did_not_exist_after_the_first_step(rule, flat):
    """pytorch#99079: non-tensor entries were dropped; torch restores only names that a first step makes."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = make(rule)
    train(model, optimizer, range(5))
    optimizer.zero_grad()
    saved = reload(get_optimizer_state_dict(model, optimizer, options=options))

    other = tiny_model(seed=1)
    other.load_state_dict(model.state_dict())
    resumed = ExtraAdam(other.parameters(), lr=0.5, **rule)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert_same(resumed.state_dict(), optimizer.state_dict())
    assert all(state["extra_origin"].dtype == torch.float64 for state in resumed.state.values())
    assert train(other, resumed, range(5, 12)) == train(model, optimizer, range(5, 12)) == [5, 8, 11]
    assert_same_run(model, optimizer, other, resumed)


@any_layout
def test_a_python_counter_is_lost_in_a_distributed_checkpoint(flat, tmp_path):
    """pytorch#99079, through files: the origin is neither 0 nor a multiple of k, so a lost one moves the cycles."""
    import torch.distributed.checkpoint as dcp

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = make(PAPER)
    train(model, optimizer, range(4))
    optimizer.jump()  # the next cycle begins at 4, as if one had begun at 1
    train(model, optimizer, range(4, 5))
    optimizer.zero_grad()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path)

    other = tiny_model(seed=1)
    other.load_state_dict(model.state_dict())
    resumed = ExtraAdam(other.parameters(), lr=0.5, **PAPER)
    state = {"optimizer": get_optimizer_state_dict(other, resumed, options=options)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, resumed, state["optimizer"], options=options)
    assert [s["extra_origin"].tolist() for s in resumed.state.values()] == 4 * [1]
    assert train(other, resumed, range(5, 12)) == train(model, optimizer, range(5, 12)) == [6, 9]
    assert_same_run(model, optimizer, other, resumed)


@any_layout
def test_unfrozen_parameters_are_not_saved(flat):
    """pytorch#192202: torch takes any non-empty state for a complete one and saves no other.

    Loading works while the same parameters are frozen. Unfrozen, they start a cycle of their own.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = make(PAPER)
    model[0].requires_grad_(False)
    train(model, optimizer, range(4))
    model[0].requires_grad_(True)
    optimizer.zero_grad()
    saved = reload(get_optimizer_state_dict(model, optimizer, options=options))

    other = tiny_model(seed=1)
    other.load_state_dict(model.state_dict())
    other[0].requires_grad_(False)
    resumed = ExtraAdam(other.parameters(), lr=0.5, **PAPER)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    other[0].requires_grad_(True)
    assert len(resumed.state) == 2
    ends = train(model, optimizer, range(4, 10))
    assert ends == train(other, resumed, range(4, 10)) == [5, 6, 8, 9]  # old ones at 5 and 8, new ones at 6 and 9
    assert_same(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("lost", [EXTRA_KEYS[:1], EXTRA_KEYS[1:2], EXTRA_KEYS], ids=["anchor", "origin", "all"])
def test_a_checkpoint_converter_that_knows_only_adams_keys(lost):
    """DeepSpeed#5263, #5289, #8608, Megatron-LM#5742: what is not there is made anew, not looked up."""
    model, optimizer = make()
    train(model, optimizer, range(7))
    saved = reload(optimizer.state_dict())
    for state in saved["state"].values():
        for key in lost:
            del state[key]
    resumed = ExtraAdam(model.parameters(), **GATED)
    resumed.load_state_dict(saved)
    assert train(model, resumed, range(7, 14)) == [9, 12]  # k steps after the load, not at 8
    assert resumed.last_jump.refused == 0


def test_state_is_made_in_the_constructor_and_keyed_by_parameters_that_are_replaced_later():
    """accelerate#3855: FSDP2 puts other parameters into the groups; state_dict() then raised KeyError."""
    model, optimizer = make()
    assert len(optimizer.state) == 0
    other = tiny_model(seed=1)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    assert optimizer.state_dict()["state"] == {}
    assert train(other, optimizer, range(7)) == [2, 5]
    assert optimizer.state.keys() == set(other.parameters()) and len(optimizer.state_dict()["state"]) == 4
    fresh = tiny_model(seed=1)
    plain = ExtraAdam(fresh.parameters(), lr=0.01, **GATED)
    train(fresh, plain, range(7))
    assert_same_run(other, optimizer, fresh, plain)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_has_lost_its_attributes(copier):
    """kakaobrain/torchlars#4, pytorch#19308, pytorch/torchrec#113, pytorch/ao#4833."""
    model, optimizer = make()
    train(model, optimizer, range(4))
    other, copied = copier((model, optimizer))
    public = {name for name in dir(optimizer) if not name.startswith("_")}
    assert {name for name in dir(copied) if not name.startswith("_")} == public
    assert copied.last_jump is None and copied.defaults == optimizer.defaults
    assert train(model, optimizer, range(4, 4 + 2 * K)) == train(other, copied, range(4, 4 + 2 * K)) == [5, 8]
    assert_same_run(model, optimizer, other, copied)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_fused_optimizer_takes_the_unfused_scaler_path(copier):
    """pytorch's own AdamW loses the flag that tells GradScaler to unscale inside the step."""
    _, optimizer = make(fused=True)
    assert optimizer._step_supports_amp_scaling is True
    assert copier(optimizer)._step_supports_amp_scaling is True


def test_state_is_mapped_by_position_over_the_parameters_that_had_gradients():
    """wochenlong/lora-scripts-next#320: with some parameters that never had gradients, states went to others."""
    model, optimizer = make()
    model[0].requires_grad_(False)
    train(model, optimizer, range(4))
    other, resumed = restart(model, optimizer, GATED)
    weights, saved = list(other.parameters()), optimizer.state_dict()["state"]
    assert saved.keys() == {2, 3} and resumed.state.keys() == set(weights[2:])
    for i in (2, 3):
        assert resumed.state[weights[i]]["extra_anchor"].shape == weights[i].shape
        assert_same(resumed.state[weights[i]], saved[i])


@both_rules
def test_state_that_is_not_shaped_like_its_parameter_cannot_be_gathered(rule):
    """bitsandbytes#89, #1403, axolotl#2744, accelerate#1362."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(3, 4), (5,), (), (1, 1), (0, 3)]]
    optimizer = ExtraAdam(params, **rule, amsgrad=True)
    for _ in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p in params:
        for key, value in optimizer.state[p].items():
            if key in NUMBERS:
                assert (value.shape, value.dtype, value.device.type) == ((), NUMBERS[key], "cpu"), key
            else:
                assert value.shape == p.shape and value.dtype == p.dtype and value.stride() == p.stride(), key


def test_objects_in_the_checkpoint_fail_under_weights_only():
    """stable-pretraining#388, ms-swift#4319, matgl PR #802, axolotl#2634: saving worked, resuming did not."""
    hyperparameters = {
        "extra_every": numpy.int64(K),
        "extra_steps": numpy.int32(6),
        "extra_beta": numpy.float64(0.5),
        "extra_gate": numpy.float32(0.5),
        "extra_start": torch.tensor(0),
        "extra_kl": numpy.float64(0.02),
        "extra_fall": numpy.float32(0.3),
    }
    model, optimizer = make(hyperparameters)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "extra_every": numpy.int64(7)})
    train(model, optimizer, range(4))
    saved = optimizer.state_dict()
    assert_same(reload(saved), saved)
    plain = (int, float, bool, type(None), tuple, list)
    assert all(type(v) in plain for g in saved["param_groups"] for v in g.values())


def test_nan_in_the_first_steps_after_a_resume():
    """NVIDIA-NeMo/RL#3544."""
    model, optimizer = make(fused=True)
    train(model, optimizer, range(5))
    other, resumed = restart(model, optimizer, GATED)
    for i in range(5, 5 + 2 * K):
        train(other, resumed, [i])
        for p in other.parameters():
            assert p.isfinite().all()
            assert all(t.isfinite().all() for t in resumed.state[p].values() if isinstance(t, torch.Tensor))
    assert resumed.last_jump.jumped == 4 and resumed.last_jump.refused == 0


@both_rules
def test_the_backup_weights_are_outside_of_the_state_dict(rule):
    """meta-pytorch/torchft#277: state_dict() alone, of model and optimizer, restores the trajectory."""
    model, optimizer = make(rule)
    train(model, optimizer, range(7))
    weights, state = reload(model.state_dict()), reload(optimizer.state_dict())
    train(model, optimizer, range(7, 14))
    wanted = copy.deepcopy(model.state_dict())
    for fresh in (False, True):  # back in the same objects, and a new pair
        if fresh:
            model, optimizer = make(rule)
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(state))
        assert train(model, optimizer, range(7, 14)) == [8, 11]
        assert_same(model.state_dict(), wanted)


def test_a_tensor_in_a_group_stays_on_the_old_device():
    """NVIDIA/apex#458, #459: no group holds a tensor, bar a learning rate or beta that the user made one."""
    model = tiny_model()
    optimizer = ExtraAdam(model.parameters(), lr=torch.tensor(0.01), **GATED)
    train(model, optimizer, range(4))
    for group in optimizer.param_groups:
        assert {k for k, v in group.items() if isinstance(v, torch.Tensor)} == {"lr"}
    own = vars(optimizer).keys() - vars(torch.optim.AdamW(model.parameters())).keys()
    assert all(name.startswith("_") for name in own)


def test_two_optimizers_that_loaded_one_dict_share_no_anchors():
    """torch copies no tensor whose dtype and device fit already: a jump of one would move the other's anchors."""
    model, optimizer = make()
    train(model, optimizer, range(4))
    saved = optimizer.state_dict()
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    for p, q in zip(model.parameters(), other.parameters()):
        for key in ("extra_anchor", "extra_estimate"):
            assert optimizer.state[p][key].data_ptr() != resumed.state[q][key].data_ptr(), key


def test_a_checkpoint_goes_from_adamw_to_extraadam_and_back():
    model = tiny_model()
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    for i in range(4):
        train_plain(model, plain, i)
    optimizer = ExtraAdam(model.parameters(), lr=0.5, **PAPER)
    optimizer.load_state_dict(reload(plain.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.01 and optimizer.param_groups[0]["extra_every"] == K
    assert train(model, optimizer, range(4, 12)) == [6, 9]
    back = torch.optim.AdamW(model.parameters(), lr=0.5)
    back.load_state_dict(reload(optimizer.state_dict()))
    for i in range(12, 14):
        train_plain(model, back, i)

    other = tiny_model()  # the same, with the jumps made by hand
    by_hand = torch.optim.AdamW(other.parameters(), lr=0.01)
    for i in range(14):
        if i == 4:
            anchors = [p.detach().clone() for p in other.parameters()]
        train_plain(other, by_hand, i)
        if i in (6, 9):
            with torch.no_grad():
                for p, a in zip(other.parameters(), anchors):
                    p.add_(p - a, alpha=2)
                    a.copy_(p)
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q)
        assert int(back.state[p]["step"]) == 14


def train_plain(model: torch.nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    from helpers import batch_loss

    optimizer.zero_grad()
    batch_loss(model, i).backward()
    optimizer.step()
