"""What torch asks of its own optimizers, asked of ExtraAdam with the machinery of torch's own tests.

torch's file of optimizer tests is not in its wheel, so its checks are restated here under their names; what they are
built of (OptimizerInfo, the inputs, TensorTracker, instantiation per device) is in the wheel and used as it is. Where
torch runs a number of steps that a cycle divides, more are run here: a lost phase would go unseen.
"""

import functools
import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_device_type import (
    instantiate_device_type_tests,
    onlyCPU,
    onlyCUDA,
    tol,
    toleranceOverride,
)
from torch.testing._internal.common_dtype import floating_types_and
from torch.testing._internal.common_methods_invocations import DecorateInfo
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    _get_device_type,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
    optim_error_inputs_func_adamw,
    optim_inputs_func_adamw,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize

from extraopt import ExtraAdam
from extraopt.hyperparameters import DEFAULTS
from extraopt.trust import UNWATCHED

# importing torch's test utilities forbids torch.backends.* = ... for the rest of the process; other tests need it
torch.backends.__allow_nonbracketed_mutation_flag = True

HYPERPARAMETERS = tuple(DEFAULTS)
ADAMW = next(info for info in optim_db if info.optim_cls is AdamW)
REDUCED = {"atol": 1e-5, "rtol": 1e-4}


def _error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    wrong = {
        "extra_every": (0, -1, 2.5, "3", True),
        "extra_steps": (-1, 0.5, None),
        "extra_beta": (-0.1, 1.0, float("nan"), "0.9", None),
        "extra_gate": (0.0, -1.0, 1.5, float("nan"), False),
        "extra_start": (-1, 1.5, None),
        "extra_kl": (0.0, -1.0, float("nan"), float("inf"), False),
        "extra_fall": (0.0, -1.0, float("nan"), None),
        "extra_watch": (1, None, "yes"),
        "extra_offload": (1, None, "yes"),
    }
    return optim_error_inputs_func_adamw(device, dtype) + [
        ErrorOptimizerInput(
            OptimizerInput(params=params, kwargs=kwargs, desc=f"{name}={value!r}"),
            error_type=ValueError,
            error_regex=f"Invalid {name}",
        )
        for name, values in wrong.items()
        for value in values
        for params, kwargs in (
            ([Parameter(torch.ones(1))], {name: value}),
            ([{"params": [Parameter(torch.ones(1))], name: value}], {}),
        )
    ]


class Rule(OptimizerInfo):
    """ExtraAdam with hyperparameters on top of each of torch's inputs for AdamW, under a name of its own."""

    def __init__(self, rule: str, **hyperparameters: Any) -> None:
        def inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
            return [
                OptimizerInput(params=None, kwargs={**i.kwargs, **hyperparameters}, desc=i.desc)
                for i in optim_inputs_func_adamw(device, dtype)
            ]

        every, horizon = hyperparameters.get("extra_every", 10), hyperparameters.get("extra_steps", UNWATCHED)
        # AdamW's own tolerance of 5e-3, times how far a jump carries the noise of one step: with an open gate
        # the newest drift is the estimate
        half = 5e-3 * (1 + horizon / every)
        super().__init__(
            ExtraAdam,
            optim_inputs_func=inputs,
            optim_error_inputs_func=_error_inputs,
            scheduler_inputs=ADAMW.scheduler_inputs,
            supported_impls=ADAMW.supported_impls,
            not_og_supported_flags=(*ADAMW.not_og_supported_flags, *HYPERPARAMETERS),
            supports_fused_on=ADAMW.supports_fused_on,
            has_capturable_arg=ADAMW.has_capturable_arg,
            decorators=[
                DecorateInfo(
                    toleranceOverride({d: tol(atol=half, rtol=half) for d in (torch.bfloat16, torch.float16)}),
                    "TestTorchHarness",
                    test,
                )
                for test in ("test_fused_matches_forloop", "test_fused_cpu_matches_cuda")
            ],
        )
        self.rule = rule
        self.hyperparameters = hyperparameters
        # two cycles, since a gated rule does not jump in the first, and a step more
        self.steps = 2 * every + 1

    @property
    def name(self) -> str:
        return f"ExtraAdam_{self.rule}"


RULES = [
    Rule("default", extra_watch=False),
    Rule("k3", extra_every=3, extra_steps=15, extra_kl=None),
    Rule("k7", extra_every=7, extra_steps=35, extra_kl=None),
    Rule("k7_paper", extra_every=7, extra_steps=35, extra_beta=0.0, extra_gate=None, extra_kl=None),
]


def _rosenbrock(point: Tensor) -> Tensor:
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def _linear(device: str, dtype: torch.dtype, contiguous: bool = True) -> tuple[Parameter, Parameter, Tensor]:
    def make(*shape: int) -> Parameter:
        if contiguous:
            return Parameter(torch.randn(shape, device=device, dtype=dtype))
        return Parameter(torch.randn((*shape, 2), device=device, dtype=dtype)[..., 0])

    return make(10, 5), make(10), torch.randn(5, device=device, dtype=dtype)


