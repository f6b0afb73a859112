"""The tables of docs/paper.md and its picture, from the results of benchmarks/reproduce.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "reproduce.json"
PAGE = ROOT / "docs" / "paper.md"
# settings with every optimizer; all others are in the result
SHOWN = (
    ("SmolLM2-135M on chain_sum, GRPO, 32 a step, full, bf16 autocast", 1e-6),
    ("addition, GRPO, 512 a step, full", 3e-4),
    ("addition, GRPO, 64 a step, full", 1e-4),
)
COLOURS = {30: "#0072b2", 50: "#d55e00", (0, 30): "#0072b2", (0, 50): "#d55e00", (20, 150): "#009e73"}
Json = Any


def grid(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *lines))


def pair(values: Sequence[float], sign: str = "") -> str:
    """A mean and its standard error."""
    return f"{values[0]:{sign}.3f} ± {values[1]:.3f}"


def steps(value: float | None) -> str:
    """JSON has null where a reward was not reached."""
    return "-" if value is None else f"{value:.0f}"


def interval(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """A statistic with the ends of its interval."""
    return "{} ({} to {})".format(*(f"{value:{sign}.{digits}f}" for value in values))


def extrapolated(results: Json) -> str:
    """Weight extrapolation beside the run itself."""
    run = {row["step"]: row for row in results["path"]}
    found = {(row["second"], row["target"]): row for row in results["weights"]}
    seconds = sorted({second for second, _ in found})
    lines = []
    for step in sorted({*(s for s in run if s in (0, 10, 20)), *(target for _, target in found)}):
        cells = [run.get(step), *(found.get((second, step)) for second in seconds)]
        lines.append(
            [
                str(step),
                *(
                    c
                    for row in cells
                    for c in (("", "") if row is None else (pair(row["chance"]), pair(row["greedy"])))
                ),
            ]
        )
    heads = ["step", "trained: sampled", "greedy"]
    for second in seconds:
        heads += [f"from 0 and {second}: sampled", "greedy"]
    return grid(heads, lines)


def logits(results: Json) -> str:
    """Logits extrapolation by alpha, and the best of each pair beside the last checkpoint."""
    rows = results["logits"]
    pairs = list(dict.fromkeys((row["first"], row["second"]) for row in rows))
    lines = []
    for alpha in sorted({row["alpha"] for row in rows}):
        cells = [f"{alpha:g}"]
        for of in pairs:
            (row,) = (r for r in rows if (r["first"], r["second"], r["alpha"]) == (*of, alpha))
            cells += [f"{row['target']:.0f}", pair(row["chance"]), pair(row["greedy"]), f"{row['entropy']:.2f}"]
        lines.append(cells)
    heads = ["alpha"]
    for first, second in pairs:
        heads += [f"{first} and {second}: aims at step", "sampled", "greedy", "entropy"]
    best = []
    for of in pairs:
        own = [row for row in rows if (row["first"], row["second"]) == of]
        for name, what in (("chance", "sampled"), ("greedy", "greedy")):
            top = max(own, key=lambda row, name=name: row[name][0])
            cells = [
                f"{of[0]} and {of[1]}",
                what,
                f"{top['alpha']:g}",
                pair(top[name]),
                pair(top[f"{name}_less_last"], "+"),
            ]
            best.append(cells)
    last = grid(["checkpoints", "answers", "best alpha", "accuracy", "less the last checkpoint's"], best)
    return grid(heads, lines) + "\n\n" + last


def cooled(results: Json) -> str:
    """Sharpening alone, beside the extrapolation of the late pair."""
    late = results["logits"][-1]["first"], results["logits"][-1]["second"]
    lines = []
    for row in results["cooled"][1:]:
        (other,) = (r for r in results["logits"] if (r["first"], r["second"], r["alpha"]) == (*late, row["alpha"]))
        cells = [pair(of["chance_less_last"], "+") for of in (other, row)]
        entropies = [f"{of['entropy']:.2f}" for of in (other, row)]
        lines.append([f"{row['alpha']:g}", cells[0], entropies[0], cells[1], entropies[1]])
    heads = ["alpha", f"{late[0]} and {late[1]}: sampled, less the last checkpoint's", "entropy"]
    return grid([*heads, "(1 + alpha) logits of the last: sampled, less the last's", "entropy"], lines)


def linear(results: Json) -> str:
    """Shares of straight paths, beside noise and the paper's."""
    weights, tokens = results["linearity"]["total"], results["tokens"]["total"]
    lines = []
    for name, of, paper in (("weights", weights, (".85", "about 80 %")), ("log-probabilities", tokens, (".83", ""))):
        lines.append([f"{name}, all: median R^2", f"{of['r2_median']:.2f}", f"{of['null_median']:.2f}", ""])
        lines.append(
            [f"{name}, all: share above 0.7", f"{100 * of['r2_above']:.0f} %", f"{100 * of['null_above']:.0f} %", ""]
        )
        lines.append(
            [
                f"{name}: share that passes the paper's filter",
                f"{100 * of['kept']:.1f} %",
                f"{100 * of['null_kept']:.1f} %",
                "",
            ]
        )
        if of["kept_r2_median"] is not None:
            null = [
                "-" if of[f"null_kept_r2_{key}"] is None else of[f"null_kept_r2_{key}"] for key in ("median", "above")
            ]
            told = [n if isinstance(n, str) else f"{n:.2f}" for n in null]
            lines.append([f"{name}, those: median R^2", f"{of['kept_r2_median']:.2f}", told[0], paper[0]])
            told = [n if isinstance(n, str) else f"{100 * n:.0f} %" for n in null]
            lines.append([f"{name}, those: share above 0.7", f"{100 * of['kept_r2_above']:.0f} %", told[1], paper[1]])
    return grid(["", "here", "noise, measured alike", "paper"], lines)


