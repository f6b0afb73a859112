"""A compiled library that can't be used is one warning and torch operations, not the end of a run."""

import _ctypes
import pathlib
import shutil
import warnings

import _kernel_cases as cases
import pytest
import torch

from extraopt.kernels import TensorLists, foreach, native

LIBRARY = pathlib.Path(_ctypes.__file__).read_bytes()  # a shared library of this machine that is not ours
MACHINE = 18  # where an ELF file says for which processors it is
BROKEN = {
    "empty": b"",
    "garbage": b"no library at all" * 1000,
    "header only": LIBRARY[:64],
    "truncated": LIBRARY[:5000],  # the loader maps what is not there, and the process dies of SIGBUS
    "of another machine": LIBRARY[:MACHINE] + b"\xf3\x00" + LIBRARY[MACHINE + 2 :],  # RISC-V
    "without our functions": LIBRARY,
}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder that the library is looked for in."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native._library.cache_clear()
    yield tmp_path
    native._library.cache_clear()


def cycle():
    out = cases.Lists(cases.specs(torch.float32, [5, 33, 4097]))
    n = len(out.params)
    work = TensorLists(out.params, out.anchors, out.estimates)
    assert [module for module, *_ in work.work] == [foreach]
    work.sums()
    work.retreat_(cases.retreats(n), [0.1] * n)
    work.trial_(cases.ratios(n))
    work.anchor_()
    return out


@pytest.mark.parametrize("kind", BROKEN)
def test_a_library_that_can_not_be_loaded_ends_the_run(folder, kind):
    assert LIBRARY[:4] == b"\x7fELF"
    file = folder / "_native.abi3.so"
    file.write_bytes(BROKEN[kind])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        broken = cycle(), cycle()
    assert [w.category for w in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    assert str(file) in message and "install extraopt again" in message and "torch operations" in message
    if kind == "without our functions":
        assert "extraopt_cycle_sums" in message
    file.unlink()
    native._library.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # where there is no library at all, nothing is wrong
        without = cycle()
    for out in broken:
        assert not cases.differing(
            out.params + out.anchors + out.estimates, without.params + without.anchors + without.estimates
        )


@pytest.mark.skipif(native._library() is None, reason="needs the C loops: install with a C compiler")
def test_a_library_of_another_python_hides_the_one_that_works(folder):
    (good,) = pathlib.Path(native.__file__).parent.glob("_native*.so")
    (folder / "_native.a.so").write_bytes(BROKEN["garbage"])
    shutil.copy(good, folder / "_native.b.so")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native._library() is not None
