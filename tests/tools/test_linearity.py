"""The paths of weights: exact against float64 numpy, their null against simulated walks, and what may go wrong."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from extraopt.tools import cli
from extraopt.tools.checkpoints import CheckpointError, find_checkpoints
from extraopt.tools.checkpoints import linearity as module
from extraopt.tools.checkpoints import paths as of_paths
from extraopt.tools.checkpoints.linearity import layer_number, layer_type, linearity
from extraopt.tools.checkpoints.paths import Filter, measure, random_walks

EVEN = [100.0 * i for i in range(14)]
UNEVEN = [0.0, 1.0, 4.0, 5.0, 11.0, 13.0, 20.0, 21.0]
ALL = Filter(0.0, 0)
Tensors = dict[str, torch.Tensor]


def summary(values: torch.Tensor, steps: list[float], keep: Filter = ALL, **options):
    return measure([values], steps, values.shape[1], keep=keep, **options).summary()


def walks(steps: list[float], count: int, scale: float = 1.0, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    t = torch.tensor(steps, dtype=torch.float64)
    steps_of_walk = torch.randn(len(t) - 1, count, dtype=torch.float64, generator=generator) * t.diff().sqrt()[:, None]
    start = torch.randn(1, count, dtype=torch.float64, generator=generator) * 0.03
    return torch.cat([start, start + scale * steps_of_walk.cumsum(0)])


def save(folder: Path, step: int, tensors: Tensors, config: dict[str, object] | None = None) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return path


def run_of(folder: Path, at: Callable[[int], Tensors], steps: list[int]) -> list[tuple[int, Path]]:
    for step in steps:
        save(folder, step, at(step))
    return find_checkpoints(folder)


# one set of paths


@pytest.mark.parametrize("steps", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_slope_and_r2_are_numpys(steps: list[float]):
    values = walks(steps, 500) + 0.3 * torch.tensor(steps)[:, None] * torch.linspace(-1, 1, 500)
    w, t = values.numpy(), np.array(steps)
    slope, intercept = np.polyfit(t, w, 1)
    residual = ((w - (intercept + np.outer(t, slope))) ** 2).sum(0)
    r2 = 1 - residual / ((w - w.mean(0)) ** 2).sum(0)
    ours, found, moving, _ = of_paths.fit(values, torch.tensor(steps, dtype=torch.float64), ALL)
    np.testing.assert_allclose(ours.numpy(), slope, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.numpy(), r2, rtol=1e-9, atol=1e-9)
    report = summary(values, steps)
    assert moving.all() and report["r2_median"] == pytest.approx(np.median(r2), abs=1 / of_paths.BINS + 2 / 500)
    assert report["r2_above"] == pytest.approx((r2 > 0.7).mean(), abs=1e-12)
    assert report["slope_rms"] == pytest.approx(np.sqrt((slope**2).mean()))
    assert report["slope_mean_abs"] == pytest.approx(np.abs(slope).mean())
    assert report["weight_rms"] == pytest.approx(np.sqrt((w[-1] ** 2).mean()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_straight_line_has_r2_one_its_slope_and_skill_one(dtype: torch.dtype):
    slopes = torch.tensor([2.0**-i for i in range(1, 11)], dtype=torch.float64)  # exact in float32
    report = summary((torch.tensor(UNEVEN, dtype=torch.float64)[:, None] * slopes + 1).to(dtype), UNEVEN)
    assert report["r2_median"] > 1 - 1 / of_paths.BINS and report["r2_above"] == 1 and report["constant"] == 0
    assert report["slope_rms"] == pytest.approx(float(slopes.square().mean().sqrt()), rel=1e-12)
    assert report["coherence"] == pytest.approx([1] * 6)
    assert all(skill == pytest.approx(1) for row in report["skill"] for skill in row["skill"].values())


def test_weights_that_never_move_are_counted_and_left_out():
    values = walks(EVEN, 1000)
    values[:, :250] = values[0, :250]
    report = summary(values, EVEN)
    assert report["constant"] == 0.25
    assert report["r2_median"] == summary(values[:, 250:], EVEN)["r2_median"]
    assert report["kept"] == 0.75


def test_where_nothing_moves_there_are_no_figures_and_no_nan():
    report = summary(torch.ones(5, 10), [0.0, 1, 2, 3, 4])
    assert report["constant"] == 1 and report["kept"] == 0 and report["coherence_mean"] == 0
    assert report["r2_median"] is report["null_median"] is report["r2_above"] is None
    json.dumps(report, allow_nan=False)


def test_the_r2_of_a_walk_is_its_own_null_and_about_0_45():
    report = summary(walks(EVEN, 40_000), EVEN)
    # two medians, of 40,000 and of 4,096 draws with density near 1 there: s.e. 0.008
    assert report["null_median"] == pytest.approx(report["r2_median"], abs=0.025)
    assert report["r2_median"] == pytest.approx(0.445, abs=0.015)
    assert report["r2_above"] == pytest.approx(0.27, abs=0.015)


@pytest.mark.parametrize("steps", [UNEVEN, [0.0, 1.0, 2.0, 300.0], [float(i * i) for i in range(10)]])
def test_the_null_knows_the_spacing(steps: list[float]):
    report = summary(walks(steps, 40_000), steps)
    assert report["null_median"] == pytest.approx(report["r2_median"], abs=0.025)
    assert report["null_above"] == pytest.approx(report["r2_above"], abs=0.03)


@pytest.mark.parametrize("scale", [1e-6, 3e-6, 1e-5], ids=lambda s: f"{s:g}")
def test_the_null_knows_storage_and_filter(scale: float):
    """Adam on noise alone moves a weight by about the learning rate in a step: two steps for each of the paper's."""
    paper = [2 * t for t in EVEN]
    stored = walks(paper, 100_000, scale).bfloat16()
    report = summary(stored, paper, Filter())
    assert report["null_median"] == pytest.approx(report["r2_median"], abs=0.03)
    assert report["null_kept"] == pytest.approx(report["kept"], rel=0.1, abs=0.005)
    few = 4 / math.sqrt(4096 * report["null_kept"])  # walks that pass the filter
    assert report["null_kept_r2_median"] == pytest.approx(report["kept_r2_median"], abs=0.25 * few + 0.01)
    assert report["unchanged"] > 0.05


