"""The Triton kernels' arithmetic and addressing, run without a GPU by Triton's interpreter.

Triton has to be told before it is imported, so this file runs a second time, in a process of its own; the tests below
the first exist only there. (The interpreter ignores alignment and checks no bounds: hence test_kernel_compiled.py, and
hence the guards around every tensor.)
"""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from functools import partial

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

if os.environ.get("TRITON_INTERPRET") != "1":

    @needs_triton
    def test_in_interpreter(tmp_path):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", __file__]
        env = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        # `-m` puts the working directory on sys.path: a neutral one
        run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        assert " passed" in run.stdout, run.stdout

else:
    import _kernel_cases as cases
    import test_kernel_operations as operations
    import test_properties
    from helpers import assert_same
    from hypothesis import Phase, given, settings

    from extraopt import ExtraAdam
    from extraopt.kernels import foreach, lists, multi_tensor

    torch.set_num_threads(1)
    FLOATS = [torch.float32, torch.bfloat16, torch.float16]

    def jumped(wanted, jump_, ratios):
        lists = cases.Lists(wanted)
        jump_(lists.params, lists.anchors, ratios)
        assert lists.guards_intact()
        return lists

    def retreated(wanted, retreat_, retreats, weight):
        lists = cases.Lists(wanted)
        retreat_(lists.params, lists.anchors, lists.estimates, retreats, [weight] * len(wanted))
        assert lists.guards_intact()
        return lists

    def assert_same_as_torch(done, plain, ours, wanted, *factors):
        """What `done` makes by the kernels, bit for bit what it makes by torch operations."""
        fused = done(wanted, partial(ours, multi_tensor), *factors)
        for peer in plain, partial(ours, foreach):
            other = done(wanted, peer, *factors)
            for name in "params", "anchors", "estimates":
                assert not cases.differing(getattr(fused, name), getattr(other, name)), (peer, name)
        return fused

    def assert_same_jump(wanted, ratios):
        before = cases.Lists(wanted)
        fused = assert_same_as_torch(jumped, cases.plain_jump_, cases.jump_, wanted, ratios)
        assert not cases.differing(fused.params, fused.anchors)
        assert not cases.differing(fused.estimates, before.estimates)
        return before, fused

    def assert_same_retreat(wanted, weight, retreats):
        before = cases.Lists(wanted)
        fused = assert_same_as_torch(retreated, cases.plain_retreat_, cases.retreat_, wanted, retreats, weight)
        assert not cases.differing(fused.params, before.params)
        return before, fused

    @pytest.fixture
    def taken(monkeypatch):
        """Offers CPU tensors to the fused kernel; counts the dtypes of those whose cycle each implementation ends."""
        counts = {foreach: Counter(), multi_tensor: Counter()}

        def spy(module, name):
            operation = getattr(module, name)

            def counting(work, *rest):
                params = work[0] if module is foreach else work.params
                counts[module].update(p.dtype for p in params)
                operation(work, *rest)

            monkeypatch.setattr(module, name, counting)

        for module in counts:
            spy(module, "jump_")  # of lists without estimates
            spy(module, "retreat_")
        monkeypatch.setattr(lists, "FUSED_DEVICES", {"cpu"})
        return counts

    def test_the_end_of_a_cycle_is_the_reference_within_one_rounding(taken):
        check = test_properties.test_the_end_of_a_cycle_is_the_reference_within_one_rounding
        settings(max_examples=40, phases=[Phase.generate])(check)()  # to shrink an example takes minutes here
        assert set(taken[multi_tensor]) == set(FLOATS) and torch.float64 in taken[foreach]

    @pytest.mark.parametrize("gate", [0.4, None])
    @pytest.mark.parametrize("beta", [0.5, 0.0])
    def test_a_whole_run_is_that_of_the_torch_operations_bit_for_bit(taken, monkeypatch, beta, gate):
        def run():
            generator = torch.Generator().manual_seed(0)
            dtypes = [*FLOATS, torch.float64, torch.complex64, torch.complex128]
            tensors = [torch.randn(n, 3, dtype=dtype, generator=generator) for n in (1, 11) for dtype in dtypes]
            tensors += [torch.randn(5, 4, generator=generator).t(), torch.zeros(0, 3)]
            tensors += [torch.randn(4, 3, 2, generator=generator)[..., 0]]  # gaps
            params = [torch.nn.Parameter(t) for t in tensors]
            hyperparameters = {"extra_every": 3, "extra_steps": 9, "extra_beta": beta, "extra_gate": gate}
            optimizer = ExtraAdam(params, lr=0.01, **hyperparameters)
            for _ in range(10):
                for p in params:  # a slope with noise: a path that is worth a jump
                    p.grad = 1 + 0.3 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
                optimizer.step()
            assert optimizer.last_jump.gate > 0 and optimizer.last_jump.jumped >= 14
            return params, [optimizer.state[p] for p in params]

        ours, our_states = run()
        assert taken[multi_tensor] == {torch.float32: 3 * 6, torch.bfloat16: 3 * 2, torch.float16: 3 * 2}
        assert taken[foreach] == {torch.float64: 3 * 4, torch.float32: 3 * 1}
        monkeypatch.setattr(lists, "FUSED_DEVICES", set())
        theirs, their_states = run()
        assert_same(ours, theirs, "weights")
        assert_same(our_states, their_states, "states")

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_jump_and_retreat_are_those_of_torch_bit_for_bit(dtype):
        sizes = cases.SMALL + cases.EDGES[-3:] + cases.LONG if dtype == torch.float32 else cases.SMALL + cases.EDGES[:3]
        wanted = cases.specs(dtype, sizes)
        assert_same_jump(wanted, cases.ratios(len(wanted)))
        assert_same_retreat(wanted, 0.1, cases.retreats(len(wanted)))

    @pytest.mark.parametrize("weight", [1 / 3, 0.499, 0.5, 0.7, 1.0])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_every_weight(dtype, weight):
        wanted = cases.specs(dtype, [1, 33, 1025])
        assert_same_retreat(wanted, weight, cases.retreats(len(wanted)))

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_jump_is_one_rounding_from_exact(dtype):
        wanted = cases.specs(dtype, [33, 1025])
        ratios = cases.ratios(len(wanted))
        p0, a0, _ = cases.Lists(wanted).copies()
        fused = jumped(wanted, partial(cases.jump_, multi_tensor), ratios)
        half_ulp, smallest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        for i, ratio in enumerate(ratios):
            p, size = cases.exact_jump(p0[i], a0[i], ratio)
            slack = 4 * torch.finfo(torch.float32).eps * size + smallest
            assert ((fused.params[i].double() - p).abs() <= half_ulp * p.abs() + slack).all()

    @operations.OPERATIONS
    @settings(max_examples=40, phases=[Phase.generate])
    @given(problem=operations.problems(FLOATS, complex_too=False, gaps=False))
    def test_operations(name, problem):
        fused = operations.by_module(multi_tensor)
        operations.check_reference(problem, name, fused)
        operations.check_same(problem, name, operations.by_module(foreach), fused)

    @pytest.mark.parametrize("victim", range(3))
    @pytest.mark.parametrize("change", operations.SWAPS)
    def test_a_list_is_kept_though_its_tensors_are_others(monkeypatch, change, victim):
        monkeypatch.setattr(lists, "FUSED_DEVICES", {"cpu"})
        operations.check_fit(*operations.fitted(torch.float32), multi_tensor, change, victim)

    @pytest.mark.parametrize("factor", [0.0, 0.5, 5.0])
    def test_mixed_dtypes_in_one_list(factor):
        wanted = [
            (dtype, n, lambda flat: flat, (shift, 0, 0))
            for n, shift in [(5, 0), (1040, 0), (0, 0), (40, 3)]
            for dtype in FLOATS
        ]
        before, jumped = assert_same_jump(wanted, [factor] * len(wanted))
        _, retreated = assert_same_retreat(wanted, 0.1, [factor] * len(wanted))
        if factor == 0:  # including the sign of zeros
            assert not cases.differing(jumped.params + retreated.anchors, before.params * 2)

    @pytest.mark.parametrize("drift", [True, False])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_sums(dtype, drift):
        sizes = cases.SMALL + cases.EDGES + cases.LONG if (dtype, drift) == (torch.float32, True) else [1, 33, 2049]
        lists = cases.Lists(cases.specs(dtype, sizes))
        arguments = lists.params, lists.anchors, lists.estimates if drift else None
        before = lists.copies()
        got = cases.sums(multi_tensor, *arguments)
        assert got.dtype == torch.float64 and got.shape == (len(lists.params), 4)
        other = cases.sums(foreach, *arguments)
        for i, row in enumerate(got):
            exact, size = cases.exact_sums(*(ts and ts[i] for ts in arguments))
            assert ((row - exact).abs() <= 1e-6 * size).all(), (i, row, exact)
            assert ((row - other[i]).abs() <= 2e-6 * size).all(), (i, row, other[i])
        for now, then in zip(lists.copies(), before):  # reads only
            assert not cases.differing(now, then)

    def test_sums_are_the_same_every_time_and_wherever_a_tensor_stands():
        wanted = [spec for dtype in FLOATS for spec in cases.specs(dtype, [1000, 9000])[::4]]
        lists = cases.Lists(wanted)
        sums = cases.sums(multi_tensor, lists.params, lists.anchors, lists.estimates)
        for order in range(len(wanted)), torch.randperm(len(wanted)).tolist():
            again = ([ts[i] for i in order] for ts in (lists.params, lists.anchors, lists.estimates))
            assert torch.equal(cases.sums(multi_tensor, *again), sums[list(order)])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_what_is_not_finite_shows_in_the_sums(dtype, bad):
        for victim in "params", "anchors", "estimates":
            lists = cases.Lists([(dtype, n, lambda flat: flat, (0, 0, 0)) for n in (9, 1031, 40)])
            getattr(lists, victim)[1][-1] = bad
            sums = cases.sums(multi_tensor, lists.params, lists.anchors, lists.estimates)
            assert sums.isfinite().all(1).tolist() == [True, False, True], victim

    def test_nothing_to_do():
        assert cases.sums(multi_tensor, [], [], None).shape == (0, 4)
        cases.jump_(multi_tensor, [], [], [])
        empty = [torch.zeros(0), torch.zeros(3, 0, dtype=torch.bfloat16)]
        assert torch.equal(cases.sums(multi_tensor, empty, empty, empty), torch.zeros(2, 4, dtype=torch.float64))
        cases.jump_(multi_tensor, empty, empty, [1.0, 1.0])

    def test_offsets_past_32_bits():
        # The last chunk of a tensor of 2**33 elements, at a made-up address 2**35 bytes before the elements there are.
        n, before = 1029, 2**33
        lists = cases.Lists([(torch.float32, n, lambda flat: flat, (0, 0, 0))])
        p, a, v = (ts[0] for ts in (lists.params, lists.anchors, lists.estimates))
        row = [t.data_ptr() - 4 * before for t in (p, a, v)] + [before + n, -before // multi_tensor.CHUNK, 0]
        expected = lists.copies()
        cases.plain_retreat_(*expected, [0.25], [0.1])
        cases.plain_jump_(*expected[:2], [0.5])
        for kernel, factors in (multi_tensor._retreat_kernel, [0.25, 0.1]), (multi_tensor._jump_kernel, [0.5]):
            kernel[(1,)](
                torch.tensor([row]), torch.zeros(1, dtype=torch.int32), torch.tensor(factors),
                DTYPE=multi_tensor.DTYPES[torch.float32], CHUNK=multi_tensor.CHUNK, VEC=4, BLOCK=1024, INTERPRET=True,
            )  # fmt: skip
        assert lists.guards_intact()
        assert not cases.differing([p, a, v], [t for ts in expected for t in ts])

    def test_autograd_notices_the_writes():
        leaf, anchor, drift = (torch.ones(5, requires_grad=i == 0) for i in range(3))
        for written in leaf, anchor:
            loss = (leaf * leaf * anchor).sum()
            version = written._version
            with torch.no_grad():
                cases.jump_(multi_tensor, [leaf], [anchor], [1.0])
            assert written._version > version
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        work = multi_tensor.prepare([leaf], [anchor], [drift])
        half = torch.tensor([0.5], dtype=torch.float64)
        for operation, factors, wanted in [
            ("retreat_", [half] * 2, (1, 2)),
            ("trial_", [half], (0,)),
            ("anchor_", [], (1,)),
        ]:
            before = [t._version for t in (leaf, anchor, drift)]
            with torch.no_grad():
                getattr(multi_tensor, operation)(work, *factors)
            after = [t._version for t in (leaf, anchor, drift)]
            assert [i for i in range(3) if after[i] > before[i]] == list(wanted), operation

    def test_tables_follow_the_addresses():
        lists = cases.Lists([(torch.float32, 5, lambda flat: flat, (0, 0, 0))] * 3)
        cases.jump_(multi_tensor, lists.params, lists.anchors, [1.0] * 3)
        moved = torch.full((5,), 2.0)
        lists.params[0].data = moved
        lists.anchors[0].fill_(1.0)
        cases.jump_(multi_tensor, lists.params, lists.anchors, [1.0] * 3)
        assert moved.tolist() == [3.0] * 5

    def test_supports():
        def supports(p, a=None, v=None):
            return multi_tensor.supports(p, torch.empty_like(p) if a is None else a, v)

        x = torch.zeros(4, 6)
        for dtype in FLOATS:
            assert supports(x.to(dtype), v=x.to(dtype))
        for dtype in torch.float64, torch.complex64, torch.int32, torch.float8_e4m3fn:
            assert not supports(x.to(dtype))
        for _, (n, layout) in cases.LAYOUTS.items():
            assert supports(layout(torch.zeros(n)))
        assert supports(torch.nn.Parameter(x)) and supports(x.t()) and supports(x[1:3])
        assert not supports(x[:, 1:3], x[:, 1:3])  # gaps
        assert not supports(x[:1].expand(4, 6), x[:1].expand(4, 6))  # overlaps
        assert not supports(x.t(), torch.zeros(6, 4)) and not supports(x, v=torch.zeros(6, 4).t())  # layouts differ
        assert not supports(x, x.bfloat16()) and not supports(x, v=x.half()) and not supports(x, x[:3])
        assert not supports(x, x.to("meta"))
        assert not supports(x.to_sparse()) and not supports(torch.zeros(1, dtype=torch.complex64).conj().imag)

        class Wrapped(torch.Tensor):
            pass

        assert not supports(x.as_subclass(Wrapped))

    def test_a_triton_that_does_not_work_is_not_used(monkeypatch):
        class Driver:
            @property
            def active(self):
                raise RuntimeError("Failed to find C compiler")

        x = torch.zeros(3)
        assert multi_tensor.supports(x, x, x)
        multi_tensor._usable.cache_clear()
        monkeypatch.setattr(multi_tensor.triton.runtime, "driver", Driver())
        monkeypatch.setattr(multi_tensor, "INTERPRET", False)
        with pytest.warns(UserWarning, match="without its fused kernel.*C compiler"):
            assert not multi_tensor._usable()
        multi_tensor._usable.cache_clear()
