"""Logits extrapolation on every kind of architecture: what the earlier model sees is what its own `generate` shows it.

The reference runs both models over one unpadded prompt without any cache.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from extraopt.tools.decoding import LogitsExtrapolation  # noqa: E402

PAD, BOS, EOS, VOCAB = 0, 1, 2, 64
SPECIAL: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    **SPECIAL,
}  # fmt: skip
MHA = SHAPE | {"num_key_value_heads": 4}
OLD: dict[str, Any] = {
    "vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3,
    **SPECIAL,
}  # fmt: skip
SSM: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.3,
    **SPECIAL,
}  # fmt: skip
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_n_groups": 1, "mamba_chunk_size": 16,
}  # fmt: skip
WINDOW = {"sliding_window": 4, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip
LINEAR = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
IMAGES = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
FAST: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", SSM),
    "falcon-mamba": ("FalconMamba", SSM),
    "bamba": ("Bamba", SHAPE | MAMBA2 | {"attn_layer_indices": [1]}),
    "jamba": ("Jamba", SHAPE | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8}),
    "qwen2.5-vl": (
        "Qwen2_5_VL", {"text_config": SHAPE | MROPE, "vision_config": VISION, **IMAGES, **SPECIAL},
    ),
    "qwen3-vl": (
        "Qwen3VL", {
            "text_config": SHAPE | MROPE | {"head_dim": 8},
            "vision_config": VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **IMAGES, **SPECIAL,
        },
    ),
}  # fmt: skip
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SHAPE),
    "qwen2-tied": ("Qwen2", SHAPE | {"tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", SHAPE | EXPERTS | {"head_dim": 8}),
    "mixtral": ("Mixtral", SHAPE | {"num_local_experts": 4}),
    "mistral-window": ("Mistral", SHAPE | {"sliding_window": 4}),
    "gemma2": ("Gemma2", SHAPE | WINDOW | {"tie_word_embeddings": False}),
    "gemma3": ("Gemma3Text", SHAPE | WINDOW | {"num_hidden_layers": 3}),
    "opt": ("OPT", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "gpt2": ("GPT2", OLD),
    "gpt-neo": ("GPTNeo", SHAPE | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "gpt-neox": ("GPTNeoX", MHA),
    "gptj": ("GPTJ", OLD | {"rotary_dim": 4}),
    "codegen": ("CodeGen", OLD | {"rotary_dim": 4}),
    "bloom": ("Bloom", OLD | {"hidden_size": 32}),
    "falcon": ("Falcon", MHA | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("Falcon", MHA | {"alibi": True, "multi_query": False}),
    "phi": ("Phi", MHA),
    "phi3": ("Phi3", SHAPE),
    "stablelm": ("StableLm", SHAPE),
    "cohere": ("Cohere", SHAPE),
    "olmo2": ("Olmo2", SHAPE),
    "granite": ("Granite", SHAPE),
    "starcoder2": ("Starcoder2", SHAPE),
    "deepseek-v3": ("DeepseekV3", MHA | DEEPSEEK),
    "gpt-oss": ("GptOss", SHAPE | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mamba2": ("Mamba2", SSM | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 16}),
    "zamba2": (
        "Zamba2", MHA | MAMBA2 | {
            "mamba_ngroups": 1, "n_mamba_heads": 8, "hybrid_layer_ids": [1], "num_mem_blocks": 1, "chunk_size": 16,
            "layers_block_type": ["mamba", "hybrid"], "mamba_headdim": 8,
        },
    ),
    "recurrent-gemma": (
        "RecurrentGemma", SHAPE | {"lru_width": 32, "num_hidden_layers": 3, "attention_window_size": 4},
    ),
    "rwkv": ("Rwkv", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, **SPECIAL}),
    "qwen3-next": (
        "Qwen3Next",
        SHAPE | EXPERTS | LINEAR | {
            "head_dim": 8, "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "granite-hybrid": (
        "GraniteMoeHybrid",
        SHAPE | MAMBA2 | {
            "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16,
            "layer_types": ["mamba", "attention"],
        },
    ),
    "falcon-h1": ("FalconH1", SHAPE | MAMBA2 | {"mamba_d_ssm": 64}),
    "lfm2": ("Lfm2", SHAPE | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "nemotron-h": (
        "NemotronH",
        SHAPE | {
            "layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3, "mamba_num_heads": 8,
            "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16, "head_dim": 8,
            "n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "minimax": (
        "MiniMax",
        SHAPE | {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8},
    ),
    "ctrl": ("CTRL", OLD | {"dff": 48}),
    "openai-gpt": ("OpenAIGPT", OLD),
    "biogpt": ("BioGpt", MHA),
}  # fmt: skip
FAMILIES = FAST | SLOW
LENGTHS = [3, 7, 1, 5]


@functools.cache
def tiny(family: str, seed: int) -> Any:
    """A model in float64: rounding never decides which token is best."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**options)
    kinds = [getattr(transformers, f"{name}{head}", None) for head in ("ForConditionalGeneration", "LMHeadModel")]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = next((kind for kind in kinds if kind is not None), None)
        model = kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped matmul takes no float64
    return model.double().eval()


def prompts(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (n,), generator=generator) for n in lengths]


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.full((width - len(row),), PAD), row]) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": torch.stack([torch.arange(width) >= width - len(r) for r in rows]).long(),
    }


