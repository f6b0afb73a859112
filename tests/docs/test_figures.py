"""Figures of the pages are those of committed results.

Three nets, from fine to coarse: sentences and rows that are made from the result here and must stand in the page;
figures of pages that only retell, each of which a page with a source must have; and sections with measured figures,
each of which must lead to a committed file. Tables between marker comments have tests beside their scripts.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pages import ROOT, links, prose, read

from extraopt.gate import momentum_coherence

RESULTS = ROOT / "benchmarks" / "results"
OPERATIONS = {
    "sums": "sums for the gates",
    "jump": "jump of the paper's rule",
    "retreat": "estimate and retreat",
    "trial": "trial of a length",
    "anchor": "new anchor",
}
Row = dict[str, Any]


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def page(name: str) -> str:
    """Its text in one line, cells of tables without padding."""
    return re.sub(r"\s+", " ", read(ROOT / name))


def pick(rows: Iterable[Row], **wanted: Any) -> Row:
    (row,) = (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))
    return row


def span(values: Iterable[float], digits: int = 1) -> str:
    """From the least to the largest."""
    found = sorted(values)
    return f"{found[0]:.{digits}f} to {found[-1]:.{digits}f}"


# --- sentences and rows, from their results ---------------------------------------------------------------------------


def costs() -> Iterator[str]:
    """Of docs/costs.md."""
    for row in result("step"):
        yield (
            f"| {row['list']} | {row['implementation']} | {row['threads']} | {row['adamw_ms']:.1f} ms | "
            f"{row['step_ratio']:.3f}x | {row['end_ms']:.1f} ms | {row['spread_percent']:.1f} % |"
        )
    for row in result("gpu/step"):
        if row["implementation"] != "for-loop":
            yield (
                f"| {row['list']} | {row['implementation']} | {row['adamw_ms']:.1f} ms | {row['step_ratio']:.3f}x | "
                f"{row['end_ms']:.1f} ms | {row['spread_percent']:.1f} % |"
            )
    for row in result("training_step"):
        yield (
            f"| {row['step_ms']:,.0f} ms | {row['end_ms']:.0f} ms | {row['share_percent']:.2f} % | "
            f"{row['share_percent_k10']:.2f} % |"
        )
    (row,) = result("gpu/training_step")
    yield (
        f"{row['step_ms']:.0f} ms) the end of a cycle is {row['share_percent_k10']:.1f} % at k = 10, "
        f"{row['share_percent_k20']:.1f} % at k = 20."
    )
    shares = [400 / (3 * micro_batches * 5) for micro_batches in (1, 4, 16, 64)]  # four forward passes to 15 M
    yield "| trust region, of training at most | " + " | ".join(f"{share:.1f} %" for share in shares) + " |"
    yield "two thirds of a step | " + " | ".join(f"{share / 3:.1f} %" for share in shares) + " |"
    yield f"at the 4.1 TB/s below {1.5e9 * 88 / 4.1e12 * 1000:.0f} ms, once in five steps"
    memory = result("gpu/memory")
    for name, label in (
        ("ExtraAdam", "ExtraAdam"),
        ("ExtraAdam, extra_offload", "ExtraAdam, `extra_offload=True`"),
        ("ExtraAdam, RL-Extra's rule", "the paper's rule"),
        ("ExtraAdam, RL-Extra's rule, extra_offload", "the paper's rule, `extra_offload=True`"),
    ):
        cells = []
        for dtype in "float32", "bfloat16":
            row = pick(memory, optimizer=name, dtype=dtype)
            host = row["host_bytes_per_parameter"]
            cells.append(f"{row['bytes_per_parameter']:.1f} | {host:.0f} | {row['end_ms']:.0f} ms")
        yield f"| {label} | {cells[0]} | {cells[1]} |"
    yield from kernels()


def kernels() -> Iterator[str]:
    """Of the kernels, in docs/costs.md."""
    for name in "kernel", "gpu/kernel":
        rows = [row for row in result(name) if row.get("operation", "cycle") == "cycle"]
        ours = [row for row in rows if row["provider"] == "extraopt"]
        large = [row for row in ours if row["elements"] > 100e6]
        lora, tiny = ([row for row in ours if row["list"] == kind] for kind in ("lora", "tiny"))

        def against(provider: str, chosen: list[Row], key: str = "ms", rows: list[Row] = rows) -> list[float]:
            same = ("list", "dtype", "threads")
            return [pick(rows, provider=provider, **{k: row[k] for k in same})[key] / row[key] for row in chosen]

        if name == "kernel":
            limits = [[row["ms"] / row["limit_ms"] for row in chosen] for chosen in (large, lora)]
            gpt2 = [row for row in ours if row["list"] == "gpt2"]
            faster = [100 * (1 / ratio - 1) for ratio in against("compile", gpt2)]
            yield f"it is {span(limits[0])} times that limit and {span(against('loop', large))} times as fast"
            yield f"on the adapter {span(limits[1])} and {span(against('loop', lora))}"
            yield f"it is {span(against('loop', tiny))} times as fast"
            yield f"is {span(faster, 0)} % faster still on GPT-2"
            yield f"is {max(row['extra_bytes'] for row in large + lora) / 2**20:.1f} MiB "
            for operation, label in OPERATIONS.items():
                each = [row for row in result(name) if row["operation"] == operation and row.get("limit_ms")]
                shares = [
                    [100 * row["limit_ms"] / row["ms"] for row in each if (row["list"] == "lora") == adapter]
                    for adapter in (False, True)
                ]
                yield f"| {label} | {span(shares[0], 0)} % | {span(shares[1], 0)} % |"
            host = [row for row in result(name) if row["list"] == "host"]
            (kept, check), (kept_of_many, check_of_many) = (
                [
                    f"{1000 * pick(host, tensors=count, operation=operation)['ms'] / count:.1f}"
                    for operation in ("kept cycle", "still fits")
                ]
                for count in (400, 10_000)
            )
            yield (
                f"is {kept} us a tensor in a list of 400, of which {check} is the check that nothing has moved, and "
                f"{kept_of_many} us in one of 10,000 ({check_of_many})"
            )
        else:
            used = [[100 * row["limit_ms"] / row["gpu_ms"] for row in chosen] for chosen in (large, lora)]
            yield f"run at {span(used[0], 0)} % of the bandwidth of a copy"
            yield f"{span(against('foreach', large, 'gpu_ms'))} times as fast as `torch._foreach`"
            yield f"adapter at {span(used[1], 0)} %"
            yield f"it is {span(against('foreach', large + lora))} times as fast as `torch._foreach`"


def checkpoints() -> Iterator[str]:
    """Of docs/checkpoints.md."""
    rows = result("merge")
    (a, b), (c, d) = (
        [pick(rows, dtype=dtype, tool=tool) for tool in ("extraopt", "mergekit")] for dtype in ("fp32", "bf16")
    )
    memory = [f"{row['peak_mb']:,.0f}" for row in (a, b, c, d)]
    yield "{} MB of memory against {} (fp32; {} against {} in bf16)".format(*memory)
    yield "{:.1f} s against {:.1f} ({:.1f} against {:.1f})".format(*(row["seconds"] for row in (a, b, c, d)))
    rows = result("decoding")["rows"]
    second, off = ([row["ratio"] for row in rows if row["earlier"] == of] for of in ("a second model", "LoRA off"))
    yield f"It costs {span(second)} times plain generation with a second model, {span(off)} times"


def reliability() -> Iterator[str]:
    """Of docs/reliability.md."""
    records = result("faults")["records"]
    kills, saving, near, finished, equal = (
        sum(record[key] for record in records)
        for key in ("kills", "kills_in_save", "kills_near_jump", "finished_runs", "equal_runs")
    )
    yield f"{kills} SIGKILLs"
    yield f"{saving} in mid-save, {near} within a step of a jump"
    yield f"{equal} of {finished} finished runs equal"
    mutants = result("mutation")
    killed = sum(mutant["killed_by"] is not None for mutant in mutants)
    yield f"| {killed} fail a test ({100 * killed / len(mutants):.1f} %); of the other {len(mutants) - killed},"
    mutants = result("mutation-cycles")
    killed = sum(mutant["killed_by"] is not None for mutant in mutants)
    yield f"{len(mutants)} places of `extraopt/` drawn at random so far"
    yield f"| {killed} fail a test ({100 * killed / len(mutants):.1f} %), two of them"


def watching() -> Iterator[str]:
    """Of docs/watch.md and docs/how-it-works.md, from the rule itself."""
    yield f"{momentum_coherence(5, 0.9, 0.9, 1):.2f} after"
    yield f"{momentum_coherence(5, 0.9, 0.9):.2f}"


def test_long_budgets_in_the_readme_are_those_of_their_table() -> None:
    table = read(ROOT / "docs" / "results.md").partition("<!-- made by benchmarks/rlvr/report.py rlvr-slow -->")[2]
    rows = [line.split(" | ") for line in table.partition("<!-- end -->")[0].strip().splitlines()[2:]]
    speeds = [float(row[-1].rstrip(" |x")) for row in rows]
    assert len(speeds) == 4
    told = f"{statistics.geometric_mean(speeds):.1f}x ({min(speeds):.1f} to {max(speeds):.0f})"
    assert f"three seeds | AdamW there | {told}" in page("README.md")


def of_32_completions() -> list[Row]:
    """The language model's rows in bf16 autocast."""
    settings = {"precision": "bf16 autocast", "completions": 32}
    return [row for row in result("grpo_llm") if settings.items() <= row["settings"].items()]


