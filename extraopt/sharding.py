"""Tensors that are sharded over ranks: their local parts, and sums over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _is_dtensor(t: Any) -> bool:
    return hasattr(t, "to_local")  # importing the class would double the time of `import extraopt`


_PLAIN = {Tensor, torch.nn.Parameter}


def local(tensors: Sequence[Any]) -> list[Tensor]:
    """The part of each tensor that lies on this rank: the tensor itself where it is no DTensor."""
    if set(map(type, tensors)) <= _PLAIN:
        return list(tensors)
    return [t.to_local() if _is_dtensor(t) else t for t in tensors]


def same_parts(a: Any, b: Any) -> bool:
    """Whether two tensors of one shape are sharded alike: both on the same ranks, or neither."""
    if type(a) in _PLAIN and type(b) in _PLAIN:
        return True
    if not (_is_dtensor(a) and _is_dtensor(b)):
        return _is_dtensor(a) == _is_dtensor(b)
    return bool(a.placements == b.placements and a.device_mesh == b.device_mesh)


def sum_over_shards(sums: Tensor, params: Sequence[Any]) -> Tensor:
    """Add up the sums of tensors that are sharded over ranks, so that every rank decides on the whole tensor.

    One all-reduce for each dimension of each mesh: [tensors of the mesh, 4] float64.
    """
    meshes: dict[Any, list[int]] = {}
    if set(map(type, params)) <= _PLAIN:
        return sums
    for i, p in enumerate(params):
        if _is_dtensor(p):
            meshes.setdefault(p.device_mesh, []).append(i)
    for mesh, indices in meshes.items():
        for dim in range(mesh.ndim):
            split = torch.tensor([not params[i].placements[dim].is_replicate() for i in indices], device="cpu")
            if mesh.size(dim) == 1 or not split.any():
                continue
            total = sums[indices].to(mesh.device_type)
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
            sums[indices] = torch.where(split[:, None], total.cpu(), sums[indices])
    return sums
