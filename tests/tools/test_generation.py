"""`extraopt generate`: what of a checkpoint's files counts, and what does not."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
tokenizers = pytest.importorskip("tokenizers")

from extraopt.tools.checkpoints import CheckpointError  # noqa: E402
from extraopt.tools.checkpoints.models import encode_prompt, load_model  # noqa: E402
from extraopt.tools.checkpoints.tokens import token_linearity  # noqa: E402
from extraopt.tools.generation import complete, load_pair  # noqa: E402

VOCAB = 64
ASK = ["w9 w8 w7", "w33 w12 w50 w51", "w20"]


@functools.cache
def words() -> Any:
    known = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return inner.to_str()


def tokenizer(**options: Any) -> Any:
    options = {"eos_token": "<eos>", "unk_token": "<unk>"} | options
    inner = tokenizers.Tokenizer.from_str(words())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **options)


def model(seed: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for seed, name in enumerate(("earlier", "later")):
        model(seed).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    return tmp_path / "earlier", tmp_path / "later"


def answers(later: Path, earlier: Path | None, ask: list[str] = ASK, **options: Any) -> list[dict[str, Any]]:
    loaded = load_pair(str(later), str(earlier) if earlier else None, 0.5, device="cpu")
    return complete(*loaded[:2], ask, loaded[2], **{"max_new_tokens": 12} | options)


def set_default(folder: Path, **values: Any) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# For every key of the class a value that would show: a new key of transformers fails the test below until it is here.
DEFAULTS: dict[str, Any] = {
    "max_length": 5, "max_new_tokens": 2, "min_length": 60, "min_new_tokens": 12, "early_stopping": True,
    "max_time": 1e-9, "stop_strings": ["w"], "do_sample": True, "num_beams": 3, "use_mtp": True, "use_cache": False,
    "cache_implementation": "static", "cache_config": {"x": 1}, "max_cache_len": 4, "temperature": 9.0, "top_k": 2,
    "top_p": 0.1, "min_p": 0.5, "top_h": 0.4, "typical_p": 0.2, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1,
    "repetition_penalty": 5.0, "encoder_repetition_penalty": 5.0, "length_penalty": -9.0, "no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(4, 60)], "renormalize_logits": True, "forced_bos_token_id": 7,
    "forced_eos_token_id": 7, "remove_invalid_values": True, "exponential_decay_length_penalty": [1, 9.0],
    "suppress_tokens": list(range(4, 60)), "begin_suppress_tokens": list(range(4, 60)),
    "sequence_bias": [[[9], 50.0]], "token_healing": True, "guidance_scale": 3.0,
    "watermarking_config": {"bias": 50.0, "greenlist_ratio": 0.1}, "num_return_sequences": 2,
    "output_attentions": True, "output_hidden_states": True, "output_scores": True, "output_logits": True,
    "return_dict_in_generate": True, "pad_token_id": 9, "bos_token_id": 9, "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 9, "is_assistant": True, "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.1, "prompt_lookup_num_tokens": 2,
    "max_matching_ngram_size": 2, "assistant_early_exit": 1, "assistant_lookbehind": 2, "target_lookbehind": 2,
    "assistant_ensemble_weight": 0.5, "speculation_type": "x", "compile_config": {"mode": "default"},
    "disable_compile": True, "continuous_batching_config": {"x": 1}, "low_memory": True, "penalty_alpha": 0.6,
    "dola_layers": "low", "diversity_penalty": 2.0, "num_beam_groups": 3, "constraints": [1],
    "force_words_ids": [[7]], "prefill_chunk_size": 2, "transformers_version": "4.0", "_from_model_config": True,
}  # fmt: skip
KEYS = sorted(vars(transformers.GenerationConfig()).keys() - {"eos_token_id"})


def test_the_list_of_generation_defaults_is_transformers_own():
    assert set(KEYS) <= DEFAULTS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_no_generation_default_but_the_stop_tokens_changes_an_answer(folders: tuple[Path, Path], beams: int):
    earlier, later = folders
    expected = answers(later, earlier, num_beams=beams)
    assert [row["prompt"] for row in expected] == ASK
    plain = {folder: (folder / "generation_config.json").read_text() for folder in folders}
    for key in KEYS:
        for folder in folders:
            set_default(folder, **{key: DEFAULTS[key]})
        try:
            transformers.GenerationConfig.from_pretrained(later)
        except ValueError:  # nothing loads such a folder
            with pytest.raises(CheckpointError):
                answers(later, earlier, num_beams=beams)
        else:
            assert answers(later, earlier, num_beams=beams) == expected, key
        for folder in folders:
            (folder / "generation_config.json").write_text(plain[folder])
    sampled = answers(later, earlier, num_beams=beams, temperature=1.5, top_p=0.9)
    set_default(later, top_k=2, min_p=0.9, temperature=0.1, typical_p=0.1, do_sample=False)
    assert answers(later, earlier, num_beams=beams, temperature=1.5, top_p=0.9) == sampled != expected


def test_an_adapters_base_keeps_its_generation_defaults_to_itself(folders: tuple[Path, Path], tmp_path: Path):
    earlier, _ = folders
    adapter = adapt(earlier, tmp_path / "adapter")
    expected = answers(adapter, None)
    set_default(earlier, num_return_sequences=2, num_beams=2, repetition_penalty=3.0, return_dict_in_generate=True)
    assert answers(adapter, None) == expected


def adapt(base: Path, folder: Path, add: int = 0, **options: Any) -> Path:
    """An adapter of a base model, with `add` tokens more."""
    under = transformers.AutoModelForCausalLM.from_pretrained(base)
    words = tokenizer()
    words.add_tokens([f"new{i}" for i in range(add)])
    torch.manual_seed(0)
    if add:
        under.resize_token_embeddings(options.pop("rows", len(words)))
    config = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"} | options
    adapted = peft.get_peft_model(under, peft.LoraConfig(**config))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_every_stop_token_ends_an_answer_the_models_and_the_tokenizers(folders: tuple[Path, Path]):
    earlier, later = folders
    whole = answers(later, earlier, ASK[:1])[0]["completion"].split()
    first, second = whole[0], next(word for word in whole if word != whole[0])
    stop = {"model": int(second[1:]), "list": [60, int(second[1:])]}
    for which in ("model", "list"):
        set_default(later, eos_token_id=stop[which])
        (row,) = answers(later, earlier, ASK[:1])
        assert row["stopped"] and row["tokens"] == whole.index(second) + 1
    set_default(later, eos_token_id=2)
    tokenizer(eos_token=second).save_pretrained(later)
    (row,) = answers(later, earlier, ASK[:1])
    assert row["stopped"] and row["tokens"] == whole.index(second) + 1 and row["completion"].split()[0] == first


def test_an_end_of_text_that_the_tokenizer_appends_is_no_part_of_a_prompt(folders: tuple[Path, Path]):
    earlier, later = folders
    expected = answers(later, earlier)
    inner = tokenizers.Tokenizer.from_str(words())
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    ending = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")
    assert ending("w9")["input_ids"] == [9, 2]
    ending.save_pretrained(later)
    assert answers(later, earlier) == expected
    assert encode_prompt(ending, "w9 <eos>") == [9, 2]  # what was asked for stays


ADDED: dict[str, dict[str, Any]] = {
    "padded": {"rows": 72},
    "resized": {},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "targeted": {"target_modules": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [64, 65]},
}


@pytest.mark.parametrize("options", ADDED.values(), ids=ADDED)
def test_an_adapter_with_added_tokens_loads_as_by_auto_peft_model(folders, tmp_path: Path, options: dict[str, Any]):
    earlier, _ = folders
    adapter = adapt(earlier, tmp_path / "adapter", 3, **options)
    found = load_model(str(adapter), None, torch.float32, "cpu", False)
    ids = torch.tensor([[5, 64, 9, 66]])
    rows = options.get("rows", 67)
    assert found.get_input_embeddings().weight.shape[0] == rows
    if options.get("rows") is None:
        torch.manual_seed(0)
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
        mask = slice(0, 64) if "trainable_token_indices" in options else slice(None)  # the drawn rows differ
        ids = ids if "trainable_token_indices" not in options else torch.tensor([[5, 64, 9]])
        torch.testing.assert_close(found(ids).logits[..., mask], theirs(ids).logits[..., mask])
    assert len(answers(adapter, None, ["w9 new0 new2"])) == 1
    later = adapt(earlier, tmp_path / "more", 3, r=8, **options)
    assert len(answers(later, adapter, ["w9 new0 new2"])) == 1
    (tmp_path / "ask.jsonl").write_text('{"prompt": "w9 new0", "response": "new2 w7"}\n')
    runs = [(step, adapter) for step in (1, 2, 3)]
    assert token_linearity(runs, tmp_path / "ask.jsonl", device="cpu")["examples"] == 1


def test_a_model_and_itself_are_refused(folders: tuple[Path, Path]):
    with pytest.raises(CheckpointError, match="same"):
        load_pair(str(folders[1]), f"{folders[0]}/../later", 0.5, device="cpu")