def test_pure_noise_through_the_papers_filter_looks_as_straight_as_the_papers_runs():
    """A walk without a direction at lr 1e-6, in bfloat16, through the filter: R^2 near 0.83 of 2 percent of weights."""
    paper = [2 * t for t in EVEN]
    report = summary(walks(paper, 200_000, 1e-6).bfloat16(), paper, Filter())
    assert 0.005 < report["kept"] < 0.04
    assert report["kept_r2_median"] == pytest.approx(0.83, abs=0.04)
    plain = summary(walks(paper, 200_000, 1e-6).float(), paper, Filter())
    assert plain["r2_median"] == pytest.approx(0.45, abs=0.02)


def test_the_filter_keeps_what_moved_far_over_enough_values():
    steps = [0.0, 1, 2, 3, 4]
    columns = {
        "far, 5 values": [0, 1, 2, 3, 4],
        "far, 3 values": [0, 1, 1, 1, 2],
        "near, 5 values": [0, 0.1, 0.2, 0.3, 0.4],
        "still": [1, 1, 1, 1, 1],
        "exactly at the bound": [0, 0.1, 0.2, 0.3, 0.5],
    }
    values = torch.tensor(list(columns.values()), dtype=torch.float64).T
    *_, kept = of_paths.fit(values, torch.tensor(steps, dtype=torch.float64), Filter(0.5, 4))
    assert dict(zip(columns, kept.tolist())) == {name: name == "far, 5 values" for name in columns}


