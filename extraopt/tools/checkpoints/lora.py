"""The updates of LoRA adapters as what they are: products of factors, by the algebra that PEFT's config asks for.

An adapter's update is B A, and what is extrapolated is the update. Some configs say that it is made otherwise of the
stored factors, and each such update splits into independent products:

- `target_parameters`: the factors of all experts of a layer are packed, A [experts * rank, in] by expert, B
  [out, rank * experts] by rank. An expert's update is its own B A.
- `use_bdlora`: A or B is block-diagonal, and only its blocks are stored. B of a convolution in groups is, too.
- `kasa_config`: the update is B diag(d) A.

What is no such product is refused, and so is what is not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .read import Checkpoint
from .safety import CheckpointError

FACTOR = re.compile(r"(?P<layer>.*\.)lora_(?P<kind>A|B|embedding_A|embedding_B|diag)(?P<end>|\.weight)")
# Beside the factors: summed one by one. A norm, and a bias, which an update adds.
BESIDE_FACTORS = re.compile(r".*\.lora_(magnitude_vector(\.weight)?|B\.bias)")
# Of PEFT 0.21's LoraConfig: what leaves the update B A, apart from what is handled here.
PLAIN = {
    "use_rslora", "use_dora", "use_qalora", "use_bdlora", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "velora_config", "kasa_config", "runtime_config", "megatron_config",
}  # fmt: skip
REFUSED = {
    "arrow_config": "it routes between adapters",
    "monteclora_config": "it samples around its factors",
}


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


class LoraAlgebra:
    """How the updates of a LoRA adapter are made of its tensors.

    Args:
        checkpoint: A PEFT adapter.

    Attributes:
        unknown: Why its updates are no sums of products known here; empty if they are.
    """

    def __init__(self, checkpoint: Checkpoint):
        config: dict[str, Any] = checkpoint.config
        self.checkpoint, self.config = checkpoint, config
        self.rank = config.get("r") if isinstance(config.get("r"), int) else None
        self.experts = bool(config.get("target_parameters"))
        self.kasa = bool(config.get("kasa_config"))
        blocks = config.get("use_bdlora") or {}
        self.blocks = int(blocks.get("nblocks") or 1) if isinstance(blocks, dict) else 1
        self.block_a = tuple(blocks.get("target_modules_bd_a") or ()) if isinstance(blocks, dict) else ()
        self.unknown = self._unknown()

    def _unknown(self) -> str:
        kind = self.config.get("peft_type")
        if kind != "LORA":
            return f"it is a {kind} adapter, which has no product B A"
        for key, value in self.config.items():
            if value and key in REFUSED:
                return f"its {key} says that {REFUSED[key]}"
            if value and key not in PLAIN and (key.startswith("use_") or key.endswith("_config")):
                return f"what its {key} makes of the factors is not known"
        if self.experts and (self.rank is None or self.config.get("rank_pattern")):
            return "target_parameters with a rank_pattern do not tell how many experts a tensor holds"
        for name in self.checkpoint.names:
            last = name.rsplit(".lora_", 1)
            if len(last) > 1 and not FACTOR.fullmatch(name) and not BESIDE_FACTORS.fullmatch(name):
                return f"what {name} is in its updates is not known"
            if self.kasa and FACTOR.fullmatch(name) and len(self.group(name)) != 3:
                return f"kasa_config asks for factors A, B and diag, which are not all there beside {name}"
        return ""

    def group(self, name: str) -> tuple[str, ...]:
        """The names of A, B and, if there is one, the diagonal between them, given one of them; else nothing."""
        match = FACTOR.fullmatch(name)
        if match is None:
            return ()
        embedding = "embedding_" if match["layer"] + "lora_embedding_A" + match["end"] in self.checkpoint.infos else ""
        found = []
        for kind in (f"{embedding}A", f"{embedding}B", "diag"):
            forms = (f"{match['layer']}lora_{kind}{end}" for end in ("", ".weight"))
            found += [form for form in forms if form in self.checkpoint.infos][:1]
        return tuple(found) if len(found) > 1 and name in found else ()

    def split(self, name: str, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The independent pairs that stored factors hold, as views: A [rank, in], B [out, rank]."""
        a, b = a.flatten(1), b.flatten(1)
        if a.shape[0] != b.shape[1] and (not b.shape[1] or a.shape[0] % b.shape[1]):
            raise CheckpointError(
                f"{name} in {self.checkpoint.path} has rank {a.shape[0]} and its B {b.shape[1]}, which do not multiply."
            )
        if (blocks := a.shape[0] // max(1, b.shape[1])) > 1:  # of B, on the diagonal
            if b.shape[0] % blocks:
                raise CheckpointError(f"{name} in {self.checkpoint.path}: its B is not {blocks} blocks of one size.")
            return list(zip(a.chunk(blocks), b.chunk(blocks)))
        if self.blocks > 1 and any(pattern in name.removeprefix("base_model.model.") for pattern in self.block_a):
            return list(zip(a.chunk(self.blocks), b.chunk(self.blocks, 1)))
        if self.experts and self.rank and a.shape[0] > self.rank:
            if a.shape[0] % self.rank:
                raise CheckpointError(f"{name} in {self.checkpoint.path} holds no whole number of experts.")
            count = a.shape[0] // self.rank
            return [(a.view(count, self.rank, -1)[e], b.view(len(b), self.rank, count)[..., e]) for e in range(count)]
        return [(a, b)]

    def extrapolate(
        self, names: tuple[str, ...], factors: list[list[Tensor]], weights: Sequence[float], product: bool
    ) -> tuple[list[Tensor], Tensor]:
        """New factors of one layer, and how far they are from the sum of products.

        The products are never formed. All B side by side are Q R, all A on top of each other (transposed) P S, and so
        any sum of products is Q C P^T with a small core C, of which the SVD gives the nearest product of rank r.

        Args:
            names: As `group` gives them.
            factors: For each name float64 tensors, one of each checkpoint.
            weights: Of the checkpoints; they add up to 1.
            product: Whether to extrapolate the product, and not the factors one by one.

        Returns:
            float64 tensors for the names, and the squared lengths [3] of the jump, the cross term, the truncation.
        """
        a_all, b_all = factors[:2]
        apart = [sum_of(weights, each) for each in factors]
        new = apart if not product else [torch.zeros_like(each[0]) for each in factors]
        diagonals = factors[2] if len(factors) > 2 else [torch.ones((), dtype=torch.float64)] * len(a_all)
        diagonal = apart[2] if len(factors) > 2 else diagonals[0]
        parts = [self.split(names[0], a, b) for a, b in zip(a_all, b_all)]
        squares = torch.zeros(3, dtype=torch.float64)
        for i, (new_a, new_b) in enumerate(self.split(names[0], new[0], new[1])):
            some_a, some_b = [part[i][0] for part in parts], [part[i][1] for part in parts]
            rank = len(some_a[0])
            q, r = torch.linalg.qr(torch.cat(some_b, 1))
            p, s = torch.linalg.qr(torch.cat(some_a, 0).mT)
            each_r, each_s = r.split(rank, 1), s.split(rank, 1)
            cores = [(left * d) @ right.mT for left, d, right in zip(each_r, diagonals, each_s)]
            target = sum_of(weights, cores)
            left, values, right = torch.linalg.svd(target)
            one_by_one = (sum_of(weights, each_r) * diagonal) @ sum_of(weights, each_s).mT
            squares[0] += (target - cores[-1]).square().sum()
            squares[1] += (target - one_by_one).square().sum()
            squares[2] += values[rank:].square().sum()
            if not product:
                continue
            kept = values[:rank]
            count = len(kept)
            scale = kept.sqrt() if len(new) < 3 else torch.ones_like(kept)
            new_a[:count] = scale[:, None] * (right[:count] @ p.mT)
            new_b[:, :count] = q @ left[:, :count] * scale
            if len(new) > 2:
                new[2][:count] = kept
        return new, squares


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
