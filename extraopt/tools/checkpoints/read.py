"""Read saved checkpoints tensor by tensor, so that a model may be larger than the memory.

A checkpoint is a folder as `save_pretrained` of transformers or PEFT writes it: one file of weights or shards with an
index, as safetensors or as `.bin`. What is opened here is only the table of contents; weights are read with plain
reads, not mapped, so that a process grows by what it holds and by nothing else.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .beside import files_beside
from .introspection import ModelFacts, ask_model, unwrapped
from .quantization import check_not_quantised
from .safety import LARGEST_SHAPE, CheckpointError, check_inside, check_records, read_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
FULL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        file: The file that holds it.
        offset: Of its first byte in the file.
        dtype: As stored.
        shape: As stored.
        stride: In elements, of the stored tensor; only a `.bin` can hold tensors that are not contiguous.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None  # None: contiguous

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes, were it contiguous."""
        return self.numel * self.dtype.itemsize


class Checkpoint:
    """A checkpoint on disk; made by `open_checkpoint`.

    Attributes:
        path: Its folder.
        is_adapter: Whether it is a PEFT adapter.
        config: Its config.json or adapter_config.json; empty if a model has none.
        infos: Name to `TensorInfo`, in the order of the files.
        metadata: Safetensors metadata, by file name.
        trust_remote_code: Whether the model's own Python code may be run to learn what it ties.
    """

    def __init__(self, path: Path, weights: Path, trust_remote_code: bool = False):
        self.path = path
        self.trust_remote_code = trust_remote_code
        self.is_adapter = weights.name in ADAPTER
        config = path / ("adapter_config.json" if self.is_adapter else "config.json")
        self.config: dict[str, Any] = read_json(config) if os.path.exists(config) or self.is_adapter else {}
        check_not_quantised(path, self.config, {})
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        if weights.name.endswith(".index.json"):
            self._open_shards(weights)
        else:
            self._open_file(weights)
        if not self.infos:
            raise CheckpointError(f"{weights} holds no tensor.")
        check_not_quantised(path, self.config, self.infos)

    def _open_shards(self, index: Path) -> None:
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise CheckpointError(f"{index} has no weight_map from names to files. Copy the checkpoint again.")
        for file in sorted(set(where.values())):
            if file != Path(file).name:
                raise CheckpointError(f"{index} names {file!r}, which is not a file of this folder. Refused.")
            if not os.path.exists(self.path / file):
                raise CheckpointError(f"{index} names {file}, which is not there. Copy the missing shard.")
            self._open_file(self.path / file)
        for name, file in where.items():
            if name not in self.infos:
                raise CheckpointError(f"{index} puts {name} in {file}, which does not hold it.")
        for name, info in self.infos.items():
            if where.get(name) != info.file.name:
                raise CheckpointError(f"{info.file} holds {name}, but {index.name} does not say so.")

    def _open_file(self, file: Path) -> None:
        check_inside(file, self.path)
        if not os.path.isfile(file):  # a pipe would never end
            raise CheckpointError(f"{file} is no file.")
        try:
            infos = self._open_bin(file) if file.suffix == ".bin" else self._open_safetensors(file)
        except OSError as error:
            raise CheckpointError(f"{file} can not be read: {error}") from error
        for name, info in infos:
            if name in self.infos:
                raise CheckpointError(f"{name} is in {self.infos[name].file} and in {file}.")
            self.infos[name] = info

    def _open_safetensors(self, file: Path) -> list[tuple[str, TensorInfo]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt"):  # checks that header, offsets and size of the file fit together
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{file} is cut short or corrupt ({error}). Copy it again.") from error
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        self.metadata[file.name] = header.pop("__metadata__", {})
        infos = []
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(f"{file} holds {name} as {entry['dtype']}, which is not supported.")
            if (
                math.prod(max(1, size) for size in entry["shape"]) > LARGEST_SHAPE
            ):  # a size of 0 beside it makes it fit any file
                raise CheckpointError(f"{file} holds {name} of shape {entry['shape']}, which no tensor has.")
            offset = 8 + length + entry["data_offsets"][0]
            infos.append((name, TensorInfo(file, offset, DTYPES[entry["dtype"]], tuple(entry["shape"]))))
        return infos

    def _open_bin(self, file: Path) -> list[tuple[str, TensorInfo]]:
        try:
            if not zipfile.is_zipfile(file):
                said = f"{file} is cut short, corrupt, or from before torch 1.6. Copy it or save it again."
                raise CheckpointError(said)
            check_records(file)
            # On "meta" nothing but the table of contents is read, and each storage says where in the file it lies.
            tensors = torch.load(file, map_location="meta", weights_only=True)
        except (CheckpointError, OSError):
            raise
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{file} holds more than tensors, and reading it could run code. Refused. Save it as safetensors."
            ) from error
        except Exception as error:  # whatever a damaged archive or pickle raises
            raise CheckpointError(
                f"{file} is corrupt ({type(error).__name__}: {str(error)[:200]}). Copy it again."
            ) from error
        size = file.stat().st_size
        infos = []
        for name, tensor in tensors.items() if isinstance(tensors, dict) else [("", None)]:
            if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                raise CheckpointError(f"{file} is no plain dict of names and tensors: {name or type(tensors)!s:.200}.")
            if tensor.dtype not in DTYPES.values():
                raise CheckpointError(f"{file} holds {name} as {tensor.dtype}, which is not supported.")
            start: int = tensor.untyped_storage()._checkpoint_offset or 0
            offset = start + int(tensor.storage_offset()) * tensor.dtype.itemsize
            stride = None if tensor.is_contiguous() else tensor.stride()
            infos.append((name, TensorInfo(file, offset, tensor.dtype, tuple(tensor.shape), stride)))
            if start + max(tensor.untyped_storage().nbytes(), tensor.nbytes) > size:  # strides of 0 repeat an element
                raise CheckpointError(f"{file} is too short for {name}. Copy it again.")
        return infos

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order in which they lie in the files."""
        return tuple(self.infos)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.infos[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, as stored."""
        return self.infos[name].dtype

    def shard_of(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        return self.infos[name].file.name

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own, as stored.

        Raises:
            CheckpointError: The file was cut short or can't be read.
        """
        info = self.infos[name]
        if info.stride is None:
            (tensor,) = self.blocks(name, max(1, info.numel))
            return tensor.reshape(info.shape)
        span = 1 + sum((size - 1) * stride for size, stride in zip(info.shape, info.stride))
        flat = TensorInfo(info.file, info.offset, info.dtype, (span,))
        (memory,) = read_blocks(name, flat, span)
        return memory.as_strided(info.shape, info.stride).contiguous()

    def blocks(self, name: str, elements: int) -> Iterator[Tensor]:
        """A tensor piece by piece, flattened; an empty one is one empty piece.

        Args:
            name: Of the tensor.
            elements: In a piece; the last one may be smaller.

        Yields:
            1-d tensors in the stored dtype. Each is overwritten by the next one.
        """
        info = self.infos[name]
        if info.stride is None:
            yield from read_blocks(name, info, elements)
        else:
            yield from torch.split(self.read(name).reshape(-1), elements)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """What belongs to the model beside its weights: config, tokenizer, chat templates, code, licence, its parts."""
        return files_beside(self.path)

    @cached_property
    def model_facts(self) -> ModelFacts:
        """What the model ties and which tensors are buffers, asked of its class."""
        return ask_model(self)

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of names that the model holds as one parameter; found from the model's class and shared storages."""
        return self.model_facts.tied

    @property
    def buffers(self) -> frozenset[str]:
        """Names of what the model keeps as buffers: state, not weights."""
        return self.model_facts.buffers

    def resolve(self, name: str) -> str | None:
        """The name under which this checkpoint holds a tensor: its own, with other wrappers, or of a tie; None: none.

        Of tied tensors a file of safetensors holds one, and a `.bin` holds all.
        """
        if name in self.infos:
            return name
        held = self._unwrapped.get(unwrapped(name))
        if held is not None:
            return held
        group = next((group for group in self.tied if name in group or unwrapped(name) in group), ())
        return next((other for other in group if other in self.infos), None)

    @cached_property
    def _unwrapped(self) -> dict[str, str]:
        """From names without wrappers to names."""
        return {unwrapped(name): name for name in self.infos}


def read_blocks(name: str, info: TensorInfo, elements: int) -> Iterator[Tensor]:
    """The contiguous tensor that `info` describes, in flat pieces; see `Checkpoint.blocks`."""
    size = info.dtype.itemsize
    count = min(elements, info.numel)
    if not count:
        yield torch.empty(0, dtype=info.dtype)
        return
    memory = bytearray(count * size)
    view = memoryview(memory)
    with open(info.file, "rb", buffering=0) as stream:
        stream.seek(info.offset)
        for start in range(0, info.numel, count):
            want = min(count, info.numel - start) * size
            have = 0
            while have < want:
                try:
                    got = stream.readinto(view[have:want])
                except OSError as error:
                    raise CheckpointError(f"{name} in {info.file} can not be read: {error.strerror}.") from error
                if not got:
                    raise CheckpointError(f"{info.file} ends within {name}. Copy it again.")
                have += got
            yield torch.frombuffer(memory, dtype=info.dtype, count=want // size)


def weights_in(path: Path) -> Path | None:
    """The file of weights, or of their index, of the checkpoint in a folder; None if there is none."""
    return next((path / name for name in ADAPTER + FULL if os.path.exists(path / name)), None)


def open_checkpoint(path: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open a folder with a model or a PEFT adapter: read its table of contents, none of its weights.

    Args:
        path: The folder.
        trust_remote_code: Allow running Python code from the folder to learn which weights the model ties.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: There is no checkpoint, or its files are damaged, contradict each other or lead elsewhere.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise CheckpointError(f"{path} is no folder. Give the folder of a checkpoint.")
    weights = weights_in(path)
    if weights is None:
        shards = sorted(path.glob("*-of-*.safetensors")) + sorted(path.glob("*-of-*.bin"))
        if shards:
            raise CheckpointError(f"{path} holds shards such as {shards[0].name}, but no index of them. Copy that too.")
        if any(path.glob("model_world_size_*")) or any(path.glob("actor/model_world_size_*")):
            raise CheckpointError(
                f"{path} holds verl's FSDP shards. Merge them first: python -m verl.model_merger merge "
                f"--backend fsdp --local_dir {path} --target_dir DIR"
            )
        raise CheckpointError(f"{path} holds no weights: none of {', '.join(ADAPTER + FULL)}.")
    return Checkpoint(path, weights, trust_remote_code)
