"""Tell quantised checkpoints: their numbers are codes and scales, and a sum of scales beside other codes is noise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .safety import CheckpointError, read_json

if TYPE_CHECKING:
    from .read import TensorInfo

KEYS = ("quantization_config", "compression_config")
# GPTQ's and AWQ's before transformers took them up, and ModelOpt's
FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
BESIDE_CODES = ("scale", "absmax", "scb", "qzeros", "zero_point", "quant_map", "quant_state")


def check_not_quantised(path: Path, config: dict[str, Any], infos: Mapping[str, TensorInfo]) -> None:
    """Refuse a checkpoint whose config, a file beside it, or whose tensors say that it is quantised.

    Raises:
        CheckpointError: It is.
    """
    sign = _in_config(config) or _in_files(path) or _in_tensors(infos)
    if sign:
        raise CheckpointError(
            f"{path} holds quantised weights ({sign}): their numbers are codes, not weights. Dequantise the model "
            "first."
        )


def _in_config(config: dict[str, Any]) -> str:
    rest: list[tuple[str, Any]] = [("", config)]
    while rest:  # no recursion: a foreign config may be nested deeply
        where, part = rest.pop()
        if isinstance(part, list):
            rest += [(where, value) for value in part]
        for key, value in part.items() if isinstance(part, dict) else ():
            if key in KEYS and value:
                return f"its config has {where}{key}"
            rest.append((f"{where}{key}."[-200:], value))
    return ""


def _in_files(path: Path) -> str:
    found = (name for name in FILES if os.path.isfile(path / name) and read_json(path / name))
    return next((f"{name} lies beside them" for name in found), "")


def _in_tensors(infos: Mapping[str, TensorInfo]) -> str:
    """A matrix of integers and its scales, in one layer: `x.qweight` and `x.scales`, `x_blocks` and `x_scales`."""
    scales: dict[str, str] = {}
    for name in infos:
        stem = _stem(name)
        if any(word in name[len(stem) :].lower() for word in BESIDE_CODES):
            scales[stem] = name
    for name, info in infos.items():
        codes = not (info.dtype.is_floating_point or info.dtype in (torch.bool, torch.int64)) and len(info.shape) > 1
        if codes and _stem(name) in scales and scales[_stem(name)] != name:
            return f"{name} holds {str(info.dtype)[6:]} beside {scales[_stem(name)]}"
    return ""


def _stem(name: str) -> str:
    """The layer of a tensor: `x` of `x.weight`, `x.weight.absmax`, `x.weight_scale`, `x.qweight`, `x_blocks`."""
    layer, _, last = name.partition(".weight") if ".weight" in name else name.rpartition(".")
    for end in ("_blocks", "_scales", "_scale", "_scale_inv", "_absmax"):
        if last.endswith(end) and ".weight" not in name:
            return f"{layer}.{last.removesuffix(end)}"
    return layer
