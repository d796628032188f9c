"""Checks arguments: models and paths."""

import os
from typing import Any

import keras


def check_ready(model: Any, expected_by: str | None = None) -> None:
    """Raises a `ValueError` unless the argument is a built model with a loss.

    Args:
        model: The argument.
        expected_by: Name of the function, for the error message.
    """
    problem = _problem_of(model)
    if problem is not None:
        pass
    elif not model.compiled or model.optimizer is None:
        problem = "which is not compiled. Call `model.compile` first."
    else:
        return
    raise ValueError(
        ("Expected" if expected_by is None else f"`{expected_by}` expected")
        + f" a built and compiled model. Received: {model!r} (of type {type(model).__name__}), "
        + problem
    )


def check_built(model: Any, expected_by: str) -> None:
    """Raises a `ValueError` unless the argument is a built model, see `check_ready`."""
    problem = _problem_of(model)
    if problem is not None:
        raise ValueError(
            f"`{expected_by}` expected a built model. Received: {model!r} (of type "
            f"{type(model).__name__}), {problem}"
        )


def _problem_of(model: Any) -> str | None:
    if not isinstance(model, keras.Model):
        return "which is not a model."
    return None if model.built else "which is not built yet. Call it on a batch of data first."


def check_path(name: str, path: Any) -> None:
    """Raises a `ValueError` unless `path` is a path."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ValueError(f"Expected `{name}` to be the path of a file. Received: {name}={path!r}.")
