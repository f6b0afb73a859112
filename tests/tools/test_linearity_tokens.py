"""Real checkpoints of small models of real architectures: their log-probabilities token by token, and their weights."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft")
datasets = pytest.importorskip("datasets", reason="needs datasets")
tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")

from extraopt.tools.checkpoints import CheckpointError, find_checkpoints  # noqa: E402
from extraopt.tools.checkpoints.linearity import linearity  # noqa: E402
from extraopt.tools.checkpoints.tokens import Example, log_probs, read_prompts, token_linearity  # noqa: E402

WORDS = [f"w{i}" for i in range(28)]
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"


def tokenizer(template: bool = True) -> Any:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {word: i + 4 for i, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE if template else None
    return made


def model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        return transformers.GPT2LMHeadModel(config)  # with dropout, tied embeddings and learnt positions
    if kind == "moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **experts, num_key_value_heads=2))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def train(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """Five checkpoints of a real run with the Trainer; the adapter's base lies beside it."""
    made = model("llama" if kind == "lora" else kind)
    run = folder / "run"
    if kind == "lora":
        made.save_pretrained(folder / "base")
        tokenizer().save_pretrained(folder / "base")
        made = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        made = peft.get_peft_model(made, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    half = torch.randint(4, 32, (64, 5), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([half, half], 1).tolist()
    args = transformers.TrainingArguments(
        str(run), max_steps=10, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=8, report_to=[],
        disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant", logging_strategy="no",
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    transformers.Trainer(made, args, train_dataset=data, processing_class=tokenizer()).train()
    return find_checkpoints(run)


@pytest.fixture(scope="module", params=["llama", "gpt2", "moe", "lora"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    return request.param, train(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return train(tmp_path_factory.mktemp("one"), "llama")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


ROWS = [
    {"prompt": "w5 w6 w7", "response": "w8 w9"},
    {"prompt": "w5", "response": "w6 w7 w8 w9 w10 w11 w12"},
    {"prompt": "w9 w8 w7 w6 w5 w4 w3", "completion": "w2"},
    {"messages": [{"role": "user", "content": "w20 w21"}, {"role": "assistant", "content": "w22 w23"}]},
    {"prompt": [{"role": "user", "content": "w4"}], "completion": [{"role": "assistant", "content": "w5 w5"}]},
]


def load(path: Path) -> Any:
    if (path / "adapter_config.json").exists():
        return peft.AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def one_by_one(path: Path, examples: list[Example]) -> torch.Tensor:
    """Each response alone, unpadded, a token at a time: what the batches must agree with."""
    loaded, found = load(path), []
    for example in examples:
        ids = list(example.prompt)
        for token in example.response:
            with torch.no_grad():
                scores = loaded(input_ids=torch.tensor([ids])).logits[0, -1].double()
            found.append(scores.log_softmax(0)[token])
            ids.append(token)
    return torch.stack(found)


def test_log_probs_of_every_architecture_are_those_of_each_response_alone(trained: Any, tmp_path: Path):
    kind, found = trained
    assert [step for step, _ in found] == [2, 4, 6, 8, 10]
    file = write(tmp_path / "prompts.jsonl", *ROWS)
    report = token_linearity(found, file, batch_size=3, device="cpu")
    examples = read_prompts(file, tokenizer())
    expected = torch.stack([one_by_one(path, examples) for _, path in found])
    assert report["total"]["elements"] == 14 and report["examples"] == 5
    for token in report["tokens"]:
        place = sum(len(example.response) for example in examples[: token["example"]]) + token["position"]
        torch.testing.assert_close(torch.tensor(token["log_probs"]).double(), expected[:, place], atol=2e-5, rtol=0)
        t = torch.tensor([2.0, 4, 6, 8, 10], dtype=torch.float64)
        y = expected[:, place]
        slope = ((t - 6) @ (y - y.mean())) / 40
        assert token["change"] == pytest.approx(float(8 * slope), abs=1e-4)
        assert token["r2"] == pytest.approx(float((8 * slope) ** 2 * 40 / 64 / (y - y.mean()).square().sum()), abs=2e-3)
    json.dumps(report, allow_nan=False)


def test_weights_of_every_architecture_are_measured(trained: Any):
    kind, found = trained
    report = linearity(found)
    kinds = {"llama": "self_attn.q_proj", "gpt2": "attn.c_attn", "moe": "mlp.gate", "lora": "q_proj.lora_B"}
    assert kinds[kind] in report["types"]
    assert report["total"]["constant"] < 0.5 and 0 < report["total"]["r2_median"] < 1
    if kind == "lora":
        assert set(report["types"]) == {f"{p}.lora_{f}" for p in ("q_proj", "v_proj") for f in "AB"}
    if kind == "gpt2":  # tied: one embedding, counted once
        assert not any("lm_head" in name for name in report["tensors"])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_the_batch_changes_nothing(llama_run: Any, tmp_path: Path, batch_size: int):
    examples = read_prompts(write(tmp_path / "p", *ROWS), tokenizer())
    found = log_probs(load(llama_run[-1][1]), examples, batch_size=batch_size)
    torch.testing.assert_close(found, one_by_one(llama_run[-1][1], examples), atol=2e-5, rtol=0)


def test_prompts_are_read_as_written(tmp_path: Path):
    examples = read_prompts(write(tmp_path / "p", ROWS[0], "", ROWS[3], {"prompt": "", "response": "w1"}), tokenizer())
    assert examples[0] == Example([9, 10, 11], [12, 13])
    assert examples[1] == Example([5, 24, 25, 6, 7], [26, 27])  # w1 w20 w21 w2, w3 for what comes; then the response
    assert examples[2] == Example([1], [5])  # nothing to predict it from but the start


def test_words_are_tokens_of_one_text(llama_run: Any, tmp_path: Path):
    file = write(tmp_path / "p", {"prompt": "w1", "response": "w4 w5 w4 w4"}, {"prompt": "w2", "response": "w5"})
    words = {word["word"]: word for word in token_linearity(llama_run, file, device="cpu")["words"]}
    assert {name: word["count"] for name, word in words.items()} == {"w4": 3, "w5": 2}
    changes = [abs(word["change"]) for word in words.values()]
    assert changes == sorted(changes, reverse=True)


def test_a_run_that_was_taught_a_sequence_moves_its_tokens_up(llama_run: Any, tmp_path: Path):
    half = torch.randint(4, 32, (64, 5), generator=torch.Generator().manual_seed(0))[:8]
    rows = [tuple(" ".join(WORDS[t - 4] for t in row.tolist()) for _ in "ab") for row in half]
    file = write(tmp_path / "p", *({"prompt": p, "response": r} for p, r in rows))
    report = token_linearity(llama_run, file, device="cpu")
    assert sum(word["change"] * word["count"] for word in report["words"]) > 0


def test_the_base_can_be_given(tmp_path: Path):
    found = train(tmp_path, "lora")
    file = write(tmp_path / "p", ROWS[0])
    right = token_linearity(found, file, device="cpu")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="can be loaded"):
        token_linearity(found, file, device="cpu")
    assert token_linearity(found, file, base=str(tmp_path / "moved"), device="cpu")["tokens"] == right["tokens"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2: "),
        ("[1]", "line 2: not a JSON object"),
        ({"prompt": "w1"}, 'line 2: needs "prompt" and "response"'),
        ({"prompt": 3, "response": "w1"}, 'needs "prompt"'),
        ({"prompt": "w1", "response": ""}, "line 2: the response is empty"),
        ({"messages": [{"role": "user", "content": "w1"}]}, "two at least"),
        ({"messages": [{"role": "user", "content": "w1"}, {"role": "assistant"}]}, "no text"),
        ({"prompt": "w1 " * 3000, "response": "w1"}, "takes 2048"),
    ],
)
def test_bad_prompts_are_named_with_their_line(llama_run: Any, tmp_path: Path, row: Any, says: str):
    file = write(tmp_path / "prompts.jsonl", ROWS[0], row)
    with pytest.raises(CheckpointError, match=says) as caught:
        token_linearity(llama_run, file, device="cpu")
    assert "\n" not in str(caught.value)


def test_prompt_files_that_are_none(llama_run: Any, tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "absent", tmp_path, tmp_path / "binary", write(tmp_path / "empty", "")):
        says = "no prompts" if file.name == "empty" else "can't be read"
        with pytest.raises(CheckpointError, match=says):
            token_linearity(llama_run, file, device="cpu")


def test_messages_need_a_chat_template(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no chat template"):
        read_prompts(write(tmp_path / "p", ROWS[3]), tokenizer(template=False))


def test_remote_code_is_not_run_unless_trusted(tmp_path: Path):
    for step in range(3):
        path = tmp_path / f"checkpoint-{step}"
        tokenizer().save_pretrained(path)
        model("llama").save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
        (path / "config.json").write_text(json.dumps(config))
        (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError):
        token_linearity(find_checkpoints(tmp_path), write(tmp_path / "p", ROWS[0]), device="cpu")
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(Exception):  # the code defines nothing
        token_linearity(find_checkpoints(tmp_path), tmp_path / "p", device="cpu", trust_remote_code=True)
    assert (tmp_path / "ran").exists()
