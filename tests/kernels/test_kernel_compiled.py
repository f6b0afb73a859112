"""What the Triton kernels compile to, which takes no GPU; and, where there is one, what they compute on it."""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
pytestmark = needs_triton

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
DTYPES = ["float32", "bfloat16", "float16"]
SCRIPT = pathlib.Path(__file__).with_name("_compile_kernels.py")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What _compile_kernels.py says of each kernel, by target and (kernel, dtype, has drift)."""
    folder = tmp_path_factory.mktemp("triton")
    env = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    jobs = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *targets],
            env=env,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for targets in (TARGETS[::2], TARGETS[1::2])
    ]
    found: dict[str, dict] = {target: {} for target in TARGETS}
    for job in jobs:
        out, err = job.communicate()
        assert job.returncode == 0, err
        for row in map(json.loads, out.splitlines()):
            if "missing" in row:
                found[row["target"]] = row
            else:
                found[row["target"]][row["kernel"], row["dtype"], row["drift"]] = row
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles_to_lean_code(compiled, target):
    if "missing" in compiled[target]:
        pytest.skip(compiled[target]["missing"])
    variants = set(itertools.product(("_sums_kernel", "_jump_kernel"), DTYPES, (False,)))
    variants |= set(itertools.product(("_sums_kernel", "_retreat_kernel", "_trial_kernel"), DTYPES, (True,)))
    # one finish serves all: nothing else about a launch makes Triton compile again
    assert set(compiled[target]) == variants | {("_finish_kernel", "float32", False)}
    # the ptxas of triton 3.3 takes 73 for a sum on sm_100
    most = 80 if importlib.metadata.version("triton").startswith(("3.3.", "3.4.")) else 64
    for variant, row in compiled[target].items():
        assert row.get("registers", 0) <= most, row
        assert row.get("local", 0) == 0, row  # spills, stack
        assert row["flushing"] == 0, row  # subnormals are numbers, too
        kernel, dtype, drift = variant
        if kernel == "_finish_kernel":
            continue
        tensors = 3 if drift else 2
        reads = {"_trial_kernel": 2}.get(kernel, tensors)
        writes = {"_sums_kernel": 0, "_jump_kernel": 2, "_retreat_kernel": 2, "_trial_kernel": 1}[kernel]
        # Aligned: all wide. Misaligned: all narrow, which the interpreter can't see and a GPU would fault on.
        assert row["load_128"] and row["load_128"] % reads == 0, row
        assert row["load_1"] >= 4 * reads, row
        if writes:
            assert row["store_128"] * reads == row["load_128"] * writes, row
            assert row["store_1"] >= 8 * writes, row


@pytest.mark.parametrize("name", ["jump_", "retreat_"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.gpu
def test_gpu_jump_and_retreat_are_those_of_torch_bit_for_bit(dtype, name):
    """Every alignment and layout, among guards; equal to torch on the CPU, and next to our own fallback on the GPU."""
    import _kernel_cases as cases

    from extraopt.kernels import foreach, multi_tensor

    wanted = cases.specs(getattr(torch, dtype), cases.SMALL + cases.EDGES + cases.LONG)
    n = len(wanted)
    for weight in [0.1, 0.5, 0.7, 1.0] if name == "retreat_" else [None]:
        fused, fallback = cases.Lists(wanted, "cuda"), cases.Lists(wanted, "cuda")
        expected = fused.copies()
        taken, factors = 2, [cases.ratios(n)]
        if name == "retreat_":
            taken, factors = 3, [cases.retreats(n), [weight] * n]
        getattr(cases, f"plain_{name}")(*expected[:taken], *factors)
        for lists, module in (fused, multi_tensor), (fallback, foreach):
            tensors = lists.params, lists.anchors, lists.estimates
            assert all(map(multi_tensor.supports, *tensors))
            getattr(cases, name)(module, *tensors[:taken], *factors)
        torch.cuda.synchronize()
        assert fused.guards_intact()
        for got, other, want in zip(fused.copies(), fallback.copies(), expected):
            assert not cases.differing(got, want)
            rtol = 2 * torch.finfo(getattr(torch, dtype)).eps
            torch.testing.assert_close(got, other, rtol=rtol, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["jump_", "retreat_", "trial_", "anchor_"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_operations(dtype, name):
    import _kernel_cases as cases
    import test_kernel_operations as operations

    from extraopt.kernels import TensorLists, foreach, multi_tensor

    wanted = cases.specs(getattr(torch, dtype), cases.SMALL + cases.EDGES + cases.LONG)
    n = len(wanted)
    factors = operations.arguments(name, cases.ratios(n), cases.retreats(n), ([0.05, 0.5, 0.7, 1.0] * n)[:n])

    def run(operate, streams=False):
        lists = cases.Lists(wanted, "cuda")
        anchors, estimates = lists.anchors, lists.estimates
        if streams:
            anchors, estimates = ([t.cpu().pin_memory() for t in ts] for ts in (anchors, estimates))
        operate(lists.params, anchors, estimates, name, *factors)
        torch.cuda.synchronize()
        assert lists.guards_intact()
        return [t.detach().cpu() for ts in (lists.params, anchors, estimates) for t in ts]

    fused = run(operations.by_module(multi_tensor))
    for other in run(operations.by_module(foreach)), run(operations.by_lists, True):
        assert not cases.differing(other, fused)
    tensors = [torch.ones(5, dtype=getattr(torch, dtype), device="cuda") for _ in range(3)]
    assert [module for module, *_ in TensorLists(*([t] for t in tensors)).work] == [multi_tensor]


@pytest.mark.parametrize("drift", [True, False])
@pytest.mark.gpu
def test_gpu_sums(drift):
    import _kernel_cases as cases

    from extraopt.kernels import multi_tensor

    sizes = cases.SMALL + cases.EDGES + cases.LONG + [3_000_000]
    lists = cases.Lists([spec for dtype in DTYPES for spec in cases.specs(getattr(torch, dtype), sizes)], "cuda")
    arguments = lists.params, lists.anchors, lists.estimates if drift else None
    got = cases.sums(multi_tensor, *arguments)
    assert got.is_cuda and torch.equal(got, cases.sums(multi_tensor, *arguments))
    for i, row in enumerate(got.cpu()):
        exact, size = cases.exact_sums(*(ts and ts[i].cpu() for ts in arguments))
        assert ((row - exact).abs() <= 1e-6 * size).all(), (i, row, exact)
    assert lists.guards_intact()
    lists.params[5].view(-1)[-1] = float("nan")
    assert (~cases.sums(multi_tensor, *arguments).isfinite().all(1)).nonzero().flatten().tolist() == [5]


@pytest.mark.gpu
def test_gpu_reaches_the_end_of_a_tensor_past_32_bits():
    import _kernel_cases as cases

    from extraopt.kernels import multi_tensor

    n = 2**31 + 8
    if torch.cuda.mem_get_info()[0] < 2.2 * 2 * n:
        pytest.skip("needs 10 GB of free GPU memory")
    p, a = (torch.zeros(n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    p[-16:] = torch.arange(1.0, 17.0)
    assert cases.sums(multi_tensor, [p], [a], None).tolist() == [[0.0, 1496.0, 0.0, 1496.0]]
    cases.jump_(multi_tensor, [p], [a], [1.0])
    for t in p, a:
        assert t[-16:].tolist() == [2.0 * i for i in range(1, 17)]
        assert not t[:-16].any()