def test_random_walks_have_the_scale_asked_for_and_start_where_they_round_to():
    start = torch.full((50_000,), 0.03, dtype=torch.bfloat16).double()
    t = torch.tensor(UNEVEN, dtype=torch.float64)
    paths = random_walks(start, 1e-2, t, torch.bfloat16, torch.Generator().manual_seed(0))
    assert torch.equal(paths[0], start) and torch.equal(paths, paths.bfloat16().double())
    spread = (paths[1:] - start).square().mean(1).sqrt()
    np.testing.assert_allclose(spread, 1e-2 * np.sqrt(UNEVEN[1:]), rtol=0.03)


@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e-3])
def test_rounding_leaves_the_mean_drift_unbiased_and_is_told(scale: float):
    """What the null's scale rests on: 1e-7 is a thousandth of what bfloat16 can tell apart here."""
    generator = torch.Generator().manual_seed(3)
    true = torch.cat([torch.zeros(1, 300_000), torch.randn(7, 300_000, generator=generator) * scale]).double().cumsum(0)
    true += torch.rand(300_000, generator=generator) * 0.02 + 0.01
    stored = true.bfloat16().double()
    assert float(stored.diff(dim=0).abs().mean()) == pytest.approx(float(true.diff(dim=0).abs().mean()), rel=0.15)
    share = summary(true.bfloat16(), [float(i) for i in range(8)])["rounding_share"]
    assert share > 0.8 if scale < 1e-4 else share < 0.05


