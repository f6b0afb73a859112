"""The code that README and Getting started show runs as it stands, on a model of a few hundred weights.

This is the way of someone who knows TRL from the README to a guarded run of their own: what the pages leave to the
reader (a model, a reward, questions) is made here, and nothing else is added.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from _pages import ROOT, blocks, read

pytest.importorskip("transformers", reason="needs transformers: pip install 'extraopt[hf]'")

from test_bugs_trainers import llama, tokens

import extraopt
from extraopt import ExtraAdam

README = read(ROOT / "README.md")


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with a model and its tokenizer, as a hub would give it. Code of the pages writes elsewhere."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(i): i + 3 for i in range(13)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"}
    PreTrainedTokenizerFast(tokenizer_object=words, **marks).save_pretrained(tmp_path / "model")
    llama().save_pretrained(tmp_path / "model")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return str(tmp_path / "model")


def rows(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": tokens(i), "labels": tokens(i)} for i in range(count)]


def assert_guarded(trainer: Any, caught: list[warnings.WarningMessage]) -> None:
    """By what the pages say to look at: jumps that were measured, within their limits, and no warning."""
    assert type(trainer.optimizer.optimizer) is ExtraAdam
    logged = [log for log in trainer.state.log_history if "extra/gate" in log]
    assert [log["step"] for log in logged] == [5, 10, 15, 20]
    measured = [log for log in logged if log["extra/length"] > 0]
    assert measured and all(0 <= log["extra/kl"] <= 0.02 and log["extra/fall"] <= 0.8 for log in measured)
    assert not [w for w in caught if "extraopt" in str(w.message)]


def test_getting_started_goes_from_an_installation_to_a_guarded_run(saved: str) -> None:
    pytest.importorskip("trl", reason="needs TRL: pip install 'extraopt[hf]'")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig

    loop, trl, resume, edits = blocks(read(ROOT / "docs" / "getting-started.md"), "python")
    model = AutoModelForCausalLM.from_pretrained(saved)
    before = [p.detach().clone() for p in model.parameters()]
    names: dict[str, Any] = {"model": model, "batches": rows(23)}
    exec(loop, names)
    optimizer = names["optimizer"]
    assert type(optimizer) is ExtraAdam and optimizer.last_jump.step == 20 and optimizer.last_jump.kl >= 0
    assert not all(map(torch.equal, before, model.parameters()))
    exec(resume, names)
    exec(edits, names)
    assert Path("optimizer.pt").is_file() and optimizer.last_jump.step == 23  # the cycle that `jump` ended early

    names = {
        "model": saved,
        "reward": lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        "questions": Dataset.from_dict({"prompt": [f"{i % 10} {i % 7}" for i in range(200)]}),
        "config": GRPOConfig(
            "run", max_steps=20, learning_rate=1e-3, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=3, report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, save_strategy="no",
            logging_steps=1,
        ),
    }  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(trl, names)
    assert_guarded(names["trainer"], caught)


def test_the_line_that_the_readme_changes_runs() -> None:
    (diff,) = blocks(README, "diff")
    (old,), (new,) = (re.findall(rf"^{re.escape(sign)} (.+)$", diff, re.M) for sign in "-+")
    for line in old, new:
        names: dict[str, Any] = {"torch": torch, "extraopt": extraopt, "model": llama()}
        exec(line, names)
        assert isinstance(names["optimizer"], torch.optim.AdamW)
    assert type(names["optimizer"]) is ExtraAdam


def test_the_readmes_blocks_of_python_run() -> None:
    model = llama()
    optimizer = ExtraAdam(model.parameters(), lr=1e-3)
    for batch in rows(12):
        model(**batch).loss.backward()
        optimizer.step()
    found = blocks(README, "python")
    assert found
    for code in found:
        exec(code, {"optimizer": optimizer, "model": model, "torch": torch, "extraopt": extraopt})
    assert optimizer.last_jump.step == 12  # `jump` ended the second cycle early


USES = re.findall(r"^\|[^|]+\| `((?:optimizer = |ExtraAdam\()[^`]+)`", README, re.M)


@pytest.mark.parametrize("code", USES)
def test_what_the_readme_says_to_write_makes_extra_adam(code: str) -> None:
    model = llama()
    made = eval(
        code.removeprefix("optimizer = ").replace("lr=...", "lr=1e-3"), {"ExtraAdam": ExtraAdam, "model": model}
    )
    assert type(made) is ExtraAdam and {p for group in made.param_groups for p in group["params"]}


def test_what_the_readme_says_to_write_of_a_trainer_makes_a_guarded_run(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    (row,) = (line for line in README.splitlines() if line.startswith("| HF Trainer; "))
    call, module = re.fullmatch(r"\|[^|]+\| `([^`]+)` before `trainer.train\(\)`, from `([^`]+)` \|", row).groups()
    args = TrainingArguments(str(tmp_path), max_steps=20, learning_rate=1e-3, report_to=[], disable_tqdm=True,
                             use_cpu=True, save_strategy="no", logging_steps=1)  # fmt: skip
    data = [{key: value[0] for key, value in row.items()} for row in rows(40)]
    names: dict[str, Any] = {"trainer": Trainer(llama(), args, train_dataset=data)}
    exec(f"from {module} import {call.partition('(')[0]}", names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(f"{call}\ntrainer.train()", names)
    assert_guarded(names["trainer"], caught)


def test_the_readme_says_what_to_write_in_a_loop_and_in_an_adapters() -> None:
    assert len(USES) >= 3 and "requires_grad" in "".join(USES)
