"""What an AdamW that jumps must keep to be a drop-in replacement: plain functions that raise where it does not.

Each check takes `make`, called like AdamW's constructor plus `extra_every` and `extra_steps`: a class or a partial.
Gradients are a steady slope with noise and depend on nothing but the step and the parameter's place in its list, so two
runs see the same gradients and the jumps have a direction worth jumping in.
"""

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from extraopt.kernels import reference

Make = Callable[..., Optimizer]
Check = Callable[[Make], None]

EVERY, STEPS = 3, 15
HYPERPARAMETERS: dict[str, Any] = {"extra_every": EVERY, "extra_steps": STEPS, "extra_kl": None, "lr": 0.01}
SHAPES = ((4, 3), (5,), (), (0,))
NUMBERS = {"extra_origin", "extra_step", "extra_noise_cov", "extra_noise_var"}  # in a parameter's state
CHECKS: dict[str, Check] = {}


def contract(check: Check) -> Check:
    """Add a check to CHECKS under its name."""
    CHECKS[check.__name__] = check
    return check


# --- helpers ---------------------------------------------------------------------------------------------------------


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def clones(params: Iterable[Tensor]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


def give_gradients(params: Sequence[Tensor], step: int, noise: float = 0.3) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        real = p.numel() * (2 if p.is_complex() else 1)
        slope = torch.linspace(-1.0, 1.2, real) if real > 1 else torch.ones(real)
        grad = slope + noise * torch.randn(real, generator=generator)
        grad = torch.view_as_complex(grad.view(-1, 2)) if p.is_complex() else grad
        p.grad = torch.empty_like(p).copy_(grad.view(p.shape))


def train(optimizer: Optimizer, params: Sequence[Tensor], steps: Iterable[int]) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def assert_same(ours: Iterable[Tensor], theirs: Iterable[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not torch.equal(a, b):
            difference = (a.detach() - b.detach()).abs().max().item()
            raise AssertionError(f"{what}: tensor {i} differs by {difference}")


def assert_trained_as_if_new(make: Make, ours: Sequence[Tensor], theirs: Sequence[Tensor], what: str) -> None:
    """`ours`, trained for two cycles, are what a new optimizer makes of `theirs`."""
    train(make(theirs, **HYPERPARAMETERS), theirs, range(2 * EVERY))
    assert_same(ours, theirs, what)


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def hyperparameter(optimizer: Optimizer, name: str, default: Any) -> Any:
    return optimizer.param_groups[0].get(name, default)


def next_cycle(
    optimizer: Optimizer,
    weights: list[Tensor],
    anchors: list[Tensor],
    estimates: list[Tensor],
    taken: list[list[float]],
    every: int = EVERY,
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Weights and estimates after the end of a cycle, in float64, and the gates; `taken` is written in place."""
    beta = hyperparameter(optimizer, "extra_beta", 0.0)
    gate = hyperparameter(optimizer, "extra_gate", None)
    momentum = hyperparameter(optimizer, "betas", (0.9,))[0]
    rule = {"every": every, "length": STEPS, "beta": beta, "gate": gate, "momentum": momentum}
    *after, shares = reference.end_cycle(weights, anchors, estimates, taken, **rule)
    for before, share in zip(taken, shares):
        before.append(share)
    return after[0], after[1], after[2]


def spacing(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of `dtype` at each element of `t`, in float64."""
    info = torch.finfo(dtype)
    return (2.0 ** t.abs().clamp(min=info.tiny).log2().floor()) * info.eps


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # SequentialLR's own, before torch 2.8
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")
        yield


# --- 1: it is an AdamW -----------------------------------------------------------------------------------------------


@contract
def has_the_signature_of_adamw(make: Make) -> None:
    optimizer = make(parameters())
    assert isinstance(optimizer, AdamW)
    theirs = inspect.signature(AdamW).parameters
    ours = inspect.signature(type(optimizer)).parameters
    assert list(ours)[: len(theirs) - 5] == list(theirs)[: len(theirs) - 5], "positional arguments"
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind and ours[name].default == parameter.default, name
    for name in ours.keys() - theirs.keys():
        assert name.startswith("extra_") and ours[name].kind == inspect.Parameter.KEYWORD_ONLY, name
    assert list(inspect.signature(type(optimizer).step).parameters) == ["self", "closure"]


# --- 2: without a horizon it is AdamW --------------------------------------------------------------------------------

FLAGS: list[dict[str, Any]] = [
    {},
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"amsgrad": True},
    {"amsgrad": True, "foreach": True},
    {"amsgrad": True, "fused": True},
    {"maximize": True},
    {"maximize": True, "foreach": True},
    {"maximize": True, "fused": True},
    {"differentiable": True},
    {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-4},
    {"lr": torch.tensor(0.01)},
    {"lr": torch.tensor(0.01), "fused": True},
]


@contract
def without_a_horizon_is_adamw_bit_for_bit(make: Make) -> None:
    for flags in FLAGS:
        # autograd may not write a leaf in place, so a differentiable step needs tensors that are not leaves
        leaves = [parameters(), parameters()]
        ours, theirs = ([p.clone() for p in params] if flags.get("differentiable") else params for params in leaves)
        a = make(ours, **{"extra_steps": 0, "extra_every": EVERY, "lr": 0.01, **copy.deepcopy(flags)})
        b = AdamW(theirs, **{"lr": 0.01, **copy.deepcopy(flags)})
        train(a, ours, range(22))
        train(b, theirs, range(22))
        assert_same(ours, theirs, f"weights with {flags}")
        for p, q in zip(ours, theirs):
            assert a.state[p].keys() == b.state[q].keys(), flags
            assert_same(a.state[p].values(), b.state[q].values(), f"state with {flags}")


@contract
def without_a_horizon_refuses_what_adamw_refuses(make: Make) -> None:
    for flags in {"capturable": True}, {"capturable": True, "foreach": True}:
        for cls in make, AdamW:
            params = parameters()
            optimizer = cls(params, **flags, **({} if cls is AdamW else {"extra_steps": 0}))
            try:
                train(optimizer, params, [0])
            except AssertionError as error:  # what AdamW raises for CPU tensors
                assert "capturable" in str(error)
            else:
                raise AssertionError(f"{cls} took capturable on a CPU")


# --- 3: the phase is that of applied steps ---------------------------------------------------------------------------


def _train_scaled(
    optimizer: Optimizer, params: list[Parameter], steps: int, overflow_before: int | None, reload: bool = False
) -> None:
    """`steps` applied steps, with one more, whose gradients are infinite, before step `overflow_before`."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    scaler.scale(torch.zeros(()))
    for step in range(steps):
        for infinite in [True, False] if step == overflow_before else [False]:
            give_gradients(params, step)
            for p in params:
                p.grad *= scaler.get_scale()
            if infinite:
                params[0].grad[0, 0] = torch.inf
                if reload:
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            scaler.step(optimizer)
            scaler.update()


def _check_skipped_steps(make: Make, fused: bool) -> None:
    steps = 2 * EVERY + 2
    plain = parameters()
    _train_scaled(make(plain, fused=fused, **HYPERPARAMETERS), plain, steps, None)
    for reload in False, True:
        for at in range(steps):
            params = parameters()
            _train_scaled(make(params, fused=fused, **HYPERPARAMETERS), params, steps, at, reload)
            assert_same(params, plain, f"an overflow before step {at + 1}, {reload=}")


@contract
def a_step_skipped_by_the_scaler_does_not_count(make: Make) -> None:
    _check_skipped_steps(make, fused=False)


@contract
def a_step_skipped_inside_the_fused_kernel_does_not_count(make: Make) -> None:
    _check_skipped_steps(make, fused=True)


@contract
def a_group_added_in_mid_run_has_its_own_phase(make: Make) -> None:
    ours, theirs = parameters(), parameters()
    together = make(ours[:1], **HYPERPARAMETERS)
    alone = [make(theirs[:1], **HYPERPARAMETERS), make(theirs[1:], **HYPERPARAMETERS)]
    train(together, ours, range(4))
    together.add_param_group({"params": ours[1:]})
    train(together, ours, range(4, 4 + 3 * EVERY))
    train(alone[0], theirs, range(4 + 3 * EVERY))
    train(alone[1], theirs, range(4, 4 + 3 * EVERY))
    assert_same(ours, theirs, "a group added after step 4")


@contract
def a_parameter_unfrozen_in_mid_run_has_its_own_phase(make: Make) -> None:
    ours, theirs = parameters(), parameters()
    together = make(ours, **HYPERPARAMETERS)
    alone = [make(theirs[:1], **HYPERPARAMETERS), make(theirs[1:], **HYPERPARAMETERS)]
    for step in range(4 + 3 * EVERY):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        if step < 4:
            for p in ours[1:]:
                p.grad = None
        together.step()
        alone[0].step()
        if step >= 4:
            alone[1].step()
    assert_same(ours, theirs, "parameters without gradients in the first 4 steps")


@contract
def a_parameter_with_rare_gradients_has_its_own_phase(make: Make) -> None:
    """As an expert of a mixture has: a gradient every second step here."""
    ours, theirs = parameters(), parameters()
    together = make(ours, **HYPERPARAMETERS)
    alone = [make(theirs[:1], **HYPERPARAMETERS), make(theirs[1:], **HYPERPARAMETERS)]
    for step in range(4 * EVERY - 1):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        if step % 2:
            for p in ours[1:]:
                p.grad = None
        together.step()
        alone[0].step()
        if not step % 2:
            alone[1].step()
    assert_same(ours, theirs, "parameters with a gradient every second step")


@contract
def parameters_that_take_turns_have_their_own_phases(make: Make) -> None:
    ours, theirs = parameters(), parameters()
    together = make(ours[:2], **HYPERPARAMETERS)
    alone = [make(theirs[:1], **HYPERPARAMETERS), make(theirs[1:2], **HYPERPARAMETERS)]
    for step, turn in enumerate([0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0]):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        ours[1 - turn].grad = None
        together.step()
        alone[turn].step()
    assert_same(ours, theirs, "one of two parameters a step")


def _zero_1(optimizer: Optimizer) -> None:
    """A step of DeepSpeed's ZeRO-1 and 2: one call for each group, which is then the only one."""
    groups = optimizer.param_groups
    for group in groups:
        optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = groups


def _zero_3(optimizer: Optimizer, subgroups: list[list[Parameter]]) -> None:
    """A step of DeepSpeed's ZeRO-3: one call for each sub-group, put into its group for the time of the call."""
    for group, params in zip(optimizer.param_groups, subgroups):
        group["params"] = params
        optimizer.step()
        group["params"] = []


@contract
def one_call_for_each_group_is_one_step(make: Make) -> None:
    ours, theirs = parameters(), parameters()
    together = make([{"params": ours[:1]}, {"params": ours[1:]}], **HYPERPARAMETERS)
    alone = [make(theirs[:1], **HYPERPARAMETERS), make(theirs[1:], **HYPERPARAMETERS)]
    for step in range(3 * EVERY):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        _zero_1(together)
        for optimizer in alone:
            optimizer.step()
    assert_same(ours, theirs, "groups stepped one by one")


@contract
def parameters_put_in_for_one_call_keep_their_cycle(make: Make) -> None:
    ours, theirs = parameters(), parameters()
    together = make([{"params": ours[:1]}, {"params": ours[1:]}], **HYPERPARAMETERS)
    alone = [make(theirs[:1], **HYPERPARAMETERS), make(theirs[1:], **HYPERPARAMETERS)]
    for group in together.param_groups:
        group["params"] = []
    for step in range(3 * EVERY):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        _zero_3(together, [ours[:1], ours[1:]])
        for optimizer in alone:
            optimizer.step()
    assert_same(ours, theirs, "groups filled for one call")


@contract
def hyperparameters_hold_for_one_group(make: Make) -> None:
    ours, jumping, plain = parameters(), parameters(), parameters()
    optimizer = make([{"params": ours[:1]}, {"params": ours[1:], "extra_steps": 0}], **HYPERPARAMETERS)
    train(optimizer, ours, range(3 * EVERY))
    train(make(jumping[:1], **HYPERPARAMETERS), jumping, range(3 * EVERY))
    train(AdamW(plain[1:], lr=HYPERPARAMETERS["lr"]), plain, range(3 * EVERY))
    assert_same(ours[:1], jumping[:1], "the group that jumps")
    assert_same(ours[1:], plain[1:], "the group that does not")


# --- 4: state is made at the first step, of the parameter's form, and stays where it is ------------------------------


@contract
def no_state_before_the_first_gradient(make: Make) -> None:
    params = parameters()
    optimizer = make(params, **HYPERPARAMETERS)
    assert not optimizer.state and not optimizer.state_dict()["state"]
    optimizer.zero_grad()
    optimizer.step()
    assert not optimizer.state, "a step without gradients made state"


@contract
def no_state_for_parameters_without_gradients(make: Make) -> None:
    params = parameters()
    params[1].requires_grad_(False)
    optimizer = make(params, **HYPERPARAMETERS)
    frozen = params[1].detach().clone()
    for step in range(2 * EVERY):
        give_gradients(params, step)
        params[1].grad = None
        optimizer.step()
    assert params[1] not in optimizer.state
    assert_same([params[1]], [frozen], "a frozen parameter")


@contract
def parameters_replaced_before_the_first_step_are_the_ones_that_jump(make: Make) -> None:
    """What accelerate does under FSDP2: it builds the optimizer first and puts the sharded parameters in later."""
    ours, theirs = parameters(), parameters()
    optimizer = make([torch.nn.Parameter(torch.empty(1)) for _ in ours], **HYPERPARAMETERS)
    optimizer.state_dict()
    optimizer.param_groups[0]["params"] = list(ours)
    optimizer.state_dict()
    train(optimizer, ours, range(2 * EVERY))
    assert_trained_as_if_new(make, ours, theirs, "parameters replaced before step 1")


@contract
def weights_loaded_before_the_first_step_are_the_anchor(make: Make) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = make(ours, **HYPERPARAMETERS)
    with torch.no_grad():
        for p, q in zip(ours, theirs):
            p.mul_(3)
            q.mul_(3)
    train(optimizer, ours, range(2 * EVERY))
    assert_trained_as_if_new(make, ours, theirs, "weights loaded after the constructor")


@contract
def weights_written_by_the_first_closure_are_the_anchor(make: Make) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = make(ours, **HYPERPARAMETERS)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        if not calls:
            with torch.no_grad():
                for p in ours:
                    p.mul_(3)
        give_gradients(ours, len(calls))
        calls.append(len(calls))
        return torch.tensor(float(len(calls)))

    losses = [float(optimizer.step(closure)) for _ in range(2 * EVERY)]
    assert losses == [1.0 + i for i in range(2 * EVERY)], "a closure runs once a step and its loss is returned"
    with torch.no_grad():
        for q in theirs:
            q.mul_(3)
    assert_trained_as_if_new(make, ours, theirs, "weights written by the closure of step 1")


def _layouts() -> list[Parameter]:
    return [
        Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
        Parameter(torch.randn(10, 5, 2)[..., 0]),
        Parameter(torch.randn(6, 4).t()),
        Parameter(torch.randn(3, 3).expand(3, 3).double()),
        Parameter(torch.randn(())),
        Parameter(torch.randn(0, 3)),
        Parameter(torch.randn(7).bfloat16()),
    ]


@contract
def state_has_the_form_of_its_parameter_from_step_1(make: Make) -> None:
    params = _layouts()
    optimizer = make(params, **HYPERPARAMETERS)
    train(optimizer, params, [0])
    keys = [set(optimizer.state[p]) for p in params]
    train(optimizer, params, range(1, 2 * EVERY + 1))
    assert keys == [set(optimizer.state[p]) for p in params], "keys made after step 1"
    for p in params:
        for key, value in optimizer.state[p].items():
            assert isinstance(value, Tensor), f"who prunes a parameter asks {key} for its shape"
            if key in NUMBERS:
                assert value.shape == () and value.is_cpu, f"to read {key} waits for the device"
            elif key != "step":
                theirs = value.shape, value.dtype, value.device, value.layout, value.requires_grad
                assert theirs == (p.shape, p.dtype, p.device, p.layout, False), key
                assert value.stride() == torch.empty_like(p).stride(), key


@contract
def state_and_weights_are_written_in_place(make: Make) -> None:
    params = parameters()
    optimizer = make(params, **HYPERPARAMETERS)
    train(optimizer, params, [0])

    def addresses() -> list[tuple[int, int]]:
        tensors = [*params, *(v for p in params for v in optimizer.state[p].values() if isinstance(v, Tensor))]
        return [(id(t), t.data_ptr()) for t in tensors]

    before = addresses()
    train(optimizer, params, range(1, 3 * EVERY))
    assert addresses() == before


@contract
def layouts_and_complex_numbers_do_not_change_the_result(make: Make) -> None:
    torch.manual_seed(0)
    odd = [p for p in _layouts() if p.dtype == torch.float32] + [Parameter(torch.randn(3, 2, dtype=torch.complex64))]
    plain = [Parameter((torch.view_as_real(p) if p.is_complex() else p).detach().contiguous().clone()) for p in odd]
    for foreach in False, True:
        train(make(odd, foreach=foreach, **HYPERPARAMETERS), odd, range(3 * EVERY))
        train(make(plain, foreach=foreach, **HYPERPARAMETERS), plain, range(3 * EVERY))
        real = [torch.view_as_real(p) if p.is_complex() else p for p in odd]
        assert_same(real, plain, "odd layouts")


# --- 5: checkpoints --------------------------------------------------------------------------------------------------


@contract
def resume_is_bit_exact_at_every_offset(make: Make) -> None:
    total = 4 * EVERY
    for flags in {}, {"fused": True}, {"amsgrad": True, "foreach": True}:
        whole = parameters()
        train(make(whole, **flags, **HYPERPARAMETERS), whole, range(total))
        for offset in range(2 * EVERY + 1):
            first = parameters()
            optimizer = make(first, **flags, **HYPERPARAMETERS)
            train(optimizer, first, range(offset))
            weights, state = through_a_file(([p.detach() for p in first], optimizer.state_dict()))
            second = clones(weights)
            resumed = make(second, **flags, **HYPERPARAMETERS)
            resumed.load_state_dict(state)
            train(resumed, second, range(offset, total))
            assert_same(second, whole, f"resumed after step {offset} with {flags}")


@contract
def going_back_to_a_checkpoint_forgets_what_came_after(make: Make) -> None:
    whole, params = parameters(), parameters()
    train(make(whole, **HYPERPARAMETERS), whole, range(4 * EVERY))
    optimizer = make(params, **HYPERPARAMETERS)
    train(optimizer, params, range(EVERY + 1))
    weights, state = clones(params), copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, range(EVERY + 1, 2 * EVERY))
    with torch.no_grad():
        for p, w in zip(params, weights):
            p.copy_(w)
    optimizer.load_state_dict(state)
    train(optimizer, params, range(EVERY + 1, 4 * EVERY))
    assert_same(params, whole, "loaded into the optimizer that had gone on")


@contract
def a_cleared_state_starts_anew(make: Make) -> None:
    """What restarts of the optimizer do (ReLoRA, curricula): empty `state` and go on with the same object."""
    ours = parameters()
    optimizer = make(ours, **HYPERPARAMETERS)
    train(optimizer, ours, range(EVERY + 1))
    theirs = clones(ours)
    optimizer.state.clear()
    train(optimizer, ours, range(3 * EVERY))
    train(make(theirs, **HYPERPARAMETERS), theirs, range(3 * EVERY))
    assert_same(ours, theirs, "after state.clear()")


@contract
def hyperparameters_come_from_the_checkpoint(make: Make) -> None:
    whole, first = parameters(), parameters()
    train(make(whole, **HYPERPARAMETERS), whole, range(4 * EVERY))
    optimizer = make(first, **HYPERPARAMETERS)
    train(optimizer, first, range(EVERY + 1))
    second = clones(first)
    resumed = make(second, extra_every=7, extra_steps=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, second, range(EVERY + 1, 4 * EVERY))
    assert_same(second, whole, "resumed with other hyperparameters in the constructor")


@contract
def a_checkpoint_of_adamw_starts_a_new_cycle(make: Make) -> None:
    for steps in 2, EVERY, EVERY + 1:
        theirs = parameters()
        adamw = AdamW(theirs, lr=HYPERPARAMETERS["lr"])
        train(adamw, theirs, range(steps))
        ours = parameters()
        optimizer = make(ours, **HYPERPARAMETERS)
        with torch.no_grad():
            for p, q in zip(ours, theirs):
                p.copy_(q)
        optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
        anchors = [p.detach().clone() for p in theirs]
        for step in range(steps, steps + EVERY - 1):
            train(adamw, theirs, [step])
            train(optimizer, ours, [step])
            assert_same(ours, theirs, f"before the first cycle ends, {steps} steps of AdamW loaded")
        train(adamw, theirs, [steps + EVERY - 1])
        train(optimizer, ours, [steps + EVERY - 1])
        nothing, none = [torch.zeros_like(a) for a in anchors], [[] for _ in anchors]
        after, *_ = next_cycle(optimizer, [p.detach() for p in theirs], anchors, nothing, none)
        for p, w in zip(ours, after):
            torch.testing.assert_close(p.detach().double(), w, rtol=1e-6, atol=1e-6)


NOISE = {"extra_noise_cov", "extra_noise_var"}
LOSSES: list[set[str]] = [
    {"extra_anchor"},
    {"extra_origin"},
    {"extra_estimate"},
    {"extra_anchor", "extra_estimate"},
    NOISE,
    {"extra_anchor", "extra_origin", "extra_estimate", *NOISE},
]


@contract
def a_checkpoint_without_some_keys_still_loads(make: Make) -> None:
    """Converters (DeepSpeed's universal checkpoint) keep the keys of Adam and may lose any other."""
    for lost in LOSSES:
        params = parameters()
        optimizer = make(params, **HYPERPARAMETERS)
        train(optimizer, params, range(EVERY + 1))
        state = copy.deepcopy(optimizer.state_dict())
        for entry in state["state"].values():
            for key in lost:
                entry.pop(key, None)
        ours, theirs = clones(params), clones(params)
        resumed, adamw = make(ours, **HYPERPARAMETERS), AdamW(theirs)
        resumed.load_state_dict(state)
        adamw.load_state_dict(copy.deepcopy(state))
        if lost <= {"extra_estimate", *NOISE}:
            train(resumed, ours, range(EVERY + 1, 3 * EVERY))
            continue
        for step in range(EVERY + 1, 2 * EVERY):
            train(resumed, ours, [step])
            train(adamw, theirs, [step])
            assert_same(ours, theirs, f"less than a cycle after a load without {lost}")


@contract
def adamw_loads_its_checkpoint(make: Make) -> None:
    """Going back is possible at any time: AdamW ignores what it does not know."""
    ours = parameters()
    optimizer = make(ours, **HYPERPARAMETERS)
    train(optimizer, ours, range(EVERY + 1))
    theirs = clones(ours)
    adamw = AdamW(theirs)
    adamw.load_state_dict(through_a_file(optimizer.state_dict()))
    train(adamw, theirs, range(EVERY + 1, EVERY + 2))
    train(optimizer, ours, range(EVERY + 1, EVERY + 2))
    assert_same(ours, theirs, "a step in mid-cycle")


@contract
def optimizers_that_loaded_one_state_dict_do_not_share_anchors(make: Make) -> None:
    """torch's own load keeps the tensors of the dict that it is given. An anchor written by two optimizers is wrong in
    both, so it must be copied; AdamW's own entries stay as torch has them."""
    ours = parameters()
    optimizer = make(ours, **HYPERPARAMETERS)
    train(optimizer, ours, range(EVERY + 1))
    theirs = clones(ours)
    second = make(theirs, **HYPERPARAMETERS)
    second.load_state_dict(optimizer.state_dict())

    def extra(o: Optimizer, params: list[Parameter]) -> list[tuple[str, Tensor]]:
        return [(k, v) for p in params for k, v in o.state[p].items() if k.startswith("extra_") and torch.is_tensor(v)]

    before = [v.clone() for _, v in extra(second, theirs)]
    train(optimizer, ours, range(EVERY + 1, 3 * EVERY))
    assert_same(
        [v for _, v in extra(second, theirs)], before, "anchors and estimates of the optimizer that stood still"
    )


@contract
def copies_go_on_in_lockstep(make: Make) -> None:
    for flags in {}, {"fused": True}:
        for offset in 0, 1, EVERY, EVERY + 1:
            params = parameters()
            optimizer = make(params, **flags, **HYPERPARAMETERS)
            train(optimizer, params, range(offset))
            duplicates = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
            train(optimizer, params, range(offset, 4 * EVERY))
            for params_c, optimizer_c in duplicates:
                train(optimizer_c, params_c, range(offset, 4 * EVERY))
                assert_same(params_c, params, f"copied after step {offset} with {flags}")


@contract
def copies_keep_the_fused_scaler_path(make: Make) -> None:
    params = parameters()
    optimizer = make(params, fused=True, **HYPERPARAMETERS)
    for other in copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)):
        assert getattr(other, "_step_supports_amp_scaling", False)


