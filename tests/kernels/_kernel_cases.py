"""Lists of tensors that a multi-tensor kernel can get wrong, and the rule in plain torch operations."""

import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from extraopt.kernels import TensorLists, multi_tensor, streamed

GUARD, SENTINEL = 64, 77.0
LAYOUTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "scalar": (1, lambda flat: flat.view(())),
    "ones": (1, lambda flat: flat.view(1, 1, 1)),
    "empty": (0, lambda flat: flat.view(3, 0)),
    "matrix": (35, lambda flat: flat.view(5, 7)),
    "transposed": (48, lambda flat: flat.view(6, 8).t()),
    "channels_last": (120, lambda flat: flat.view(2, 4, 5, 3).permute(0, 3, 1, 2)),
    "permuted": (60, lambda flat: flat.view(3, 4, 5).permute(2, 0, 1)),
}
SMALL = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33]
EDGES = [1023, 1024, 1025, 2047, 2049, multi_tensor.CHUNK - 1, multi_tensor.CHUNK, multi_tensor.CHUNK + 8]
LONG = [2 * multi_tensor.CHUNK + 5]

Spec = tuple[torch.dtype, int, Callable[[Tensor], Tensor], tuple[int, int, int]]


def specs(dtype: torch.dtype, sizes: Sequence[int]) -> list[Spec]:
    """Flat tensors of these sizes, every layout, and all ways for param, anchor and drift to be misaligned."""
    aligned = (0, 0, 0)
    out = [(dtype, n, lambda flat: flat, aligned) for n in sizes]
    out += [(dtype, n, layout, aligned) for n, layout in LAYOUTS.values()]
    shifts = [(i, i, i) for i in range(1, 9)] + [(1, 0, 0), (0, 3, 0), (0, 0, 2), (8, 4, 1)]
    return out + [(dtype, 41 + sum(shift), lambda flat: flat, shift) for shift in shifts]


class Lists:
    """Params, anchors and estimates, each a view into a buffer of its own that is sentinels everywhere else."""

    def __init__(self, wanted: Sequence[Spec], device: str = "cpu", seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.buffers: list[tuple[Tensor, int, int]] = []
        self.params, self.anchors, self.estimates = lists = [], [], []
        for dtype, n, layout, shifts in wanted:
            p, noise, v = torch.randn(3, n, generator=generator).unbind()
            scale = 10 ** (3 * torch.rand(2, n, generator=generator) - 4)  # steps from 1e-4 of the weights up to 0.1
            a = p - scale[0] * noise
            v *= scale[1]
            for i, (start, stop) in enumerate(itertools.pairwise((0, n // 8, n // 6, n // 5))):
                if i == 0:
                    a[start:stop] = p[start:stop]  # has not moved
                elif i == 1:
                    p[start:stop] = -0.0
                else:
                    v[start:stop] = 0.0
            for values, out, shift in zip((p, a, v), lists, shifts):
                buffer = torch.full((GUARD + shift + n + GUARD,), SENTINEL, dtype=dtype, device=device)
                flat = buffer[GUARD + shift : GUARD + shift + n]
                flat.copy_(values)
                out.append(layout(flat))
                self.buffers.append((buffer, GUARD + shift, n))

    def guards_intact(self) -> bool:
        outside = (part for b, start, n in self.buffers for part in (b[:start], b[start + n :]))
        return all(bool((part == SENTINEL).all()) for part in outside)

    def copies(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The tensors as they are now, on the CPU, layouts kept."""
        return tuple(
            [t.detach().to("cpu", copy=True) for t in ts] for ts in (self.params, self.anchors, self.estimates)
        )


def ratios(n: int) -> list[float]:
    return list(itertools.islice(itertools.cycle([0.5, 0.0, 5.0, 0.3, 1.0, 7.3, 0.0]), n))


def retreats(n: int) -> list[float]:
    return list(itertools.islice(itertools.cycle([0.5, 0.0, 0.0, 0.25, 0.123]), n))


def plain_jump_(params: Sequence[Tensor], anchors: Sequence[Tensor], ratios: Sequence[float]) -> None:
    """The paper's rule as one would type it; 16-bit tensors are computed in float32 and rounded once, at the end."""
    for p, a, ratio in zip(params, anchors, ratios):
        p32 = p.float()
        if ratio:
            p32 = p32.add(p32 - a.float(), alpha=ratio)
        p.copy_(p32)
        a.copy_(p)


def plain_retreat_(
    params: Sequence[Tensor], anchors: Sequence[Tensor], estimates: Sequence[Tensor],
    retreats: Sequence[float], weights: Sequence[float],
) -> None:  # fmt: skip
    """The retreat as one would type it, likewise."""
    for p, a, v, retreat, weight in zip(params, anchors, estimates, retreats, weights):
        p32 = p.float()
        d = p32 - a.float()
        v.copy_(v.float().lerp_(d, weight))
        a.copy_(p32.add(d, alpha=-retreat) if retreat else p)


def prepared(module: ModuleType, params: Any, anchors: Any, estimates: Any) -> Any:
    extra = [TensorLists] if module is streamed else []
    return module.prepare(params, anchors, estimates, *extra)


def column(factors: Sequence[float]) -> Tensor:
    return torch.tensor(factors, dtype=torch.float64)


def sums(module: ModuleType, *lists: Any) -> Tensor:
    """What a module's two steps make of params, anchors and estimates."""
    return module.cycle_sums(prepared(module, *lists))


def jump_(module: ModuleType, params: Any, anchors: Any, ratios: Sequence[float]) -> None:
    module.jump_(prepared(module, params, anchors, None), column(ratios))


def retreat_(module: ModuleType, params: Any, anchors: Any, estimates: Any, retreats: Any, weights: Any) -> None:
    module.retreat_(prepared(module, params, anchors, estimates), column(retreats), column(weights))


def exact_jump(p: Tensor, a: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """New weights in float64, and the size of the largest number that was rounded on the way."""
    p, a = p.double(), a.double()
    return p + ratio * (p - a), (1 + ratio) * (p.abs() + a.abs())


def exact_sums(p: Tensor, a: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """The four sums in float64, and the same of absolute values, which is what their error is relative to."""
    p, a = p.float(), a.float()
    d, p = (p - a).double(), p.double()
    v = torch.zeros_like(d) if v is None else v.double()
    products = [d * v, d * d, v * v, p * p]
    return torch.stack([x.sum() for x in products]), torch.stack([x.abs().sum() for x in products])


def bits(t: Tensor) -> Tensor:
    real = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return real.cpu().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[real.itemsize])


def differing(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[tuple[int, tuple[int, ...], int]]:
    """(index, shape, number of elements) of what is not the same, bit for bit."""
    counts = [int((bits(g) != bits(w)).sum()) for g, w in zip(got, wanted, strict=True)]
    return [(i, tuple(wanted[i].shape), count) for i, count in enumerate(counts) if count]
