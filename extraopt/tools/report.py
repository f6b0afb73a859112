"""`extraopt report`: what ExtraAdam did in a run, from the logs that the run left. `page.py` shows it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..hyperparameters import DEFAULTS, check_hyperparameters
from ..mixin import momentum_of
from ..trust import OPEN
from .checkpoints import CheckpointError
from .checkpoints.find import split_step
from .checkpoints.safety import check_records

Row = dict[str, float]

PLAIN = ("reward", "loss", "learning_rate")
MOST = 1e9  # steps of a horizon
LARGEST = 1e38  # of numbers: what float32 overflows at counts as not finite, and axes could not be divided either
MOST_BYTES, MOST_ROWS = 2**26, 100_000  # of a log: what can be read and drawn within a minute and a gigabyte
MOST_MARKS = 2000  # jumps drawn in a chart
SPEEDS = ("_runtime", "_per_second", "_time")  # of an evaluation, not of the model
CURE = (
    "The log has no extra/ keys, so it does not tell what the optimizer did. In a Trainer, call use_extra_adam() of "
    "extraopt.integrations.transformers, or add ExtraCallback() to its callbacks. In your own loop, write length, "
    "kl, fall, gate, coherence, drift_norm, jumped and refused of optimizer.last_jump as extra/gate and so on, at each "
    "step that ended a cycle."
)


@dataclass(frozen=True)
class Run:
    """What the logs of a run hold.

    Attributes:
        name: of its folder or file.
        rows: one for each logged step, by step; a value that is no finite number is nan.
        hyperparameters: the optimizer's, and its "momentum"; None where no checkpoint tells, or its groups differ.
        ahead: N, the horizon, from the hyperparameters or from the user; None where neither tells.
        memory: bytes per parameter of each kind of optimizer state; empty without a checkpoint's.
        parameters: with such a state.
        notes: what could not be read, in words.
    """

    name: str
    rows: list[Row]
    hyperparameters: dict[str, Any] | None = None
    ahead: float | None = None
    memory: tuple[tuple[str, float], ...] = ()
    parameters: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ends:
    """The cycles that ended since the log before.

    Attributes:
        row: the log that tells of them.
        count: how many they are; 1 where k is not known.
        ahead: steps jumped: gate times the length that was chosen, or times N where no length is logged; None without.
        seen: cycles before them.
    """

    row: Row
    count: int
    ahead: float | None
    seen: int


def read_run(path: Path, *, ahead: float | None = None) -> Run:
    """Read the logs of a run, and the optimizer's hyperparameters and state from its newest checkpoint.

    Args:
        path: an output folder of a Trainer, one of its checkpoints, a folder with a ``log.jsonl``, or a file:
            ``trainer_state.json``, or JSON lines, each an object with "step" and any of "loss", "reward", "eval_...",
            "learning_rate", "extra/length", "extra/kl", "extra/fall", "extra/gate", "extra/coherence",
            "extra/drift_norm", "extra/jumped" and "extra/refused". "extra/gate" stands where a cycle has ended, and
            only there. Lines of the same step are put together.
        ahead: N, instead of the checkpoint's ``extra_steps``; >= 0.

    Raises:
        CheckpointError: there is nothing to read, it is broken, or it has no step.
    """
    if ahead is not None and not 0 <= ahead <= MOST:
        raise CheckpointError(f"a horizon of {ahead:g} steps: give a number from 0 to {MOST:g}")
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such file or folder")
    folder = path if os.path.isdir(path) else path.parent
    checkpoints = sorted((split_step(p)[1] or 0, p) for p in folder.glob("checkpoint-*") if os.path.isdir(p))
    folders = [folder, *(p for _, p in reversed(checkpoints))]
    logs = [f / "trainer_state.json" for f in folders] + [folder / "log.jsonl"] if os.path.isdir(path) else [path]
    log = next((file for file in logs if os.path.isfile(file)), None)
    if log is None:
        raise CheckpointError(f"{path} holds no trainer_state.json, neither do its checkpoints, and no log.jsonl.")
    rows: dict[int, Row] = {}
    for entry in _entries(log):
        step = _number(entry.get("step"))
        if not 0 <= step < 2**53 or isinstance(entry["step"], bool):
            continue
        row = rows.setdefault(int(step), {"step": float(int(step))})
        whole = "train_runtime" in entry  # the Trainer's last: averages of all training, not of a step
        for name, value in entry.items():
            key = printable(name)
            if key.startswith("extra/") or not whole and (key in PLAIN or key.startswith("eval_")):
                row[key] = _number(value)
    if not rows:
        raise CheckpointError(f"{log} has no log with a step.")
    name = (path if os.path.isdir(path) or log.name != "trainer_state.json" else folder).resolve().name
    state = next((f / "optimizer.pt" for f in folders if os.path.isfile(f / "optimizer.pt")), None)
    hyperparameters, memory, parameters, notes = _optimizer(state) if state else (None, (), 0, ())
    if ahead is None and hyperparameters:
        ahead = hyperparameters["extra_steps"]
    return Run(
        printable(name), [rows[step] for step in sorted(rows)], hyperparameters, ahead, memory, parameters, notes
    )


def printable(words: str) -> str:
    """Words from a log without characters that XML forbids, that no encoding has or that turn a line around."""
    return "".join(c if c.isprintable() else "\ufffd" for c in words[:120]) + "..." * (len(words) > 120)


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if abs(number) < LARGEST else math.nan


def _entries(log: Path) -> list[dict[str, Any]]:
    line = 0
    try:
        if (size := log.stat().st_size) > MOST_BYTES:
            raise CheckpointError(
                f"{log} has {size / 1e6:,.0f} MB, more than {MOST_BYTES / 1e6:,.0f}: give a part of it."
            )
        text = log.read_text(encoding="utf-8-sig")
        if log.suffix == ".json":
            found = json.loads(text)
            found = found.get("log_history") if isinstance(found, dict) else found
        else:
            found = []
            for words in text.split("\n"):
                line += 1
                found += [json.loads(words)] if words.strip() else []
                if len(found) > MOST_ROWS:
                    break
    except OSError as error:
        raise CheckpointError(f"{log} can not be read: {error.strerror}") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        where = f", line {line}" if line else ""
        raise CheckpointError(f"{log}{where}: broken JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise CheckpointError(f"{log} is no list of logs: give a trainer_state.json, or an object with a step a line.")
    if len(found) > MOST_ROWS:
        raise CheckpointError(f"{log} has more than {MOST_ROWS:,} logs: give a part of it, or every tenth.")
    return found


def _optimizer(file: Path) -> tuple[dict[str, Any] | None, tuple[tuple[str, float], ...], int, tuple[str, ...]]:
    """Hyperparameters, bytes per parameter by kind of state, parameters, and notes. Reads no tensor's values."""
    where = f"{file.parent.name}/{file.name}"
    try:
        check_records(file)
        saved = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        states = [[(key, t) for key, t in s.items() if isinstance(t, torch.Tensor)] for s in saved["state"].values()]
        sizes: dict[str, int] = {}
        for key, t in (pair for state in states for pair in state):
            kind = printable(str(key))
            sizes[kind] = sizes.get(kind, 0) + t.numel() * t.element_size()
        if sum(sizes.values()) > file.stat().st_size:
            raise ValueError("its tensors are larger than the file")
        count = sum(max((t.numel() for _, t in state), default=0) for state in states)
        memory = tuple((key, size / count) for key, size in sorted(sizes.items()))
        groups = [group for group in saved["param_groups"] if group["params"]]
        if missing := sorted({key for group in groups for key in DEFAULTS.keys() - group.keys()}):
            return None, memory, count, (f"{where} is not ExtraAdam's, or an older one's: no {', '.join(missing)}.",)
        hyperparameters = [{**check_hyperparameters(group), "momentum": momentum_of(group)} for group in groups]
    except Exception as error:  # whatever a broken or foreign pickle raises
        return (
            None,
            (),
            0,
            (f"{where} can not be read ({type(error).__name__}): hyperparameters and memory are left out.",),
        )
    if not hyperparameters or any(other != hyperparameters[0] for other in hyperparameters):
        return (
            None,
            memory,
            count,
            (f"In {where} the parameter groups differ in their hyperparameters, which are left out.",),
        )
    return hyperparameters[0], memory, count, ()


