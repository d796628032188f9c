"""Checks of numbers, scales and saved settings."""

import math
import numbers
from collections.abc import Iterable
from typing import Any, TypeGuard

# The bound of all log2 scales, those of layers and that of the loss: from -60 to 60. The largest
# shift between two layers is then 2**120, which float32 can represent.
MAX_LOG2_SCALE = 60


def is_number(value: Any) -> TypeGuard[float]:
    """Whether an argument is an int or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any, least: int = 0) -> TypeGuard[int]:
    """Whether an argument is an int of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_whole(name: str, value: Any, of: str = "") -> None:
    """Raises a `ValueError` unless an argument is an int of at least 1.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        of: What it counts, such as " of steps".
    """
    if not is_whole(value, 1):
        raise ValueError(
            f"Expected `{name}` to be a whole number{of}, at least 1. Received: {name}={value!r}."
        )


def is_scale_value(value: Any) -> bool:
    """Whether an argument is a power of two in the range of scales. It may be a NumPy number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    if not math.isfinite(value) or value <= 0:
        return False
    mantissa, exponent = math.frexp(value)
    return mantissa == 0.5 and abs(exponent - 1) <= MAX_LOG2_SCALE


def checked_settings(config: dict[str, Any], kind: str, names: Iterable[str]) -> dict[str, Any]:
    """`config`, as read from a file, if it contains the given settings and nothing else.

    Args:
        config: What was read.
        kind: What the config describes, for error messages.
        names: Names of the settings.

    Raises:
        ValueError: If `config` is not a dict, or contains anything else.
    """
    if not config.keys() <= set(names):
        raise ValueError(
            f"Expected the config of a {kind} to hold its settings alone: {', '.join(names)}. "
            f"Received: {config}. It was saved by another version, or is damaged."
        )
    return config
