"""extraopt: finish training in fewer steps by jumping ahead along the straight part of the path."""

from .adam import ExtraAdam
from .extrapolation import JumpReport

__version__ = "0.1.0"
__all__ = ["ExtraAdam", "JumpReport", "__version__"]
