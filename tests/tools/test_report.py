"""`extraopt report`: the numbers are those of the logs, and the page is safe, self-contained and readable anywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html import escape, unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'extraopt[cli]'")

from _report_page import Page, cycles, jsonl, page_of, svgs

from extraopt import ExtraAdam
from extraopt.gate import momentum_coherence
from extraopt.tools import cli
from extraopt.tools.page import _floors, html
from extraopt.tools.report import CURE, Run, ends, limits, read_run, summarize

HOSTILE = "eval_<script>alert(1)</script>\"' onload=x &amp; \x00\x1b\u202e\ud800 https://evil.example"


def run_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> tuple[int, Any]:
    monkeypatch.setattr(sys, "argv", ["extraopt", "report", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run()
    return stop.value.code, capsys.readouterr()


def train(folder: Path, rule: str, steps: int, save: int, **options: Any) -> tuple[Path, list[dict[str, Any]]]:
    """A run of a real Trainer by one of the rules that its own tests name, and its logs."""
    pytest.importorskip("transformers", reason="needs transformers: pip install 'extraopt[hf]'")
    import test_integrations_transformers as real

    args = real.arguments(folder, max_steps=steps, save_strategy="steps", save_steps=save)
    trainer = real.Trainer(real.llama(), args, train_dataset=real.rows(same=True))
    real.use_extra_adam(trainer, lr=1e-3, **getattr(real, rule), **options)
    trainer.train()
    return folder, trainer.state.log_history


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """With a checkpoint at its end, and without a trust region."""
    return train(tmp_path_factory.mktemp("trained") / "a run", "GATED", 30, 15)


def test_the_numbers_are_those_of_a_trainers_run(trained, capsys, monkeypatch, tmp_path: Path):
    folder, history = trained
    logged = [log for log in history if "extra/gate" in log]
    gates = [log["extra/gate"] for log in logged]
    assert len(logged) == 10 and gates[0] == 0 < gates[1]
    code, said = run_cli(capsys, monkeypatch, folder, "--json", "-o", tmp_path / "new" / "page.html")
    result = json.loads(said.out)
    losses = [log["loss"] for log in history if "loss" in log]
    assert code == 0 and (result["steps"], result["cycles"]) == (30, 10)
    assert result["jumps"] == sum(log["extra/jumped"] > 0 for log in logged) > 0
    assert result["mean_gate"] == pytest.approx(sum(gates[1:]) / 9)
    assert result["mean_coherence"] == pytest.approx(sum(log["extra/coherence"] for log in logged[1:]) / 9)
    assert result["hyperparameters"]["extra_every"] == 3 and result["horizon"] == 6
    ahead = [log["extra/length"] * log["extra/gate"] for log in logged]
    assert result["mean_length"] == pytest.approx(sum(log["extra/length"] for log in logged) / 10)
    assert result["effective_steps"] == pytest.approx(30 + sum(ahead))
    assert result["metrics"]["loss"]["first"] == pytest.approx(sum(losses[:6]) / 6)
    assert result["metrics"]["loss"]["last"] == pytest.approx(sum(losses[-6:]) / 6)
    memory = result["bytes_per_parameter"]
    assert [memory[key] for key in ("exp_avg", "exp_avg_sq", "extra_anchor", "extra_estimate")] == [4, 4, 4, 4]
    assert result["verdict"][0].startswith("Gates were ") and not result["warnings"]

    page = Page((tmp_path / "new" / "page.html").read_text())
    facts = page.facts()
    assert (
        facts["steps"] == "30" and facts["cycles ended"] == "10" and facts["mean gate"] == f"{sum(gates[1:]) / 9:.2f}"
    )
    assert facts["effective steps"] == f"{30 + sum(ahead):.0f}"
    assert facts["loss, first to last"] == f"{sum(losses[:6]) / 6:.3g} \u2192 {sum(losses[-6:]) / 6:.3g}"
    for row, log, jump in zip(page.rows(), logged, ahead, strict=True):
        assert row[0] == str(log["step"]) and row[1] == f"{log['extra/length']:.4g}"
        assert row[4] == f"{log['extra/gate']:.4g}" and row[6] == f"{log['extra/drift_norm']:.4g}"
        assert row[9] == f"{jump:.4g}" and row[2] == row[3] == "\u2013"
    titles = [svg.get("aria-label") for svg in svgs((tmp_path / "new" / "page.html").read_text())]
    assert titles == [
        "loss, by optimizer step",
        "loss, effective steps, by effective step",
        "Length of the jumps, by optimizer step",
        "Gate, by optimizer step",
        "Coherence: how straight the path was, by optimizer step",
        "Drift norm, by optimizer step",
    ]


def test_words_for_people_name_the_page(trained, capsys, monkeypatch):
    folder, _ = trained
    code, said = run_cli(capsys, monkeypatch, folder)
    page = folder / "extraopt-report.html"
    assert code == 0 and "Gates were " in said.out and said.out.rstrip().endswith(page.name)
    assert page.read_text().startswith("<!DOCTYPE html>")
    page.unlink()


def test_logs_are_found_wherever_they_lie(trained, tmp_path: Path):
    """The folder, else its newest checkpoint; a checkpoint; a file."""
    folder, _ = trained
    assert read_run(folder).rows[-1]["step"] == 30
    assert read_run(folder / "checkpoint-15").rows[-1]["step"] == 15
    by_file = read_run(folder / "checkpoint-30" / "trainer_state.json")
    assert by_file.name == "checkpoint-30" and by_file.ahead == 6
    shutil.copytree(folder / "checkpoint-15", tmp_path / "run" / "checkpoint-15")
    shutil.copytree(folder / "checkpoint-15", tmp_path / "run" / "checkpoint-9")
    (tmp_path / "run" / "checkpoint-9" / "trainer_state.json").write_text("{")
    assert read_run(tmp_path / "run").rows[-1]["step"] == 15
    state = {"log_history": [{"step": 99, "loss": 1.0}]}
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps(state))
    run = read_run(tmp_path / "run")
    assert run.rows == [{"step": 99, "loss": 1.0}] and run.ahead == 6


def test_a_list_of_logs_and_json_lines_are_the_same(tmp_path: Path):
    lines = jsonl(tmp_path / "a", cycles())
    (tmp_path / "a" / "list.json").write_text(json.dumps(cycles()))
    assert read_run(lines).rows == read_run(tmp_path / "a" / "list.json").rows == read_run(tmp_path / "a").rows


def test_steps_ahead_stand_in_for_a_checkpoint(tmp_path: Path):
    jsonl(tmp_path / "run", cycles())
    summary = summarize(read_run(tmp_path / "run"))
    assert summary["effective_steps"] is None and any("--steps-ahead" in note for note in summary["notes"])
    page = page_of(tmp_path / "run")
    assert "effective step<" not in page and Page(page).facts()["effective steps"] == "unknown"
    summary = summarize(run := read_run(tmp_path / "run", ahead=50))
    ahead = [e.row["extra/gate"] * 50 for e in ends(run)]
    assert summary["effective_steps"] == pytest.approx(120 + sum(ahead)) and not summary["notes"]
    assert "effective step<" in page_of(tmp_path / "run", ahead=50)


def test_the_length_that_was_chosen_counts_and_not_the_horizon(tmp_path: Path):
    logs = cycles(count=4)
    for log in logs:
        if "extra/gate" in log:
            log |= {"extra/length": log["step"], "extra/kl": 0.01}
    run = read_run(jsonl(tmp_path, logs), ahead=100)
    assert [e.ahead for e in ends(run)] == pytest.approx([0, 0.1 * 20, 0.2 * 30, 0.3 * 40])
    summary = summarize(read_run(tmp_path))  # needs no horizon
    assert summary["jumped_steps"] == pytest.approx(20) and summary["mean_length"] == 25 and not summary["notes"]


def test_logs_over_several_cycles_count_them_all():
    options = {"extra_every": 3, "extra_steps": 30, "extra_beta": 0.9, "extra_gate": 0.5, "extra_start": 0}
    rows = [{"step": step, "extra/gate": 0.5, "extra/coherence": 0.4, "extra/jumped": 2.0} for step in (10.0, 20, 30)]
    run = Run("run", rows, {**options, "momentum": 0.9}, 30)
    assert [(e.count, e.seen) for e in ends(run)] == [(3, 0), (3, 3), (4, 6)]
    summary = summarize(run)
    assert summary["cycles"] == 10 and summary["jumped_steps"] == pytest.approx(10 * 0.5 * 30)
    assert any("several cycles" in note for note in summary["notes"])
    late = Run("late", rows[1:], {**options, "momentum": 0.9}, 30)
    assert [(e.count, e.seen) for e in ends(late)] == [(3, 3), (4, 6)], "the log begins in mid-run"
    assert any("k is not known" in note for note in summarize(Run("run", rows))["notes"])


@pytest.mark.parametrize(
    "gates, cosine, options, says",
    [
        ([0.0] * 8, 0.1, {}, "Gates stayed mostly shut"),
        ([0.2] * 8, 0.4, {}, "Gates were open in part"),
        ([0.9] * 8, 0.9, {}, "Gates were mostly open"),
        ([0.0], 0.0, {}, "No gate to judge by"),
        ([1.0] * 8, 0.0, {"extra_gate": None}, "The gate was switched off"),
        ([0.0] * 8, 0.4, {"extra_start": 900}, "No gate to judge by"),
        ([0.0] * 8, 0.4, {"extra_steps": 0}, "this was AdamW"),
    ],
)
def test_the_verdict_says_what_the_gates_did(gates: list[float], cosine: float, options: dict[str, Any], says: str):
    of = {"extra_every": 10, "extra_steps": 200, "extra_beta": 0.9, "extra_gate": 0.5, "extra_start": 0, **options}
    rows = [{"step": 10.0 * i, "extra/gate": g, "extra/coherence": cosine} for i, g in enumerate(gates, 1)]
    run = Run("run", rows, {**of, "momentum": 0.9}, of["extra_steps"])
    summary = summarize(run)
    assert says in summary["verdict"][0] and says in html(run, summary)


def test_refused_tensors_and_non_finite_numbers_are_warned_of(tmp_path: Path):
    logs = cycles(**{"extra/refused": 2}) + [
        {"step": 121, "loss": float("nan"), "reward": None},
        {"step": 122, "loss": float("inf"), "reward": "n/a", "extra/gate": float("nan"), "extra/coherence": None},
        {"step": 123, "loss": 1e300, "reward": [1], "extra/gate": 1e300, "extra/drift_norm": -1e308},
        {"step": None, "loss": 1.0},
        {"loss": 1.0},
    ]
    run = read_run(jsonl(tmp_path, logs), ahead=1e9)
    summary = summarize(run)
    assert summary["refused"] == 24 and summary["cycles"] == 14 and summary["steps"] == 123
    assert summary["metrics"]["loss"] == pytest.approx(
        {"first": 1.945, "last": 0.845, "window": 10, "values": 120, "not_finite": 3}
    )
    page = html(run, summary)
    assert all(escape(words) in page for words in summary["warnings"]) and len(summary["warnings"]) == 3
    assert "nan" not in Page(page).words and json.dumps(summary, allow_nan=False)
    assert page.count("Warning:") == 3


def test_coherence_stands_beside_the_levels_of_its_gates(trained, monkeypatch):
    """From where momentum alone ends to where a gate is open, by the checkpoint's hyperparameters."""
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **k: (drawn.append((x, y, k)), plot(self, x, y, **k))[1])
    page_of(trained[0])
    (low,) = [y for _, y, k in drawn if k.get("linestyle") == "--"]
    (high,) = [y for _, y, k in drawn if k.get("linestyle") == ":"]
    beta = read_run(trained[0]).hyperparameters["extra_beta"]
    shut = [momentum_coherence(3, beta, 0.9, max(1, seen)) for seen in range(10)]
    assert low[:2] == pytest.approx(shut[:2]) and max(low) == low[0] and low != pytest.approx(shut)
    assert high == pytest.approx([(1 + c) / 2 for c in low])


