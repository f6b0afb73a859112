"""Work on saved checkpoints: read them, extrapolate them, measure how straight their path was.

Nothing here is imported by `import extraopt`.
"""

from .extrapolate import Extrapolation, LoraError, Sweep, coefficients, extrapolate, sweep
from .find import find_checkpoints
from .read import Checkpoint, CheckpointError, check_same_family, open_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Extrapolation",
    "LoraError",
    "Sweep",
    "check_same_family",
    "coefficients",
    "extrapolate",
    "find_checkpoints",
    "open_checkpoint",
    "sweep",
]
