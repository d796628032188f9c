"""Checks of numbers, scales and saved settings."""

import math
import numbers
from collections.abc import Iterable
from typing import Any, TypeGuard

# Bound of log2 scales, of layers and of the loss alike, either way. The largest
# shift between two layers is then 2**120, which float32 holds.
MAX_LOG2_SCALE = 60


def is_number(value: Any) -> TypeGuard[float]:
    """Whether an argument is an int or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any, least: int = 0) -> TypeGuard[int]:
    """Whether an argument is an int of at least so much."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_whole(name: str, value: Any, of: str = "") -> None:
    """Raises a `ValueError` if an argument is no int from 1.

    Args:
        name: Its name.
        value: What was given.
        of: What it is a number of, such as " of steps".
    """
    if not is_whole(value, 1):
        raise ValueError(
            f"Expected `{name}` to be a whole number{of}, at least 1. Received: {name}={value!r}."
        )


def is_scale_value(value: Any) -> bool:
    """Whether an argument, which may be of NumPy, is a power of two that a scale can be."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    if not math.isfinite(value) or value <= 0:
        return False
    mantissa, exponent = math.frexp(value)
    return mantissa == 0.5 and abs(exponent - 1) <= MAX_LOG2_SCALE


def only_settings(config: dict[str, Any], kind: str, names: Iterable[str]) -> dict[str, Any]:
    """`config`, read from a file, once it is known to hold nothing but settings.

    Args:
        config: What was read.
        kind: What it is the config of, for errors.
        names: Those of its settings.

    Raises:
        ValueError: If it holds anything else.
    """
    if not config.keys() <= set(names):
        raise ValueError(
            f"Expected the config of a {kind} to hold its settings alone: {', '.join(names)}. "
            f"Received: {config}. It was saved by another version, or is damaged."
        )
    return config