def ends(run: Run) -> list[Ends]:
    """The cycles of a run, log by log, with the steps that each jumped."""
    logs = [row for row in run.rows if any(not key.startswith(("eval_", "step")) for key in row)]
    steps = [row["step"] for row in logs]
    gap = min((b - a for a, b in zip(steps, steps[1:])), default=math.inf)
    begun = max(0.0, steps[0] - gap) if steps else 0.0  # the log may begin in mid-run
    every = (run.hyperparameters or {}).get("extra_every")
    seen, found = int(begun // every) if every else 0, list[Ends]()
    for row, last in zip(logs, [begun, *steps]):
        if "extra/gate" in row:
            count = max(1, int(row["step"] // every - last // every)) if every else 1
            gate = min(1.0, max(0.0, value_or_0(row, "extra/gate")))
            length = max(0.0, value_or_0(row, "extra/length")) if "extra/length" in row else run.ahead
            found.append(Ends(row, count, None if length is None else count * gate * length, seen))
            seen += count
    return found


def limits(run: Run) -> dict[str, float]:
    """The limits of the trust region on "kl" and "fall": those that the run's newest checkpoint tells, and are any."""
    of = run.hyperparameters or {}
    if of.get("extra_kl") is None:  # without it fall has no limit either
        return {}
    return {key: of[f"extra_{key}"] for key in ("kl", "fall") if math.isfinite(of.get(f"extra_{key}", math.inf))}


def value_or_0(row: Row, key: str) -> float:
    """A logged value; 0 where there is none, or none that is finite."""
    value = row.get(key, math.nan)
    return value if math.isfinite(value) else 0.0


def _mean(values: Iterable[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else None


def summarize(run: Run) -> dict[str, Any]:
    """The numbers of a run and what they say, ready for JSON.

    Args:
        run: of :func:`read_run`.
    """
    found, hyperparameters = ends(run), run.hyperparameters or {}
    # the first cycle has no estimate to compare with, unless the log begins later; before extra_start nothing may jump
    judged = [e.row for e in found if e.seen or any(value_or_0(e.row, f"extra/{k}") for k in ("gate", "coherence"))]
    judged = [row for row in judged if row["step"] >= hyperparameters.get("extra_start", 0)]
    gates, cosines = (
        [row[f"extra/{key}"] for row in judged if math.isfinite(row.get(f"extra/{key}", math.nan))]
        for key in ("gate", "coherence")
    )
    columns: dict[str, list[float]] = {}
    for row in run.rows:
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    evals = sorted(key for key in columns if key.startswith("eval_") and not key.endswith(SPEEDS))
    metrics = {}
    for key in ("reward", "loss", *evals):
        values = columns.get(key, [])
        finite = [value for value in values if math.isfinite(value)]
        n = min(10, max(1, len(finite) // 5))
        if values:
            metrics[key] = {"first": _mean(finite[:n]), "last": _mean(finite[-n:]), "window": n, "values": len(finite)}
            metrics[key]["not_finite"] = len(values) - len(finite)
    steps = int(run.rows[-1]["step"])
    jumped = None if not found or any(e.ahead is None for e in found) else sum(e.ahead or 0.0 for e in found)
    summary: dict[str, Any] = {
        "run": run.name,
        "steps": steps,
        "cycles": sum(e.count for e in found),
        "jumps": sum(value_or_0(e.row, "extra/jumped") > 0 for e in found),
        "mean_gate": _mean(gates),
        "mean_coherence": _mean(cosines),
        "along": _mean(max(0.0, min(1.0, cosine)) ** 2 for cosine in cosines),
        "mean_kl": _mean(e.row.get("extra/kl", math.nan) for e in found),
        "mean_fall": _mean(e.row.get("extra/fall", math.nan) for e in found),
        "mean_length": _mean(max(0.0, value_or_0(e.row, "extra/length")) for e in found if "extra/length" in e.row),
        "refused": int(sum(max(0.0, value_or_0(row, "extra/refused")) for row in run.rows)),
        "horizon": run.ahead,
        "jumped_steps": jumped,
        "effective_steps": None if jumped is None else steps + jumped,
        "metrics": metrics,
        "hyperparameters": run.hyperparameters,
        "parameters": run.parameters,
        "bytes_per_parameter": dict(run.memory),
    }
    notes = list(run.notes)
    if any(e.count > 1 for e in found):
        notes.append(
            "Some logs cover several cycles: their length, gate and coherence are means, and they count as one jump."
        )
    if any(e.ahead is None for e in found):
        notes.append("How far it jumped is not known (no extra/length in the logs, no optimizer.pt of ExtraAdam's; "
                     "--steps-ahead gives N): "
                     "effective steps are left out.")  # fmt: skip
    far = [e.row for e in found if value_or_0(e.row, "extra/length") > 0]
    blind = sum(not math.isfinite(row.get("extra/kl", math.nan)) for row in far)
    if blind and hyperparameters.get("extra_kl", 0) is not None:  # else there is no trust region, as was wanted
        notes.append(
            f"Of {len(far)} logs of jumps {blind} have no extra/kl: their outputs were not measured, so that the trust "
            "region did not guard them, or it was not logged. A RuntimeWarning of the run says why."
        )
    if len(found) > MOST_MARKS:
        notes.append(f"Of {len(found):,} logs of cycles the charts mark one in {1 + len(found) // MOST_MARKS}.")
    if found and not run.hyperparameters and any(b["step"] - a["step"] > 1 for a, b in zip(run.rows, run.rows[1:])):
        notes.append("Logs are several steps apart and k is not known: each log of cycles counts as one cycle.")
    return {**summary, "notes": notes, "warnings": _warnings(summary), "verdict": _verdict(run, summary, gates, judged)}


def _warnings(summary: dict[str, Any]) -> list[str]:
    said = []
    if count := summary["refused"]:
        said.append(f"Tensors were refused ({count} times one tensor): a weight, anchor or drift was not finite, or "
                    "the jump could have left its dtype's range. They stayed where AdamW put them.")  # fmt: skip
    for key, of in summary["metrics"].items():
        if of["not_finite"]:
            said.append(f"Not finite and left out: {of['not_finite']} of the logged values of {key}.")
    return said


def _verdict(run: Run, summary: dict[str, Any], gates: list[float], judged: list[Row]) -> list[str]:
    hyperparameters, said = run.hyperparameters or DEFAULTS, list[str]()
    gate = fmean(gates) if gates else 0.0
    if not any(key.startswith("extra/") for row in run.rows for key in row):
        said.append(CURE)
    elif not summary["cycles"]:
        said.append("No cycle ended within these logs.")
    elif hyperparameters["extra_steps"] == 0:
        said.append("extra_steps is 0: this was AdamW.")
    elif not gates:
        said.append("No gate to judge by: with one, nothing jumps in the first cycle or before extra_start.")
    elif hyperparameters["extra_gate"] is None:
        said.append("The gate was switched off (extra_gate=None): cycles jump whether the path is straight or not.")
    elif gate < 0.05:
        said.append(f"Gates stayed mostly shut (mean {gate:.2f}): the drift of a cycle hardly agreed with the estimate "
                    "before it beyond what momentum alone shows. That is noise, or a path that turns; these logs can "
                    "not tell which. ExtraAdam acted mostly as Lookahead.")  # fmt: skip
    elif gate < 0.5:
        said.append(f"Gates were open in part (mean {gate:.2f}): some drifts agreed with the estimate before them, "
                    "others did not. As far as a gate is shut, ExtraAdam acts as Lookahead.")  # fmt: skip
    else:
        said.append(f"Gates were mostly open (mean {gate:.2f}): the path kept its direction from cycle to cycle, and "
                    "most of the chosen length was jumped.")  # fmt: skip
    if len(gates) >= 6:
        half = len(gates) // 2
        said.append(f"The mean gate was {fmean(gates[:half]):.2f} in the first half of the cycles and "
                    f"{fmean(gates[half:]):.2f} in the second.")  # fmt: skip
    opened = [row for row in judged if value_or_0(row, "extra/gate") >= OPEN and "extra/length" in row]
    if still := sum(value_or_0(row, "extra/length") == 0 for row in opened):
        said.append(f"Behind open gates ({OPEN:g} or more) nothing jumped in {still} of {len(opened)} cycles: mostly "
                    "the real steps alone used the limits up, at a learning rate that is high for what the model "
                    "knows. Where the model failed instead, a RuntimeWarning of the run says so.")  # fmt: skip
    for key, of in list(summary["metrics"].items())[:2]:
        if of["values"] > 1:
            said.append(f"{key} went from {of['first']:.4g} to {of['last']:.4g} (means of the first and last "
                        f"{of['window']} of {of['values']} values).")  # fmt: skip
    if summary["cycles"]:
        said.append("One run can not say what AdamW would have done: compare with one at extra_steps=0.")
    return said
