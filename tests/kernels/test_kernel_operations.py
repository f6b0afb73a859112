"""Jump, retreat, trial and anchor by every implementation, and TensorLists that are kept from one cycle to the next."""

import _kernel_cases as cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extraopt.kernels import TensorLists, foreach, lists, native, reference, streamed

REALS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = [*cases.LAYOUTS.values(), (120, lambda flat: flat.view(5, 8, 3)[..., 1])]  # the last one has gaps
FLAT = [(n, lambda flat: flat) for n in (1, 3, 16, 33, 1025, 5000)]
SHIFTS = [(0, 0, 0)] * 3 + [(1, 1, 1), (1, 0, 0), (0, 3, 0), (0, 0, 2)]
FACTORS = st.one_of(st.sampled_from([0.0, 1.0, 1e-200]), st.floats(0, 8, allow_subnormal=False))
WEIGHTS = st.one_of(st.sampled_from([0.0, 0.05, 0.499, 0.5, 1.0]), st.floats(0, 1))


@st.composite
def problems(draw, dtypes=REALS, complex_too=True, gaps=True):
    """What `cases.Lists` takes, and for each tensor a ratio, a retreat and a weight."""
    kinds = st.sampled_from([*dtypes, torch.complex64, torch.complex128] if complex_too else dtypes)
    one = st.tuples(
        kinds,
        st.sampled_from(FLAT + (LAYOUTS if gaps else LAYOUTS[:-1])),
        st.sampled_from(SHIFTS),
        FACTORS,
        FACTORS,
        WEIGHTS,
    )
    rows = draw(st.lists(one, min_size=1, max_size=6))
    specs = [(dtype, *layout, shifts) for dtype, layout, shifts, *_ in rows]
    return specs, *([row[i] for row in rows] for i in (3, 4, 5))


def made(specs):
    """The lists, whose complex tensors have imaginary parts, and -0.0 in anchors where weights are."""
    out = cases.Lists(specs)
    for buffer, start, n in out.buffers:
        if buffer.is_complex():
            part = buffer[start : start + n]
            part.imag.copy_(part.real.flip(0))
    return out


def real(tensors):
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def by_module(module):
    """Does an operation on all of a problem's tensors by one module."""

    def operate(p, a, v, name, *factors):
        work = cases.prepared(module, real(p), real(a), None if name == "jump_" else real(v))
        getattr(module, name)(work, *map(cases.column, factors))

    return operate


def by_lists(p, a, v, name, *factors):
    getattr(TensorLists(p, a, None if name == "jump_" else v), name)(*factors)


def arguments(name, ratios, retreats, weights):
    return {"jump_": (ratios,), "retreat_": (retreats, weights), "trial_": (ratios,), "anchor_": ()}[name]


def after(problem, name, operate, times=1):
    specs, *factors = problem
    out = made(specs)
    for _ in range(times):
        operate(out.params, out.anchors, out.estimates, name, *arguments(name, *factors))
    assert out.guards_intact()
    return out


def buffers(out):
    """All that the lists' tensors lie in, gaps between elements included."""
    return [buffer for buffer, *_ in out.buffers]


def check_same(problem, name, *implementations):
    """Bit for bit, wherever the tensors lie."""
    first, *others = (buffers(after(problem, name, operate)) for operate in implementations)
    for other in others:
        assert not cases.differing(other, first), name


