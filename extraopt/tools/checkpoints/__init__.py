"""Work on saved checkpoints: read them, extrapolate them, measure how straight their path was.

Nothing here is imported by `import extraopt`.
"""

from .extrapolate import Extrapolation, extrapolate
from .family import check_same_family
from .find import find_checkpoints
from .lora import LoraError
from .plan import coefficients
from .read import Checkpoint, open_checkpoint
from .safety import CheckpointError
from .sweep import Sweep, sweep

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
