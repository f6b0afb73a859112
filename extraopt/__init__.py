"""extraopt: finish training in fewer steps by jumping ahead along the straight part of the path."""

from importlib.util import find_spec

if find_spec("extraopt.kernels") is None:  # in a checkout they lie beside the package; an installation joins them
    raise ImportError("extraopt is not installed: run `pip install -e .` in its checkout (or `pip install .`).")

from .adam import ExtraAdam
from .extrapolation import JumpReport

__version__ = "0.1.0"
__all__ = ["ExtraAdam", "JumpReport", "__version__"]
