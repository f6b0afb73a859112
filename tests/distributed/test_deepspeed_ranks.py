"""DeepSpeed's ZeRO on two real ranks. Each test is named after the symptom that a failure would show."""

from __future__ import annotations

import copy
import datetime
import os
import socket
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import RULES, K, assert_same, batch_loss, rule_name, tiny_model

from extraopt import ExtraAdam
from extraopt.trust import UNWATCHED

WORLD = 2
SAVED, LAST, LATER = 8, 16, 18  # steps; the save lies two steps into a cycle
RULE = {rule_name(rule): rule for rule in RULES}
ESTIMATE = {"extra_estimate", "extra_noise_cov", "extra_noise_var"}
CASES = [f"{stage}-{rule}" for stage in (1, 2, 3) for rule in RULE]
MOMENTS = "exp_avg", "exp_avg_sq"
Weights = list[torch.Tensor]
Seen = dict[str, dict[str, Any]]  # by case


def own_half(model: Any, i: int) -> torch.Tensor:
    return batch_loss(model, WORLD * i + int(os.environ["RANK"]))


def both_halves(model: Any, i: int) -> torch.Tensor:
    return (batch_loss(model, WORLD * i) + batch_loss(model, WORLD * i + 1)) / WORLD


class Run:
    """An engine, its optimizer, and the steps in which that ended cycles."""

    def __init__(
        self, case: str, seed: int = 0, lr: float = 0.01, rule: dict[str, Any] | None = None, **config: Any
    ) -> None:
        import deepspeed

        model = tiny_model(seed)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        self.optimizer = ExtraAdam(groups, lr=lr, **(rule or RULE[case[2:]]))
        # fp32 throughout: bf16 weights would hide a small error behind their rounding. DeepSpeed clips unless told.
        zero = {"stage": int(case[0]), "sub_group_size": 10, "stage3_param_persistence_threshold": 0}
        config |= {"train_micro_batch_size_per_gpu": 16, "gradient_clipping": 0.0, "zero_optimization": zero}
        config["zero_allow_untested_optimizer"] = True
        self.engine = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)[0]
        self.ends: dict[int, list[list[int]]] = {}
        self.lengths = set[float]()
        self.now, self.last = 0, None
        self.optimizer.register_step_post_hook(self.watch)  # ZeRO calls step() for each group or sub-group

    def watch(self, *_: Any) -> None:
        if self.optimizer.last_jump is not self.last:
            self.last = self.optimizer.last_jump
            self.ends.setdefault(self.now, []).append([self.last.step, self.last.jumped])
            self.lengths.add(self.last.length)

    def train(self, first: int, last: int, loss: Callable[[Any, int], torch.Tensor]) -> list[Weights]:
        path = []
        for self.now in range(first, last + 1):
            self.engine.backward(loss(self.engine, self.now))
            self.engine.step()
            path.append(self.weights())
        return path

    def weights(self) -> Weights:
        import deepspeed

        params = list(self.engine.module.parameters())
        with deepspeed.zero.GatheredParameters(params):
            return [p.detach().clone() for p in params]

    def pieces(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        return [(p.detach().clone(), copy.deepcopy(state)) for p, state in self.optimizer.state.items()]


def on_two_ranks(case: str, folder: Path) -> dict[str, Any]:
    """Train, save in mid-cycle, train on; resume in a new engine, train that on as well."""
    run = Run(case)
    path = run.train(1, SAVED, own_half)
    run.engine.save_checkpoint(str(folder), tag="saved")
    saved = run.pieces()
    path += run.train(SAVED + 1, LAST, own_half)
    again = Run(case, seed=1, lr=0.5)
    again.engine.load_checkpoint(str(folder), tag="saved")
    again.train(SAVED + 1, LAST, own_half)
    resumed = {"resumed ends": again.ends, "resumed": again.pieces()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guarded = Run(case, rule={"extra_every": K, "extra_gate": None})  # with a trust region, as by default
        guarded.train(1, SAVED, own_half)
    said = [str(w.message) for w in caught if "extraopt" in str(w.message)]
    resumed |= {"said": said, "lengths": guarded.lengths}
    return {"path": path, "saved": saved, "ends": run.ends, "pieces": run.pieces(), **resumed}


def on_one_rank(case: str, folder: Path) -> dict[str, Any]:
    """Convert what the two ranks saved, go on from it in a new engine and in one that has trained something else."""
    from deepspeed.checkpoint import ds_to_universal

    args = {"input_folder": str(folder / "saved"), "output_folder": str(folder / "universal"), "strict": True}
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    ds_to_universal.main(Namespace(**args, **options, inject_missing_state=True))
    seen = {}
    for engine, steps in {"new": 0, "used": K + 1}.items():
        run = Run(case, seed=1, lr=0.5, checkpoint={"load_universal": True})
        run.train(1, steps, both_halves)
        run.ends.clear()
        # DeepSpeed writes weights and moments past load_state_dict: anchors in the state would stay, of other weights
        run.optimizer.state.clear()
        run.engine.load_checkpoint(str(folder), tag="universal")
        seen[engine] = {"loaded": run.weights(), "path": run.train(SAVED + 1, LATER, both_halves)}
        seen[engine] |= {"ends": run.ends, "pieces": run.pieces()}
    return seen


def main(work: str, folder: str) -> None:
    """All cases, into a file: in processes of their own, which DeepSpeed sets up for good."""
    import deepspeed.ops

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ extension that would be compiled now
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=60))
    seen = {case: globals()[work](case, Path(folder, case)) for case in CASES}
    torch.save(seen, Path(folder, f"{work}-{os.environ['RANK']}.pt"))


