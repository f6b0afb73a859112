"""The rule on a GPU: one Triton launch per dtype over every tensor of a list.

A kernel can't take a list of hundreds of tensors, so the tensors are described by two small tables on the device.
`tensors` is int64 [G, 6], a row per tensor: addresses of param, anchor and drift estimate (0: none), number of
elements, number of its first chunk, index in the caller's list. `chunks` is int32 [C]: the row of `tensors` that chunk
c belongs to. Program c works on the elements of that tensor from (c - first) * CHUNK on.

Tensors are flat storage here: all that matters is that the three have the same dense layout. Nothing is autotuned (that
would run an in-place kernel several times on the data), and nothing is summed by atomics (that would make the order of
a sum, and so its last bits, a matter of luck).

Importing this module imports triton. With `TRITON_INTERPRET=1` set before that, it runs on CPU tensors, for tests.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-def,no-untyped-call"
# (triton comes without types, and what a kernel's argument is depends on the launch)

import contextlib
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .foreach import same_storage_order

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
CHUNK = 8192  # elements of one program; fixed, since it sets the order of the sums
FINISH_BLOCK = 128  # chunks that the finish adds at a time, one a thread
# Elements of one pass of the loop in a chunk, by bytes per element, and threads of a program: at least 16 bytes each.
# Twice as much takes up to 125 registers instead of 64 at most, for more loads in flight than it takes to hide memory.
JUMP_BLOCK, JUMP_THREADS = {4: 1024, 2: 1024}, 128
SUMS_BLOCK, SUMS_THREADS = {4: 1024, 2: 2048}, 256


@triton.jit
def _pointer(address, start, DTYPE: tl.constexpr, VEC: tl.constexpr):
    """The address of element `start` as a pointer to DTYPE, promised to be 16-byte aligned if VEC > 1."""
    # The promise is noted on the operation that makes the pointer, so each branch of a kernel has to cast for itself:
    # with one cast for both, the branch for misaligned tensors would load 128 bits at a time, too.
    pointer = address.to(tl.pointer_type(DTYPE))
    if VEC > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _load(pointer, offsets, mask, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Elements as float32, zero where masked."""
    if INTERPRET and DTYPE == tl.bfloat16:  # the interpreter gets bfloat16's subnormals wrong: go by the bits
        bits = tl.load(pointer.to(tl.pointer_type(tl.int16)) + offsets, mask=mask, other=0)
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, offsets, x, mask, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Store float32 `x` as DTYPE, rounded to the nearest, ties to even."""
    if INTERPRET and DTYPE == tl.bfloat16:  # the interpreter truncates to bfloat16: round by the bits
        bits = x.to(tl.int32, bitcast=True)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        bits = tl.where(nan, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        tl.store(pointer.to(tl.pointer_type(tl.int16)) + offsets, bits.to(tl.int16), mask=mask)
    else:
        tl.store(pointer + offsets, x.to(DTYPE), mask=mask)


@triton.jit
def _fma(x, y, z, INTERPRET: tl.constexpr):
    """x * y + z, rounded once."""
    if INTERPRET:  # before triton 3.9 the interpreter's fma rounds twice; float64 holds the product exactly
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    return tl.fma(x, y, z)


@triton.jit
def _lerp(v, d, weight, INTERPRET: tl.constexpr):
    """lerp(v, d, weight), in the form that torch uses."""
    small = weight < 0.5
    return _fma(d - v, tl.where(small, weight, weight - 1.0), tl.where(small, v, d), INTERPRET)


@triton.jit
def _locate(tensors, chunks, CHUNK: tl.constexpr, VEC: tl.constexpr):
    """This program's work: addresses of param, anchor, drift; first element, count, index in the list; all aligned?"""
    chunk = tl.program_id(0)
    row = tensors + tl.load(chunks + chunk).to(tl.int64) * 6
    p, a, v = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    start = (chunk - tl.load(row + 4)) * CHUNK  # int64
    n = tl.minimum(tl.load(row + 3) - start, CHUNK).to(tl.int32)
    # Only the last chunk of a tensor can have a ragged end; it is not worth a path of its own.
    aligned = ((p | a | v) % 16 == 0) & (n % VEC == 0)
    return p, a, v, start, n, tl.load(row + 5), aligned


