"""LoRA factors of an extrapolated update: the nearest product of the adapter's rank, and what it misses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .read import Checkpoint
from .safety import CheckpointError

FACTORS = ((".lora_A", ".lora_B"), (".lora_embedding_A", ".lora_embedding_B"))


@dataclass
class LoraError:
    """What became of a LoRA update, summed over all pairs of factors.

    Errors are lengths of what the written B A misses of the sum of the products, in parts of the jump (the distance
    from the last checkpoint's product to that sum). All lengths are Frobenius norms without the adapter's scale.

    Attributes:
        pairs: Pairs of factors.
        jump: Length of the jump.
        cross_term: Error of extrapolating A and B one by one: for two checkpoints alpha (1 + alpha) |dB dA| / jump.
        truncation: Error of the product, cut back to the adapter's rank: the least that any pair of this rank can have.
        written: Which of both is in the files: "product" or "factors".
    """

    pairs: int = 0
    jump: float = 0.0
    cross_term: float = 0.0
    truncation: float = 0.0
    written: Literal["product", "factors"] = "product"


def factors(name: str) -> tuple[str, str] | None:
    """The names of both LoRA factors, given that of one; None for another tensor."""
    for a, b in FACTORS:
        if a in name or b in name:
            return name.replace(b, a), name.replace(a, b)
    return None


def sum_of(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Sum of w W, where the w add up to 1, by way of differences from the last."""
    total = tensors[-1].clone()
    for weight, tensor in zip(weights[:-1], tensors):
        total.add_(tensor - tensors[-1], alpha=weight)
    return total


def not_finite(name: str, checkpoint: Checkpoint) -> CheckpointError:
    """The error for NaN or infinity among weights."""
    file = checkpoint.path / checkpoint.shard_of(checkpoint.resolve(name) or name)
    return CheckpointError(f"{name} in {file} holds NaN or infinity. Use a checkpoint from before that.")


def finite(block: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    # one pass; the sum of finite numbers may overflow, and then they are looked at one by one
    total = block.sum(dtype=torch.float64 if block.dtype == torch.float64 else torch.float32)
    return math.isfinite(total.item()) or bool(block.isfinite().all())