@pytest.mark.parametrize("pieces", [1, 7, 64, 1000])
def test_chunks_give_the_figures_of_one_go(pieces: int):
    values = walks(EVEN, 1000, 1e-3).bfloat16()
    whole = measure([values], EVEN, 1000, keep=Filter())
    parts = measure(values.split(-(-1000 // pieces), dim=1), EVEN, 1000, keep=Filter())
    assert all(torch.equal(parts.r2[key], whole.r2[key]) for key in whole.r2)
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-12, atol=0)
    assert compare(parts.summary(), whole.summary())


def compare(a: object, b: object) -> bool:
    """Nested dicts and lists of numbers, up to the order in which sums were taken."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(compare(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(compare, a, b))
    return a == (pytest.approx(b, rel=1e-9, abs=1e-9) if isinstance(b, float) else b)


@given(
    st.integers(0, 2**31), st.sampled_from([-3.0, 1e-4, 0.5, 1e3]), st.floats(-100, 100), st.sampled_from([1, 10, 977])
)
def test_r2_and_skill_know_neither_unit_nor_offset(seed: int, scale: float, offset: float, unit: int):
    values = walks(UNEVEN, 50, seed=seed)
    one, two = summary(values, UNEVEN), summary(values * scale + offset, [t * unit for t in UNEVEN])
    assert two["r2_median"] == pytest.approx(one["r2_median"], abs=1e-4)
    assert two["coherence"] == pytest.approx(one["coherence"], abs=1e-6)
    assert two["slope_rms"] == pytest.approx(one["slope_rms"] * abs(scale) / unit, rel=1e-6)
    # ExtraAdam's gate asks what momentum alone would show at this spacing, so it knows the unit of time
    for method in ("secant", "ols", "damped", "extra")[: 4 if unit == 1 else 3]:
        assert two["skill"][0]["skill"][method] == pytest.approx(one["skill"][0]["skill"][method], abs=1e-6)


@pytest.mark.parametrize("r2", [[0.2], [0.2, 0.9], [0.1, 0.2, 0.9, 0.95], [0.1, 0.4, 0.9], [1.0, 1.0], [0.0, 1.0]])
def test_the_median_of_few_is_that_of_numpy(r2: list[float]):
    found = of_paths._quantile(of_paths._bins(torch.tensor(r2, dtype=torch.float64)), 0.5)
    assert found == pytest.approx(np.median(r2), abs=1 / of_paths.BINS)


# tensors and their names


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "self_attn.q_proj", 3),
        ("model.layers.3.self_attn.q_proj.bias", "self_attn.q_proj.bias", 3),
        ("model.layers.11.input_layernorm.weight", "layers.input_layernorm", 11),
        ("model.layers.0.mlp.experts.7.down_proj.weight", "mlp.experts.down_proj", 0),
        ("model.embed_tokens.weight", "model.embed_tokens", None),
        ("lm_head.weight", "lm_head", None),
        ("transformer.h.5.attn.c_proj.weight", "attn.c_proj", 5),
        ("base_model.model.model.layers.2.self_attn.v_proj.lora_A.weight", "v_proj.lora_A", 2),
        ("weight", "weight", None),
    ],
)
def test_layer_types_and_numbers(name: str, kind: str, layer: int | None):
    assert layer_type(name) == kind and layer_number(name) == layer


# checkpoints on disk


def small_run(folder: Path, dtype: torch.dtype = torch.float32) -> list[tuple[int, Path]]:
    """Five steps of a straight tensor, a walking one, one that does not move and a buffer of integers."""
    walk = walks([float(i) for i in range(0, 60, 10)], 6000, 1e-3).to(dtype)

    def at(step: int) -> Tensors:
        return {
            "model.layers.0.mlp.up_proj.weight": (torch.ones(8, 16) + step * torch.eye(8, 16) / 1024).to(dtype),
            "model.layers.1.mlp.up_proj.weight": walk[step // 10].view(60, 100),
            "model.norm.weight": torch.ones(16, dtype=dtype),
            "model.positions": torch.arange(4),
            "model.nothing": torch.ones(0, 3, dtype=dtype),
        }

    return run_of(folder, at, [0, 10, 20, 30, 40, 50])


def test_a_run_on_disk_is_measured_by_tensor_type_and_in_all(tmp_path: Path):
    report = linearity(small_run(tmp_path), sample=None)
    assert report["steps"] == [0, 10, 20, 30, 40, 50]
    assert set(report["tensors"]) == {*(f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)), "model.norm.weight"}
    line = report["tensors"]["model.layers.0.mlp.up_proj.weight"]
    assert line["constant"] == 1 - 8 / 128 and line["r2_above"] == 1 and line["layer"] == 0
    assert line["skill"][0]["skill"]["secant"] == pytest.approx(1)
    assert set(report["types"]) == {"mlp.up_proj", "model.norm"} and report["types"]["mlp.up_proj"]["tensors"] == 2
    assert report["total"]["elements"] == 6000 + 128 + 16
    assert report["total"]["constant"] == pytest.approx((120 + 16) / 6144)
    assert sum(report["histogram"]["all"]) == pytest.approx(6008)
    json.dumps(report, allow_nan=False)


def test_the_order_in_which_checkpoints_are_given_does_not_matter(tmp_path: Path):
    found = small_run(tmp_path)
    assert linearity(found) == linearity(found[::-1])


def test_streaming_in_small_chunks_changes_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = small_run(tmp_path)
    for sample in (None, 500):
        whole = linearity(found, sample=sample)
        with monkeypatch.context() as patch:
            patch.setattr(module, "CHUNK", 600)
            assert compare(linearity(found, sample=sample), whole)


def test_a_sample_stands_for_its_tensor(tmp_path: Path):
    found = small_run(tmp_path)
    whole, name = linearity(found, sample=None), "model.layers.1.mlp.up_proj.weight"
    drawn = [linearity(found, sample=1000, seed=seed)["tensors"][name] for seed in range(12)]
    for key, error in (("r2_median", 0.012), ("kept", 0.01), ("slope_rms", 0.02), ("drift_rms", 0.01)):
        mean = sum(d[key] for d in drawn) / len(drawn)
        assert mean == pytest.approx(whole["tensors"][name][key], rel=error, abs=error if key == "r2_median" else 0)
    assert all(d["elements"] == 6000 for d in drawn)
    assert len({d["slope_rms"] for d in drawn}) == 12
    assert linearity(found, sample=1000, seed=3)["tensors"][name] == drawn[3]


def test_bfloat16_checkpoints_are_read_as_they_are_stored(tmp_path: Path):
    report = linearity(small_run(tmp_path, torch.bfloat16), sample=None)
    line = report["tensors"]["model.layers.0.mlp.up_proj.weight"]
    values = (1 + torch.arange(6) * 10 / 1024).bfloat16().double()
    slope, r2, *_ = of_paths.fit(values[:, None], torch.arange(6).double() * 10, ALL)
    assert line["slope_rms"] == pytest.approx(float(slope.abs()) * math.sqrt(8 / 128))
    assert line["r2_median"] == pytest.approx(float(r2), abs=1 / of_paths.BINS)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoints(tmp_path: Path):
    """Peak memory above the bare process, of 8 checkpoints of 32 MB each, all weights: a few chunks, not 256 MB."""
    big = torch.randn(4096, 2048)
    for step in range(8):
        save(tmp_path, step, {"layers.0.weight": big + step})
    code = """
import resource, sys
from extraopt.tools.checkpoints import find_checkpoints, linearity as module
module.CHUNK = 2**18
found = find_checkpoints(sys.argv[1])
module.linearity(found[:3], sample=10)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
module.linearity(found, sample=None)
print(peak() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 48, f"{grown:.0f} MB"


# the verdict


def verdict_of(values: torch.Tensor, steps: list[float]) -> str:
    paths = measure([values], steps, values.shape[1], keep=Filter())
    return " ".join(module.verdict(steps, paths, paths.summary()))


def test_the_verdict_of_a_walk_is_not_to_extrapolate():
    said = verdict_of(walks(EVEN, 20_000, 1e-5).float(), EVEN)
    assert "Do not extrapolate this run" in said and "extra_every" not in said


def test_the_verdict_of_a_line_names_the_longest_horizon_and_the_hyperparameters():
    said = verdict_of(torch.tensor(EVEN)[:, None] * torch.linspace(-1e-5, 1e-5, 100), EVEN)
    assert "up to 1100 steps, the longest horizon" in said and "extra_every=100, extra_steps=1000" in said


def test_the_verdict_tells_the_papers_jump_from_a_damped_one():
    drift = math.sqrt(0.35 / 0.65 / 100)  # cosine 0.35: below the break-even of an undamped jump
    values = walks(EVEN, 20_000) + drift * torch.tensor(EVEN)[:, None]
    said = verdict_of(values, EVEN)
    assert "the last drift, unchanged, nowhere" in said and "extra_every=" in said


def test_the_verdict_of_too_few_checkpoints_is_that():
    said = verdict_of(torch.tensor(EVEN[:4])[:, None] * torch.linspace(-1e-5, 1e-5, 100), EVEN[:4])
    assert "Too few checkpoints: 4" in said and "extra_every" not in said


def test_the_verdict_warns_of_chance_and_of_rounding_and_of_fading():
    line = torch.tensor(EVEN[:5])[:, None] * torch.linspace(-1e-5, 1e-5, 100)
    assert "agree by chance" in verdict_of(line, EVEN[:5])
    noise = verdict_of(walks(EVEN, 20_000, 1e-6).bfloat16(), EVEN)
    assert "Storage hides the path" in noise and "Storage" not in verdict_of(walks(EVEN, 20_000, 1e-6), EVEN)
    drift = torch.tensor(EVEN).clamp(max=700)[:, None] * torch.linspace(-1, 1, 20_000)
    assert "The direction fades" in verdict_of(walks(EVEN, 20_000) + drift, EVEN)


def test_the_verdict_of_a_run_that_stood_still():
    assert verdict_of(torch.ones(6, 10), EVEN[:6]).startswith("Nothing moved")


# bad input


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in this process: what a shell would get of it."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    line = ["extraopt", "linearity", *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", line)
        try:
            cli.run()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())


def test_the_command_prints_tables_or_one_json_object(tmp_path: Path):
    small_run(tmp_path / "run")
    shown = command(tmp_path / "run")
    assert shown.returncode == 0, shown.stderr
    assert all(word in shown.stdout for word in ("mlp.up_proj", "Direction:", "steps ahead"))
    result = command(tmp_path / "run", "--json", "--sample", 0, "--plots", tmp_path / "pictures", "--format", "svg")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["sample"] is None and report["total"]["elements"] == 6144
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"r2.svg", "skill.svg", "layers.svg"}
    again = command(*sorted((tmp_path / "run").iterdir()), "--json", "--sample", 0)
    assert json.loads(again.stdout) == report


