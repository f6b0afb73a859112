"""Pictures: written in the format asked for, with what they claim to show, of every kind of report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib")

from matplotlib.figure import Figure  # noqa: E402

from extraopt.tools import plots  # noqa: E402
from extraopt.tools.checkpoints.paths import Filter, measure  # noqa: E402

STEPS = [0, 10, 20, 30, 40, 50, 60]
HEADS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
KINDS = [f"{part}.{kind}" for part, kind in (("self_attn", "q_proj"), ("mlp", "up_proj"), ("model", "embed_tokens"))]


def report(still: bool = False, layers: int = 3) -> dict[str, Any]:
    """As `linearity` makes it, of walks with a drift; the tensors of the last kind lie outside the layers."""
    t = torch.tensor(STEPS, dtype=torch.float64)
    tensors = {}
    for kind in KINDS:
        for layer in range(layers if kind != KINDS[-1] else 1):
            generator = torch.Generator().manual_seed(layer)
            noise = torch.randn(len(t), 300, dtype=torch.float64, generator=generator).cumsum(0)
            values = (torch.zeros_like(noise) if still else noise) + (0 if still else 0.05 * t[:, None])
            paths = measure([values], STEPS, 300, keep=Filter())
            where = {"type": kind, "layer": None if kind == KINDS[-1] else layer}
            tensors[f"{kind}.{layer}"] = paths.summary(horizons=False) | where
    return {
        "steps": STEPS,
        "total": paths.summary(),
        "filter": {"min_move": 1e-4, "min_values": 4},
        "histogram": paths.histogram(),
        "tensors": tensors,
    }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


TOKENS = {
    "steps": STEPS,
    "tokens": [
        {"text": text, "context": "so $x_1$ =\n", "r2": 0.9, "log_probs": [-0.1 * i for i in range(7)]}
        for text in (" 7", "$", "\n", "_{", "数")
    ],
}


@pytest.mark.parametrize("suffix", HEADS)
@pytest.mark.parametrize("still", [False, True], ids=["moving", "still"])
def test_every_picture_is_drawn_in_the_format_of_its_name(tmp_path: Path, suffix: str, still: bool):
    made = report(still)
    for name in ("r2_histogram", "skill", "layer_map"):
        path = tmp_path / f"{name}{suffix}"
        getattr(plots, name)(made, path)
        assert path.read_bytes().startswith(HEADS[suffix]) and path.stat().st_size > 2000


@pytest.mark.filterwarnings("ignore:Glyph")
def test_token_curves_take_any_text(tmp_path: Path, drawn: list[Figure]):
    plots.token_curves(TOKENS, tmp_path / "tokens.png")
    (axes,) = drawn[0].axes
    assert [line.get_ydata()[-1] for line in axes.lines] == pytest.approx([-0.6] * 5)
    assert "nats" in axes.get_ylabel() and "step" in axes.get_xlabel()


def test_the_histogram_shows_run_and_null_with_their_medians(tmp_path: Path, drawn: list[Figure]):
    made = report()
    plots.r2_histogram(made, tmp_path / "r2.png")
    for axes, run, null in zip(drawn[0].axes, ("r2_median", "kept_r2_median"), ("null_median", "null_kept_r2_median")):
        texts = [text.get_text().strip() for text in axes.get_legend().get_texts()]
        assert texts[0] == "this run" and texts[2] == "walks without a direction"
        for shown, key in ((texts[1], run), (texts[3], null)):
            assert float(shown.removeprefix("median ")) == pytest.approx(made["total"][key], abs=0.02)
    assert "100.0% of weights" in drawn[0].axes[1].get_title()


def test_skill_below_the_axis_is_told(tmp_path: Path, drawn: list[Figure]):
    made = report()
    made["total"]["skill"][0]["skill"]["secant"] = -7.3
    plots.skill(made, tmp_path / "skill.png")
    left, right = drawn[0].axes
    assert any("lowest -7.3" in text.get_text() for text in left.texts)
    assert min(min(line.get_ydata()) for line in left.lines) >= plots.LOWEST
    assert list(right.lines[-1].get_ydata()) == made["total"]["coherence"]


@pytest.mark.parametrize("layers", [1, 3, 40])
def test_the_map_has_a_cell_for_each_kind_and_layer(tmp_path: Path, drawn: list[Figure], layers: int):
    made = report(layers=layers)
    plots.layer_map(made, tmp_path / "layers.png")
    left = drawn[0].axes[0]
    grid = left.images[0].get_array()
    assert grid.shape == (3, layers + 1)
    assert [label.get_text() for label in left.get_yticklabels()] == KINDS
    tensor = made["tensors"][f"{KINDS[1]}.{layers - 1}"]
    assert grid[1, layers] == pytest.approx(tensor["r2_median"] - tensor["null_median"])
    assert grid.mask[2, 1] and not grid.mask[2, 0]  # the embedding is in no layer