# --- 6: one step, one pair of hooks, the jump inside -----------------------------------------------------------------


@contract
def hooks_fire_once_and_in_order(make: Make) -> None:
    params = parameters()
    AdamW(parameters())  # an AdamW made in the same process gives the class's own step its hooks
    SGD(parameters(), 0.1)
    optimizer = make(params, **HYPERPARAMETERS)
    fired: list[int] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: fired.append(0)),
        optimizer.register_step_pre_hook(lambda *_: fired.append(1)),
        optimizer.register_step_post_hook(lambda *_: fired.append(2)),
        register_optimizer_step_post_hook(lambda *_: fired.append(5)),
    ]
    try:
        train(optimizer, params, range(2 * EVERY))
    finally:
        for handle in handles:
            handle.remove()
    assert fired == 2 * EVERY * [0, 1, 2, 5]


@contract
def post_hooks_see_the_weights_after_the_jump(make: Make) -> None:
    params = parameters()
    AdamW(parameters())
    optimizer = make(params, **HYPERPARAMETERS)
    seen: list[list[Tensor]] = []
    optimizer.register_step_post_hook(lambda *_: seen.append([p.detach().clone() for p in params]))
    for step in range(3 * EVERY):
        train(optimizer, params, [step])
        for weights in seen:
            assert_same(weights, params, f"in a post hook of step {step + 1}")
        assert seen, "no hook fired"
        seen.clear()


