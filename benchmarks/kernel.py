"""The end of a cycle over lists of tensors: sums for the gate, retreat, trial, anchor, by several implementations.

    python benchmarks/kernel.py --quick
    python benchmarks/kernel.py --json benchmarks/results/kernel.json     # and a picture beside it

The limit is what the bytes that ExtraAdam moves would take at the bandwidth of a copy in the same run: with one length
its four operations read and write 13 numbers an element. Times are medians over rounds in which the implementations
take turns, so that a busy moment of the machine hits all of them. `extraopt` is what ExtraAdam calls with one length,
on tables made anew; `loop` is the rule as one would type it, tensor by tensor; `foreach` the same by torch._foreach;
`compile` is the loop through torch.compile, on a CPU. On a GPU most of the time from call to result is the host's
(Python and launches), so beside it stands how long the GPU was at work, which is what the picture shows. Extra memory
is the peak above what the lists take.

Rows with another operation than "cycle" are of `extraopt` alone, on tables that are kept as an optimizer keeps them:
one operation over the list beside what its own bytes would take ("jump" is the paper's rule, which has no estimates);
with "one pass" the whole cycle beside what reading and writing weights, anchor and estimate once would take; and with
"host" of what each costs a tensor of 16 elements, in lists of 400 and 10,000 on one thread, where "kept cycle" is all
that a cycle with two trials calls.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import step
import torch
import typer
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from extraopt import __version__, kernels

Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]
WEIGHT, RATIO, RETREAT = 0.05, 4.0, 0.4
COLOURS = {"extraopt": "#0072b2", "foreach": "#e69f00", "loop": "#94a3b8", "compile": "#009e73"}


def llama(width: int, kv: int, hidden: int, layers: int, ranks: int, tied: bool) -> list[tuple[int, ...]]:
    """One rank's shards of a Llama: each parameter is cut along its first dimension."""
    block = [(width, width), (kv, width), (kv, width), (width, width), (hidden, width), (hidden, width)]
    block += [(width, hidden), (width,), (width,)]
    whole = [(128256, width)] * (1 if tied else 2) + block * layers + [(width,)]
    return [(-(-first // ranks), *rest) for first, *rest in whole]


LISTS: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "gpt2": step.gpt2_small,
    "llama-1b/8": lambda: llama(2048, 512, 8192, 16, 8, True),
    "llama-8b/64": lambda: llama(4096, 1024, 14336, 32, 64, False),
    "lora": step.lora,
    "tiny": lambda: [(32,)] * 10_000,
}


# numbers that an operation reads and writes for each element; "one pass": the least for all of a cycle
TRAFFIC = {"sums": 3, "jump": 4, "retreat": 5, "trial": 3, "anchor": 2, "one pass": 6}
CYCLE = ("sums", "retreat", "trial", "anchor")  # what ExtraAdam calls, with one length


def extraopt(p: list[Tensor], a: list[Tensor], v: list[Tensor]) -> Tensor:
    lists = kernels.TensorLists(p, a, v)
    sums = lists.sums()
    lists.retreat_([RETREAT] * len(p), [WEIGHT] * len(p))
    lists.trial_([RATIO] * len(p))
    lists.anchor_()
    return sums


def loop(ps: list[Tensor], anchors: list[Tensor], vs: list[Tensor]) -> Tensor:
    sums = []
    for p, a, v in zip(ps, anchors, vs):
        d = p - a
        sums.append(torch.stack([(d * v).sum(), (d * d).sum(), (v * v).sum(), (p * p).sum()]))
    result = torch.stack(sums)
    for p, a, v in zip(ps, anchors, vs):
        d = p - a
        v.lerp_(d, WEIGHT)
        a.copy_(p).sub_(d, alpha=RETREAT)
        p.copy_(a).add_(v, alpha=RATIO)
        a.copy_(p)
    return result


def foreach(p: list[Tensor], a: list[Tensor], v: list[Tensor]) -> Tensor:
    d = torch._foreach_sub(p, a)
    dots = torch.stack([x.sum() for x in torch._foreach_mul(d, v)])
    norms = [torch.stack(torch._foreach_norm(x)) for x in (d, v, p)]
    torch._foreach_lerp_(v, d, WEIGHT)
    torch._foreach_copy_(a, p)
    torch._foreach_add_(a, d, alpha=-RETREAT)
    torch._foreach_copy_(p, a)
    torch._foreach_add_(p, v, alpha=RATIO)
    torch._foreach_copy_(a, p)
    return torch.stack([dots, *norms])


def make(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> Lists:
    generator = torch.Generator(device).manual_seed(0)

    def some(scale: float) -> list[Tensor]:
        return [torch.randn(s, generator=generator, device=device).mul_(scale).to(dtype) for s in shapes]

    p = some(0.02)
    return p, [t + d for t, d in zip(p, some(1e-4))], some(1e-4)


class Calls(TorchDispatchMode):
    """Counts torch's operations."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], Any], device: str) -> tuple[int, float | None]:
    """Kernels launched on a GPU and the milliseconds that they ran; torch operations on a CPU, and None."""
    if device == "cpu":
        with Calls() as calls:
            call()
        return calls.n, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(events), sum(event.time_range.elapsed_us() for event in events) / 1e3


def extra_memory(call: Callable[[], Any], device: str) -> int:
    """The peak in bytes above what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    # profile.events() leaves out what is allocated within an operation
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0))


def measure(name: str, dtype: torch.dtype, device: str, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    lists = make(LISTS[name](), dtype, device)
    elements = sum(p.numel() for p in lists[0])
    providers: dict[str, Callable[..., Any]] = {"extraopt": extraopt, "foreach": foreach}
    if device == "cpu" or len(lists[0]) < 1000:  # to profile 150,000 launches takes minutes
        providers["loop"] = loop
    if compiled:
        torch._dynamo.reset()
        providers["compile"] = torch.compile(loop, dynamic=False)
    # a copy larger than any cache
    flat = torch.randn(1 << 28 if device == "cuda" else max(1 << 24, elements // 4), device=device)
    other = torch.empty_like(flat)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: other.copy_(flat)}
    calls |= {key: (lambda f=f: f(*lists)) for key, f in providers.items()}
    times = medians(calls, rounds, device)
    bandwidth = 2 * flat.nbytes / times["copy"]  # bytes a millisecond
    needed = sum(TRAFFIC[key] for key in CYCLE) * elements * dtype.itemsize
    work = {key: launches(calls[key], device) for key in providers}
    return [
        {
            "list": name,
            "tensors": len(lists[0]),
            "elements": elements,
            "dtype": str(dtype).removeprefix("torch."),
            "provider": key,
            "operation": "cycle",
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "ms": times[key],
            "limit_ms": needed / bandwidth,
            "gb_per_s": needed / times[key] / 1e6,
            "launches": work[key][0],
            "gpu_ms": work[key][1],
            "extra_bytes": extra_memory(calls[key], device),
        }
        for key in providers
    ]


def operations(p: list[Tensor], a: list[Tensor], v: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """All that a kept `TensorLists` can be asked, by name."""
    lists, papers, n = kernels.TensorLists(p, a, v), kernels.TensorLists(p, a, None), len(p)
    ratios, retreats, weights = (torch.full((n,), x, dtype=torch.float64) for x in (RATIO, RETREAT, WEIGHT))
    return {
        "still fits": lambda: lists.still_fits(p, a, v),
        "sums": lists.sums,
        "jump": lambda: papers.jump_(ratios),
        "retreat": lambda: lists.retreat_(retreats, weights),
        "trial": lambda: lists.trial_(ratios),
        "anchor": lists.anchor_,
    }


def medians(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Milliseconds of each call, which take turns."""
    times: dict[str, list[float]] = {key: [] for key in calls}
    for round in range(rounds + 1):
        for key, call in calls.items():
            ms = step.milliseconds(call, device)
            if round:  # the first one warms up, and compiles
                times[key].append(ms)
    return {key: statistics.median(ts) for key, ts in times.items()}


def measure_operations(name: str, dtype: torch.dtype, device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each operation over a list, beside the limit of its own bytes."""
    lists = make(LISTS[name](), dtype, device)
    elements = sum(p.numel() for p in lists[0])
    flat = torch.randn(1 << 28 if device == "cuda" else max(1 << 24, elements // 4), device=device)
    other = torch.empty_like(flat)
    calls = operations(*lists)
    calls["one pass"] = lambda: [calls[key]() for key in CYCLE]
    ms = medians({"copy": lambda: other.copy_(flat)} | {key: calls[key] for key in TRAFFIC}, rounds, device)
    limits = {key: n * elements * dtype.itemsize / (2 * flat.nbytes / ms["copy"]) for key, n in TRAFFIC.items()}
    kind = {"list": name, "tensors": len(lists[0]), "elements": elements, "dtype": str(dtype).removeprefix("torch.")}
    where = {"device": torch.cuda.get_device_name() if device == "cuda" else platform.machine()}
    where |= {"threads": torch.get_num_threads()}
    return [
        {**kind, "provider": "extraopt", "operation": key, **where, "ms": ms[key], "limit_ms": limits[key]}
        | {"share_of_limit": limits[key] / ms[key], "gpu_ms": launches(calls[key], device)[1]}
        for key in TRAFFIC
    ]


def measure_host(tensors: int, device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each call on a list of tiny tensors: nanoseconds a tensor until it returns."""
    p, a, v = make([(16,)] * tensors, torch.float32, device)
    calls = operations(p, a, v)
    cycle = [calls[key] for key in ("still fits", "sums", "retreat", "trial", "trial", "anchor")]
    calls |= {"kept cycle": lambda: [call() for call in cycle], "new tables": lambda: kernels.TensorLists(p, a, v)}
    ms = medians(calls, rounds, device)
    return [
        {"list": "host", "tensors": tensors, "elements": 16 * tensors, "dtype": "float32", "provider": "extraopt"}
        | {"operation": key, "device": platform.machine(), "threads": torch.get_num_threads()}
        | {"ms": ms[key], "ns_per_tensor": 1e6 * ms[key] / tensors}
        for key in calls
    ]


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Times over the limit, an axis for each list."""
    names = list(dict.fromkeys(row["list"] for row in rows))
    kinds = list(dict.fromkeys((row["dtype"], row["threads"]) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    figure = Figure(figsize=(2 + 2.2 * len(names), 3.6), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for i, provider in enumerate(providers):
            own = {(r["dtype"], r["threads"]): r for r in rows if (r["list"], r["provider"]) == (name, provider)}
            heights = [
                (own[kind]["gpu_ms"] or own[kind]["ms"]) / own[kind]["limit_ms"] if kind in own else 0 for kind in kinds
            ]
            places = [j + (i - (len(providers) - 1) / 2) * 0.8 / len(providers) for j in range(len(kinds))]
            axes.bar(places, heights, 0.8 / len(providers), color=COLOURS[provider], label=provider)
        if max(bar.get_height() for bar in axes.patches) > 50:
            axes.set_yscale("log")
        axes.axhline(1, color="#334155", lw=0.8, ls=":")
        axes.set_title(name)
        axes.set_xticks(range(len(kinds)), [f"{d}\n{t} thr." for d, t in kinds], fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("time on the GPU / limit" if rows[0]["gpu_ms"] else "time / limit")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False, fontsize=8
    )
    figure.savefig(path)


def main(
    quick: Annotated[bool, typer.Option(help="Two lists, few rounds, no compiler.")] = False,
    threads: Annotated[list[int] | None, typer.Option(help="Thread counts on a CPU.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here, a picture beside.")] = None,
) -> None:
    """Measure the end of a cycle over lists of tensors."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = threads or ([1] if quick or device == "cuda" else [1, 2])
    names = ["lora", "tiny"] if quick else list(LISTS)
    jobs = [(n, d, t) for t in counts for n in names for d in (torch.float32, torch.bfloat16)]
    rows, single = [], []
    for name, dtype, count in track(jobs, "measuring", console=Console(stderr=True)):
        torch.set_num_threads(count)
        # to compile a list takes a minute and more
        compiled = not quick and name == "gpt2" and device == "cpu"
        rows += measure(name, dtype, device, 5 if quick else 15, compiled)
        if name != "tiny":
            single += measure_operations(name, dtype, device, 5 if quick else 15)
    torch.set_num_threads(1)
    host = [row for n in (400, 10_000) for row in measure_host(n, device, 15 if quick else 51)]

    title = f"extraopt {__version__}, torch {torch.__version__}, {rows[0]['device']}"
    table = Table(title=title, box=box.MARKDOWN)
    texts, numbers = ("list", "dtype", "implementation"), ("threads", "time", "on the GPU", "limit", "time / limit")
    for column in (*texts, *numbers, "calls", "memory"):
        table.add_column(column, justify="left" if column in texts else "right")
    for row in rows:
        table.add_row(
            row["list"], row["dtype"], row["provider"], str(row["threads"]), f"{row['ms']:.2f} ms",
            f"{row['gpu_ms']:.2f} ms" if row["gpu_ms"] else "", f"{row['limit_ms']:.2f} ms",
            f"{row['ms'] / row['limit_ms']:.2f}", str(row["launches"]),
            f"{row['extra_bytes'] / 2**20:.1f} MiB",
        )  # fmt: skip
    Console(width=120).print(table)

    table = Table("list", "dtype", "threads", *TRAFFIC, title="share of the limit, each operation", box=box.MARKDOWN)
    for i in range(0, len(single), len(TRAFFIC)):
        shares = [f"{100 * row['share_of_limit']:.0f}%" for row in single[i : i + len(TRAFFIC)]]
        table.add_row(single[i]["list"], single[i]["dtype"], str(single[i]["threads"]), *shares)
    Console(width=120).print(table)

    calls = list(dict.fromkeys(row["operation"] for row in host))
    table = Table("tensors", *calls, title="host time, ns a tensor", box=box.MARKDOWN)
    for i in range(0, len(host), len(calls)):
        table.add_row(str(host[i]["tensors"]), *(f"{row['ns_per_tensor']:.0f}" for row in host[i : i + len(calls)]))
    Console(width=120).print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text("[\n" + ",\n".join(map(json.dumps, rows + single + host)) + "\n]\n")
        picture(rows, json_file.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