def lora(results: Json) -> str:
    """The run with a LoRA adapter: how straight its factors are, and its updates extrapolated."""
    of = results["lora"]["linearity"]["total"]
    lines = [
        ["factors: median R^2", f"{of['r2_median']:.2f}", f"{of['null_median']:.2f}"],
        ["factors: share above 0.7", f"{100 * of['r2_above']:.0f} %", f"{100 * of['null_above']:.0f} %"],
        [
            "factors: share that passes the paper's filter",
            f"{100 * of['kept']:.1f} %",
            f"{100 * of['null_kept']:.1f} %",
        ],
    ]
    return grid(["", "here", "noise, measured alike"], lines) + "\n\n" + extrapolated(results["lora"])


def words(results: Json) -> str:
    """The words of sampled completions that moved most, of those said five times at least."""
    named = {"\n": "line break", "\n\n": "two line breaks", " ": "space", "<|im_end|>": "end of text"}
    lines = [
        [
            f"`{named.get(row['word'], row['word'])}`",
            f"{row['count']:.0f}",
            f"{row['change']:+.2f}",
            f"{row['r2_median']:.2f}",
        ]
        for row in [row for row in results["tokens"]["words"] if row["count"] >= 5][:8]
    ]
    return grid(["word", "times", "mean change of log p, nats", "median R^2"], lines)


def passes(results: Json) -> str:
    """pass@k of every policy there is."""
    lines = []
    for row in results["passes"]:
        for of, questions in (("all", "all"), ("negative", "with a negative answer")):
            cells = [pair(row[of][k]) for k in ("1", "8", "64")]
            name = [row["name"], str(row["step"]), f"{row['entropy']:.2f}"] if of == "all" else ["", "", ""]
            lines.append([*name, f"{questions} ({row[of]['questions']})", *cells])
    return grid(["policy", "step", "entropy", "questions", "pass@1", "pass@8", "pass@64"], lines)


def budgets(results: Json) -> str:
    """Reward at five budgets, less AdamW's where it is another's, and steps to fixed rewards."""
    parts = []
    for row in (row for row in results["budgets"] if (row["setting"], row["lr"]) in SHOWN):
        count, first = len(row["seeds"]), row["optimizers"][0]
        heads = [f"{row['setting']}, lr {row['lr']:g}, {count} seeds: reward at step"]
        heads += [f"{b[0]:.0f}" for b in first["budgets"]] + [f"steps to {m[0]:g}" for m in first["steps_to"]]
        lines = []
        for of in sorted(row["optimizers"], key=lambda of: of["optimizer"]):
            less = of.get("budgets_less_adamw", [None] * len(of["budgets"]))
            cells = [
                f"{b[1]:.2f}" + (f", {interval(gain[1:], sign='+')}" if gain else "")
                for b, gain in zip(of["budgets"], less)
            ]
            for _, median, low, high, reached in of["steps_to"]:
                seen = f"{steps(median)} ({steps(low)} to {steps(high)})" if reached else "-"
                cells.append(seen + (f", {reached} of {count}" if 0 < reached < count else ""))
            lines.append([of["optimizer"], *cells])
        parts.append(grid(heads, lines))
    return "\n\n".join(parts)


