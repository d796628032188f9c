"""What an argument may be: a number or a whole one, where `bool` is none."""

from typing import Any, TypeGuard


def is_number(value: Any) -> TypeGuard[float]:
    """Whether an argument is an int or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any, least: int = 0) -> TypeGuard[int]:
    """Whether an argument is an int of at least so much."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