def processes(work: str, folder: Path, world: int) -> list[Seen]:
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", port]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [*torchrun, __file__, work, str(folder)]
    done = subprocess.run(command, env=env, cwd=folder, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{work}-{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Seen]:
    return processes("on_two_ranks", folder, WORLD)


@pytest.fixture(scope="module")
def one_rank(ranks: list[Seen], folder: Path) -> Seen:
    return processes("on_one_rank", folder, 1)[0]


def assert_like_one_process(path: list[Weights], case: str, model: torch.nn.Module, state: Any, first: int) -> None:
    optimizer = ExtraAdam(model.parameters(), lr=0.01, **RULE[case[2:]])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    # Gates are of pieces: there, till the first jump. The paper's rule knows no pieces, and all steps were found equal,
    # bit for bit. Where sums are rounded otherwise, 6e-8 may grow by the jump's 1 + N / k = 3 in each of 5 cycles, to
    # 1.5e-5; a jump that is missing, doubled or from another anchor shows as 1e-2.
    for i, weights in enumerate(path if case.endswith("paper") else path[: 2 * K - 1], first):
        optimizer.zero_grad()
        both_halves(model, i).backward()
        optimizer.step()
        torch.testing.assert_close([p.detach() for p in model.parameters()], weights, rtol=0, atol=1e-4)


def assert_ends(seen: dict[str, Any], first: int, last: int) -> None:
    steps = {end: [step for step, _ in jumps] for end, jumps in seen["ends"].items()}
    assert steps == {end: len(seen["pieces"]) * [end] for end in range(first, last + 1, K)}


@pytest.mark.parametrize("case", CASES)
def test_ranks_stay_together_and_end_cycles_in_the_same_steps(ranks: list[Seen], case: str):
    assert_same(*(seen[case]["path"] for seen in ranks))
    for seen in (seen[case] for seen in ranks):
        assert len(seen["pieces"]) == (3 if case[0] == "3" else 2)
        assert_ends(seen, K, LAST)
        jumped = [sum(n for _, n in jumps) for jumps in seen["ends"].values()]
        assert bool(jumped[0]) == case.endswith("paper") and all(jumped[1:])


@pytest.mark.parametrize("case", CASES)
def test_a_flat_copy_has_no_trust_region_and_one_warning_says_so(ranks: list[Seen], case: str):
    for seen in (seen[case] for seen in ranks):
        assert seen["lengths"] == {UNWATCHED} and len(seen["said"]) == 1
        assert "without a trust region" in seen["said"][0] and "DeepSpeed" in seen["said"][0]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_land_where_one_process_does(ranks: list[Seen], case: str):
    assert_like_one_process(ranks[0][case]["path"], case, tiny_model(), {}, 1)


@pytest.mark.parametrize("case", CASES)
def test_ranks_keep_their_cycle_on_resuming(ranks: list[Seen], case: str):
    for seen in (seen[case] for seen in ranks):
        entries = {"extra_anchor", "extra_origin"} | (ESTIMATE if "gated" in case else set())
        assert all(entries <= state.keys() for _, state in seen["resumed"])
        assert seen["resumed ends"] == {end: jumps for end, jumps in seen["ends"].items() if end > SAVED}
        assert_same(seen["resumed"], seen["pieces"])


@pytest.mark.parametrize("engine", ["new", "used"])
@pytest.mark.parametrize("case", CASES)
def test_a_universal_checkpoint_starts_a_new_cycle_at_the_load(one_rank, ranks, folder, case, engine):
    """ZeRO-3 loads one step counter for all sub-groups, which then counts once for each of them."""
    seen, model, state = one_rank[case][engine], tiny_model(), {}
    for i, (name, p) in enumerate(model.named_parameters()):
        files = [torch.load(folder / case / "universal" / "zero" / name / f"{key}.pt") for key in MOMENTS]
        moments = [(f["param"] if isinstance(f, dict) else f).view_as(p) for f in files]  # ZeRO-3's are bare
        state[i] = {"step": torch.tensor(float(SAVED)), **dict(zip(MOMENTS, moments))}  # AdamW's: a cycle begins here
        p.data.copy_(seen["loaded"][i])
    assert_same(seen["loaded"], ranks[0][case]["path"][SAVED - 1])
    for key in MOMENTS:  # as the ranks had them, in another order and without padding
        before = torch.cat([s[key] for rank in ranks for _, s in rank[case]["saved"]])
        after = torch.cat([s[key].flatten() for s in state.values()])
        assert_same(before[before != 0].sort()[0], after[after != 0].sort()[0])
    assert_like_one_process(seen["path"], case, model, state, SAVED + 1)
    assert_ends(seen, SAVED + K, LATER)


if __name__ == "__main__":
    main(*sys.argv[1:])