def curves() -> Iterator[str]:
    """Of docs/watch.md, from the two runs that it draws."""
    yield from watching()
    of = {"optimizer": "ExtraAdam", "task": "chain_sum", "tuning": "full", "seed": 0}
    rows = of_32_completions()
    well, little = ([jump for jump in pick(rows, **of, lr=lr)["jumps"] if jump[3]] for lr in (1e-6, 3e-6))
    lengths = [jump[3] for jump in well if jump[0] <= 40]
    yield f"jumps of {span(lengths, 0)} steps"
    longest = max(well, key=lambda jump: jump[3])
    yield f"gate of {longest[2]:.2f} a jump of {longest[3]:.0f} steps moves the weights as far as an open one of "
    yield f"an open one of {longest[2] * longest[3]:.0f}."
    yield f"but for one of {little[0][3]:.0f} steps at step {little[0][0]}, nothing jumps before step {little[1][0]}:"


MADE: dict[str, Callable[[], Iterator[str]]] = {
    "docs/costs.md": costs,
    "docs/checkpoints.md": checkpoints,
    "docs/reliability.md": reliability,
    "docs/watch.md": curves,
    "docs/how-it-works.md": watching,
}


@pytest.mark.parametrize("name", MADE)
def test_the_page_has_what_its_results_say(name: str) -> None:
    text = page(name)
    assert [sentence for sentence in MADE[name]() if re.sub(r"\s+", " ", sentence) not in text] == []