@triton.jit
def _jump_chunk(
    p_address, a_address, start, n, ratio,
    DTYPE: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    p_pointer = _pointer(p_address, start, DTYPE, VEC)
    a_pointer = _pointer(a_address, start, DTYPE, VEC)
    for i in range(0, n, BLOCK):
        offsets = i + tl.arange(0, BLOCK)
        mask = offsets < n // VEC * VEC  # n is a multiple of VEC already: this is how the compiler gets to know
        p = _load(p_pointer, offsets, mask, DTYPE, INTERPRET)
        d = p - _load(a_pointer, offsets, mask, DTYPE, INTERPRET)
        p = tl.where(ratio == 0.0, p, _fma(d, ratio, p, INTERPRET))  # 0 * d + p would lose the sign of -0.0
        _store(p_pointer, offsets, p, mask, DTYPE, INTERPRET)
        _store(a_pointer, offsets, p, mask, DTYPE, INTERPRET)


@triton.jit
def _jump_kernel(
    tensors, chunks, factors,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """p += ratio * (p - a); a = p. `factors`: ratio, float32 [T]."""
    p, a, _, start, n, index, aligned = _locate(tensors, chunks, CHUNK, VEC)
    ratio = tl.load(factors + index)
    if aligned:
        _jump_chunk(p, a, start, n, ratio, DTYPE, VEC, BLOCK, INTERPRET)
    else:
        _jump_chunk(p, a, start, n, ratio, DTYPE, 1, BLOCK, INTERPRET)


@triton.jit
def _retreat_chunk(
    p_address, a_address, v_address, start, n, retreat, weight,
    DTYPE: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    p_pointer = _pointer(p_address, start, DTYPE, VEC)
    a_pointer = _pointer(a_address, start, DTYPE, VEC)
    v_pointer = _pointer(v_address, start, DTYPE, VEC)
    for i in range(0, n, BLOCK):
        offsets = i + tl.arange(0, BLOCK)
        mask = offsets < n // VEC * VEC
        p = _load(p_pointer, offsets, mask, DTYPE, INTERPRET)
        d = p - _load(a_pointer, offsets, mask, DTYPE, INTERPRET)
        v = _lerp(_load(v_pointer, offsets, mask, DTYPE, INTERPRET), d, weight, INTERPRET)
        _store(v_pointer, offsets, v, mask, DTYPE, INTERPRET)
        a = tl.where(retreat == 0.0, p, _fma(d, -retreat, p, INTERPRET))
        _store(a_pointer, offsets, a, mask, DTYPE, INTERPRET)


@triton.jit
def _retreat_kernel(
    tensors, chunks, factors,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """d = p - a; v = lerp(v, d, weight); a = p - retreat * d. `factors`: retreat and weight, float32 [T, 2]."""
    p, a, v, start, n, index, aligned = _locate(tensors, chunks, CHUNK, VEC)
    retreat, weight = tl.load(factors + 2 * index), tl.load(factors + 2 * index + 1)
    if aligned:
        _retreat_chunk(p, a, v, start, n, retreat, weight, DTYPE, VEC, BLOCK, INTERPRET)
    else:
        _retreat_chunk(p, a, v, start, n, retreat, weight, DTYPE, 1, BLOCK, INTERPRET)


@triton.jit
def _trial_chunk(
    p_address, a_address, v_address, start, n, ratio,
    DTYPE: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    p_pointer = _pointer(p_address, start, DTYPE, VEC)
    a_pointer = _pointer(a_address, start, DTYPE, VEC)
    v_pointer = _pointer(v_address, start, DTYPE, VEC)
    for i in range(0, n, BLOCK):
        offsets = i + tl.arange(0, BLOCK)
        mask = offsets < n // VEC * VEC
        a = _load(a_pointer, offsets, mask, DTYPE, INTERPRET)
        v = _load(v_pointer, offsets, mask, DTYPE, INTERPRET)
        p = tl.where(ratio == 0.0, a, _fma(v, ratio, a, INTERPRET))
        _store(p_pointer, offsets, p, mask, DTYPE, INTERPRET)


@triton.jit
def _trial_kernel(
    tensors, chunks, factors,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """p = a + ratio * v. `factors`: ratio, float32 [T]."""
    p, a, v, start, n, index, aligned = _locate(tensors, chunks, CHUNK, VEC)
    ratio = tl.load(factors + index)
    if aligned:
        _trial_chunk(p, a, v, start, n, ratio, DTYPE, VEC, BLOCK, INTERPRET)
    else:
        _trial_chunk(p, a, v, start, n, ratio, DTYPE, 1, BLOCK, INTERPRET)


@triton.jit
def _sums_chunk(
    p_address, a_address, v_address, start, n, out,
    DTYPE: tl.constexpr, HAS_V: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    p_pointer = _pointer(p_address, start, DTYPE, VEC)
    a_pointer = _pointer(a_address, start, DTYPE, VEC)
    v_pointer = _pointer(v_address, start, DTYPE, VEC)
    dv = tl.full([BLOCK], 0.0, tl.float32)
    dd = tl.full([BLOCK], 0.0, tl.float32)
    vv = tl.full([BLOCK], 0.0, tl.float32)
    pp = tl.full([BLOCK], 0.0, tl.float32)
    for i in range(0, n, BLOCK):
        offsets = i + tl.arange(0, BLOCK)
        mask = offsets < n // VEC * VEC
        p = _load(p_pointer, offsets, mask, DTYPE, INTERPRET)
        d = p - _load(a_pointer, offsets, mask, DTYPE, INTERPRET)
        dd = tl.fma(d, d, dd)
        pp = tl.fma(p, p, pp)
        if HAS_V:
            v = _load(v_pointer, offsets, mask, DTYPE, INTERPRET)
            dv = tl.fma(d, v, dv)
            vv = tl.fma(v, v, vv)
    if HAS_V:
        tl.store(out, tl.sum(dv, 0))
        tl.store(out + 2, tl.sum(vv, 0))
    tl.store(out + 1, tl.sum(dd, 0))
    tl.store(out + 3, tl.sum(pp, 0))


@triton.jit
def _sums_kernel(
    tensors, chunks, partials,
    DTYPE: tl.constexpr, HAS_V: tl.constexpr, CHUNK: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """<d,v>, <d,d>, <v,v>, <p,p> of each chunk, d = p - a, into `partials`: float32 [C, 4], zeros before."""
    p, a, v, start, n, _, aligned = _locate(tensors, chunks, CHUNK, VEC)
    out = partials + tl.program_id(0).to(tl.int64) * 4
    if aligned:
        _sums_chunk(p, a, v, start, n, out, DTYPE, HAS_V, VEC, BLOCK, INTERPRET)
    else:
        _sums_chunk(p, a, v, start, n, out, DTYPE, HAS_V, 1, BLOCK, INTERPRET)


@triton.jit
def _finish_kernel(tensors, partials, sums, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the chunks of tensor `program_id(0)` into its row of `sums`: float64 [T, 4]."""
    row = tensors + tl.program_id(0).to(tl.int64) * 6
    count = (tl.load(row + 3) + CHUNK - 1) // CHUNK
    columns = tl.arange(0, 4)[None, :]
    total = tl.full([BLOCK, 4], 0.0, tl.float64)
    for i in range(0, count, BLOCK):
        chunk = (i + tl.arange(0, BLOCK))[:, None]
        part = tl.load(partials + (tl.load(row + 4) + chunk) * 4 + columns, mask=chunk < count, other=0.0)
        total += part.to(tl.float64)
    tl.store(sums + tl.load(row + 5) * 4 + tl.arange(0, 4), tl.sum(total, 0))


INTERPRET = not isinstance(_jump_kernel, triton.JITFunction)


@functools.cache
def _usable() -> bool:
    """Whether Triton finds all it needs here: it builds a part of its driver with a C compiler, when first used."""
    try:
        return INTERPRET or triton.runtime.driver.active.get_current_target() is not None
    except Exception as error:  # a missing compiler or header, two drivers, ...: nothing that should end a training run
        warnings.warn(f"extraopt jumps without its fused kernel: Triton does not work here: {error}", stacklevel=2)
        return False


def supports(p: Tensor, a: Tensor, v: Tensor | None) -> bool:
    """Can the kernels take a parameter, its anchor and its drift estimate? If not, the caller has another path."""
    return p.dtype in DTYPES and (INTERPRET or p.is_cuda) and _usable() and same_storage_order(p, a, v)


def _tables(device: torch.device, addresses: list[Tensor], numels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """`tensors` and `chunks` on the device, from int64 columns.

    These are addresses of params, anchors and drift estimates, numbers of elements (> 0), indices in the list.
    """
    counts = (numels + CHUNK - 1) // CHUNK
    tensors = torch.stack([*addresses, numels, counts.cumsum(0) - counts, index], 1)
    chunks = torch.repeat_interleave(torch.arange(len(numels), dtype=torch.int32, device="cpu"), counts)
    return tensors.to(device), chunks.to(device)


@dataclass
class Work:
    """The tensors, and for each dtype that has elements `tensors`, `chunks`, bytes per element, constants."""

    params: Sequence[Tensor]
    anchors: Sequence[Tensor]
    estimates: Sequence[Tensor] | None
    launches: list[tuple[Tensor, Tensor, int, dict[str, Any]]]


def prepare(params: Sequence[Tensor], anchors: Sequence[Tensor], estimates: Sequence[Tensor] | None) -> Work:
    """What the operations take, of tensors that are all on one device. It knows their addresses of now."""
    groups: dict[torch.dtype, list[int]] = {}
    for i, p in enumerate(params):
        if p.numel():
            groups.setdefault(p.dtype, []).append(i)
    zeros = torch.zeros(len(params), dtype=torch.int64, device="cpu")
    addresses = [
        zeros if ts is None else torch.tensor([t.data_ptr() for t in ts], device="cpu")
        for ts in (params, anchors, estimates)
    ]
    numels = torch.tensor([p.numel() for p in params], device="cpu")
    launches = []
    for dtype, places in groups.items():
        index = torch.tensor(places, device="cpu")
        tables = _tables(params[0].device, [column[index] for column in addresses], numels[index], index)
        constants = {"DTYPE": DTYPES[dtype], "CHUNK": CHUNK, "VEC": 16 // dtype.itemsize, "INTERPRET": INTERPRET}
        launches.append((*tables, dtype.itemsize, constants))
    return Work(params, anchors, estimates, launches)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors' device is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _options(threads: int) -> dict[str, Any]:
    """Triton's own launch options. No fusing but where a kernel says so: then versions of Triton can't differ in it."""
    # Triton counts in warps, which are of 32 threads or, on some of AMD's GPUs, of 64.
    warp = 32 if INTERPRET else triton.runtime.driver.active.get_current_target().warp_size
    return {"num_warps": threads // warp, "num_stages": 1, "enable_fp_fusion": False}


def cycle_sums(work: Work) -> Tensor:
    """The sums of `extraopt.kernels.TensorLists`, float64 [T, 4] on the device.

    Reads only. Products are added in float32 within a chunk, in float64 from there on, in an order that depends on
    nothing but the tensor's size and alignment: it has the same sums, bit for bit, wherever it stands in a list. A NaN
    or an infinity in a tensor (or a square past float32) makes its sums non-finite.
    """
    if not work.params:
        return torch.zeros(0, 4, dtype=torch.float64, device="cpu")
    sums = torch.zeros(len(work.params), 4, dtype=torch.float64, device=work.params[0].device)
    with _on(sums.device):
        for tensors, chunks, itemsize, constants in work.launches:
            partials = torch.zeros(len(chunks), 4, dtype=torch.float32, device=sums.device)
            options = {"BLOCK": SUMS_BLOCK[itemsize], "HAS_V": work.estimates is not None, **_options(SUMS_THREADS)}
            _sums_kernel[(len(chunks),)](tensors, chunks, partials, **constants, **options)
            options = {"BLOCK": FINISH_BLOCK, **_options(FINISH_BLOCK)}
            _finish_kernel[(len(tensors),)](tensors, partials, sums, CHUNK=CHUNK, **options)
    return sums


def jump_(work: Work, ratios: Tensor) -> None:
    """The jump of `extraopt.kernels.TensorLists`, bit-equal to `foreach`.

    Ratio 0 leaves P alone. Computed in float32 (`ratios` are rounded to it first), each product and sum fused; each
    result rounds once, when it is stored. A is the stored P.
    """
    _write(_jump_kernel, work, ratios)
    _written(work.params, work.anchors)


def retreat_(work: Work, retreats: Tensor, weights: Tensor) -> None:
    """The retreat of `extraopt.kernels.TensorLists`, in the arithmetic of the jump."""
    _write(_retreat_kernel, work, torch.stack([retreats, weights], 1))
    _written(work.anchors, work.estimates or ())


def trial_(work: Work, ratios: Tensor) -> None:
    """The trial of `extraopt.kernels.TensorLists`, in the arithmetic of the jump."""
    _write(_trial_kernel, work, ratios)
    _written(work.params)


def anchor_(work: Work) -> None:
    """A <- E."""
    if work.params:
        torch._foreach_copy_(list(work.anchors), list(work.params))


def _write(kernel: Any, work: Work, factors: Tensor) -> None:
    """Launch `kernel` once per dtype, with the factors of every tensor."""
    if not work.launches:
        return
    device = work.params[0].device
    with _on(device):
        table = factors.float().to(device)
        for tensors, chunks, itemsize, constants in work.launches:
            options = {"BLOCK": JUMP_BLOCK[itemsize], **_options(JUMP_THREADS)}
            kernel[(len(chunks),)](tensors, chunks, table, **constants, **options)


def _written(*lists: Sequence[Tensor]) -> None:
    """Tell autograd, which saw none of the writes: it would use what it saved as if it were still right."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)
