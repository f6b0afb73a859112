"""Whether two checkpoints are of one family: whether a sum of their weights means anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .read import Checkpoint
from .safety import CheckpointError

# What of an adapter's config says what its tensors are, by presence where the values are of training only.
SAME = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias",
    "lora_bias", "use_bdlora", "use_qalora", "qalora_group_size", "target_parameters", "layer_replication",
    "trainable_token_indices", "alora_invocation_tokens",
)  # fmt: skip
SAME_PRESENCE = ("kasa_config", "arrow_config", "monteclora_config")
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that replace the base's weights


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in two adapters' configs; what is not said is what PEFT takes for it."""
    found = {key: config.get(key) or None for key in SAME}
    found |= {key: bool(config.get(key)) for key in SAME_PRESENCE}
    start = str(config.get("init_lora_weights"))
    return found | {"init_lora_weights": start if start.startswith(BASE_CHANGING) else "one that leaves the base"}


def check_same_family(a: Checkpoint, b: Checkpoint, *, dtypes: bool = True) -> None:
    """Refuse two checkpoints whose weights can't be put into one sum.

    Args:
        a: A checkpoint.
        b: Another one.
        dtypes: Whether floats must have the same dtype, too.

    Raises:
        CheckpointError: They differ in kind, model type, adapter settings, names, shapes or dtypes.
    """
    where = f"{a.path} and {b.path}"
    if a.is_adapter != b.is_adapter:
        raise CheckpointError(f"{where}: one is an adapter, the other a whole model. Merge the adapter first.")
    left, right = a.config, b.config
    keys: tuple[str, ...] = ("model_type",)
    if a.is_adapter:
        left, right = _settings(left), _settings(right)
        keys = tuple(left)
    for key in keys:
        if left.get(key) != right.get(key):
            raise CheckpointError(f"{where} have {key} {left.get(key)} and {right.get(key)}: mixed families.")
    for one, other in ((a, b), (b, a)):
        # Most pairs have the same names, and then the model's class need not be asked what is tied.
        absent = [name for name in one.infos if name not in other.infos and other.resolve(name) is None]
        if absent:
            raise CheckpointError(f"{other.path} lacks {some(absent)}, which {one.path} has.")
    for name, info in b.infos.items():
        other_name = a.resolve(name)
        assert other_name is not None
        other_info = a.infos[other_name]
        if other_info.shape != info.shape:
            raise CheckpointError(
                f"{name} has shape {other_info.shape} in {a.path} but {info.shape} in {b.path}: mixed families."
            )
        floats = other_info.dtype.is_floating_point and info.dtype.is_floating_point
        if other_info.dtype != info.dtype and (dtypes or not floats):
            raise CheckpointError(
                f"{name} has dtype {other_info.dtype} in {a.path} but {info.dtype} in {b.path}. Save both in one: "
                "from_pretrained(..., dtype=...).save_pretrained(...)."
            )