def test_the_average_of_the_toy_scale_benchmark_is_that_of_its_table() -> None:
    text = read(ROOT / "docs" / "results.md")
    table = text.partition("<!-- made by benchmarks/rlvr/report.py -->")[2].partition("<!-- end -->")[0]
    means = [float(row.split(" | ")[3].rstrip("x")) for row in table.strip().split("\n\n")[0].splitlines()[2:]]
    told = re.search(r"geometric mean over the (\w+) rows is ([\d.]+)x", page("docs/results.md"))
    assert told, "docs/results.md tells of no average any more"
    product = 1.0
    for mean in means:
        product *= mean
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    assert (told[1], told[2]) == (words[len(means)], f"{product ** (1 / len(means)):.1f}")


def test_the_readmes_sentences_on_the_language_model_are_those_of_its_rows() -> None:
    """AdamW's level at its end, the steps at which both come to it, and the lengths of the jumps."""
    text = page("README.md")
    told = re.search(
        r"over steps 131-150, by seed: ExtraAdam (\d+), (\d+), not by (\d+); AdamW (\d+), (\d+), (\d+)\.", text
    )
    signs = re.search(r"ExtraAdam ([\d., ]+) by step 100; AdamW ([\d., ]+) by step 150", text)
    jumps = re.search(r"Jumps on seed 0: (\d+) to (\d+) steps", text)
    assert told and signs and jumps, "README tells of something else by now"
    rows = of_32_completions()
    of = {"lr": 1e-6, "task": "chain_sum", "tuning": "full"}
    ours = [pick(rows, optimizer="ExtraAdam", seed=seed, **of) for seed in range(3)]
    adamw = [pick(rows, optimizer="AdamW", seed=row["seed"], machine=row["machine"], **of) for row in ours]

    def means(row: Row) -> list[tuple[int, float]]:
        """Of twenty steps each, by their last step."""
        rewards = [reward for _, reward in row["curve"]]
        return [(i, sum(rewards[i - 20 : i]) / 20) for i in range(20, len(rewards) + 1)]

    levels = [means(row)[-1][1] for row in adamw]
    first = [
        [next((step for step, mean in means(row) if mean >= level - 5e-4), None) for row in pair]
        for level, *pair in zip(levels, ours, adamw)
    ]
    assert first[2][0] is None
    expected = [first[0][0], first[1][0], ours[2]["curve"][-1][0], *(step for _, step in first)]
    assert told.groups() == tuple(map(str, expected))
    assert signs.groups() == tuple(", ".join(f"{row['minus'][-1][1]:.2f}" for row in own) for own in (ours, adamw))
    lengths = [jump[3] for jump in ours[0]["jumps"] if jump[3]]
    assert jumps.groups() == (f"{min(lengths):.0f}", f"{max(lengths):.0f}")


