"""States that released versions wrote are read by this one, and training goes on from them as it did then.

The files in `golden/` are never remade, only added: `golden/make.py VERSION` writes those of a new version. A test that
fails here says that a user's checkpoint would be lost.

The rule of 0.1.0 is another one but for the paper's setting: its gated runs go on, by the rule as it is now, from the
same weights in the same phases, with their estimates made free of the bias that they had then.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from torch import Tensor

from extraopt import ExtraAdam, __version__
from extraopt.gate import plain_noise
from extraopt.hyperparameters import DEFAULTS
from extraopt.trust import UNWATCHED
from extraopt.wrap import Extra

FOLDER = Path(__file__).parent / "golden"
FILES = sorted(FOLDER.glob("*.pt"))
FIRST = [file for file in FILES if file.name.startswith("0.1.0-")]  # of the rule before
LATER = [file for file in FILES if file not in FIRST]
spec = importlib.util.spec_from_file_location("make_golden", FOLDER / "make.py")
assert spec is not None and spec.loader is not None
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

each_first = pytest.mark.parametrize("file", FIRST, ids=lambda file: file.stem)
# files of later versions, and what this one would write
each_later = pytest.mark.parametrize("source", [*LATER, *make.CASES], ids=lambda s: getattr(s, "stem", "-".join(s)))


def load(source: Path | tuple[str, ...]) -> dict[str, Any]:
    saved: dict[str, Any] = (
        torch.load(source, weights_only=True) if isinstance(source, Path) else copy.deepcopy(make.golden(*source))
    )
    return saved


def resume(saved: dict[str, Any], **given: Any) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """An optimizer that knows nothing but which parameters are in which group, and what is asked of it here."""
    params = [w.clone() for w in saved["weights"]]
    groups = [{"params": [params[i] for i in group["params"]]} for group in saved["state_dict"]["param_groups"]]
    given = {"extra_watch": False, **given}
    kinds = {
        "ExtraAdam": lambda groups: ExtraAdam(groups, **given),
        "Extra-SGD": lambda groups: Extra(torch.optim.SGD(groups, momentum=0.5), **given),
    }
    optimizer = kinds[saved["optimizer"]](groups)
    optimizer.load_state_dict(saved["state_dict"])
    return params, optimizer


def go_on(saved: dict[str, Any], params: list[Tensor], optimizer: Any, exact: list[int]) -> list[int]:
    """Train on as the file says, where `exact` parameters must be what they were then; in which steps cycles ended."""
    same_torch = saved["torch"] == torch.__version__
    ends = []
    for step in range(len(saved["gradients"][0])):
        before = optimizer.last_jump
        for p, g in zip(params, saved["gradients"]):
            p.grad = g[step].clone()
        optimizer.step()
        ends += [step + 1] if optimizer.last_jump is not before else []
        for i in exact:
            p, expected = params[i], saved["expected"][i]
            # another torch may sum in another order, and AdamW's square root rounds as the kind of CPU does
            wide = p.dtype.itemsize > 2
            rtol, atol = (5e-7 if same_torch else 1e-5, 1e-6) if wide else (0.005 if same_torch else 0.02, 1e-3)
            tolerance = {"rtol": rtol, "atol": atol / 10 if same_torch else atol}
            torch.testing.assert_close(p, expected[step], **tolerance, msg=f"step {step + 1}, parameter {i}")
        assert all(bool(p.isfinite().all()) for p in params)
    return ends


def applied(entries: dict[str, Any]) -> int:
    return int(entries["extra_step"] if "extra_step" in entries else entries["step"])


def in_tensors(entries: dict[str, Any]) -> dict[str, Any]:
    """Numbers as states have them by now; some of 0.1.0 are plain."""
    return {k: torch.tensor(v, dtype=torch.float64) if type(v) in (int, float) else v for k, v in entries.items()}


def phases(saved: dict[str, Any]) -> list[int]:
    """In which of the next steps cycles end."""
    ends = set()
    for group in saved["state_dict"]["param_groups"]:
        for i in group["params"]:
            entries = saved["state_dict"]["state"][i]
            begun = applied(entries) - entries["extra_origin"]
            ends |= {n for n in range(1, make.STEPS + 1) if (begun + n) % group["extra_every"] == 0}
    return sorted(ends)


def is_papers(group: dict[str, Any]) -> bool:
    return group["extra_beta"] == 0 and group["extra_gate"] is None


@each_first
def test_a_checkpoint_of_0_1_0_goes_on_in_its_phases_and_by_the_papers_rule(file: Path) -> None:
    saved = load(file)
    exact = [i for group in saved["state_dict"]["param_groups"] if is_papers(group) for i in group["params"]]
    assert bool(exact) == ("-paper-" in file.name)
    params, optimizer = resume(saved)
    ends = go_on(saved, params, optimizer, exact)
    assert ends == phases(saved) and len(ends) >= 6  # four cycles of three, three cycles of four, some at once
    assert optimizer.last_jump.refused == 0  # type: ignore[attr-defined]


@each_first
def test_the_estimates_of_0_1_0_lose_their_bias_and_nothing_else_of_its_state_changes(file: Path) -> None:
    saved = load(file)
    before = copy.deepcopy(saved["state_dict"])
    _, optimizer = resume(saved)
    assert_same(saved["state_dict"], before)  # what is loaded is not written
    ours = optimizer.state_dict()
    debiased = 0
    for group in before["param_groups"]:
        every, beta = group["extra_every"], group["extra_beta"]
        beta = 1 - every / group["extra_steps"] if beta is None else beta  # as it was then
        for i in group["params"]:
            theirs, mine = before["state"][i], ours["state"][i]
            drift, _ = theirs.pop("extra_drift", None), theirs.pop("extra_ratio", None)
            if drift is not None:
                seen = (applied(theirs) - theirs["extra_origin"]) // every
                assert seen > 0
                cov, var = plain_noise(every, beta, 0.9, seen)
                noise = {"extra_noise_cov": float(cov), "extra_noise_var": float(var)}
                theirs |= {"extra_estimate": drift / (1 - beta**seen), **noise}
                assert 0 < noise["extra_noise_cov"] and 0 < noise["extra_noise_var"] <= 1
                debiased += beta > 0 and bool(drift.any())
            assert_same(mine, in_tensors(theirs))
    assert debiased >= (4 if "-gated-" in file.name else 2)


@each_first
def test_groups_of_0_1_0_keep_their_hyperparameters_and_take_the_new_ones_from_here(file: Path) -> None:
    saved = load(file)
    _, optimizer = resume(saved, extra_fall=0.1, extra_kl=0.5, extra_beta=0.7)
    for group, theirs in zip(optimizer.param_groups, saved["state_dict"]["param_groups"]):
        kept = {key: v for key, v in theirs.items() if key not in ("params", "extra_scale", "extra_reports")}
        if kept["extra_beta"] is None:
            kept["extra_beta"] = 0.7  # it followed from k and N
        assert_same({key: group[key] for key in kept}, kept)
        assert group["extra_kl"] == (None if is_papers(theirs) else 0.5)
        assert (group["extra_fall"], group["extra_watch"], group["extra_offload"]) == (0.1, False, False)
        assert group["extra_length"] == UNWATCHED
        assert {key for key in group if key.startswith("extra_")} == {*DEFAULTS, "extra_length"}


@each_later
def test_a_checkpoint_of_this_rule_continues_as_it_did_then(source: Path | tuple[str, ...]) -> None:
    saved = load(source)
    params, optimizer = resume(saved)
    assert go_on(saved, params, optimizer, list(range(len(params)))) == phases(saved)


@each_first
@pytest.mark.parametrize("beta", [1, 1.0, 2.0, -0.1, float("nan"), float("inf"), "0.9", True, [0.9]], ids=repr)
def test_a_state_of_0_1_0_with_a_beta_out_of_range_is_refused_by_name(file: Path, beta: Any) -> None:
    saved = load(file)
    params, optimizer = resume(saved)
    before = copy.deepcopy(optimizer.state_dict())
    for group in saved["state_dict"]["param_groups"]:
        group["extra_beta"] = beta
    with pytest.raises(ValueError, match=r"Invalid extra_beta: .* in \[0, 1\)"):
        optimizer.load_state_dict(saved["state_dict"])
    assert_same(optimizer.state_dict(), before)


@each_later
def test_a_checkpoint_of_this_rule_keeps_all_entries_and_hyperparameters(source: Path | tuple[str, ...]) -> None:
    saved = load(source)
    _, optimizer = resume(saved)
    ours = optimizer.state_dict()
    assert_same(ours["state"], {i: in_tensors(theirs) for i, theirs in saved["state_dict"]["state"].items()})
    for group, theirs in zip(ours["param_groups"], saved["state_dict"]["param_groups"]):
        kept = {key: v for key, v in theirs.items() if key != "extra_watch"}  # for this machine to say
        assert_same({key: group[key] for key in kept}, kept)


def test_golden_files_hold_jumps_and_retreats() -> None:
    """Else a resume that lost anchors and estimates would go unnoticed."""
    ours = [file for file in FILES if "ExtraAdam-gated-fp32" in file.name]
    assert ours and all(file.stat().st_size < 20_000 for file in FILES)
    for source in [*ours, *(case for case in make.CASES if case[:3] == ("ExtraAdam", "gated", "fp32"))]:
        saved = load(source)
        full, part = 0, 0
        params, optimizer = resume(saved)
        for step in range(len(saved["gradients"][0])):
            for p, g in zip(params, saved["gradients"]):
                p.grad = g[step].clone()
            optimizer.step()
            full += optimizer.last_jump is not None and optimizer.last_jump.jumped > 0
            part += optimizer.last_jump is not None and optimizer.last_jump.gate < 1
        assert full > 0 and part > 0, source


def test_each_version_has_golden_files() -> None:
    assert [file for file in FILES if file.name.startswith(f"{__version__}-")], f"python {FOLDER}/make.py {__version__}"


def test_golden_files_are_never_overwritten_or_filed_under_another_version() -> None:
    before = {file: file.stat().st_mtime_ns for file in FILES}
    for version in (__version__, "0.0.0"):
        command = [sys.executable, str(FOLDER / "make.py"), version]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 1 and ("never remade" in result.stderr or "not 0.0.0" in result.stderr)
    assert {file: file.stat().st_mtime_ns for file in sorted(FOLDER.glob("*.pt"))} == before
