"""Wrong hyperparameters, wrong checkpoints, non-finite values: a clear error or a warning, weights untouched."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch

from extraopt import ExtraAdam
from extraopt.hyperparameters import DEFAULTS

JUMPY = {"lr": 0.1, "extra_every": 3, "extra_steps": 6, "extra_beta": 0.0, "extra_gate": None, "extra_kl": None}


def params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes or [(3,)]]


def run(optimizer: ExtraAdam, steps: int) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()


@pytest.mark.parametrize(
    "hyperparameter, value, allowed",
    [
        *[("extra_every", v, "an integer >= 1") for v in (0, -3, 2.5, "10", None, True, float("nan"))],
        *[("extra_steps", v, "an integer >= 0") for v in (-1, 0.5, None, False, "50", float("inf"))],
        *[("extra_beta", v, "[0, 1)") for v in (1, 1.0, -0.1, float("nan"), "0.9", True, [0.9], None)],
        *[("extra_gate", v, "(0, 1]") for v in (0, 0.0, -1, 1.5, float("nan"), "0.4", True)],
        *[("extra_start", v, "an integer >= 0") for v in (-1, 1.5, None)],
        *[("extra_kl", v, "(0, inf)") for v in (0, 0.0, -1, float("nan"), float("inf"), "0.02", True)],
        *[("extra_fall", v, "(0, inf]") for v in (0, -0.1, float("nan"), "0.3", False, None)],
        *[("extra_watch", v, "True or False") for v in (1, 0, None, "yes", object)],
        *[("extra_offload", v, "True or False") for v in (1, 0, None, "yes")],
    ],
)
def test_a_hyperparameter_out_of_range_names_itself_its_value_and_what_is_allowed(hyperparameter, value, allowed):
    makers = [
        lambda: ExtraAdam(params(), **{hyperparameter: value}),
        lambda: ExtraAdam([{"params": params(), hyperparameter: value}]),
        lambda: ExtraAdam(params()).add_param_group({"params": params(), hyperparameter: value}),
    ]
    for make in makers:
        with pytest.raises(ValueError) as error:
            make()
        assert all(text in str(error.value) for text in (hyperparameter, repr(value), allowed))


def test_a_refused_group_is_not_added():
    optimizer = ExtraAdam(params())
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": params(), "extra_every": 0})
    assert len(optimizer.param_groups) == 1


def test_numpy_hyperparameters_become_plain_numbers():
    optimizer = ExtraAdam(
        params(),
        extra_every=np.int64(3),
        extra_steps=np.int32(6),
        extra_beta=np.float32(0.5),
        extra_gate=np.float64(0.4),
        extra_kl=np.float32(0.01),
        extra_fall=np.float64("inf"),
    )
    types = {key: type(optimizer.param_groups[0][key]) for key in DEFAULTS}
    assert types == {
        "extra_every": int,
        "extra_steps": int,
        "extra_beta": float,
        "extra_gate": float,
        "extra_start": int,
        "extra_kl": float,
        "extra_fall": float,
        "extra_watch": bool,
        "extra_offload": bool,
    }


def test_a_wrong_hyperparameter_in_a_checkpoint_is_refused():
    state = ExtraAdam(params()).state_dict()
    state["param_groups"][0]["extra_every"] = 0
    with pytest.raises(ValueError, match="extra_every"):
        ExtraAdam(params()).load_state_dict(state)


@pytest.mark.parametrize("key", ["extra_anchor", "extra_estimate"])
def test_a_checkpoint_of_another_parameter_is_refused(key):
    optimizer = ExtraAdam(params((3,), (2, 2)))
    run(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in key, "exp_avg", "exp_avg_sq":
        state["state"][1][entry] = torch.zeros(4)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(ValueError, match=rf"{key} of parameter 1 in group 0 has shape \(4,\).*\(2, 2\)"):
        optimizer.load_state_dict(state)
    assert all(torch.equal(p, b) for p, b in zip(optimizer.param_groups[0]["params"], before))


def test_no_parameters_and_sparse_gradients_are_errors():
    with pytest.raises(ValueError, match="empty parameter list"):
        ExtraAdam([])
    (p,) = params()
    optimizer = ExtraAdam([p])
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3)) and not any(optimizer.state.values())


def test_empty_groups_and_groups_without_gradients_do_nothing():
    optimizer = ExtraAdam([{"params": []}, {"params": params()}], **JUMPY)
    optimizer.step()
    assert len(optimizer.state) == 0 and optimizer.jump() is None
    optimizer.reset_anchor()
    run(optimizer, 3)
    assert optimizer.last_jump.jumped == 1


@pytest.mark.parametrize("gate", [None, 0.4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "extra_anchor", "extra_estimate"])
def test_one_tensor_gone_bad_does_not_jump_and_the_others_do(where, bad, gate):
    sick, well = params((3,), (4,))
    optimizer = ExtraAdam([sick, well], **{**JUMPY, "extra_beta": 0.5, "extra_gate": gate})
    run(optimizer, 5)
    target = sick.data if where == "weight" else optimizer.state[sick][where]
    target[1] = bad
    shadow = torch.optim.AdamW([sick_copy := torch.nn.Parameter(sick.detach().clone())], lr=0.1)
    shadow.load_state_dict({**shadow.state_dict(), "state": copy.deepcopy({0: optimizer.state_dict()["state"][0]})})
    sick_copy.grad = torch.ones(3)
    shadow.step()
    with pytest.warns(RuntimeWarning, match="1 of 2 tensors did not jump at applied step 6"):
        run(optimizer, 1)
    assert optimizer.last_jump.jumped == 1 and optimizer.last_jump.refused == 1
    assert torch.equal(sick.nan_to_num(), sick_copy.nan_to_num())  # exactly where AdamW left it
    assert torch.equal(optimizer.state[sick]["extra_anchor"].nan_to_num(), sick.nan_to_num())
    assert well.isfinite().all() and optimizer.state[sick]["extra_estimate"].isfinite().all()
    if where != "weight":  # the next cycles are sound again
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(optimizer, 6)
        assert optimizer.last_jump.jumped == 2 and sick.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_jump_that_would_overflow_the_dtype_is_refused(dtype):
    big, small = params((2,), (2,), dtype=dtype)
    optimizer = ExtraAdam([big, small], **{**JUMPY, "extra_steps": 300, "weight_decay": 0.0})
    run(optimizer, 2)
    top = torch.finfo(dtype).max
    with torch.no_grad():
        big.fill_(top / 4)
        optimizer.state[big]["extra_anchor"].fill_(top / 8)
    with pytest.warns(RuntimeWarning, match="could overflow"):
        run(optimizer, 1)
    assert big.isfinite().all() and abs(float(big.detach()[0]) - top / 4) <= top * 0.01
    assert optimizer.last_jump.jumped == 1 and optimizer.last_jump.refused == 1


def test_a_jump_by_an_estimate_that_its_dtype_can_not_hold_is_refused():
    """However short it is: a tenth of an infinite estimate is infinite, too. Other dtypes hold what can be squared."""
    (p,) = params((1,), dtype=torch.float16)
    options = {"extra_every": 10, "extra_steps": 1, "extra_gate": None, "extra_kl": None}
    optimizer = ExtraAdam([p], lr=1e-3, eps=1e-4, weight_decay=0, **options)
    p.data.fill_(-4e4)
    run(optimizer, 9)
    p.data.fill_(4e4)
    with pytest.warns(RuntimeWarning, match="could overflow"):
        run(optimizer, 1)
    assert optimizer.last_jump.refused == 1 and p.isfinite().all()


def test_a_drift_too_long_to_measure_is_refused():
    (p,) = params((4,))
    optimizer = ExtraAdam([p], **{**JUMPY, "lr": 1e20, "weight_decay": 0.0})
    with pytest.warns(RuntimeWarning, match="did not jump"):
        run(optimizer, 3)  # the square of a drift of 3e20 is beyond float32
    assert optimizer.last_jump.refused == 1 and p.isfinite().all()