OF: dict[str, Any] = {"extra_every": 5, "extra_steps": 200, "extra_beta": 0.9, "extra_gate": 0.5, "extra_start": 0}


def floors(gates: list[float]) -> list[float]:
    rows = [{"step": 5.0 * i, "extra/gate": gate} for i, gate in enumerate(gates, 1)]
    options = {**OF, "momentum": 0.9}
    return _floors(options, ends(Run("run", rows, options, 200)))


def test_the_floor_of_a_gate_depends_on_the_gates_before() -> None:
    """Behind shut gates the estimate becomes an average, with which noise agrees less; behind open ones it does not."""
    first, later = (momentum_coherence(5, 0.9, 0.9, seen) for seen in (1, 400))
    assert floors([0.0] * 60) == pytest.approx([momentum_coherence(5, 0.9, 0.9, max(1, seen)) for seen in range(60)])
    assert floors([0.0, *[1.0] * 60]) == pytest.approx([first] * 61) and first == pytest.approx(0.71, abs=0.005)
    closed = floors([0.0, *[1.0] * 60, *[0.0] * 100])
    assert closed[61] == pytest.approx(first) and closed[62] < 0.5 and closed[-1] == pytest.approx(later, abs=0.01)


def test_the_floor_is_the_one_that_the_optimizer_judged_by() -> None:
    """One tensor, so that its gate is the logged one: the noise in its state is what the logged gates make of it."""
    weight, rows = torch.nn.Parameter(torch.zeros(400)), []
    optimizer = ExtraAdam([weight], lr=1e-3, extra_kl=None, extra_steps=5)
    noise, kept = torch.Generator().manual_seed(0), []
    for step in range(1, 61):
        if step % 5 == 0 and step > 5:
            kept.append(optimizer.state[weight])
            kept[-1] = float(kept[-1]["extra_noise_cov"] / kept[-1]["extra_noise_var"].sqrt())
        weight.grad = torch.randn(400, generator=noise) + (0.5 if step < 40 else 0.0)
        optimizer.step()
        if step % 5 == 0:
            rows.append({"step": float(step), "extra/gate": optimizer.last_jump.gate})
    assert 0 < sum(0 < row["extra/gate"] < 1 for row in rows)
    of = {**OF, "momentum": 0.9}
    assert _floors(of, ends(Run("run", rows, of, 5)))[1:] == pytest.approx(kept)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """With a trust region; its logs of cycles."""
    folder, logs = train(tmp_path_factory.mktemp("guarded") / "run", "OPEN", 18, 18, extra_fall=0.7)
    return folder, [log for log in logs if "extra/gate" in log]