SCHEDULERS: list[Callable[[Optimizer], Any]] = [
    lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=4 * EVERY),
    lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ConstantLR(o)], milestones=[3]
    ),
    lambda o: lr_scheduler.CyclicLR(o, base_lr=0.001, max_lr=0.02, step_size_up=4),
]


@contract
def schedulers_wrap_the_step(make: Make) -> None:
    for scheduled in SCHEDULERS:
        ours, theirs = parameters(), parameters()
        optimizer, by_hand = make(ours, **HYPERPARAMETERS), make(theirs, **HYPERPARAMETERS)
        scheduler = scheduled(optimizer)
        for step in range(3 * EVERY):
            for key in "lr", "betas":
                by_hand.param_groups[0][key] = optimizer.param_groups[0][key]
            train(by_hand, theirs, [step])
            with no_warnings():  # they warn where the step they wrapped was not the one called
                train(optimizer, ours, [step])
                scheduler.step()
        assert_same(ours, theirs, type(scheduler).__name__)


# --- 7: the arithmetic -----------------------------------------------------------------------------------------------


def _check_the_rule(make: Make, dtype: torch.dtype, every: int) -> None:
    """Five cycles against the reference, from AdamW's own step. One tensor has no gradient in the first cycle, so no
    estimate in the second; one group stands still in the third."""
    params = parameters(dtype, SHAPES[:3])
    optimizer = make(
        [{"params": params[:1]}, {"params": params[1:]}],
        betas=(0.2, 0.9),  # little momentum and much noise: drifts that agree somewhat
        eps=1e-3,
        **{**HYPERPARAMETERS, "extra_every": every},
    )
    anchors, gates, taken = clones(params), set[float](), [list[float]() for _ in params]
    for step in range(5 * every):
        cycle = step // every
        plain = clones(params)
        optimizer.param_groups[1]["lr"] = 0.0 if cycle == 2 else 0.03
        adamw = AdamW([{"params": plain[:1]}, {"params": plain[1:]}])
        adamw.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        estimates = [optimizer.state[p].get("extra_estimate", torch.zeros_like(p)).clone() for p in params]
        for o, own in (adamw, plain), (optimizer, params):
            give_gradients(own, step, noise=2.0)
            if cycle == 0:
                own[2].grad = None
            o.step()
        if (step + 1) % every:
            assert_same(params, plain, f"{dtype}: step {step + 1} ends no cycle")
            continue
        here = [i for i in range(len(params)) if cycle or i != 2]
        before = ([ts[i] for i in here] for ts in (plain, anchors, estimates, taken))
        ends = [next_cycle(optimizer, [e], [a], [v], [w], every) for e, a, v, w in zip(*before, strict=True)]
        after, estimates, opened = ([t for end in ends for t in end[i]] for i in range(3))
        unit = torch.float64 if dtype == torch.float64 else torch.float32
        for i, w, nv, g in zip(here, after, estimates, opened, strict=True):
            p, e, a, v = params[i], plain[i], anchors[i], estimates[i]
            ratio, terms, stored = g * STEPS / every, e.double().abs() + a.double().abs() + v.abs(), 0.0
            estimate = optimizer.state[p].get("extra_estimate")
            if estimate is not None:
                error = (estimate.double() - nv).abs()
                allowed = 0.5 * spacing(nv, dtype) + 4 * spacing(terms, unit)
                assert bool((error <= allowed).all()), f"{dtype}: an estimate {error.max()} off at step {step + 1}"
                # what is jumped from, and by, is stored first
                stored = 0.5 * spacing(w - ratio * nv, dtype)
                w = w + ratio * (estimate.double() - nv)
            # half a spacing of the result where it is stored, and a few of the unit that it is computed in
            allowed = 0.5 * spacing(w, dtype) + 4 * spacing(w.abs() + (1 + ratio) * terms, unit) + stored
            error = (p.double() - w).abs()
            assert bool((error <= allowed).all()), f"{dtype}: {error.max()} off at step {step + 1}"
        anchors = clones(params)
        gates.update(opened)
    if hyperparameter(optimizer, "extra_gate", None) is not None:
        assert any(0 < gate < 1 for gate in gates), f"{dtype}: gates that are open or shut do not tell rules apart"
    assert any(gates), f"{dtype}: no jump"