def two_only(run: Path) -> None:
    for step in (20, 30, 40, 50):
        (run / f"checkpoint-{step}").rename(run / f"gone{step}x")


def other_shape(run: Path) -> None:
    save_file({"model.norm.weight": torch.ones(3)}, run / "checkpoint-30" / "model.safetensors")


def bad_weight(value: float) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        from safetensors.torch import load_file

        file = run / "checkpoint-40" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"][59, 99] = value  # the last one of the largest: no sample's luck
        save_file(tensors, file)

    return spoil


def truncated(run: Path) -> None:
    file = run / "checkpoint-20" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_integers(run: Path) -> None:
    for folder in run.iterdir():
        save_file({"ids": torch.arange(3)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (two_only, "2 checkpoints given"),
        (other_shape, "lacks"),
        (bad_weight(math.nan), "checkpoint-40: model.layers.1.mlp.up_proj.weight has weights that are NaN"),
        (bad_weight(-math.inf), "NaN or infinite"),
        (truncated, "cut short"),
        (only_integers, "no floating-point tensor"),
    ],
    ids=lambda x: getattr(x, "__name__", "says"),
)
def test_bad_checkpoints_end_in_one_line_and_exit_code_2(tmp_path: Path, spoil: Callable[[Path], None], says: str):
    small_run(tmp_path / "run")
    spoil(tmp_path / "run")
    result = command(tmp_path / "run", "--sample", 10)
    assert result.returncode == 2 and result.stdout == ""
    assert says in result.stderr and result.stderr.count("\n") == 1