def drawn(
    monkeypatch: pytest.MonkeyPatch, path: Path
) -> tuple[str, list[float], list[tuple[Any, Any, dict[str, Any]]]]:
    """A page, the heights of its horizontal lines, and what was plotted."""
    from matplotlib.axes import Axes

    across, plotted, axhline, plot = [], [], Axes.axhline, Axes.plot
    monkeypatch.setattr(Axes, "axhline", lambda self, y=0, **k: (across.append(y), axhline(self, y, **k))[1])
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **k: (plotted.append((x, y, k)), plot(self, x, y, **k))[1])
    return page_of(path), across, plotted


def test_each_jump_stands_beside_its_limits(guarded, monkeypatch) -> None:
    """Limits come from the checkpoint, the rest from the Trainer's logs."""
    folder, logged = guarded
    assert len(logged) == 6 and all("extra/kl" in log for log in logged if log["extra/length"])
    assert any(log["extra/length"] for log in logged)
    page, across, plotted = drawn(monkeypatch, folder)
    check(page)
    assert across.count(0.02) == across.count(0.7) == 1
    assert "Dashed: the limit, extra_kl = 0.02." in page and "Dashed: the limit, extra_fall = 0.7." in page
    assert "kl (limit 0.02)" in page and "fall (limit 0.7)" in page
    dots = [y for _, y, k in plotted if k.get("linestyle") == ""]
    assert dots == [[log[f"extra/{key}"] for log in logged if f"extra/{key}" in log] for key in ("kl", "fall")]
    for row, log in zip(Page(page).rows(), logged, strict=True):
        told = [f"{log[f'extra/{key}']:.4g}" if f"extra/{key}" in log else "\u2013" for key in ("kl", "fall")]
        assert row[2:4] == told
    summary = summarize(read_run(folder))
    assert summary["mean_kl"] == pytest.approx(sum(dots[0]) / len(dots[0])) and summary["mean_kl"] <= 0.02
    assert summary["notes"] == []