def _forward_backward(optimizer: Optimizer, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = (weight.mv(x) + bias).pow(2).sum()
    loss.backward()
    return loss


def _takes_lr_with_dimensions() -> bool:
    """AdamW does since torch 2.8."""
    p = Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    try:
        AdamW([p], lr=torch.tensor([1e-3]), foreach=False).step()
    except TypeError:
        return False
    return True


def _named(params: list[Parameter], named: bool) -> list[Any]:
    return [(f"name{i}", p) for i, p in enumerate(params)] if named else params


def _step_schedulers(schedulers: list[Any], loss: Tensor) -> None:
    for scheduler in schedulers:
        scheduler.step(*([loss.detach()] if isinstance(scheduler, ReduceLROnPlateau) else []))


def _state_dict_pre_hook(optimizer: Optimizer) -> None:
    optimizer.state["test"] = 1


def _state_dict_post_hook(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict["ran_state_dict_pre_hook"] = state_dict["state"].pop("test", None) is not None
    return state_dict


def _load_state_dict_pre_hook1(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["lr"] = 0.002


def _load_state_dict_pre_hook2(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    replacement = deepcopy(state_dict)
    replacement["param_groups"][0]["lr"] = 0.003
    return replacement


def _load_state_dict_post_hook(optimizer: Optimizer) -> None:
    optimizer.state["ran_load_state_dict_pre_hook2"] = optimizer.param_groups[0]["lr"] == 0.003
    optimizer.state["ran_load_state_dict_post_hook"] = True


class TestTorchHarness(TestCase):
    @onlyCPU
    @optims(RULES)
    def test_optim_infos_do_not_specify_global_cliquey_kwargs(self, device, dtype, optim_info):
        for optim_input in optim_info.optim_inputs_func(device=device):
            self.assertFalse({"foreach", "fused", "differentiable"} & optim_input.kwargs.keys())

    @optims(RULES[:1])
    def test_errors(self, device, dtype, optim_info):
        for error_input in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            params, kwargs = error_input.optimizer_error_input.params, error_input.optimizer_error_input.kwargs
            wrong = functools.partial(optim_info.optim_cls, params, **kwargs)
            if error_input.error_on == OptimizerErrorEnum.STEP_ERROR:
                wrong = wrong().step
            warns = issubclass(error_input.error_type, Warning)
            expecting = self.assertWarnsRegex if warns else self.assertRaisesRegex
            with expecting(error_input.error_type, error_input.error_regex):
                wrong()

    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @optims(RULES, dtypes=[torch.float32])
    def test_forloop_goes_right_direction(self, device, dtype, optim_info, contiguous, with_lrsched):
        for constructors in optim_info.scheduler_inputs if with_lrsched else [[]]:
            for optim_input in optim_info.optim_inputs_func(device=device):
                weight, bias, x = _linear(device, dtype, contiguous)
                optimizer = optim_info.optim_cls([weight, bias], **optim_input.kwargs, foreach=False)
                schedulers = [constructor(optimizer) for constructor in constructors]
                closure = functools.partial(_forward_backward, optimizer, weight, bias, x)
                initial = closure().item()
                for _ in range(optim_info.steps):
                    loss = closure()
                    optimizer.step()
                    _step_schedulers(schedulers, loss)
                if optim_input.kwargs.get("maximize", False):
                    self.assertGreater(closure().item(), initial)
                else:
                    self.assertLess(closure().item(), initial)

    @optims(RULES, dtypes=[torch.float32])
    def test_param_group_with_lrscheduler_goes_right_direction(self, device, dtype, optim_info):
        for constructors in optim_info.scheduler_inputs:
            weight, bias, x = _linear(device, dtype)
            groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
            optimizer = optim_info.optim_cls(groups, **optim_info.hyperparameters)
            schedulers = [constructor(optimizer) for constructor in constructors]
            closure = functools.partial(_forward_backward, optimizer, weight, bias, x)
            initial = closure().item()
            for _ in range(optim_info.steps):
                _step_schedulers(schedulers, optimizer.step(closure))
            self.assertLess(closure().item(), initial)

    @parametrize("num_dim", [0, 1, 2])
    @optims(RULES, dtypes=[torch.float32])
    def test_tensor_lr(self, device, dtype, optim_info, num_dim):
        if num_dim and not _takes_lr_with_dimensions():
            self.skipTest(f"AdamW of torch {torch.__version__} takes no lr of shape {[1] * num_dim}")
        inputs = _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info, skip=("differentiable",))
        for optim_input in inputs:
            weight, bias, x = _linear(device, dtype)
            weight_c, bias_c = (p.detach().clone().requires_grad_() for p in (weight, bias))
            kwargs = {**optim_input.kwargs, "lr": 1e-3}
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            kwargs["lr"] = torch.tensor(1e-3).reshape([1] * num_dim)
            if kwargs.get("foreach") and not kwargs.get("capturable"):
                with self.assertRaisesRegex(ValueError, "lr as a Tensor is not supported"):
                    optim_info.optim_cls([weight_c, bias_c], **kwargs)
                continue
            optimizer_c = optim_info.optim_cls([weight_c, bias_c], **kwargs)
            for _ in range(optim_info.steps):
                _forward_backward(optimizer, weight, bias, x)
                _forward_backward(optimizer_c, weight_c, bias_c, x)
                optimizer.step()
                optimizer_c.step()
                self.assertEqual(weight, weight_c)
                self.assertEqual(bias, bias_c)

    @optims(RULES, dtypes=[torch.complex64])
    def test_complex(self, device, dtype, optim_info):
        skip = ("differentiable", "fused")  # fused knows no complex tensors
        for optim_input in _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info, skip=skip):
            mixed = [
                torch.randn(10, 5, device=device, dtype=dtype, requires_grad=True),
                torch.randn(10, device=device, dtype=dtype, requires_grad=True),
                torch.randn(10, 5, device=device, requires_grad=True),
            ]
            real = [(torch.view_as_real(p) if p.is_complex() else p).detach().clone().requires_grad_() for p in mixed]
            mixed_optimizer = optim_info.optim_cls(mixed, **optim_input.kwargs)
            real_optimizer = optim_info.optim_cls(real, **optim_input.kwargs)
            for _ in range(optim_info.steps):
                for p, q in zip(mixed, real):
                    q.grad = torch.randn_like(q)
                    p.grad = torch.view_as_complex(q.grad.clone()) if p.is_complex() else q.grad.clone()
                mixed_optimizer.step()
                real_optimizer.step()
                self.assertEqual([torch.view_as_real(p) if p.is_complex() else p for p in mixed], real)

    @optims(RULES, dtypes=[torch.complex64])
    def test_complex_2d(self, device, dtype, optim_info):
        skip = ("differentiable", "fused")
        for optim_input in _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info, skip=skip):
            whole = torch.randn(2, device=device, dtype=dtype, requires_grad=True)
            parts = [part.detach().clone().requires_grad_() for part in (whole.real, whole.imag)]
            kwargs = {**optim_input.kwargs, "extra_gate": None}  # whole has one gate, its parts would have two
            optimizer = optim_info.optim_cls([whole], **kwargs)
            optimizer_parts = optim_info.optim_cls(parts, **kwargs)
            trackers = [TensorTracker() for _ in range(5)]

            def closure(w=whole, o=optimizer, trackers=trackers) -> None:
                o.zero_grad()
                loss = _rosenbrock(w).abs()
                loss.backward()
                for tracker, t in zip(trackers, (w.real, w.imag, loss, w.grad.real, w.grad.imag)):
                    tracker.add(t)

            def closure_parts(p=parts, o=optimizer_parts, trackers=trackers) -> None:
                o.zero_grad()
                trackers[0].pop_check_set(p[0], self)
                trackers[1].pop_check_set(p[1], self)
                loss = _rosenbrock(torch.complex(*p)).abs()
                trackers[2].pop_check_set(loss, self)
                loss.backward()
                trackers[3].pop_check_set(p[0].grad, self)
                trackers[4].pop_check_set(p[1].grad, self)

            for _ in range(optim_info.steps):
                closure()
                closure_parts()
                optimizer.step()
                optimizer_parts.step()
                self.assertEqual(whole.real, parts[0])
                self.assertEqual(whole.imag, parts[1])
            self.assertTrue(all(tracker.all_popped() for tracker in trackers))

    def _compare_between(self, inputs, models, optimizers, assert_eq_kwargs=None, assert_step_dtype=None, steps=9):
        """Step both; after each step compare weights and state, then set the second's to the first's."""
        tracker = TensorTracker(assert_eq_kwargs)
        for i in range(steps):
            for x, model, optimizer in zip(inputs, models, optimizers):
                optimizer.zero_grad()
                if i == 3:  # a layer without gradients must not step, whatever the implementation
                    model[2].requires_grad_(False)
                if i == 5:
                    model[2].requires_grad_(True)
                if i != 2:  # no gradients at all: no step at all
                    model(x).sum().backward()
                optimizer.step()
            first, second = optimizers
            for p, q in zip(models[0].parameters(), models[1].parameters()):
                tracker.add(p)
                tracker.pop_check_set(q, self)
                self.assertEqual(first.state[p].keys(), second.state[q].keys())
                for key, value in first.state[p].items():
                    # a gate may be another by half precision's roundings, and so how much of the drift is taken in
                    if key.startswith("extra_noise_") and p.dtype.itemsize <= 2:
                        continue
                    if key == "step" and assert_step_dtype is not None:
                        self.assertEqual(value.dtype, assert_step_dtype)
                        self.assertEqual(second.state[q][key].dtype, assert_step_dtype)
                    tracker.add(value)
                    tracker.pop_check_set(second.state[q][key], self)
            self.assertTrue(tracker.all_popped())

    def _test_derived_optimizers(
        self, device, dtype, optim_info, flag, reduced_precision=False, assert_step_dtype=None
    ):
        for optim_input in optim_info.optim_inputs_func(device=device, dtype=dtype):
            kwargs = deepcopy(optim_input.kwargs)
            if kwargs.get("capturable", False) and _get_device_type(device) == "cpu":
                continue
            models, optimizers = [], []
            x = torch.arange(1, 7, device=device).to(dtype).div(10).reshape(3, 2)
            for value in (False, True):
                torch.manual_seed(1)
                model = torch.nn.Sequential(
                    torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
                ).to(dtype=dtype, device=device)
                last = torch.empty((0,), device=device, dtype=dtype, requires_grad=True)
                last.grad = torch.rand_like(last)
                optimizers.append(optim_info.optim_cls([*model.parameters(), last], **{**kwargs, flag: value}))
                models.append(model)
            self._compare_between(
                [x, x],
                models,
                optimizers,
                REDUCED if reduced_precision else {},
                assert_step_dtype,
                steps=optim_info.steps + 1,
            )

    @optims(RULES[1:], dtypes=[torch.float64])
    def test_foreach_matches_forloop(self, device, dtype, optim_info):
        self._test_derived_optimizers(device, dtype, optim_info, "foreach")

    @optims(RULES[1:2], dtypes=[torch.float64])
    def test_set_default_dtype_works_with_foreach(self, device, dtype, optim_info):
        old = torch.get_default_dtype()
        for default in (torch.float64, torch.float16):
            try:
                torch.set_default_dtype(default)
                self._test_derived_optimizers(
                    device,
                    dtype,
                    optim_info,
                    "foreach",
                    reduced_precision=default == torch.float16,
                    assert_step_dtype=torch.float64 if default == torch.float64 else torch.float32,
                )
            finally:
                torch.set_default_dtype(old)

    @optims(RULES[1:], dtypes=floating_types_and(torch.bfloat16, torch.float16))
    def test_fused_matches_forloop(self, device, dtype, optim_info):
        self._test_derived_optimizers(device, dtype, optim_info, "fused")

    @parametrize("impl", ["foreach", "fused"])
    @optims(RULES, dtypes=[torch.float32])
    def test_mixed_device_dtype(self, device, dtype, optim_info, impl):
        """One device here: torch runs this on two GPUs, where every dtype stands on both."""
        dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        for optim_input in optim_info.optim_inputs_func(device=device, dtype=torch.float16):
            params = [torch.rand(2, 3, device=device).to(d) for d in dtypes]
            grads = [torch.rand(2, 3, device=device).to(d) for d in dtypes]
            pair = [[p.clone().requires_grad_() for p in params] for _ in range(2)]
            for value, own in zip((False, True), pair):
                optimizer = optim_info.optim_cls(own, **{**optim_input.kwargs, impl: value})
                for p, grad in zip(own, grads):
                    p.grad = grad.clone()
                for _ in range(7 if impl == "foreach" else 1):
                    optimizer.step()
            for p, q in zip(*pair):
                rtol, atol = torch.testing._comparison.get_tolerances(p.dtype, rtol=None, atol=None)
                self.assertEqual(p, q, rtol=30 * rtol, atol=30 * atol)

    @onlyCUDA
    @optims(RULES, dtypes=[torch.float32])
    def test_peak_memory_foreach(self, device, dtype, optim_info):
        """A step may hold one list of intermediates more than the for-loop's (3 with capturable); the jump none."""
        nparams = 10
        for optim_input in optim_info.optim_inputs_func(device=device):
            most = []
            for foreach in (False, True):
                # 512 bytes, the least that the allocator gives, so that sizes add up
                params = [torch.rand(16, 8, device=device, dtype=dtype) for _ in range(nparams)]
                optimizer = optim_info.optim_cls(params, **{**optim_input.kwargs, "foreach": foreach})
                for p in params:
                    p.grad = torch.rand_like(p)
                optimizer.step()
                torch.cuda.reset_peak_memory_stats()
                for _ in range(20):
                    optimizer.step()
                most.append(torch.cuda.max_memory_allocated())
                del optimizer, params, p
            intermediates = 3 if optim_input.kwargs.get("capturable") else 1
            self.assertLessEqual(most[1], most[0] + intermediates * nparams * 512)

    @optims(RULES, dtypes=[torch.float32])
    def test_fused_error_on_params_on_meta(self, device, dtype, optim_info):
        with torch.device("meta"):
            model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1)).to(dtype)
        optimizer = optim_info.optim_cls(model.parameters(), fused=True, **optim_info.hyperparameters)
        for p in model.parameters():
            p.grad = torch.rand_like(p)
        with self.assertRaisesRegex(RuntimeError, "`fused=True` requires all the params to be floating point Tensors"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.to_empty(device=device)
        for p in model.parameters():
            p.data.fill_(1.0)
            p.grad = torch.rand_like(p)
        for _ in range(optim_info.steps):
            optimizer.step()

    @optims(RULES, dtypes=[torch.float32])
    def test_fused_does_not_step_if_foundinf(self, device, dtype, optim_info):
        for optim_input, with_scale in itertools.product(optim_info.optim_inputs_func(device=device), (True, False)):
            params = [torch.ones((1,), device=device, dtype=dtype) for _ in range(5)]
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer = optim_info.optim_cls(params, fused=True, **optim_input.kwargs)
            optimizer.grad_scale = torch.ones((1,), dtype=dtype, device=device) if with_scale else None
            optimizer.found_inf = torch.ones((), dtype=dtype, device=device)
            for _ in range(optim_info.steps):
                optimizer.step()
            for p in params:
                self.assertEqual(optimizer.state[p]["step"], torch.zeros((), dtype=dtype, device=device))
                self.assertEqual(p, torch.ones_like(p), rtol=0, atol=0)

    @onlyCUDA
    @parametrize("impl", ["fused", "capturable"])
    @optims(RULES, dtypes=[torch.float32])
    def test_cpu_load_state_dict(self, device, dtype, impl, optim_info):
        """A fused or capturable optimizer whose state comes from a checkpoint mapped to the CPU."""
        for optim_input in optim_info.optim_inputs_func(device="cpu"):
            param = torch.tensor([0.1, 0.2], dtype=dtype)
            optimizer = optim_info.optim_cls([param], **optim_input.kwargs)
            param.grad = torch.rand_like(param)
            for _ in range(4):
                optimizer.step()
            state_dict = deepcopy(optimizer.state_dict())
            state_dict["param_groups"][0][impl] = True
            param_d = param.clone().to(device)
            optimizer_d = optim_info.optim_cls([param_d], **{**optim_input.kwargs, impl: True})
            optimizer_d.load_state_dict(state_dict)
            param_d.grad = param.grad.to(device)
            for _ in range(optim_info.steps):
                optimizer.step()
                optimizer_d.step()
                self.assertEqual(param, param_d.cpu())

    @optims(RULES, dtypes=[torch.float32])
    def test_param_groups_weight_decay(self, device, dtype, optim_info):
        inputs = _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info, skip=("differentiable",))
        for optim_input in inputs:
            weight, bias, x = _linear(device, dtype)
            kwargs = optim_input.kwargs
            optimizer = optim_info.optim_cls(
                [{"params": [weight], **kwargs}, {"params": [bias], **kwargs, "weight_decay": 0.0}]
            )
            losses = []
            for _ in range(optim_info.steps):
                losses.append(_forward_backward(optimizer, weight, bias, x).item())
                optimizer.step()
            if kwargs.get("maximize", False):
                self.assertGreater(losses[-1], losses[0])
            else:
                self.assertLess(losses[-1], losses[0])

    @optims(RULES, dtypes=[torch.float32])
    def test_param_groups_lr(self, device, dtype, optim_info):
        inputs = _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info, skip=("differentiable",))
        for optim_input in inputs:
            weight, bias, x = _linear(device, dtype)
            still = Parameter(torch.randn(2, device=device, dtype=dtype))
            before = still.detach().clone()
            kwargs = {"lr": 1e-3, **optim_input.kwargs}
            optimizer = optim_info.optim_cls(
                [{"params": [weight, bias], **kwargs}, {"params": [still]}], lr=1e-28, **optim_info.hyperparameters
            )
            losses = []
            for _ in range(optim_info.steps):
                losses.append(_forward_backward(optimizer, weight, bias, x).item())
                still.grad = torch.rand_like(still)
                optimizer.step()
            if kwargs.get("maximize", False):
                self.assertGreater(losses[-1], losses[0])
            else:
                self.assertLess(losses[-1], losses[0])
            self.assertEqual(still, before)

    @optims(RULES, dtypes=[torch.float32])
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        for optim_input in _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info):
            params = [torch.randn(2, 3, device=device, dtype=dtype) for _ in range(2)]
            before = [p.clone() for p in params]
            optimizer = optim_info.optim_cls(params, **optim_input.kwargs)
            for _ in range(optim_info.steps):
                self.assertEqual(optimizer.step(lambda: 1.5), 1.5)
            self.assertEqual(params, before, rtol=0, atol=0)
            self.assertEqual(len(optimizer.state), 0)

    @optims(RULES, dtypes=[torch.float32])
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        for optim_input in _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info):
            param = torch.randn((5, 1), device=device, dtype=dtype, requires_grad=True)
            before = param.detach().clone()
            kwargs = {**optim_input.kwargs, "weight_decay": 0.0}
            params = [param.clone() if kwargs.get("differentiable", False) else param]
            params[0].grad = torch.zeros_like(params[0])
            optimizer = optim_info.optim_cls(params, **kwargs)
            for _ in range(optim_info.steps):
                optimizer.step(lambda: torch.tensor([1], device=device))
            self.assertEqual(params[0], before, rtol=0, atol=0)

    @optims(RULES, dtypes=[torch.float32])
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for optim_input in _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info):
            params = [Parameter(torch.randn(2, 3, device=device, dtype=dtype)) for _ in range(2)]
            printed = repr(optim_info.optim_cls(params, **optim_input.kwargs))
            for name in HYPERPARAMETERS:
                self.assertIn(f"    {name}: ", printed)

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims(RULES, dtypes=[torch.float32])
    def test_state_dict_deterministic(self, device, dtype, optim_info, is_named_optim0, is_named_optim1):
        def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
            state_dict = deepcopy(state_dict)
            for group in state_dict["param_groups"]:
                group.pop("param_names", None)
            return state_dict

        inputs = _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info, skip=("differentiable",))
        for optim_input in inputs:
            weight, bias, x = _linear(device, dtype)
            optimizer = optim_info.optim_cls(_named([weight, bias], is_named_optim0), **optim_input.kwargs)
            for _ in range(optim_info.steps):
                _forward_backward(optimizer, weight, bias, x)
                optimizer.step()

            weight_c, bias_c = (Parameter(p.detach().clone()) for p in (weight, bias))
            optimizer_c = optim_info.optim_cls(_named([weight_c, bias_c], is_named_optim1), **optim_input.kwargs)
            optimizer_c.load_state_dict(deepcopy(optimizer.state_dict()))
            for _ in range(optim_info.steps):
                _forward_backward(optimizer, weight, bias, x)
                _forward_backward(optimizer_c, weight_c, bias_c, x)
                optimizer.step()
                optimizer_c.step()
                self.assertEqual(weight, weight_c, rtol=0, atol=0)
                self.assertEqual(bias, bias_c, rtol=0, atol=0)
            self.assertEqual(without_names(optimizer.state_dict()), without_names(optimizer_c.state_dict()))

            # repeated parameters look alike in a state dict
            optimizer_c.param_groups.extend(optimizer_c.param_groups)
            self.assertEqual(
                without_names(optimizer.state_dict())["param_groups"][-1],
                without_names(optimizer_c.state_dict())["param_groups"][-1],
            )

    def _model(self, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Tensor]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2))
        return model.to(dtype=dtype, device=device), torch.rand(1, 4, 16, 16, device=device, dtype=dtype)

    def _train(self, optimizer: Optimizer, model: torch.nn.Module, x: Tensor, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()

    @optims(RULES, dtypes=[torch.float32])
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        inputs = _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info, skip=("differentiable",))
        for optim_input in inputs:
            model, x = self._model(device, dtype)
            optimizer = optim_info.optim_cls(model.parameters(), **optim_input.kwargs)
            self._train(optimizer, model, x, 4)
            old = deepcopy(optimizer.state_dict())
            for group in old["param_groups"]:
                for flag in optim_info.not_og_supported_flags:
                    group.pop(flag, None)
            optimizer.load_state_dict(old)
            self._train(optimizer, model, x, optim_info.steps)
            for name in HYPERPARAMETERS:  # a checkpoint that lacks a hyperparameter leaves it
                expected = optim_input.kwargs.get(name, optimizer.defaults[name])
                self.assertEqual(optimizer.param_groups[0][name], expected)

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims(RULES, dtypes=[torch.float32])
    def test_can_load_from_to_named_state_dict(self, device, dtype, optim_info, is_named_optim0, is_named_optim1):
        inputs = _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info, skip=("differentiable",))
        for optim_input in inputs:
            model, x = self._model(device, dtype)
            params = [model.named_parameters() if n else model.parameters() for n in (is_named_optim0, is_named_optim1)]
            optimizer = optim_info.optim_cls(params[0], **optim_input.kwargs)
            self._train(optimizer, model, x, 4)
            second = optim_info.optim_cls(params[1], **optim_input.kwargs)
            second.load_state_dict(deepcopy(optimizer.state_dict()))
            self._train(second, model, x, optim_info.steps)
            if is_named_optim0 or is_named_optim1:
                names = ["0.weight", "0.bias", "1.weight", "1.bias"]
                self.assertEqual(second.state_dict()["param_groups"][0]["param_names"], names)

    @parametrize("is_named_optim", [True, False])
    @optims(RULES, dtypes=[torch.float32])
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info, is_named_optim):
        inputs = _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info, skip=("differentiable",))
        for optim_input in inputs:
            weight, bias, x = _linear(device, dtype)
            optimizer = optim_info.optim_cls(_named([weight, bias], is_named_optim), **optim_input.kwargs)
            for _ in range(optim_info.steps):
                optimizer.step(functools.partial(_forward_backward, optimizer, weight, bias, x))
            state_dict = optimizer.state_dict()
            with tempfile.TemporaryFile() as file:
                torch.save(state_dict, file)
                for weights_only in (False, True):
                    file.seek(0)
                    self.assertEqual(torch.load(file, weights_only=weights_only), state_dict)

    @optims(RULES, dtypes=[torch.float32])
    def test_load_nontensor_step(self, device, dtype, optim_info):
        inputs = _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info, skip=("differentiable",))
        for optim_input in inputs:
            params = [Parameter(torch.randn(2, 3, device=device, dtype=dtype)) for _ in range(2)]
            for p in params:
                p.grad = torch.rand_like(p)
            optimizer = optim_info.optim_cls(params, **optim_input.kwargs)
            for _ in range(4):
                optimizer.step()
            state_dict = deepcopy(optimizer.state_dict())
            params_c = [Parameter(p.detach().clone()) for p in params]
            for p, q in zip(params, params_c):
                q.grad = p.grad
            for state in state_dict["state"].values():
                state["step"] = state["step"].item()
            optimizer_c = optim_info.optim_cls(params_c, **optim_input.kwargs)
            optimizer_c.load_state_dict(state_dict)
            for _ in range(optim_info.steps):
                optimizer.step()
                optimizer_c.step()
                self.assertEqual(params, params_c, rtol=0, atol=0)

    @onlyCUDA
    @optims(RULES, dtypes=[torch.float32])
    def test_state_dict_with_cuda_params(self, device, dtype, optim_info):
        inputs = _get_optim_inputs_including_global_cliquey_kwargs("cpu", dtype, optim_info, skip=("differentiable",))
        for optim_input in inputs:
            params = [Parameter(torch.randn(2, 3, dtype=dtype)) for _ in range(2)]
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer = optim_info.optim_cls(params, **optim_input.kwargs)
            for _ in range(4):
                optimizer.step()
            params_cuda = [p.detach().to("cuda") for p in params]
            for p, q in zip(params, params_cuda):
                q.grad = p.grad.to("cuda")
            optimizer_cuda = optim_info.optim_cls(params_cuda, **optim_input.kwargs)
            state_dict, untouched = deepcopy(optimizer.state_dict()), deepcopy(optimizer.state_dict())
            optimizer_cuda.load_state_dict(state_dict)
            self.assertEqual(state_dict, untouched)
            group = untouched["param_groups"][0]
            on_device = group.get("capturable", False) or group.get("fused", False)
            for state in optimizer_cuda.state_dict()["state"].values():
                self.assertEqual(state["step"].device.type, "cuda" if on_device else "cpu")
                self.assertEqual(state["extra_anchor"].device.type, "cuda")
            for _ in range(optim_info.steps):
                optimizer.step()
                optimizer_cuda.step()
                self.assertEqual(params, params_cuda)
                self.assertEqual(optimizer.state_dict(), optimizer_cuda.state_dict())

    def _each(self, device: str, dtype: torch.dtype, optim_info: Rule) -> list[Optimizer]:
        """One optimizer for each set of flags, over a parameter without a gradient."""
        return [
            optim_info.optim_cls([torch.rand(2, 3, device=device, dtype=dtype, requires_grad=True)], **i.kwargs)
            for i in _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info)
        ]

    @optims(RULES, dtypes=[torch.float32])
    def test_state_dict_pre_hook(self, device, dtype, optim_info):
        for optimizer in self._each(device, dtype, optim_info):
            optimizer.register_state_dict_pre_hook(_state_dict_pre_hook)
            self.assertEqual(optimizer.state_dict()["state"]["test"], 1)

    @optims(RULES, dtypes=[torch.float32])
    def test_state_dict_post_hook(self, device, dtype, optim_info):
        for optimizer in self._each(device, dtype, optim_info):
            optimizer.register_state_dict_post_hook(_state_dict_post_hook)
            self.assertFalse(optimizer.state_dict()["ran_state_dict_pre_hook"])

    @optims(RULES, dtypes=[torch.float32])
    def test_state_dict_pre_post_hook(self, device, dtype, optim_info):
        for optimizer in self._each(device, dtype, optim_info):
            optimizer.register_state_dict_pre_hook(_state_dict_pre_hook)
            optimizer.register_state_dict_post_hook(_state_dict_post_hook)
            state_dict = optimizer.state_dict()
            self.assertNotIn("test", state_dict["state"])
            self.assertTrue(state_dict["ran_state_dict_pre_hook"])

    @optims(RULES, dtypes=[torch.float32])
    def test_load_state_dict_pre_hook_and_prepend(self, device, dtype, optim_info):
        for optimizer in self._each(device, dtype, optim_info):
            state_dict = optimizer.state_dict()
            optimizer.register_load_state_dict_pre_hook(_load_state_dict_pre_hook1)
            optimizer.load_state_dict(state_dict)
            self.assertEqual(optimizer.param_groups[0]["lr"], 0.002)
            # the one put first is overruled by the other
            optimizer.register_load_state_dict_pre_hook(_load_state_dict_pre_hook2, prepend=True)
            optimizer.load_state_dict(state_dict)
            self.assertEqual(optimizer.param_groups[0]["lr"], 0.002)

    @optims(RULES, dtypes=[torch.float32])
    def test_load_state_dict_post_hook(self, device, dtype, optim_info):
        for optimizer in self._each(device, dtype, optim_info):
            optimizer.register_load_state_dict_post_hook(_load_state_dict_post_hook)
            optimizer.load_state_dict(optimizer.state_dict())
            self.assertFalse(optimizer.state["ran_load_state_dict_pre_hook2"])
            self.assertTrue(optimizer.state["ran_load_state_dict_post_hook"])

    @optims(RULES, dtypes=[torch.float32])
    def test_load_state_dict_pre_post_hook(self, device, dtype, optim_info):
        for optimizer in self._each(device, dtype, optim_info):
            optimizer.register_load_state_dict_pre_hook(_load_state_dict_pre_hook2)
            optimizer.register_load_state_dict_post_hook(_load_state_dict_post_hook)
            optimizer.load_state_dict(optimizer.state_dict())
            self.assertTrue(optimizer.state["ran_load_state_dict_pre_hook2"])
            self.assertTrue(optimizer.state["ran_load_state_dict_post_hook"])

    def _count_hook(self, optimizer: Optimizer, register: str) -> None:
        fired = []
        handle = getattr(optimizer, register)(lambda opt, args, kwargs: fired.append(opt))
        optimizer.step()
        optimizer.step()
        self.assertEqual(len(fired), 2)
        self.assertTrue(all(opt is optimizer for opt in fired))
        handle.remove()
        optimizer.step()
        self.assertEqual(len(fired), 2)

    @optims(RULES, dtypes=[torch.float32])
    def test_step_post_hook(self, device, dtype, optim_info):
        for optimizer in self._each(device, dtype, optim_info):
            self._count_hook(optimizer, "register_step_post_hook")

    @optims(RULES, dtypes=[torch.float32])
    def test_step_pre_hook(self, device, dtype, optim_info):
        for optimizer in self._each(device, dtype, optim_info):
            self._count_hook(optimizer, "register_step_pre_hook")

    @optims(RULES, dtypes=[torch.float32])
    def test_step_all_hooks(self, device, dtype, optim_info):
        def appends(fired: list[int], mark: int) -> Callable[..., None]:
            return lambda opt, args, kwargs: fired.append(mark)

        for optimizer in self._each(device, dtype, optim_info):
            fired: list[int] = []
            other = SGD(optimizer.param_groups[0]["params"])
            AdamW(optimizer.param_groups[0]["params"])  # gives the base class's own step its hooks
            handles = [
                register_optimizer_step_pre_hook(appends(fired, 0)),
                register_optimizer_step_post_hook(appends(fired, 5)),
                optimizer.register_step_pre_hook(appends(fired, 1)),
                optimizer.register_step_post_hook(appends(fired, 2)),
                other.register_step_pre_hook(appends(fired, 1)),
                other.register_step_post_hook(appends(fired, 2)),
            ]
            try:
                for stepping in (optimizer, other, optimizer):
                    stepping.step()
                    self.assertEqual(fired, [0, 1, 2, 5])
                    fired.clear()
            finally:
                for handle in handles:
                    handle.remove()
            optimizer.step()
            other.step()
            self.assertEqual(fired, [])

    @optims(RULES, dtypes=[torch.float32])
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        def public(obj: Any) -> set[str]:
            return {name for name in vars(obj) if not name.startswith("_")}

        inputs = _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info, skip=("differentiable",))
        for optim_input in inputs:
            params = [Parameter(torch.randn(2, 3, device=device, dtype=dtype)) for _ in range(2)]
            for p in params:
                p.grad = torch.rand_like(p)
            optimizer = optim_info.optim_cls(params, **optim_input.kwargs)
            for _ in range(optim_info.steps):
                optimizer.step()
            copied = deepcopy(optimizer)
            self.assertEqual(public(optimizer), public(copied))
            self.assertEqual(public(optimizer), {"defaults", "state", "param_groups"})
            self.assertEqual(optimizer.state_dict(), copied.state_dict())

    @onlyCUDA
    @optims(RULES, dtypes=floating_types_and(torch.bfloat16, torch.float16))
    def test_fused_cpu_matches_cuda(self, device, dtype, optim_info):
        for optim_input in optim_info.optim_inputs_func(device="cpu", dtype=dtype):
            inputs, models, optimizers = [], [], []
            for dev in ("cpu", "cuda"):
                inputs.append(torch.arange(1, 7, device=dev).to(dtype).div(10).reshape(3, 2))
                torch.manual_seed(1)
                model = torch.nn.Sequential(
                    torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
                ).to(dtype)
                models.append(model.to(dev))
                kwargs = {**optim_input.kwargs, "fused": True}
                optimizers.append(optim_info.optim_cls(models[-1].parameters(), **kwargs))
            self._compare_between(inputs, models, optimizers)

    @onlyCUDA
    @optims(RULES, dtypes=[torch.float32])
    def test_defaults_changed_to_foreach(self, device, dtype, optim_info):
        """On a GPU the default is the multi-tensor implementation, as for AdamW."""
        model = torch.nn.Linear(5, 5).to(dtype=dtype, device=device)
        for optim_input in optim_info.optim_inputs_func(device=device):
            optimizer = optim_info.optim_cls(model.parameters(), **optim_input.kwargs)
            optimizer.zero_grad()
            model(torch.rand(2, 5, dtype=dtype, device=device)).sum().backward()
            with patch.object(sys.modules["torch.optim.adam"], "_multi_tensor_adam") as multi_tensor:
                optimizer.step()
            self.assertTrue(multi_tensor.called)

    @optims(RULES, dtypes=[torch.float32])
    def test_non_empty_state(self, device, dtype, optim_info):
        model = torch.nn.Linear(5, 5).to(dtype=dtype, device=device)
        for optim_input in optim_info.optim_inputs_func(device=device):
            optimizer = optim_info.optim_cls(model.parameters(), **optim_input.kwargs)
            self._train(optimizer, model, torch.rand(2, 5, dtype=dtype, device=device), 1)
            self.assertEqual(len(optimizer.state), 2)
            for state in optimizer.state.values():
                self.assertGreater(len(state), 0)

    # --- differentiable: a step as a function that gradcheck can differentiate ---

    @optims(RULES, dtypes=[torch.float64])
    def test_optimizers_differentiable_wrt_params(self, device, dtype, optim_info):
        def one_step(p, grad, kwargs, keys, *values):
            p = p.clone()
            p.grad = grad
            optimizer = optim_info.optim_cls([p], **kwargs)
            optimizer.state[p].update({k: v.clone() for k, v in zip(keys, values)})
            optimizer.step()
            return (p, *(v for v in optimizer.state[p].values() if torch.is_tensor(v) and v.requires_grad))

        for optim_input in optim_info.optim_inputs_func(device=device):
            kwargs = {**optim_input.kwargs, "differentiable": True, "capturable": False}
            p, grad = (torch.rand(10, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
            # `step` is not continuous: it has no gradient
            keys, values = ["step"], [torch.tensor(10.0, dtype=dtype)]
            for key in ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if kwargs.get("amsgrad") else ()):
                keys.append(key)
                values.append(torch.rand(10, device=device, dtype=dtype, requires_grad=True))
            self.assertTrue(gradcheck(one_step, (p, grad, kwargs, keys, *values)))

    @optims(RULES, dtypes=[torch.float64])
    def test_differentiable_hyperparameters(self, device, dtype, optim_info):
        def two_steps(p, grad, kwargs, names, *values):
            p = p.clone()
            optimizer = optim_info.optim_cls([p], **kwargs, **dict(zip(names, values)))
            for _ in range(2):
                p.grad = grad + p.detach()
                optimizer.step()
            return p

        p, grad = (torch.rand(5, device=device, dtype=dtype) for _ in range(2))
        for names in (("lr",), ("weight_decay",), ("lr", "weight_decay")):
            values = [torch.tensor(0.01, dtype=dtype, device=device, requires_grad=True) for _ in names]
            kwargs = {**optim_info.hyperparameters, "differentiable": True}
            self.assertTrue(gradcheck(two_steps, (p, grad, kwargs, names, *values)))

    @optims(RULES, dtypes=[torch.float64])
    def test_differentiable_sees_through_a_jump(self, device, dtype, optim_info):
        """The jump is a constant to autograd: gradients of the weights after it are AdamW's over the same steps."""

        def run(
            cls: type[Optimizer], hyperparameters: dict[str, Any], shifts: list[Tensor] | None
        ) -> tuple[Tensor, list[Tensor]]:
            start = torch.linspace(-1, 1, 6, dtype=dtype, device=device, requires_grad=True)
            grads = torch.linspace(1, 2, 6, dtype=dtype, device=device)
            p = start.clone()
            optimizer = cls([p], lr=0.01, differentiable=True, **hyperparameters)
            path = []
            for i in range(optim_info.steps):
                p.grad = grads * start
                optimizer.step()
                if shifts is not None:  # move AdamW's weights to where the jump went
                    with torch.enable_grad():
                        p.add_(shifts[i] - p.detach())
                path.append(p.detach().clone())
            (gradient,) = torch.autograd.grad(p.sum(), start)
            return gradient, path

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradient, path = run(optim_info.optim_cls, optim_info.hyperparameters, None)
            _, without = run(AdamW, {}, None)
            expected, _ = run(AdamW, {}, path)
        self.assertNotEqual(path[-1], without[-1])
        self.assertEqual(gradient, expected)


instantiate_device_type_tests(TestTorchHarness, globals(), only_for=("cpu", "cuda"))
