"""Tiny models of real architectures, saved as checkpoints of a run that moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

transformers = __import__("pytest").importorskip(
    "transformers", reason="needs transformers: pip install 'extraopt[hf]'"
)

SMALL: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
ARCHITECTURES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen2-tied": lambda: transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=False),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4, tie_word_embeddings=False),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


def make(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](), dtype=dtype)


def move(model: torch.nn.Module, scale: float = 0.01, seed: int = 1) -> None:
    """Training, as far as checkpoints are concerned."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.add_((scale * noise).to(parameter.dtype))


def save(model: torch.nn.Module, folder: Path, kind: str = "safetensors") -> Path:
    """As one file, in shards, or as the `.bin` files that older libraries wrote, with all names of a tie."""
    model.save_pretrained(folder, max_shard_size="20KB" if "sharded" in kind else "5GB")
    if "bin" in kind:
        for file in folder.glob("model*"):
            file.unlink()
        state = model.state_dict()
        if "sharded" in kind:
            import json

            names = list(state)
            parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
            for file, part in parts.items():
                torch.save({name: state[name] for name in part}, folder / file)
            where = {name: file for file, part in parts.items() for name in part}
            text = json.dumps({"metadata": {}, "weight_map": where})
            (folder / "pytorch_model.bin.index.json").write_text(text)
        else:
            torch.save(state, folder / "pytorch_model.bin")
    return folder


def run_of(tmp: Path, architecture: str, dtype: torch.dtype = torch.float32, kind: str = "safetensors", count: int = 2):
    """Checkpoints `checkpoint-100`, `checkpoint-200`, ... of one run."""
    model = make(architecture, dtype)
    folders = []
    for i in range(count):
        folders.append(save(model, tmp / f"checkpoint-{100 * (i + 1)}", kind))
        move(model, seed=i + 1)
    return folders


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Through transformers' own door, not ours."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