def test_bad_arguments_end_in_one_line_before_any_work(tmp_path: Path):
    found = small_run(tmp_path / "run")
    for arguments, says in (
        ((tmp_path / "run", "--plots", tmp_path / "p", "--format", "jpeg"), "png, svg or pdf"),
        ((tmp_path / "run", "--plots", found[0][1] / "config.json"), "no folder for pictures"),
        ((tmp_path / "run", "--prompts", tmp_path / "p.jsonl"), "no such file"),
        ((tmp_path / "absent",), "absent"),
        ((found[0][1], found[1][1], found[0][1]), "both of step 0"),
    ):
        result = command(*arguments)
        assert result.returncode == 2 and says in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_bin_that_lists_tied_tensors_twice_counts_them_once(tmp_path: Path):
    for step in range(5):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        weight = torch.arange(12.0).view(3, 4) * (1 + step)
        torch.save({"model.embed_tokens.weight": weight, "lm_head.weight": weight}, path / "pytorch_model.bin")
    report = linearity(find_checkpoints(tmp_path))
    assert list(report["tensors"]) == ["model.embed_tokens.weight"] and report["total"]["elements"] == 12


def test_errors_are_checkpoint_errors(tmp_path: Path):
    found = small_run(tmp_path)
    with pytest.raises(CheckpointError, match="2 checkpoints"):
        linearity(found[:2])
    with pytest.raises(CheckpointError, match="both of step 3"):
        linearity([(3, path) for _, path in found])