def without_cache(models: list[Any], weights: list[float], inputs: dict[str, Tensor], **how: Any) -> list[list[int]]:
    """`generate` for one unpadded prompt after the other, by a sum of logits, all models over everything each step."""
    model = copy.deepcopy(models[0])

    @functools.wraps(model.forward)
    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        outputs = [model(input_ids=input_ids, use_cache=False) for model in models]
        outputs[0].logits = sum(w * one.logits[:, -1:].float() for w, one in zip(weights, outputs))
        return outputs[0]

    model.forward = forward
    found = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        row = ids[mask == 1][None]
        output = model.generate(row, attention_mask=torch.ones_like(row), use_cache=False, **how)
        found += tokens_of(output, row.shape[1])
    return found


def tokens_of(output: Tensor, width: int) -> list[list[int]]:
    rows = output[:, width:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def check(family: str, beams: int, lengths: list[int]) -> None:
    later, earlier, inputs = tiny(family, 1), tiny(family, 0), padded(prompts(lengths))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}

    def extrapolated(alpha: float) -> list[list[int]]:
        processor = LogitsExtrapolation(earlier, alpha, inputs["attention_mask"])
        return tokens_of(later.generate(**inputs, logits_processor=[processor], **options), max(lengths))

    try:
        one, two = (tokens_of(model.generate(**inputs, **options), max(lengths)) for model in (earlier, later))
    except ValueError as error:
        pytest.skip(f"transformers itself can't: {error}")
    assert one != two, "the models are too alike to tell"
    assert extrapolated(-1.0) == one
    if all(without_cache([model], [1.0], inputs, **options) == own for model, own in ((earlier, one), (later, two))):
        assert extrapolated(0.5) == without_cache([later, earlier], [1.5, -0.5], inputs, **options)
    else:  # transformers' own batches or caches change the text: then the earlier model's own text is all that is right
        assert family in SLOW


CASES = [
    pytest.param(family, beams, lengths, id=f"{family}-{'beams' if beams > 1 else 'greedy'}-{kind}",
                 marks=[pytest.mark.slow] if family in SLOW else [])
    for family in FAMILIES
    for beams in (1, 3)
    for kind, lengths in (("plain", [5, 5]), ("padded", LENGTHS))
]  # fmt: skip


@pytest.mark.parametrize(("family", "beams", "lengths"), CASES)
def test_a_batch_with_caches_equals_each_prompt_alone_without(family: str, beams: int, lengths: list[int]):
    check(family, beams, lengths)


def answer_about_an_image(model: Any) -> Any:
    """Leaves behind how far the image moved the positions of what followed it."""
    grid = torch.tensor([[1, 4, 4]])
    ids = torch.tensor([[5, 62, 60, 60, 60, 60, 63, 7, 9]])
    pixels = torch.randn(16, 3 * 2 * 4 * 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == 60).int()}
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, **images)
    (deltas,) = (m.rope_deltas for m in model.modules() if "rope_deltas" in vars(m))
    assert deltas.any()
    return deltas


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_an_earlier_model_that_answered_about_an_image_is_as_a_fresh_one(family: str):
    later, fresh = tiny(family, 1), tiny(family, 0)
    earlier = copy.deepcopy(fresh)
    for lengths in ([5, 5], LENGTHS, [4]):
        deltas = answer_about_an_image(earlier)
        inputs = padded(prompts(lengths))
        found = []
        for model in (fresh, earlier):
            processor = LogitsExtrapolation(model, 0.5, inputs["attention_mask"])
            found.append(later.generate(**inputs, logits_processor=[processor], max_new_tokens=6, do_sample=False))
        assert torch.equal(*found)
        (now,) = (m.rope_deltas for m in earlier.modules() if "rope_deltas" in vars(m))
        assert now is deltas  # its own answers go on where they were


def offloaded(how: str, model: Any, folder: Path) -> Any:
    if how == "data parallel":
        return torch.nn.DataParallel(model)
    if how == "compiled":
        return torch.compile(model, backend="eager")
    accelerate = pytest.importorskip("accelerate")
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk_offload":
        return accelerate.disk_offload(model, folder / "offload", execution_device=torch.device("cpu"))
    parts = {name: "cpu" for name, _ in model.model.named_children()}
    parts = {f"model.{name}": where for name, where in parts.items()} | {"lm_head": "cpu", "model.embed_tokens": "disk"}
    return accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=folder / "disk")


@pytest.mark.parametrize("how", ["data parallel", "compiled", "cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_earlier_model_may_be_wrapped_or_offloaded(how: str, beams: int, tmp_path: Path):
    later, plain = tiny("llama", 1), tiny("llama", 0)
    earlier = offloaded(how, copy.deepcopy(plain), tmp_path)
    inputs = padded(prompts(LENGTHS))
    found = []
    for model in (plain, earlier):
        processor = LogitsExtrapolation(model, 0.5, inputs["attention_mask"])
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        found.append(later.generate(**inputs, logits_processor=[processor], **options))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "defaults",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 2.0},
        {"pad_token_id": 5, "max_length": 2},
    ],
)
def test_the_earlier_models_generation_defaults_do_not_matter(defaults: dict[str, Any]):
    later, plain = tiny("llama", 1), tiny("llama", 0)
    earlier = copy.deepcopy(plain)
    earlier.generation_config = transformers.GenerationConfig(**defaults)
    before = earlier.generation_config
    inputs = padded(prompts(LENGTHS))
    found = []
    for model in (plain, earlier):
        processor = LogitsExtrapolation(model, 0.5, inputs["attention_mask"])
        found.append(later.generate(**inputs, logits_processor=[processor], max_new_tokens=6, do_sample=False))
    assert torch.equal(*found) and earlier.generation_config is before