def check_reference(problem, name, operate):
    """One rounding from the reference, and only what the operation writes is written."""
    specs, ratios, retreats, weights = problem
    before, out = made(specs), after(problem, name, operate)
    E, A, V = map(real, (before.params, before.anchors, before.estimates))
    got = dict(zip("EAV", map(real, (out.params, out.anchors, out.estimates))))
    wanted = dict(zip("EAV", (E, A, V)))
    if name == "jump_":  # a trial from the weights on, along the drift itself
        wanted["E"] = wanted["A"] = reference.trial(E, [e.double() - a.double() for e, a in zip(E, A)], ratios)
    elif name == "retreat_":
        wanted["A"], wanted["V"] = reference.retreat(E, A, V, retreats, weights)
    elif name == "trial_":
        wanted["E"] = reference.trial(A, V, ratios)
    else:
        wanted["A"] = reference.anchor(E)
    written = {"jump_": "EA", "retreat_": "AV", "trial_": "E", "anchor_": "A"}[name]
    for letter in "EAV":
        if letter not in written:
            assert not cases.differing(got[letter], wanted[letter]), letter
            continue
        for i, (x, y) in enumerate(zip(got[letter], wanted[letter])):
            limits, wide = torch.finfo(x.dtype), torch.finfo(torch.promote_types(x.dtype, torch.float32))
            size = sum(t[i].double().abs() for t in (E, A, V)) * (2 + ratios[i] + retreats[i])
            slack = limits.eps / 2 * y.abs() + 4 * wide.eps * size + limits.smallest_normal * limits.eps
            assert ((x.double() - y).abs() <= slack).all(), (name, letter, i)
    for i, (e, a) in enumerate(zip(got["E"], got["A"])):  # a factor of 0 copies, the sign of zeros included
        copied = {"jump_": True, "retreat_": not retreats[i], "trial_": not ratios[i], "anchor_": True}[name]
        assert not copied or not cases.differing([e], [a]), (name, i)
        if name == "jump_" and not ratios[i]:
            assert not cases.differing([e], [E[i]]), i


OPERATIONS = pytest.mark.parametrize("name", ["jump_", "retreat_", "trial_", "anchor_"])
needs_native = pytest.mark.skipif(native._library() is None, reason="needs the C loops: install with a C compiler")


@OPERATIONS
@given(problem=problems())
def test_operations_are_the_reference_within_one_rounding(name, problem):
    check_reference(problem, name, by_lists)


@OPERATIONS
@given(problem=problems())
def test_operations_depend_on_who_computes_them(name, problem):
    buffer, threads = streamed.BUFFER, torch.get_num_threads()
    check_same(problem, name, by_module(foreach), by_lists)
    try:
        streamed.BUFFER = 1 << 12  # many batches
        check_same(problem, name, by_lists, by_module(streamed))
        torch.set_num_threads(3)
        check_same(problem, name, by_module(foreach), by_lists)
    finally:
        streamed.BUFFER = buffer
        torch.set_num_threads(threads)


@OPERATIONS
@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_parts_of_long_tensors_are_lost(name, dtype, threads):
    before = torch.get_num_threads()
    specs = cases.specs(dtype, [native.PART - 1, native.PART, native.PART + 17, 3 * native.PART])
    n = len(specs)
    problem = specs, cases.ratios(n), cases.retreats(n), ([0.05, 0.5, 0.7, 1.0] * n)[:n]
    try:
        torch.set_num_threads(threads)
        check_same(problem, name, by_module(foreach), by_module(native))
    finally:
        torch.set_num_threads(before)


@given(problem=problems(), other=FACTORS)
def test_a_trial_leaves_rounding_behind(problem, other):
    specs, ratios, *_ = problem
    once, twice = after(problem, "trial_", by_lists), made(specs)
    work = TensorLists(twice.params, twice.anchors, twice.estimates)
    for factors in [other] * len(ratios), ratios[::-1], ratios:
        work.trial_(factors)
    assert not cases.differing(buffers(twice), buffers(once))


def test_what_is_not_finite_keeps_its_bits_as_an_anchor():
    for dtype in REALS:
        p = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype)
        a, v = torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=dtype)
        TensorLists([p], [a], [v]).anchor_()
        assert not cases.differing([a], [p])


@OPERATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64])  # native, foreach, foreach by views
def test_autograd_does_not_notice_what_operations_write(name, dtype):
    written = {"jump_": (0, 1), "retreat_": (1, 2), "trial_": (0,), "anchor_": (1,)}[name]
    tensors = [torch.ones(5, dtype=dtype, requires_grad=i == 0) for i in range(3)]
    for i, t in enumerate(tensors):
        version = t._version
        with torch.no_grad():
            by_lists(*([t] for t in tensors), name, *arguments(name, [1.0], [0.5], [0.5]))
        assert (t._version > version) == (i in written)


