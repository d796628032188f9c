"""What an argument may be: a number or a whole one, where `bool` is none; saved settings."""

from collections.abc import Iterable
from typing import Any, TypeGuard


def is_number(value: Any) -> TypeGuard[float]:
    """Whether an argument is an int or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any, least: int = 0) -> TypeGuard[int]:
    """Whether an argument is an int of at least so much."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