@contract
@torch.no_grad()
def weights_follow_the_rule_within_one_rounding(make: Make) -> None:
    for dtype in torch.float32, torch.float64, torch.bfloat16, torch.float16:
        for every in EVERY, 1:
            _check_the_rule(make, dtype, every)


@contract
def a_jump_that_could_overflow_is_refused(make: Make) -> None:
    for dtype, near_the_end in (torch.float16, 5e4), (torch.bfloat16, 3e38), (torch.float32, 3e38):
        params = [Parameter(torch.full((4,), near_the_end, dtype=dtype)), *parameters(dtype, [(4,)])]
        optimizer = make(
            params, **{**HYPERPARAMETERS, "extra_steps": 1000, "lr": near_the_end / 100, "weight_decay": 0.0}
        )
        warned = False
        for _ in range(3 * EVERY):
            for p in params:
                p.grad = -torch.ones_like(p)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            warned |= any(issubclass(w.category, RuntimeWarning) for w in caught)
        assert all(bool(p.isfinite().all()) for p in params), f"{dtype}: {params}"
        assert warned, f"{dtype}: refused without a word"


@contract
def nan_in_one_tensor_leaves_the_others_alone(make: Make) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, without = make(ours, **HYPERPARAMETERS), make([theirs[0], *theirs[2:]], **HYPERPARAMETERS)
    warned: list[int] = []
    for step in range(4 * EVERY):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        if step == EVERY + 1:
            ours[1].grad[0] = torch.nan
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        if any(issubclass(w.category, RuntimeWarning) for w in caught):
            warned.append(step + 1)
        without.step()
        assert_same([ours[0], *ours[2:]], [theirs[0], *theirs[2:]], f"the other tensors after step {step + 1}")
    assert warned and min(warned) == 2 * EVERY, warned
    assert bool(ours[1][1:].isfinite().all()), "elements that AdamW left finite"


@contract
def weights_repaired_after_a_refusal_are_no_drift(make: Make) -> None:
    params = parameters()
    optimizer = make(params, **HYPERPARAMETERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        train(optimizer, params, range(2 * EVERY - 1))
        with torch.no_grad():
            params[0].fill_(torch.nan)
        train(optimizer, params, [2 * EVERY - 1])
        with torch.no_grad():
            params[0].fill_(100.0)
        train(optimizer, params, range(2 * EVERY, 5 * EVERY))
    # AdamW moves a weight by at most about lr a step, and each jump goes on for extra_steps of them
    reach = 2 * HYPERPARAMETERS["lr"] * 3 * (EVERY + STEPS)
    assert float((params[0].detach() - 100).abs().max()) < reach