# --- pages that retell ------------------------------------------------------------------------------------------------

SOURCES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("results", "paper", "costs", "reliability", "checkpoints")),
]
RETELLING = ["index", "getting-started", "recipes", "watch", "how-it-works", "compatibility", "reproducing"]
FIGURE = re.compile(r"(?<![\w.,])(\d+\.\d+x?|\d+(?:\.\d+)? ?%)(?![\w.])")
# not measured: hyperparameters, versions, constants of the rule and of others (PPO's clip, AdamW's betas)
NO_MEASUREMENT = {"0.02", "0.1", "0.3", "0.4", "0.5", "0.8", "0.9",
                  "1 %", "0.2", "1.2", "2.7", "3.3", "3.10", "3.13", "2601.04537",
                  "1802.10551", "1.0", "0.71", "0.34", "0.25"}  # fmt: skip


def figures(text: str) -> set[str]:
    return set(FIGURE.findall(re.sub(r"\]\([^)]*\)|\$[^$]*\$", "]", prose(text))))


@pytest.mark.parametrize("name", RETELLING)
def test_a_figure_that_is_retold_stands_in_a_page_with_a_source(name: str) -> None:
    known = set().union(*(figures(read(ROOT / source)) for source in SOURCES))
    known |= {figure.rstrip("x") for figure in known} | NO_MEASUREMENT
    assert figures(read(ROOT / "docs" / f"{name}.md")) - known == set()


# --- sections and their files -----------------------------------------------------------------------------------------


def sections(file: Path) -> Iterator[tuple[str, str, str]]:
    """Heading, text up to the next heading, and all of the part of the page under the heading above it."""
    above = ""
    for part in re.split(r"^(?=#{2,4} )", prose(read(file)), flags=re.M):
        heading = part.splitlines()[0] if part.strip() else ""
        above = part if not heading.startswith("###") else above + part
        yield heading, part, above


@pytest.mark.parametrize("name", [*SOURCES, "docs/recipes.md", "docs/compatibility.md"])
def test_a_section_with_measured_figures_leads_to_a_committed_file(name: str) -> None:
    untraced = []
    for heading, text, above in sections(ROOT / name):
        measured = figures(text) - NO_MEASUREMENT
        led = [link.partition("#")[0] for link in links(above)]
        files = [((ROOT / name).parent / link).resolve() for link in led if link and "://" not in link]
        traced = any(file.is_relative_to(RESULTS) or file.is_relative_to(ROOT / "tests") for file in files)
        if measured and not traced:
            untraced.append((heading, sorted(measured)))
    assert untraced == []
