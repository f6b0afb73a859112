"""What others wrote and we read: replayed inputs of benchmarks/fuzz.py, what harm they did, and resource exhaustion."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'extraopt[hf]'")
pytest.importorskip("typer", reason="needs the command line: pip install 'extraopt[cli]'")

from extraopt import ExtraAdam
from extraopt.tools.checkpoints import CheckpointError, coefficients, find_checkpoints, open_checkpoint
from extraopt.tools.report import read_run, summarize
from extraopt.wrap import Extra

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "tests" / "tools" / "corpus"
INPUTS = sorted(file.relative_to(CORPUS).as_posix() for file in CORPUS.glob("*/*"))


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import fuzz

        return fuzz


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_does_what_none_may_do(fuzz: ModuleType, name: str, tmp_path: Path):
    fuzz.replay(name.partition("/")[0], (CORPUS / name).read_bytes(), tmp_path)


def test_a_target_has_no_corpus(fuzz: ModuleType):
    assert {name.partition("/")[0] for name in INPUTS} == set(fuzz.TARGETS)
    assert sum((CORPUS / name).stat().st_size for name in INPUTS) < 300_000


def test_the_replay_lets_an_undocumented_error_or_a_changed_optimizer_pass(fuzz: ModuleType, monkeypatch, tmp_path):
    broken = (CORPUS / "adam" / "finding-state").read_bytes()
    with monkeypatch.context() as patch:
        patch.delattr(ExtraAdam, "load_state_dict")  # torch's alone
        with pytest.raises(KeyError):
            fuzz.replay("adam", broken, tmp_path)

    def half(self: ExtraAdam, state: object) -> None:
        self.param_groups[0]["lr"] = 1.0
        raise ValueError

    monkeypatch.setattr(ExtraAdam, "load_state_dict", half)
    with pytest.raises(fuzz.Finding, match="changed the optimizer"):
        fuzz.replay("adam", broken, tmp_path)


# --- states ---


def trained(extra: bool, steps: int = 4) -> ExtraAdam | Extra:
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    options = {"extra_every": 3, "extra_steps": 6}
    optimizer = Extra(torch.optim.AdamW(weights), **options) if extra else ExtraAdam(weights, **options)
    for _ in range(steps):
        step(optimizer)
    return optimizer


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


NO_STATES = {
    "no state": lambda state: state.pop("state"),
    "no groups": lambda state: state.pop("param_groups"),
    "a number for groups": lambda state: state.update(param_groups=[1]),
    "a list for entries": lambda state: state["state"].update({0: [1]}),
    "an anchor that is a word": lambda state: state["state"][0].update(extra_anchor="abc"),
    "an origin after the last step": lambda state: state["state"][0].update(extra_origin=99),
    "an origin that is no integer": lambda state: state["state"][0].update(extra_origin=0.5),
    "a length that is not finite": lambda state: state["param_groups"][0].update(extra_length=float("nan")),
    "a hyperparameter without an end": lambda state: state["param_groups"][0].update(extra_every=10**400),
    "a gate without an end": lambda state: state["param_groups"][0].update(extra_gate=10**400),
}


@pytest.mark.parametrize("case", NO_STATES)
@pytest.mark.parametrize("extra", [False, True])
def test_a_state_that_is_none_is_another_error_or_half_loaded(extra: bool, case: str):
    state = copy.deepcopy(trained(extra).state_dict())
    NO_STATES[case](state)
    optimizer, twin = trained(extra, 2), trained(extra, 2)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)
    for _ in range(4):
        step(optimizer), step(twin)
    ours, theirs = ([p for group in o.param_groups for p in group["params"]] for o in (optimizer, twin))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("absent", ["extra_anchor", "extra_origin", "extra_estimate"])
@pytest.mark.parametrize("extra", [False, True])
def test_a_cycle_that_lacks_an_entry_breaks_jump(extra: bool, absent: str):
    state = copy.deepcopy(trained(extra).state_dict())
    for entries in state["state"].values():
        del entries[absent]
        entries["extra_ratio"] = 0.5
    optimizer = trained(extra, 2)
    optimizer.load_state_dict(state)
    optimizer.jump()
    optimizer.reset_anchor()
    for _ in range(3):
        step(optimizer)
    assert optimizer.last_jump is not None


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": 1.5}, {"beta1": float("nan")}])
def test_a_momentum_that_never_forgets_ends_in_a_division_by_zero(options: dict[str, float]):
    p = torch.nn.Parameter(torch.ones(3))
    group = {"params": [p], **options}
    optimizer = Extra(torch.optim.SGD([group], lr=1e-3), extra_every=3, extra_steps=6)
    for _ in range(9):
        step(optimizer)
    assert optimizer.last_jump is not None and p.isfinite().all()


# --- files ---


def test_links_that_lead_round_and_pipes_hang_or_crash(tmp_path: Path):
    (tmp_path / "checkpoint-1").symlink_to("checkpoint-1")
    (tmp_path / "checkpoint-2").mkdir()
    for name in "config.json", "model.safetensors", "trainer_state.json", "optimizer.pt":
        os.mkfifo(tmp_path / "checkpoint-2" / name)
    os.mkfifo(tmp_path / "log.jsonl")
    (tmp_path / "loop").symlink_to("loop")
    for path in tmp_path, tmp_path / "checkpoint-1", tmp_path / "loop":
        for read in find_checkpoints, open_checkpoint, read_run:
            if (read, path) != (find_checkpoints, tmp_path):  # finds the second by its name
                with pytest.raises(CheckpointError):
                    read(path)
    for read in open_checkpoint, read_run:
        with pytest.raises(CheckpointError):
            read(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError):
        read_run(tmp_path / "log.jsonl")


@pytest.mark.parametrize("steps", [(0.0, 1e300), (0.0, 1e-300), (0.0, 10.0**160, 10.0**161)])
def test_steps_too_far_apart_or_too_close_are_an_arithmetic_error(steps: tuple[float, ...]):
    with pytest.raises(CheckpointError, match="too large or too close"):
        coefficients(steps, 1.0, fit="ols")


def extraopt(*words: str | Path) -> tuple[int, str]:
    """Exit code and stderr of the command line with a minute of processor time and 4 GB of memory."""
    limits = "import resource as r; r.setrlimit(r.RLIMIT_CPU, (60, 60)); r.setrlimit(r.RLIMIT_DATA, (4 << 30,) * 2);"
    code = limits + "from extraopt.__main__ import main; main()"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=env)
    return done.returncode, done.stderr


def test_an_eval_command_with_an_open_quote_is_a_traceback(tmp_path: Path):
    code, said = extraopt("extrapolate", "a", "b", "--sweep", "1", "--eval", "echo '{dir}", "-o", tmp_path / "out")
    assert code == 2 and said.startswith("extraopt: ") and "quot" in said and len(said.splitlines()) == 1


EXHAUSTING = {
    "a huge line": (lambda: '{"step": 1, "loss": "' + "9" * 2**26 + '"}', "give a part of it"),
    "a million rows": (lambda: '{"step": 1, "loss": 1.5}\n' * 10**6, "give a part of it"),
    "nested": (lambda: '{"step": 1, "loss": ' + "[" * 10**6, "broken JSON"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXHAUSTING)
def test_a_log_takes_memory_or_time_without_end(kind: str, tmp_path: Path):
    made, says = EXHAUSTING[kind]
    (tmp_path / "log.jsonl").write_text(made())
    code, said = extraopt("report", tmp_path)
    assert code == 2 and says in said and len(said.splitlines()) == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def write_log(folder: Path, *rows: dict[str, float]) -> None:
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_optimizers_file_claims_more_than_it_holds(tmp_path: Path):
    write_log(tmp_path, {"step": 1, "loss": 1.0})
    state = trained(False).state_dict()
    state["state"][0]["exp_avg"] = torch.ones(1).expand(2**40)
    torch.save(state, tmp_path / "optimizer.pt")
    run = read_run(tmp_path)
    assert not run.memory and "can not be read" in run.notes[0]


def test_a_step_far_ahead_is_counted_cycle_by_cycle(tmp_path: Path):
    write_log(tmp_path, {"step": 3, "extra/gate": 1.0}, {"step": 3000, "extra/gate": 1.0})
    torch.save(trained(False).state_dict(), tmp_path / "optimizer.pt")
    near = summarize(read_run(tmp_path))
    write_log(tmp_path, {"step": 3, "extra/gate": 1.0}, {"step": 3 * 10**15, "extra/gate": 1.0})
    far = summarize(read_run(tmp_path))
    assert near["cycles"] == 1000 and far["cycles"] == 10**15
    assert near["jumped_steps"] == pytest.approx(6e3) and far["jumped_steps"] == pytest.approx(6e15)


def test_as_many_metrics_as_rows_are_summed_up(tmp_path: Path):
    rows = [{"step": i, "extra/gate": 0.5, f"eval_{i}": 1.0} for i in range(1, 3001)]
    write_log(tmp_path, *rows)
    summary = summarize(read_run(tmp_path, ahead=20))
    assert summary["cycles"] == 3000 and len(summary["metrics"]) == 3000
