"""Two real ranks over gloo: sharded, replicated and partitioned optimizers jump as one process would.

Functions called `rank_*` run on the ranks, the tests in the test process. Both ranks see the same batch: averaging two
equal gradients is exact, so whatever differs from a single process is ExtraAdam's doing.
"""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import WORLD, Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from extraopt import ExtraAdam

EVERY = 3
STEPS = 4 * EVERY
HYPERPARAMETERS: dict[str, Any] = {"lr": 0.01, "extra_every": EVERY, "extra_steps": 15, "extra_kl": None}
RULES: dict[str, dict[str, Any]] = {"gated": {"extra_gate": 0.9}, "paper": {"extra_beta": 0.0, "extra_gate": None}}


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Ranks]]:
    started: list[Ranks] = []
    yield started
    for ranks in started:
        ranks.close()


@pytest.fixture
def ranks(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The ranks of the test before, or new ones where it failed."""
    if not pool or not pool[-1].alive:
        pool.append(Ranks(str(tmp_path_factory.mktemp("ranks") / "store")))
    return pool[-1]


def make_model() -> nn.Module:
    """Over two ranks its tensors are cut unevenly (7, 3 rows) or leave one rank nothing (1 row)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))


def backward(model: nn.Module, step: int) -> None:
    """Gradients of the batch of a step, noisy enough that a gate is neither shut nor fully open."""
    generator = torch.Generator().manual_seed(step)
    x, noise = torch.randn(8, 5, generator=generator), torch.randn(8, 1, generator=generator)
    model.zero_grad()
    (model(x) - x.sum(1, keepdim=True) - 3 - noise).square().mean().backward()


def train(model: nn.Module, optimizer: Optimizer, steps: range, poisoned_step: int | None = None) -> list[Any]:
    """Train; the reports of the cycles that ended. A gradient of row 0, which rank 0 has, is NaN at `poisoned_step`."""
    reports = []
    for step in steps:
        backward(model, step)
        if step == poisoned_step:
            grad = next(model.parameters()).grad
            if not isinstance(grad, DTensor):
                grad[0, 0] = torch.nan
            elif torch.distributed.get_rank() == 0:
                grad.to_local()[0, 0] = torch.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step()
        report = getattr(optimizer, "last_jump", None)
        if report is not None and (not reports or reports[-1] is not report):
            reports.append(report)
    return reports