def test_factors_come_as_tensors_or_sequences_of_any_length():
    def run(*factors):
        out = made([(torch.float32, 9, lambda flat: flat, (0, 0, 0))] * 3)
        work = TensorLists(out.params, out.anchors, out.estimates)
        work.retreat_(*factors)
        work.trial_(factors[0])
        TensorLists(out.params, out.anchors, None).jump_(factors[1])
        return buffers(out)

    expected = run([0.5, 0.0, 2.0], [0.25] * 3)
    column = torch.tensor([[0.5, 9.0], [0.0, 9.0], [2.0, 9.0]], dtype=torch.float64)[:, 0]
    assert not cases.differing(run(column, torch.tensor(0.25, dtype=torch.float64).expand(3)), expected)
    assert not cases.differing(run((0.5, 0.0, 2.0), torch.full((3,), 0.25)), expected)
    for wrong in [0.5] * 2, [0.5] * 4, 0.5, torch.zeros(3, 1):
        with pytest.raises(ValueError, match="3 tensors need as many factors"):
            run(wrong, [0.25] * 3)
        with pytest.raises(ValueError, match="3 tensors need as many factors"):
            run([0.25] * 3, wrong)
        with pytest.raises(ValueError, match="3 tensors need as many factors"):
            TensorLists(*[[torch.ones(9)] * 3] * 2, None).jump_(wrong)


def test_retreat_and_trial_without_estimates():
    work = TensorLists([torch.ones(3)], [torch.zeros(3)], None)
    for call in lambda: work.retreat_([0.5], [0.5]), lambda: work.trial_([0.5]):
        with pytest.raises(ValueError, match="needs drift estimates"):
            call()
    work.anchor_()
    assert work.sums().tolist() == [[0.0, 0.0, 0.0, 3.0]]


def test_a_jump_with_estimates():
    out = made([(torch.float32, 9, lambda flat: flat, (0, 0, 0))])
    before = [buffer.clone() for buffer in buffers(out)]
    with pytest.raises(ValueError, match="takes no drift estimates"):
        TensorLists(out.params, out.anchors, out.estimates).jump_([0.5])
    assert not cases.differing(buffers(out), before)


def test_nothing_to_do_fails():
    empty = [torch.zeros(0), torch.zeros(3, 0, dtype=torch.bfloat16), torch.zeros(0, dtype=torch.float16)]
    for tensors in [], empty:
        work = TensorLists(tensors, tensors, tensors)
        n = len(tensors)
        assert torch.equal(work.sums(), torch.zeros(n, 4, dtype=torch.float64))
        work.retreat_([0.5] * n, [0.1] * n)
        work.trial_([0.5] * n)
        TensorLists(tensors, tensors, None).jump_([0.5] * n)
        work.anchor_()
        assert work.still_fits(tensors, tensors, tensors)


# What can be done to a tensor behind a list's back, as float [4, 6]
SWAPS = {
    "storage": lambda t: setattr(t, "data", t.data.clone()),
    "set_": lambda t: t.set_(t.detach().clone()),
    "emptied": lambda t: t.set_(),
    "shape": lambda t: setattr(t, "data", t.data.view(-1)),
    "smaller": lambda t: setattr(t, "data", t.data[:2]),
    "strides": lambda t: setattr(t, "data", t.data.t()),
    "layout": lambda t: setattr(t, "data", t.data.as_strided((4, 6), (1, 4))),
    "gaps": lambda t: setattr(t, "data", t.data[:, :3]),
    "dtype": lambda t: setattr(t, "data", t.data.view(torch.int16 if t.itemsize == 2 else torch.int32)),
    "wider": lambda t: setattr(t, "data", t.data.double()),
}


