"""Notes which scaled layers are called on symbolic tensors during a trace."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.training.layer_scaling import LayerScaling

_noted: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
    "noted_calls", default=None
)


@contextlib.contextmanager
def noting(called: list[LayerScaling]) -> Iterator[None]:
    """Context manager that appends the scaled layers called in it to `called`."""
    token = _noted.set(called)
    try:
        yield
    finally:
        _noted.reset(token)


def note_call(
    scaling: LayerScaling,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Runs `original(*args, **kwargs)`, and notes the call of a scaled layer."""
    outputs = original(*args, **kwargs)
    called = _noted.get()
    if called is not None:
        called.append(scaling)
    return outputs
