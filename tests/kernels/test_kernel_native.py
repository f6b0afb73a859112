"""The C loops of the CPU path: bit-equal to the torch operations, and indifferent to threads, places and layouts."""

import _kernel_cases as cases
import pytest
import torch

from extraopt import kernels
from extraopt.kernels import foreach, native

FLOATS = [torch.float32, torch.bfloat16]
EDGES = [1023, 1025, native.PART - 1, native.PART, native.PART + 17, 3 * native.PART]
pytestmark = pytest.mark.skipif(native._library() is None, reason="needs the C loops: install with a C compiler")


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def done(module, wanted, weight):
    """After a jump, where there is no weight of a new drift, or a retreat."""
    lists = cases.Lists(wanted)
    n = len(wanted)
    if weight is None:
        cases.jump_(module, lists.params, lists.anchors, cases.ratios(n))
    else:
        cases.retreat_(module, lists.params, lists.anchors, lists.estimates, cases.retreats(n), [weight] * n)
    assert lists.guards_intact()
    return lists


@pytest.mark.parametrize("weight", [None, 0.05, 1 / 3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_jump_and_retreat_are_those_of_torch_bit_for_bit(dtype, weight):
    wanted = cases.specs(dtype, cases.SMALL + EDGES)
    lists = cases.Lists(wanted)
    assert all(map(native.supports, lists.params, lists.anchors, lists.estimates))
    ours, theirs = (done(module, wanted, weight) for module in (native, foreach))
    for name in "params", "anchors", "estimates":
        assert not cases.differing(getattr(ours, name), getattr(theirs, name)), name
    if weight is None:
        assert not cases.differing(ours.params, ours.anchors)


def test_bfloat16_rounds_otherwise_than_torch_at_the_ends_of_its_range():
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]  # subnormals, zeros of both signs, the largest
    other = every[torch.randperm(len(every), generator=generator)]
    wanted = []
    for module in native, foreach:
        p, a, b, v = every.clone(), other.clone(), other.clone(), other.flip(0).clone()
        cases.retreat_(module, [p], [a], [v], [0.5], [0.1])
        cases.jump_(module, [p], [b], [0.3])
        out = torch.stack([p, a, b, v])
        nan = out.isnan()  # infinity less infinity: which NaN it is, is no matter
        wanted.append(out.where(~nan, 0).view(torch.int16).masked_fill(nan, 1))
    assert torch.equal(*wanted)


@pytest.mark.parametrize("drift", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums(dtype, drift):
    lists = cases.Lists(cases.specs(dtype, cases.SMALL + EDGES))
    arguments = lists.params, lists.anchors, lists.estimates if drift else None
    before = lists.copies()
    for i, row in enumerate(cases.sums(native, *arguments)):
        exact, size = cases.exact_sums(*(ts and ts[i] for ts in arguments))
        assert ((row - exact).abs() <= 1e-6 * size).all(), (i, row, exact)
    for now, then in zip(lists.copies(), before):  # reads only
        assert not cases.differing(now, then)


def test_sums_depend_on_threads_or_on_the_place_in_the_list():
    wanted = [spec for dtype in FLOATS for spec in cases.specs(dtype, EDGES)]
    lists = cases.Lists(wanted)
    sums = cases.sums(native, lists.params, lists.anchors, lists.estimates)
    torch.set_num_threads(2)
    order = torch.randperm(len(wanted)).tolist()
    again = ([ts[i] for i in order] for ts in (lists.params, lists.anchors, lists.estimates))
    assert torch.equal(cases.sums(native, *again), sums[order])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_does_not_show_in_the_sums(dtype, bad):
    for victim in "params", "anchors", "estimates":
        lists = cases.Lists([(dtype, n, lambda flat: flat, (0, 0, 0)) for n in (9, 1031, 40)])
        getattr(lists, victim)[1][-1] = bad
        sums = cases.sums(native, lists.params, lists.anchors, lists.estimates)
        assert sums.isfinite().all(1).tolist() == [True, False, True], victim


def test_nothing_to_do_fails():
    assert cases.sums(native, [], [], None).shape == (0, 4)
    cases.jump_(native, [], [], [])
    empty = [torch.zeros(0), torch.zeros(3, 0, dtype=torch.bfloat16)]
    assert torch.equal(cases.sums(native, empty, empty, empty), torch.zeros(2, 4, dtype=torch.float64))
    cases.jump_(native, empty, empty, [1.0, 1.0])


def test_autograd_does_not_notice_the_writes():
    leaf, anchor = (torch.ones(5, requires_grad=i == 0) for i in range(2))
    for written in leaf, anchor:
        loss = (leaf * leaf * anchor).sum()
        with torch.no_grad():
            cases.jump_(native, [leaf], [anchor], [1.0])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        assert written._version


def test_tensors_it_cannot_take_are_taken():
    def supports(p, a=None, v=None):
        return native.supports(p, torch.empty_like(p) if a is None else a, v)

    x = torch.zeros(4, 6)
    assert supports(x) and supports(torch.nn.Parameter(x), v=x) and supports(x.t()) and supports(x[1:3])
    for dtype in torch.float64, torch.float16, torch.complex64, torch.int32, torch.float8_e4m3fn:
        assert not supports(x.to(dtype))
    assert not supports(x[:, 1:3], x[:, 1:3]) and not supports(x[:1].expand(4, 6), x[:1].expand(4, 6))
    assert not supports(x.t(), torch.zeros(6, 4)) and not supports(x, v=torch.zeros(6, 4).t())
    assert not supports(x, x.bfloat16()) and not supports(x, x[:3]) and not supports(x, x.to("meta"))
    assert not supports(x.to_sparse()) and not supports(torch.zeros(1, dtype=torch.complex64).conj().imag)
    assert not supports(x.as_subclass(type("Wrapped", (torch.Tensor,), {})))


def test_a_cycle_without_a_compiler_is_another_one(monkeypatch):
    def run():
        lists = cases.Lists(cases.specs(torch.float32, [5, 33, 4097]))
        n = len(lists.params)
        work = kernels.TensorLists(lists.params, lists.anchors, lists.estimates)
        sums = work.sums()
        work.retreat_(cases.retreats(n), [0.1] * n)
        work.trial_(cases.ratios(n))
        work.anchor_()
        return sums, lists

    (sums, ours), calls = run(), []
    monkeypatch.setattr(native, "_library", lambda: calls.append(1))
    others, theirs = run()
    assert calls and torch.allclose(sums, others, rtol=1e-6, atol=1e-9)
    assert not cases.differing(ours.params + ours.estimates, theirs.params + theirs.estimates)