def check_fit(work, tensors, module, change, victim):
    """`tensors`: params, anchors, estimates."""
    assert [m for m, *_ in work.work] == [module]
    assert work.still_fits(*tensors)
    aliases = [[t.detach() for t in ts] for ts in tensors]
    assert work.still_fits(*aliases)
    with torch.no_grad():
        SWAPS[change](tensors[victim][1])
    assert not work.still_fits(*tensors), (change, victim)
    assert not work.still_fits(*aliases), "the list's own tensors are not what they were"


def fitted(dtype):
    tensors = [[torch.randn(4, 6, dtype=dtype) for _ in range(3)] for _ in range(3)]
    tensors[0] = [torch.nn.Parameter(t, requires_grad=False) for t in tensors[0]]
    return TensorLists(*tensors), tensors


@pytest.mark.parametrize("victim", range(3))
@pytest.mark.parametrize("change", SWAPS)
@pytest.mark.parametrize("module", [pytest.param(native, marks=needs_native), foreach, streamed])
def test_a_list_is_kept_though_its_tensors_are_others(monkeypatch, module, change, victim):
    monkeypatch.setattr(lists, "_implementation", lambda *_: module)
    work, tensors = fitted(torch.float32)
    check_fit(work, tensors, module, change, victim)


@pytest.mark.parametrize("change", ["storage", "set_", "emptied", "shape", "smaller", "strides", "gaps"])
def test_a_list_of_complex_tensors_is_kept_though_its_tensors_are_others(change):
    check_fit(*fitted(torch.complex64), native if native._library() else foreach, change, 1)


def test_a_list_of_transposed_tensors_is_kept_though_their_layout_is_another():
    for strides in (2, 1, 4), (12, 6, 1):
        tensors = [[torch.zeros(24).as_strided((2, 2, 6), (1, 2, 4))] for _ in range(3)]
        work = TensorLists(*tensors)
        assert work.still_fits(*tensors)
        tensors[2][0].data = tensors[2][0].data.as_strided((2, 2, 6), strides)
        assert not work.still_fits(*tensors)


def test_a_list_is_kept_for_other_tensors():
    work, (p, a, v) = fitted(torch.float32)
    for others in (p[::-1], a, v), (p, a, a), (p[:2], a[:2], v[:2]), (p, a, None), (p, [*a, a[0]], v):
        assert not work.still_fits(*others)
    assert not TensorLists(p, a, None).still_fits(p, a, v) and TensorLists(p, a, None).still_fits(
        tuple(p), tuple(a), None
    )
    empty = [torch.zeros(0)]
    assert not TensorLists(empty, empty, None).still_fits([torch.zeros(0, device="meta")], empty, None)


def test_a_list_of_wrapped_tensors_is_kept():
    class Wrapped(torch.Tensor):
        pass

    p, a = [torch.zeros(3).as_subclass(Wrapped)], [torch.zeros(3)]
    assert not TensorLists(p, a, None).still_fits(p, a, None)
    plain = [p[0].as_subclass(torch.Tensor)]
    assert TensorLists(plain, a, None).still_fits(plain, a, None)
    assert not TensorLists(plain, a, None).still_fits(p, a, None)


@given(problem=problems())
def test_a_kept_list_computes_otherwise_than_a_new_one(problem):
    specs, ratios, retreats, weights = problem

    def run(keep):
        out = made(specs)
        tensors = out.params, out.anchors, out.estimates
        work, sums = TensorLists(*tensors), []
        for _ in range(2):
            assert work.still_fits(*tensors)
            work = work if keep else TensorLists(*tensors)
            sums.append(work.sums())
            work.retreat_(retreats, weights)
            work.trial_(ratios)
            sums.append(work.sums())
            work.trial_([0.5 * ratio for ratio in ratios])
            work.anchor_()
        return torch.stack(sums), buffers(out)

    (sums, kept), (others, new) = run(True), run(False)
    assert torch.equal(sums, others) and not cases.differing(kept, new)