def test_without_a_checkpoint_no_limit_is_drawn(guarded, monkeypatch, tmp_path: Path) -> None:
    folder, logged = guarded
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": logged}))
    page, across, _ = drawn(monkeypatch, tmp_path)
    titles = [svg.get("aria-label") for svg in svgs(page)]
    assert "KL divergence of the outputs, by optimizer step" in titles and "the limit, extra_" not in page
    assert set(across) == {0} and "(limit" not in page


@pytest.mark.parametrize("options, drawn", [
    ({"extra_kl": 0.02, "extra_fall": 0.8}, {"kl": 0.02, "fall": 0.8}),
    ({"extra_kl": 0.02, "extra_fall": float("inf")}, {"kl": 0.02}),
    ({"extra_kl": None, "extra_fall": 0.8}, {}),
    ({}, {}),
])  # fmt: skip
def test_a_limit_that_is_none_or_not_known_is_not_drawn(options: dict[str, Any], drawn: dict[str, float]) -> None:
    assert limits(Run("run", [{"step": 1.0}], {**OF, **options})) == drawn
    assert limits(Run("run", [{"step": 1.0}])) == {}


def test_jumps_that_nothing_guarded_are_noted(tmp_path: Path) -> None:
    """A length of 0 needs no KL; a NaN, as a loop of one's own may write, is none."""
    logs = cycles(count=6, **{"extra/length": 20})
    logs[9]["extra/length"] = 0
    for log, kl in zip(logs[19::10], (0.01, float("nan"), None)):
        log["extra/kl"] = kl
    summary = summarize(read_run(jsonl(tmp_path, logs)))
    assert any(note.startswith("Of 5 logs of jumps 4 have no extra/kl") for note in summary["notes"])
    assert summary["mean_kl"] == pytest.approx(0.01) and summary["mean_fall"] is None
    check(page_of(tmp_path))


