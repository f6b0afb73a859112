"""The table of where ExtraAdam is tested, made from what the tests themselves reported.

    make test ARGS="--junitxml build/tests.xml" && .venv/bin/python tests/common/support.py build/tests.xml

A row names the tests that stand for it by a pattern of `file::name`. It is an error if one has no passed test or a
failed one.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- made by tests/common/support.py -->", "<!-- end of support -->"

# where; tests; by whom they are run; known limits
ROWS = [
    ("`torch.optim`'s interface", r"test_torch_harness::", "torch's own optimizer tests", ""),
    (
        "your own loop: closures, hooks, groups, copies, resume",
        r"test_(contract|bugs_step|bugs_state|jump|stateful)::",
        "the optimizer itself",
        "",
    ),
    ("learning-rate schedulers", r"lrsched|scheduler", "torch's schedulers", ""),
    ("gradient scalers", r"::test_(an|the_accelerated.*)_overflow|scaler", "torch, accelerate", ""),
    ("`torch.compile` of the step", r"test_compile::|compiled_step", "torch", "the end of a cycle runs outside of it"),
    (
        "HF `Trainer`: accumulation, clipping, resume, evaluation",
        r"bugs_trainers::test_trainer|the_trainer_of_transformers|hf_trainer|integrations_transformers",
        "transformers",
        "",
    ),
    (
        "TRL `SFT`, `Reward`, `DPO`, `KTO`, `GRPO`, `RLOOTrainer`",
        r"test_grpo_trainer|test_a_trl_trainer|"
        r"integrations_transformers::test_(a_jump_falls|use_extra_adam|a_resumed_run|ranks_take)",
        "TRL, two ranks too",
        "all but SFT and Reward take no optimizer class: `use_extra_adam`",
    ),
    (
        "PEFT: LoRA, rsLoRA, DoRA, LoRA+, bf16 and 4-bit bases, several adapters, in a Trainer",
        r"(trainers|transformers|examples)::.*(lora|adapter|grpo)|test_jumping_both_factors|"
        r"peft_trainers::(?!test_a_trl_trainer)",
        "PEFT; bitsandbytes where installed",
        "A and B jump one by one",
    ),
    (
        "accelerate",
        r"accelerate|accumulate",
        "accelerate; `accelerate launch`",
        "an offloaded optimizer is replaced unless told",
    ),
    ("Lightning", r"lightning", "Lightning", "averaged weights written in: `reset_anchor()`"),
    ("DDP", r"test_ddp", "2 ranks, gloo", ""),
    (
        "FSDP2, HSDP, tensor parallel",
        r"test_fsdp|four_ranks::(?!.*(zero|checkpoint))|examples_sharded.*fsdp2",
        "2 and 4 ranks, gloo; `torchrun`",
        "",
    ),
    (
        "`torch.distributed.checkpoint`",
        r"dcp|sharded_checkpoint|four_ranks::test_a_checkpoint",
        "1, 2 and 4 ranks, gloo; saved by 4, loaded by 2",
        "",
    ),
    (
        "`ZeroRedundancyOptimizer`",
        r"zero_redundancy",
        "2 and 4 ranks, gloo",
        "no trust region: each rank would try its own part of a jump; `last_jump` tells of a rank's own tensors",
    ),
    (
        "DeepSpeed ZeRO-1, 2, 3",
        r"deepspeed|offload_replaces|zero2",
        "DeepSpeed on CPUs, 2 ranks",
        "gates per piece; no `jump()` under ZeRO-3",
    ),
    ("verl, OpenRLHF: built by name, offloaded between steps", r"test_verl_contract::", "verl's calls, not verl", ""),
    ("other optimizers in `Extra`", r"test_wrap::", "torch's, schedulefree", "no evidence that it pays"),
    ("8-bit AdamW in `Extra`", r"8_bit", "torchao, bitsandbytes", "where they are installed"),
    ("an installed wheel: beside `kernels`, without a compiler, from the sdist", r"test_packaging::", "pip", ""),
    ("runs killed at any moment", r"test_kill::", "SIGKILL; Trainer, and DCP on 2 ranks", ""),
]


def outcomes(reports: list[str]) -> dict[str, str]:
    """`file::name` of each test in JUnit files: passed, skipped or failed, as the last file has it."""
    found = {}
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        module = next(part for part in reversed(case.get("classname", "").split(".")) if part.startswith("test_"))
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[f"{module}::{case.get('name')}"] = outcome
    return found


def table(found: dict[str, str]) -> str:
    """One line a row."""
    lines = ["| where | tests passed | run by | known limits |", "|---|---|---|---|"]
    for where, pattern, by, limits in ROWS:
        counts = Counter(outcome for name, outcome in found.items() if re.search(pattern, name))
        if counts["failed"] or not (counts["passed"] or counts["skipped"]):
            raise SystemExit(f"{where}: {dict(counts) or 'no test'}")
        skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
        lines.append(f"| {where} | {counts['passed'] or 'none'}{skipped} | {by} | {limits} |")
    return "\n".join(lines)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    made = table(outcomes(sys.argv[1:]))
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}")
    print(made)
