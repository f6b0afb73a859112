"""Compile every shipped variant of the Triton kernels, without a GPU: a script, run by test_kernel_compiled.py.

A fake driver claims to be the GPU asked for and the launch stops short of running anything, so the kernels are compiled
by the calls that compile them in use: ``cycle_sums``, ``jump_``, ``retreat_`` and ``trial_``, with the arguments that
those pass to Triton.

    python _compile_kernels.py TARGET...      a target is sm_90, gfx942, ...; one JSON object per kernel and line
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from extraopt.kernels import multi_tensor

NVIDIA_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver(DriverBase):
    """As much of a driver as compiling takes."""

    def __init__(self, target: GPUTarget, device: int):
        self.target, self.device = target, device

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError


def tool(name: str, *arguments: str) -> str | None:
    """Output of a program in triton's wheel, None where the wheel has it not."""
    if not (NVIDIA_TOOLS / name).exists():
        return None
    return subprocess.run([NVIDIA_TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def count(accesses: list[tuple[str, str]], wide: str, narrow: tuple[str, ...]) -> dict:
    """How many loads and stores are of 128 bits, how many of one element, by what the instructions are called."""
    return {
        name + suffix: sum(kind == name and bool(re.search(pattern, width)) for kind, width in accesses)
        for name in ("load", "store")
        for suffix, pattern in (("_128", wide), ("_1", f"^(?:{'|'.join(narrow)})$"))
    }


def measure_nvidia(asm: dict, itemsize: int, disassemble: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", str(cubin))
        sass = tool("nvdisasm", "--print-code", "--no-dataflow", str(cubin)) if disassemble else None
    result = {"flushing": len(re.findall(r"\.ftz\b", asm["ptx"]))}
    if usage is not None:
        registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups())
        result |= {"registers": registers, "local": stack + local}
    if sass is None:
        accesses = re.findall(r"\b(ld|st)\.global(\S*)", asm["ptx"])
        accesses = [({"ld": "load", "st": "store"}[kind], width) for kind, width in accesses]
        return result | {"from": "ptx"} | count(accesses, r"\.v4\.b32$", (rf"\.b{8 * itemsize}",))
    accesses = re.findall(r"\b(LDG|STG)\.E(\S*)", sass)
    accesses = [({"LDG": "load", "STG": "store"}[kind], width) for kind, width in accesses]
    result["instructions"] = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+[@!A-Z]", sass, re.MULTILINE))
    return result | {"from": "sass"} | count(accesses, r"\.128\b", ("",) if itemsize == 4 else (r"\.U16",))


def measure_amd(asm: dict, itemsize: int) -> dict:
    code = asm["amdgcn"]
    field = {k: int(v) for k, v in re.findall(r"^\s+\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    local = field["private_segment_fixed_size"] + field["vgpr_spill_count"] + field["sgpr_spill_count"]
    accesses = re.findall(r"^\s+global_(load|store)_(\w+)", code, re.MULTILINE)
    narrow = ("dword",) if itemsize == 4 else (r"u?short(?:_d16)?(?:_hi)?",)
    result = {"from": "amdgcn", "registers": field["vgpr_count"], "local": local, "flushing": 0}
    return result | count(accesses, "^dwordx4$", narrow)


def missing(target: str) -> str | None:
    """What Triton lacks here to compile for a target: before 3.4 it runs ROCm's linker, which is not in its wheel."""
    if target.startswith("gfx"):
        from triton.backends.amd.compiler import HIPBackend

        try:
            getattr(HIPBackend, "path_to_rocm_lld", lambda: None)()
        except Exception as error:
            return str(error)
    return None


def main() -> None:
    run = triton.JITFunction.run
    measured = set()
    variant: dict = {}  # what is being compiled

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in measured:
            measured.add(compiled.hash)
            target, itemsize = variant["target"], getattr(torch, variant["dtype"]).itemsize
            amd = target.startswith("gfx")
            result = measure_amd(compiled.asm, itemsize) if amd else measure_nvidia(compiled.asm, itemsize, disassemble)
            print(json.dumps(variant | {"kernel": self.__name__} | result))

    triton.JITFunction.run = compile_only
    for device, target in enumerate(sys.argv[1:]):
        if reason := missing(target):
            print(json.dumps({"target": target, "missing": reason}))
            continue
        # it takes as long to disassemble as to compile, and the PTX has the same widths: one target will do
        disassemble = target == "sm_90"
        amd = target.startswith("gfx")
        gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        triton.runtime.driver.set_active(Driver(gpu, device))
        for dtype in multi_tensor.DTYPES:
            for drift in False, True:
                variant.update(target=target, dtype=str(dtype).removeprefix("torch."), drift=drift)
                params, anchors, estimates = ([torch.zeros(n, dtype=dtype) for n in (20_000, 5)] for _ in range(3))
                work = multi_tensor.prepare(params, anchors, estimates if drift else None)
                multi_tensor.cycle_sums(work)
                ratios, retreats = (torch.tensor(x, dtype=torch.float64) for x in ([0.5, 2.0], [0.5, 0.0]))
                if drift:
                    multi_tensor.retreat_(work, retreats, ratios)
                    multi_tensor.trial_(work, ratios)
                else:
                    multi_tensor.jump_(work, ratios)


if __name__ == "__main__":
    main()
