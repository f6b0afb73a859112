"""Go on along the line that saved weights moved on: W = (1 + alpha) W_B - alpha W_A, written as a checkpoint.

Weight extrapolation of "Linear Dynamics in the RLVR Training of LLMs" (arXiv 2601.04537, section 5; ExPO, arXiv
2404.16792, is the same formula between a model and its fine-tuned self). Every variant here, through two checkpoints or
many, averaged before or not, is a sum of checkpoints whose weights add up to 1.

Tensors are read, summed and written in blocks of `BLOCK` elements, so that memory depends neither on the model's size
nor on that of its tensors. Sums are taken in float64 and rounded once, to float32 or float64 and from there to the
stored dtype: reading and writing take longer than that, and neither the order of a sum nor a large alpha costs a bit.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .beside import is_weights
from .family import check_same_family
from .find import numbered
from .lora import LoraAlgebra, LoraError, finite, not_finite
from .plan import line
from .read import Checkpoint, open_checkpoint
from .safety import CheckpointError
from .write import check_space, fsync, fsync_handle, new_folder, write_all, write_header, write_text

BLOCK = 1 << 15  # elements: stays in a core's cache, and torch starts no threads, which would cost more than they do

STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}

Progress = Callable[[float, float], None]


@dataclass
class Extrapolation:
    """What was written.

    Attributes:
        out: The new checkpoint's folder.
        sum: Folder and weight of each checkpoint in the sum, in the order given. The weights add up to 1.
        alpha: How far beyond the last point of the line, in distances from its first to its last point.
        extrapolated: Number of tensors that are such a sum.
        copied: Names of those taken from the last checkpoint unchanged: integers, buffers, those left out by pattern.
        tied: Groups of names that the model holds as one parameter.
        lora: For LoRA adapters.
        notes: What to know before use, in words.
        bytes: Size of the weights written.
        seconds: Time taken.
    """

    out: Path
    sum: list[tuple[Path, float]]
    alpha: float
    extrapolated: int = 0
    copied: list[str] = field(default_factory=list)
    tied: list[tuple[str, ...]] = field(default_factory=list)
    lora: LoraError | None = None
    notes: list[str] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class _Sum:
    """One extrapolation in progress: the sum over checkpoints, tensor by tensor, into a folder."""

    def __init__(
        self, checkpoints: list[Checkpoint], weights: list[float], include: Sequence[str], exclude: Sequence[str],
        lora: Literal["product", "factors"], report: Extrapolation, progress: Progress | None,
    ):  # fmt: skip
        self.checkpoints, self.weights, self.last = checkpoints, weights, checkpoints[-1]
        self.include, self.exclude, self.report = include, exclude, report
        self.lora, self.progress = lora, progress
        self.ready: dict[str, Tensor] = {}  # LoRA factors that were computed when another one of the layer was due
        self.squares = torch.zeros(3, dtype=torch.float64)  # of jump, cross term, truncation
        self.stored: dict[str, str] = {}  # name to file, as written
        for pattern in (*include, *exclude):
            if not any(fnmatchcase(name, pattern) for name in self.last.names):
                raise CheckpointError(f"The pattern {pattern!r} fits no tensor such as {self.last.names[0]}.")
        self.algebra = LoraAlgebra(self.last) if self.last.is_adapter else None
        if self.algebra and self.algebra.unknown:
            if lora == "product":
                raise CheckpointError(
                    f"{self.last.path} can not be extrapolated as products B A: {self.algebra.unknown}. "
                    "With --lora factors its tensors are extrapolated one by one, which is not the same."
                )
            report.notes.append(f"Tensors were extrapolated one by one: {self.algebra.unknown}.")
            self.algebra = report.lora = None

    def is_state(self, name: str) -> bool:
        """Whether a tensor is a buffer: by the model's class, or by a batch norm's names (no variance is below 0)."""
        return name in self.last.buffers or name.rpartition(".")[2] in STATISTICS

    def moves(self, name: str) -> bool:
        """Whether a tensor is extrapolated. All names of one parameter, and both factors of a pair, go together."""
        if not self.last.dtype(name).is_floating_point or self.is_state(name):
            return False
        names = {name, *(other for group in self.last.tied if name in group for other in group)}
        names.update(self.algebra.group(name) if self.algebra else ())
        chosen = not self.include or any(fnmatchcase(n, pattern) for n in names for pattern in self.include)
        return chosen and not any(fnmatchcase(n, pattern) for n in names for pattern in self.exclude)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The new tensor in flat pieces, in its dtype; each is overwritten by the next one."""
        if not self.moves(name):
            self.report.copied.append(name)
            check = self.last.dtype(name).is_floating_point and not self.is_state(name)
            for block in self.last.blocks(name, BLOCK):
                if check and not finite(block):
                    raise not_finite(name, self.last)
                yield block
            return
        self.report.extrapolated += 1
        group = self.algebra.group(name) if self.algebra else ()
        if group:
            if name not in self.ready:
                self.ready.update(zip(group, self.group(group)))
            yield from torch.split(self.ready.pop(name).reshape(-1), BLOCK)
            return
        new = torch.empty(0, dtype=self.last.dtype(name))
        names = [checkpoint.resolve(name) or name for checkpoint in self.checkpoints]
        for blocks in zip(*(c.blocks(n, BLOCK) for c, n in zip(self.checkpoints, names))):
            last = blocks[-1].double()
            total = last.clone()  # last + sum of w (W - last): the weights add up to 1, and nothing cancels
            for weight, block in zip(self.weights[:-1], blocks):
                total.add_(block.double().sub_(last), alpha=weight)
            new.resize_(total.shape).copy_(total)
            if not finite(new):
                for checkpoint, block in zip(self.checkpoints, blocks):
                    if not finite(block):
                        raise not_finite(name, checkpoint)
                raise CheckpointError(f"{name} leaves the range of {new.dtype} at this alpha. Use a smaller one.")
            yield new

    def group(self, names: tuple[str, ...]) -> list[Tensor]:
        """New LoRA factors of one layer, in their dtypes."""
        assert self.algebra is not None and self.report.lora is not None
        factors: list[list[Tensor]] = []
        for name in names:
            factors.append([])
            for checkpoint in self.checkpoints:
                factors[-1].append(checkpoint.read(name).double())
                if not finite(factors[-1][-1]):
                    raise not_finite(name, checkpoint)
        found, squares = self.algebra.extrapolate(names, factors, self.weights, self.lora == "product")
        self.squares += squares
        self.report.lora.pairs += 1
        new = [tensor.to(self.last.dtype(name)) for name, tensor in zip(names, found)]
        for name, tensor in zip(names, new):
            if not finite(tensor):
                raise CheckpointError(f"{name} leaves the range of {tensor.dtype} at this alpha. Use a smaller one.")
        return new

    def write(self, folder: Path) -> None:
        """All files of the new checkpoint."""
        self.report.bytes = sum(info.nbytes for info in self.last.infos.values())
        check_space(folder, self.report.bytes)
        shards: dict[str, list[str]] = {}
        for name in self.last.names:
            if not self.doubled(name):
                shards.setdefault(self.last.shard_of(name), []).append(name)
        done = 0
        for shard, names in shards.items():
            file = folder / shard.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            with open(file, "wb", buffering=0) as stream:
                write_header(stream, self.last, names, self.last.metadata.get(shard, {}))
                for name in names:
                    for piece in self.pieces(name):
                        memory = bytearray(piece.numel() * piece.element_size())
                        if memory:
                            torch.frombuffer(memory, dtype=piece.dtype).copy_(piece)
                        write_all(stream, memory)
                        done += len(memory)
                        if self.progress:
                            self.progress(done, self.report.bytes)
                    self.stored[name] = file.name
                fsync_handle(stream.fileno())
        if len(shards) > 1 or (self.last.path / "model.safetensors.index.json").exists():
            index = {"metadata": {"total_size": done}, "weight_map": dict(sorted(self.stored.items()))}
            write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        for file in self.last.files:
            copy = folder / file.relative_to(self.last.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if is_weights(file):
                self.report.notes.append(f"{file} holds weights of its own: copied, not extrapolated.")
            shutil.copyfile(file, copy)
            fsync(copy)
        self.report.bytes = done

    def doubled(self, name: str) -> bool:
        """Whether a `.bin` holds this tensor as another name of one before it: safetensors keep one name of a tie."""
        info = self.last.infos[name]
        if info.file.suffix != ".bin":
            return False
        group = next((group for group in self.last.tied if name in group), (name,))
        first = next(other for other in group if other in self.last.infos)
        twin = self.last.infos[first]
        return first != name and (twin.file, twin.offset) == (info.file, info.offset)


def extrapolate(
    checkpoints: Sequence[str | Path],
    out: str | Path,
    *,
    alpha: float | None = None,
    to: float | None = None,
    steps: Sequence[float] | None = None,
    fit: Literal["line", "ols"] = "line",
    average: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    lora: Literal["product", "factors"] = "product",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Extrapolation:
    """Extrapolate checkpoints and write the result as one that `from_pretrained` loads.

    The new checkpoint has the last one's dtypes, shards, config, tokenizer and index; `.bin` files become safetensors.
    Memory: a few blocks, some MB, whatever the model's size; for a LoRA adapter the factors of one layer besides.

    Args:
        checkpoints: Folders of models of one family, earliest first; or of adapters on one base model. A single folder
            of a run stands for all its checkpoints.
        out: New folder. It appears when all of it is written.
        alpha: How far: 1 goes on beyond the last point as far as it lies from the first.
        to: How far, as a step; `steps` are then needed, from the folders' names if not given here.
        steps: Step of each checkpoint.
        fit: The line through two points, or least squares over more: see `coefficients`.
        average: Checkpoints averaged into a point.
        include: Patterns of names (`*.mlp.*`) to extrapolate, instead of all.
        exclude: Patterns of names to take from the last checkpoint as they are.
        lora: "product" extrapolates each update B A and cuts it back to its rank; "factors" A and B one by one.
        trust_remote_code: Allow Python code from the last checkpoint's folder to run, to learn what the model ties.
        progress: Called with bytes written and bytes to write.

    Returns:
        What was written, of what.

    Raises:
        CheckpointError: The input is bad, or `out` can't be written. Then `out` is as it was.
    """
    start = time.perf_counter()
    left_out: list[str] = []
    found = numbered(checkpoints, left_out)
    paths, weights, alpha = line(found, alpha, to, steps, fit, average)
    opened = [open_checkpoint(path, trust_remote_code=trust_remote_code) for path in paths]
    for checkpoint in opened[:-1]:
        check_same_family(checkpoint, opened[-1], dtypes=False)
    last = opened[-1]
    report = Extrapolation(Path(out), list(zip(paths, weights)), alpha, tied=list(last.tied), notes=left_out)
    mixed = sorted({str(c.dtype(c.resolve(name) or name))[6:] for name in last.names for c in opened})
    if any(c.dtype(c.resolve(name) or name) != last.dtype(name) for name in last.names for c in opened):
        report.notes.append(
            f"The checkpoints are stored in {' and '.join(mixed)}: the sum is taken in float64 and written as the last "
            "one is stored. What the coarser dtype rounded off is extrapolated too."
        )
    if last.model_facts.unknown:
        report.notes.append(
            f"The model's class could not be asked what it ties and buffers ({last.model_facts.unknown[:200]}): "
            "every tensor of floats was taken for a weight."
        )
    if last.is_adapter:
        report.lora = LoraError(written=lora)
        if last.config.get("use_dora"):
            report.notes.append("DoRA: the product B A and the magnitudes were extrapolated each by itself.")
        bases = {str(checkpoint.config.get("base_model_name_or_path")) for checkpoint in opened}
        if len(bases) > 1:
            report.notes.append(f"The adapters name different base models: {', '.join(sorted(bases))}.")
    work = _Sum(opened, weights, include, exclude, lora, report, progress)
    with new_folder(report.out, paths) as folder:
        work.write(folder)
    if report.lora is not None:
        jump, cross_term, truncation = work.squares.sqrt().tolist()
        if jump > 0:
            report.lora.jump = jump
            report.lora.cross_term, report.lora.truncation = cross_term / jump, truncation / jump
    report.seconds = time.perf_counter() - start
    return report