def test_open_gates_without_a_jump_are_told(tmp_path: Path) -> None:
    logs = cycles(count=10, **{"extra/length": 0})
    assert any(
        "nothing jumped in 7 of 7 cycles" in words for words in summarize(read_run(jsonl(tmp_path, logs)))["verdict"]
    )


def test_a_log_without_jumps_still_makes_a_page(capsys, monkeypatch, tmp_path: Path):
    jsonl(tmp_path / "run", [{"step": step, "loss": 1 / step} for step in range(1, 9)])
    code, said = run_cli(capsys, monkeypatch, tmp_path / "run")
    page = Page((tmp_path / "run" / "extraopt-report.html").read_text())
    assert code == 0 and CURE in said.out and CURE in page.words
    assert "ExtraCallback" in CURE and "use_extra_adam" in CURE and sum(tag == "svg" for tag, _ in page.tags) == 1


def check(page: str) -> Page:
    """What every page has to be."""
    parsed = Page(page)
    bare = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[\w/]+"', "", page)
    assert not re.search(r'(src|href|url|action)\s*[=(]\s*["\']?\s*(https?:|//|data:|javascript:)', bare)
    assert not re.search(r"https?://", bare.replace("https://evil.example", "")) and "@import" not in page
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "iframe", "object", "embed", "link", "img", "image", "base", "form"}
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert all(value.startswith("#") for name, value in attributes.items() if name.endswith("href"))
    found = svgs(page)
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and len(found) == sum(tag == "svg" for tag, _ in parsed.tags) > 0
    for svg in found:
        assert svg.get("role") == "img" and svg.get("viewBox") and svg[0].tag.endswith("title")
        assert svg.get("aria-label") == svg[0].text and not svg.get("width")
        assert any(element.tag.endswith("}text") for element in svg.iter())
        colors = set(re.findall(r"#[0-9a-f]{6}\b", ElementTree.tostring(svg, "unicode")))
        assert not colors, "a colour that does not follow light and dark"
    used, style = set(re.findall(r"var\(--(\w+)\)", page)), page[page.index("<style>") : page.index("</style>")]
    light, dark = style.split("@media(prefers-color-scheme:dark)")
    dark = dark[: dark.index("}}")]
    assert all(f"--{name}:" in light and f"--{name}:" in dark for name in used) and {"ink", "line"} <= used
    return parsed