def sigmoids(results: Json) -> str:
    """Asymptotes and midpoints of AdamW's and ExtraAdam's curves."""
    lines = []
    for row in results["budgets"]:
        by_name = {of["optimizer"]: of for of in row["optimizers"]}
        if "ExtraAdam" not in by_name or not all(by_name[of]["sigmoid"]["rises"] for of in ("AdamW", "ExtraAdam")):
            continue
        fits = [by_name[of]["sigmoid"] for of in ("AdamW", "ExtraAdam")]
        lines.append(
            [
                f"{row['setting']}, {row['lr']:g}", str(row["steps"]), str(len(row["seeds"])),
                *(interval(fit["asymptote"]) + "*" * fit["bound"] for fit in fits),
                *(interval(fit["midpoint"], 0) for fit in fits),
                interval(by_name["ExtraAdam"]["asymptote_less_adamw"], sign="+"),
            ]
        )  # fmt: skip
    heads = ["setting, learning rate", "steps", "seeds", "A, AdamW", "A, ExtraAdam", "C, AdamW", "C, ExtraAdam"]
    return grid([*heads, "A, ExtraAdam less AdamW"], lines)


def shares(results: Json) -> str:
    """Where a step's time goes."""
    clock, jumps = results["extra"]["clock"], results["extra"]["jumps"]
    # the clock may be of fewer steps than the run
    searched = sum(step <= clock["steps"] and gate > 0 for step, _, gate, *_ in jumps)
    named = {name: f"{100 * share:.1f} %" for name, share in clock["shares"].items()}
    named["steps, searches"] = f"{clock['steps']}, {searched}"
    named["one search"] = f"{clock['shares']['trust region'] * clock['steps'] / searched:.2f} steps"
    return grid(list(named), [list(named.values())])


def summary(results: Json) -> str:
    """Figure by figure: here, there, and what differs most."""
    weights, tokens = results["linearity"]["total"], results["tokens"]["total"]
    run = {row["step"]: row for row in results["path"]}
    tops = []
    for second in sorted({row["second"] for row in results["weights"]}):
        top = max((r for r in results["weights"] if r["second"] == second), key=lambda r: r["chance"][0])
        there = run.get(top["target"])
        beside = f", the run there {there['chance'][0]:.3f}" if there else ""
        seen = f"{top['target']} = {top['target'] / second:.1f} x {second}"
        tops.append(f"step {seen}: {top['chance'][0]:.3f}{beside}")
    last_pair = results["logits"][-1]
    own = [r for r in results["logits"] if (r["first"], r["second"]) == (last_pair["first"], last_pair["second"])]
    best = {name: max(own, key=lambda r, name=name: r[name][0]) for name in ("chance", "greedy")}
    (toy,) = (r for r in results["budgets"] if (r["setting"], r["lr"]) == SHOWN[1])
    to_half = {of["optimizer"]: of["steps_to"][0] for of in toy["optimizers"]}
    llm = [r for r in results["budgets"] if (r["setting"], r["lr"]) == SHOWN[0]]
    ends = []
    for row in (*llm, toy):
        for of in row["optimizers"]:
            if of["optimizer"] in ("ExtraAdam", "RL-Extra (20,100) kept", "RL-Extra (100,100) kept"):
                where = "language model" if row["language_model"] else "toy scale"
                at_end = of["budgets_less_adamw"][-1]
                ends.append(f"{of['optimizer']}, {where}: {at_end[1]:+.2f} at step {at_end[0]:.0f}")
    mark = to_half["AdamW"][0]
    less = [
        f"{what} {pair(best[of][f'{of}_less_last'], '+')}" for what, of in (("sampled", "chance"), ("greedy", "greedy"))
    ]
    reached = [f"{of}: {steps(told[1])}" for of, told in to_half.items() if "reset" not in of]
    lines = [
        [
            "median R^2 of weights",
            f"{weights['r2_median']:.2f}, noise {weights['null_median']:.2f}",
            ".85 of those that pass the filter",
            f"all weights here; {100 * weights['kept']:.1f} % pass: the filter asks for 1e-4, and 150 steps are few",
        ],
        [
            "share of weights above 0.7",
            f"{100 * weights['r2_above']:.0f} %, noise {100 * weights['null_above']:.0f} %",
            "about 80 % of those",
            "the same",
        ],
        [
            "median R^2 of log-probabilities that moved by 0.2",
            f"{tokens['kept_r2_median']:.2f}, noise {tokens['null_kept_r2_median']:.2f}",
            ".83",
            f"{results['tokens']['examples']} completions of at most 4 tokens",
        ],
        [
            "where extrapolated weights are best",
            "; ".join(tops),
            "900 = 3.0 x 300; 1100 = 1.8 x 600; 1800 = 1.3 x 1400",
            "AIME24 there, the probability of a right answer here",
        ],
        [
            "best extrapolated logits less the last checkpoint",
            ", ".join(less),
            "AIME24 .446 less .419; four benchmarks on average 4 % more",
            f"steps {own[0]['first']} and {own[0]['second']} here, 200 and 1400 there",
        ],
        [
            "reward less AdamW's at the last budget",
            "; ".join(ends),
            "AIME24 .412 less .383 at 1,200 steps",
            "means over seeds here, one run there",
        ],
        [
            f"steps to a fixed reward ({mark:g} here)",
            "; ".join(reached),
            "to .38: 1100, (100,100) 700, (20,100) 180; to .40: 1400, 900, not reached",
            "medians over seeds at toy scale, 512 completions, AdamW's best learning rate",
        ],
    ]
    return grid(["figure", "here", "paper", "what differs"], lines)


