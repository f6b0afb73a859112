"""Checkpoints of other kinds than plain language models: quantised ones, batch norms, wrappers' names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _checkpoint_models import make, move, save, transformers
from safetensors.torch import load_file, save_file

from extraopt.tools.checkpoints import CheckpointError, extrapolate, open_checkpoint

CODES = {
    "GPTQ": {"x.qweight": torch.int32, "x.scales": torch.float16, "x.qzeros": torch.int32},
    "bitsandbytes 4 bit": {"x.weight": torch.uint8, "x.weight.absmax": torch.float32},
    "bitsandbytes 8 bit": {"x.weight": torch.int8, "x.SCB": torch.float32},
    "compressed-tensors": {"x.weight_packed": torch.int32, "x.weight_scale": torch.bfloat16},
    "MXFP4": {"experts.up_proj_blocks": torch.uint8, "experts.up_proj_scales": torch.uint8},
    "Quanto": {"x.weight._data": torch.int8, "x.weight._scale": torch.float32},
    "HQQ": {"x.W_q": torch.uint8, "x.scale": torch.float16},
}


@pytest.mark.parametrize("kind", CODES)
def test_packed_codes_beside_scales_are_quantised_weights(kind: str, tmp_path: Path):
    state = {name: torch.ones(4, 4).to(dtype) for name, dtype in CODES[kind].items()}
    save_file({**state, "y.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="quantised"):
        open_checkpoint(tmp_path)


def test_counts_masks_and_positions_are_no_codes(tmp_path: Path):
    state = {
        "x.mask": torch.ones(4, 4, dtype=torch.bool), "x.scale": torch.ones(4), "position_ids": torch.ones(1, 4).long(),
        "logit_scale": torch.ones(()), "y.counts": torch.ones(4, dtype=torch.int32), "y.scale": torch.ones(4),
    }  # fmt: skip
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    assert set(open_checkpoint(tmp_path).names) == state.keys()


def resnet(folder: Path, prefix: str, known: bool, seed: int) -> Path:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config)
    move(model, seed=seed)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(1.0 / seed)
    model.save_pretrained(folder)
    state = {prefix + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    if not known:
        (folder / "config.json").write_text('{"model_type": "mine"}')
    return folder


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("known", [True, False], ids=["class known", "class unknown"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_statistics_of_batch_norms_are_copied_whatever_wraps_the_model(prefix: str, known: bool, tmp_path: Path):
    a, b = (resnet(tmp_path / name, prefix, known, seed) for name, seed in (("a", 1), ("b", 5)))
    report = extrapolate([a, b], tmp_path / "out", alpha=3)
    end, new = (load_file(folder / "model.safetensors") for folder in (b, tmp_path / "out"))
    statistics = {name for name in new if name.rpartition(".")[2] in STATISTICS}
    assert set(report.copied) == statistics and len(statistics) > 10
    for name in new:
        assert torch.equal(new[name], end[name]) == (name in statistics), name
        assert "running_var" not in name or (new[name] > 0).all()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_ties_are_seen_through_wrappers_and_wrappers_may_differ(prefix: str, tmp_path: Path):
    model = make("qwen2-tied")
    for folder in ("a", "b"):
        save(model, tmp_path / folder)
        move(model)
    plain = load_file(tmp_path / "b" / "model.safetensors")
    wrapped = {prefix + name: tensor for name, tensor in plain.items()}
    wrapped[f"{prefix}lm_head.weight"] = plain["model.embed_tokens.weight"].clone()
    save_file(wrapped, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    report = extrapolate([tmp_path / "a", tmp_path / "b"], tmp_path / "out", alpha=1, exclude=["*embed_tokens*"])
    assert set(report.copied) == {f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"}
    start, new = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = "model.norm.weight"
    assert torch.equal(new[prefix + name], 2 * plain[name] - start[name])