@pytest.mark.parametrize("ahead", [None, 40])
def test_the_page_needs_nothing_else_and_follows_light_and_dark(ahead: float | None, tmp_path: Path):
    logs = cycles(count=60, **{"extra/refused": 1})
    logs[99] |= {"eval_loss": 1.5, "eval_runtime": 3.0}
    parsed = check(page_of(jsonl(tmp_path, logs), ahead=ahead))
    assert "eval_loss, first to last" in parsed.facts() and "eval_runtime, first to last" not in parsed.facts()


def test_a_hostile_log_is_only_text(tmp_path: Path):
    name = "<img src=x onerror=alert(1)>&amp;\u202e'\""
    logs = [log | {HOSTILE: 1.0, "eval_$\\frac{": 2.0, "eval_" + "w" * 500: 3.0} for log in cycles()]
    logs[5] |= {"extra/<b>": "<script>", "loss": "</title><script>alert(1)</script>", "reward": "1" * 500}
    jsonl(tmp_path / name, logs)
    page = page_of(tmp_path / name, ahead=20)
    page.encode()
    parsed = check(page)
    assert "\x00" not in page and "\u202e" not in page and "<script" not in page and "<img" not in page
    assert any("<script>alert(1)</script>" in word for word in parsed.words), "shown, as text"
    assert parsed.words[
        parsed.words.index("steps") - 1 :
    ] and "ExtraAdam in <img src=x onerror=alert(1)>&amp;" in unescape(page)
    assert max(map(len, parsed.words)) < 500