TABLES: dict[str, tuple[tuple[str, ...], Callable[[Json], str]]] = {
    "summary": (("linearity", "tokens", "path", "weights", "logits", "budgets"), summary),
    "linearity": (("linearity", "tokens"), linear),
    "words": (("tokens",), words),
    "lora": (("lora",), lora),
    "weights": (("path", "weights"), extrapolated),
    "logits": (("logits",), logits),
    "cooled": (("logits", "cooled"), cooled),
    "passes": (("passes",), passes),
    "budgets": (("budgets",), budgets),
    "sigmoids": (("budgets",), sigmoids),
    "shares": (("extra",), shares),
}


def made(results: Json, name: str) -> str:
    """A table, or that its stages have not been made."""
    stages, table = TABLES[name]
    return table(results) if all(stage in results for stage in stages) else "Not made yet."


def marks(name: str) -> tuple[str, str]:
    """What a table stands between."""
    return f"<!-- made by benchmarks/reproduce.py: {name} -->", f"<!-- end of {name} -->"


def picture(results: Json, path: Path) -> None:
    """Both extrapolations against the steps they aim at, beside the run itself."""
    figure = Figure(figsize=(11, 3.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    run = [(row["step"], *row["chance"]) for row in results["path"]]
    for axes in left, right:
        axes.plot([r[0] for r in run], [r[1] for r in run], color="#000000", lw=2, label="the trained run")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.2)
    for second in sorted({row["second"] for row in results["weights"]}):
        own = [row for row in results["weights"] if row["second"] == second]
        x, y, error = ([row["target"] for row in own], *([row["chance"][i] for row in own] for i in (0, 1)))
        left.errorbar(x, y, error, fmt="o-", ms=4, color=COLOURS[second], label=f"weights, from steps 0 and {second}")
    for of in dict.fromkeys((row["first"], row["second"]) for row in results["logits"]):
        own = [row for row in results["logits"] if (row["first"], row["second"]) == of and row["target"] <= 360]
        x, y, error = ([row["target"] for row in own], *([row["chance"][i] for row in own] for i in (0, 1)))
        right.errorbar(x, y, error, fmt="o-", ms=4, color=COLOURS[of], label=f"logits, from steps {of[0]} and {of[1]}")
    left.set(xlabel="step, or step aimed at", ylabel="probability of a right answer")
    right.set(xlabel="step, or step aimed at")
    for axes in left, right:
        axes.legend(frameon=False, fontsize=8, loc="lower center")
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def write(results: Json) -> None:
    """Put the tables into the page, and the picture beside the results."""
    text = PAGE.read_text()
    for name in TABLES:
        begin, end = marks(name)
        before, mark, rest = text.partition(begin)
        if not mark:
            raise ValueError(f"{PAGE} has no {begin}")
        text = f"{before}{begin}\n{made(results, name)}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)
    if all(stage in results for stage in ("path", "weights", "logits")):
        picture(results, RESULT.with_suffix(".png"))
