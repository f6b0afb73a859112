"""What a bug report has to say of the machine: `python -m extraopt env`. Needs nothing but torch."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import torch

from .. import __version__
from ..kernels import lists

PACKAGES = ("triton", "transformers", "trl", "peft", "accelerate", "deepspeed", "lightning", "numpy")
KERNELS = {"native": "C loops", "multi_tensor": "Triton kernels", "foreach": "torch operations"}


def print_environment() -> None:
    """One line a fact, `name: value`; nothing of it says whose machine it is."""
    for name, value in environment():
        print(f"{name}: {value}")


def environment() -> Iterator[tuple[str, str]]:
    """Names and values, in the order in which they are printed."""
    yield "extraopt", __version__
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", platform.platform()
    yield "torch", f"{torch.__version__} ({_backend()})"
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "end of a cycle on CPUs", _kernels(torch.device("cpu"))
    for i in range(torch.cuda.device_count()):
        yield f"GPU {i}", _gpu(i)
        yield f"end of a cycle on GPU {i}", _kernels(torch.device("cuda", i))
    if not torch.cuda.device_count():
        yield "GPUs", "none that torch sees"


def _backend() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"


def _gpu(index: int) -> str:
    try:
        facts = torch.cuda.get_device_properties(index)
    except RuntimeError as error:  # a driver that does not fit, a device that another process has for itself
        return _one_line(error)
    return f"{facts.name}, compute capability {facts.major}.{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"


def _kernels(device: torch.device) -> str:
    """Who computes the end of a cycle of plain float32 tensors there: what the optimizer itself would choose."""
    try:
        t = torch.zeros(1, device=device)
        return KERNELS[lists._implementation(t, t, t).__name__.rpartition(".")[2]]
    except RuntimeError as error:
        return _one_line(error)


def _one_line(error: Exception) -> str:
    return f"fails ({str(error).strip().splitlines()[0]:.200})"