def test_the_same_run_is_the_same_bytes(tmp_path: Path):
    """In another process too, with another seed of hashes and another place."""
    logs = cycles() + [{"step": 130, "eval_b": 1.0, "eval_a": 2.0}]
    for place in ("one", "two"):
        jsonl(tmp_path / place / "run", logs)
    command = [sys.executable, "-m", "extraopt", "report", str(tmp_path / "one" / "run"), "--steps-ahead", "20"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    written = (tmp_path / "one" / "run" / "extraopt-report.html").read_text(encoding="utf-8")
    assert written == page_of(tmp_path / "two" / "run", ahead=20)


BROKEN = {
    "nothing there": (None, "no such file or folder"),
    "no logs": ({}, "holds no trainer_state.json"),
    "broken JSON": ({"trainer_state.json": '{"log_history": ['}, "broken JSON"),
    "a broken line": ({"log.jsonl": '{"step": 1}\n{"step": 2,\n'}, "log.jsonl, line 2: broken JSON"),
    "a line that is no object": ({"log.jsonl": "[1]\n"}, "is no list of logs"),
    "another JSON": ({"trainer_state.json": '{"model_type": "llama"}'}, "is no list of logs"),
    "no step": ({"log.jsonl": '{"loss": 1}\n{"step": null}\n{"step": true}\n{"step": -4}\n'}, "no log with a step"),
    "empty": ({"log.jsonl": ""}, "no log with a step"),
    "not text": ({"log.jsonl": b"\xff\xfe\x00"}, "broken JSON"),
    "too deep": ({"log.jsonl": "[" * 200_000}, "broken JSON"),
    "a number too long": ({"log.jsonl": '{"step": ' + "9" * 5000 + "}"}, "broken JSON"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_logs_are_one_line_and_nothing_is_written(kind: str, capsys, monkeypatch, tmp_path: Path):
    files, says = BROKEN[kind]
    folder = tmp_path / "run"
    for name, content in (files or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if files == {}:
        folder.mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, said = run_cli(capsys, monkeypatch, folder)
    assert code == 2 and says in said.err and said.out == "" and len(said.err.strip().splitlines()) == 1
    assert said.err.startswith("extraopt: ") and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words, says",
    [
        (("-o", "page.json"), "ends in .html"),
        (("-o", "run/log.jsonl/page.html"), "can not be written"),
        (("-o", "folder.html"), "can not be written"),
        (("--steps-ahead", "inf"), "horizon of inf"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(words, says, capsys, monkeypatch, tmp_path: Path):
    jsonl(tmp_path / "run", cycles())
    (tmp_path / "folder.html").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, said = run_cli(capsys, monkeypatch, "run", *words)
    assert code == 2 and says in said.err and len(said.err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_that_is_there_stays_until_the_new_one_is_whole(capsys, monkeypatch, tmp_path: Path):
    jsonl(tmp_path, cycles())
    page = tmp_path / "extraopt-report.html"
    page.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        code, said = run_cli(capsys, patched, tmp_path)
    assert code == 2 and "No space left" in said.err and page.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [page.name, "log.jsonl"]
    assert run_cli(capsys, monkeypatch, tmp_path)[0] == 0 and "ExtraAdam in" in page.read_text()


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path):
    jsonl(tmp_path, cycles())
    code = "import sys; sys.modules['matplotlib'] = None; sys.argv = ['extraopt', 'report', sys.argv[1]]\n"
    code += "from extraopt.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install matplotlib" in done.stderr and len(done.stderr.splitlines()) == 1


RAN = Path(tempfile.gettempdir()) / f"extraopt-report-ran-code-{os.getpid()}"


class Unsafe:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(RAN),)


def test_a_checkpoint_that_is_not_ours_is_a_note(tmp_path: Path):
    """Another optimizer's, groups that differ, a torn file, code instead of a state."""
    checkpoint = tmp_path / "checkpoint-7"
    jsonl(tmp_path, cycles())
    checkpoint.mkdir()
    weights = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(5))]

    def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        sum(w.square().sum() for w in weights).backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
        run = read_run(tmp_path)
        check(html(run, summarize(run)))
        return summarize(run)

    summary = saved(torch.optim.AdamW(weights))
    assert "is not ExtraAdam's" in summary["notes"][0] and summary["bytes_per_parameter"]["exp_avg"] == 4
    groups = [{"params": weights[:1], "extra_every": 7}, {"params": weights[1:]}]
    summary = saved(ExtraAdam(groups))
    assert "differ in their hyperparameters" in summary["notes"][0] and summary["horizon"] is None
    assert summary["parameters"] == 17 and summary["bytes_per_parameter"]["extra_estimate"] == 4
    for content in (b"", b"PK\x03\x04 torn", None):
        torch.save({"state": {}, "param_groups": [Unsafe()]}, checkpoint / "optimizer.pt")
        if content is not None:
            (checkpoint / "optimizer.pt").write_bytes(content)
        summary = summarize(read_run(tmp_path))
        assert "checkpoint-7/optimizer.pt can not be read" in summary["notes"][0] and summary["hyperparameters"] is None
    assert not RAN.exists()


def test_bf16_halves_the_memory(tmp_path: Path):
    weights = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = ExtraAdam([weights], extra_every=3, extra_steps=30)
    weights.sum().backward()
    optimizer.step()
    jsonl(tmp_path, cycles())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    summary = summarize(read_run(tmp_path))
    kinds = ("exp_avg", "exp_avg_sq", "extra_anchor", "extra_estimate")
    assert sum(summary["bytes_per_parameter"][key] for key in kinds) == 8 and summary["horizon"] == 30
