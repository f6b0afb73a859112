"""The comparison of benchmarks/rlvr in small, one seed a process: see test_rlvr.py."""

from __future__ import annotations

import copy
from typing import Any

import torch


def compare_once(seed: int) -> dict[tuple[str, float], tuple[bool, float]]:
    """Noisy GRPO on addition, 100 steps: of each run whether it collapsed, and what accuracy it gained."""
    import compare
    import lab
    import report

    torch.set_num_threads(1)
    cell = compare.Cell("addition", "GRPO", 64, "full", 100, (1e-4, 3e-4), (), ())
    task = lab.TASKS["addition"](seed)
    weak = lab.pretrain(task, seed, steps=300)

    def weak_policy(name: str, of: int) -> tuple[Any, torch.nn.Module]:
        return task, copy.deepcopy(weak)

    compare.weak_policy = weak_policy
    gains = {}
    for name, lr in ("AdamW", 1e-4), ("ExtraAdam", 1e-4), ("ExtraAdam", 3e-4):
        row = compare.run(cell, name, lr, seed)
        gains[name, lr] = row["collapsed"], report.final(row) - row["curve"][0][1]
    return gains