def whole(tensors: Any) -> list[Tensor]:
    return [(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for t in tensors]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def shard(model: nn.Module, layout: str) -> nn.Module:
    if layout == "shard":
        return fully_shard(model)
    if layout == "replicate":  # HSDP: every rank has the whole of each tensor, on a mesh with a sharded dimension of 1
        return fully_shard(model, mesh=init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard")))
    fully_shard(model[0])  # "part": the other layers stay plain tensors
    return model


def rank_fsdp(
    rank: int, layout: str, hyperparameters: dict[str, Any], poisoned_step: int | None
) -> list[tuple[Any, ...]]:
    model = shard(make_model(), layout)
    optimizer = ExtraAdam(model.parameters(), **hyperparameters)
    reports = train(model, optimizer, range(STEPS), poisoned_step)
    for p in model.parameters():
        for key in {"extra_anchor", "extra_estimate"} & optimizer.state[p].keys():
            state = optimizer.state[p][key]
            assert type(state) is type(p.data) and state.shape == p.shape, key
    single = make_model()
    expected = train(single, ExtraAdam(single.parameters(), **hyperparameters), range(STEPS), poisoned_step)
    assert_same(whole(model.parameters()), whole(single.parameters()))
    for report, one in zip(reports, expected, strict=True):
        assert (report.step, report.jumped, report.refused) == (one.step, one.jumped, one.refused)
        for name in "gate", "coherence", "drift_norm", "weight_norm":
            assert getattr(report, name) == pytest.approx(getattr(one, name), rel=1e-5, abs=1e-6), name
    return [(r.step, r.gate, r.coherence, r.jumped, r.refused) for r in reports]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", ["shard", "replicate", "part"])
def test_fsdp_jumps_like_one_process(ranks: Ranks, layout: str, rule: str) -> None:
    first, second = ranks.run(rank_fsdp, layout, {**HYPERPARAMETERS, **RULES[rule]}, None)
    assert first == second, "ranks decided differently"
    assert len(first) == STEPS // EVERY and first[-1][3] > 0
    if rule == "gated":
        assert any(0 < gate < 1 for _, gate, *_ in first), "a gate that is open or shut does not tell the ranks apart"


def test_fsdp_refuses_a_tensor_on_all_ranks_where_one_shard_is_nan(ranks: Ranks) -> None:
    first, second = ranks.run(rank_fsdp, "shard", {**HYPERPARAMETERS, **RULES["gated"]}, EVERY)
    assert first == second, "ranks decided differently"
    assert [refused > 0 for *_, refused in first] == [False, True, True, True]


def rank_dcp(rank: int, folder: str, options: dict[str, Any], hyperparameters: dict[str, Any]) -> None:
    options = dcp_state_dict.StateDictOptions(**options)

    def make(saved: bool) -> tuple[nn.Module, Optimizer]:
        model = fully_shard(make_model())
        if not saved:
            for p in model.parameters():
                nn.init.constant_(p, 0.5)
        return model, ExtraAdam(model.parameters(), **(hyperparameters if saved else {**hyperparameters, "lr": 0.5}))

    model, optimizer = make(saved=True)
    train(model, optimizer, range(EVERY + 1))
    weights, state = dcp_state_dict.get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(model, optimizer, range(EVERY + 1, STEPS))

    resumed, second = make(saved=False)
    weights, state = dcp_state_dict.get_state_dict(resumed, second, options=options)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    dcp_state_dict.set_state_dict(
        resumed, second, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
    )
    train(resumed, second, range(EVERY + 1, STEPS))
    assert_same(whole(resumed.parameters()), whole(model.parameters()))


@pytest.mark.parametrize(
    "options",
    [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}],
    ids=["sharded", "flat", "full"],
)
def test_dcp_resumes_bit_for_bit(ranks: Ranks, tmp_path: Path, options: dict[str, Any]) -> None:
    ranks.run(rank_dcp, str(tmp_path / "checkpoint"), options, {**HYPERPARAMETERS, **RULES["gated"]})


def rank_dcp_from_adamw(rank: int, folder: str) -> None:
    model = fully_shard(make_model())
    adamw = AdamW(model.parameters(), lr=HYPERPARAMETERS["lr"])
    train(model, adamw, range(EVERY + 1))
    weights, state = dcp_state_dict.get_state_dict(model, adamw)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)

    resumed = fully_shard(make_model())
    optimizer = ExtraAdam(resumed.parameters(), **HYPERPARAMETERS, **RULES["paper"])
    template = AdamW(resumed.parameters(), lr=HYPERPARAMETERS["lr"])  # DCP reads what the template has
    weights, state = dcp_state_dict.get_state_dict(resumed, template)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    dcp_state_dict.set_state_dict(
        resumed, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    train(model, adamw, range(EVERY + 1, 2 * EVERY))
    train(resumed, optimizer, range(EVERY + 1, 2 * EVERY))
    assert_same(whole(resumed.parameters()), whole(model.parameters()))  # no jump less than k steps after the load
    anchors = whole(optimizer.state[p]["extra_anchor"] for p in resumed.parameters())
    train(model, adamw, range(2 * EVERY, 2 * EVERY + 1))
    train(resumed, optimizer, range(2 * EVERY, 2 * EVERY + 1))
    for p, e, a in zip(whole(resumed.parameters()), whole(model.parameters()), anchors):
        torch.testing.assert_close(p, e + HYPERPARAMETERS["extra_steps"] / EVERY * (e - a), rtol=1e-5, atol=1e-6)


def test_dcp_checkpoint_of_adamw_starts_a_new_cycle(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(rank_dcp_from_adamw, str(tmp_path / "checkpoint"))


def rank_ddp(rank: int, hyperparameters: dict[str, Any]) -> list[tuple[Any, ...]]:
    model = DistributedDataParallel(make_model())
    reports = train(model, ExtraAdam(model.parameters(), **hyperparameters), range(STEPS))
    single = make_model()
    expected = train(single, ExtraAdam(single.parameters(), **hyperparameters), range(STEPS))
    assert_same(whole(model.parameters()), whole(single.parameters()))
    assert reports == expected
    return [(r.step, r.gate, r.coherence, r.jumped) for r in reports]


@pytest.mark.parametrize("rule", RULES)
def test_ddp_jumps_like_one_process(ranks: Ranks, rule: str) -> None:
    first, second = ranks.run(rank_ddp, {**HYPERPARAMETERS, **RULES[rule]})
    assert first == second and first[-1][3] > 0


def rank_zero_redundancy(rank: int, hyperparameters: dict[str, Any]) -> float:
    def make(model: nn.Module) -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=ExtraAdam, **hyperparameters)

    model = make_model()
    optimizer = make(model)
    train(model, optimizer, range(EVERY + 1))
    optimizer.consolidate_state_dict(to=0)
    box = [copy.deepcopy(optimizer.state_dict()) if rank == 0 else None]
    torch.distributed.broadcast_object_list(box)
    resumed = copy.deepcopy(model)
    second = make(resumed)
    second.load_state_dict(box[0])
    train(model, optimizer, range(EVERY + 1, STEPS))
    train(resumed, second, range(EVERY + 1, STEPS))
    assert_same(whole(resumed.parameters()), whole(model.parameters()))

    single = make_model()
    train(single, ExtraAdam(single.parameters(), **hyperparameters), range(STEPS))
    assert_same(whole(model.parameters()), whole(single.parameters()))
    return optimizer.optim.last_jump.coherence


@pytest.mark.parametrize("rule", RULES)
def test_zero_redundancy_optimizer_resumes_and_jumps_like_one_process(ranks: Ranks, rule: str) -> None:
    """Each rank steps whole tensors of its own, and each tensor has a gate of its own."""
    first, second = ranks.run(rank_zero_redundancy, {**HYPERPARAMETERS, **RULES[rule]})
    if rule == "gated":
        assert first != second, "ranks that share a gate by chance prove nothing"


@pytest.mark.parametrize("every", [1, EVERY])
@pytest.mark.parametrize("rule", RULES)
def test_dcp_filling_a_fresh_state_moves_no_weight(rule: str, every: int) -> None:
    """DCP makes the state of an optimizer that has none by a step with gradients and learning rate of 0."""
    model = make_model()
    before = copy.deepcopy(model)
    optimizer = ExtraAdam(model.parameters(), **{**HYPERPARAMETERS, **RULES[rule], "extra_every": every})
    state = dcp_state_dict.get_optimizer_state_dict(model, optimizer)
    assert_same(whole(model.parameters()), whole(before.parameters()))
    anchors = [entry["extra_anchor"] for entry in state["state"].values()]
    assert_same(anchors, whole(before.parameters()))


@pytest.mark.parametrize("rule", RULES)
def test_weights_loaded_after_dcp_filled_a_fresh_state_are_no_drift(rule: str) -> None:
    """DCP's step is no step of training: the weights that the first real step starts from are the anchor."""
    ours, theirs = make_model(), make_model()
    optimizer = ExtraAdam(ours.parameters(), **HYPERPARAMETERS, **RULES[rule])
    dcp_state_dict.get_optimizer_state_dict(ours, optimizer)
    pretrained = {name: 5 + value for name, value in ours.state_dict().items()}
    ours.load_state_dict(pretrained)
    theirs.load_state_dict(pretrained)
    train(ours, optimizer, range(EVERY))
    train(theirs, AdamW(theirs.parameters(), lr=HYPERPARAMETERS["lr"]), range(EVERY))
    # AdamW moves a weight by at most about lr a step, and a jump goes on for extra_steps of them
    reach = 2 * HYPERPARAMETERS["lr"] * (EVERY + HYPERPARAMETERS["extra_steps"])
    jumps = [float((p - q).abs().max()) for p, q in zip(whole(ours.parameters()), whole(theirs.parameters()))]
    assert max(jumps) < reach
    drifts = [
        float(state["extra_estimate"].abs().max()) for state in optimizer.state.values() if "extra_estimate" in state
    ]
    assert max(drifts, default=0.0) < reach
