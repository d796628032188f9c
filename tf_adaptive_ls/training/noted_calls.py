"""Which scaled layers are called on symbolic tensors, noted for whoever traces a model."""

import contextlib
import contextvars

_noted: contextvars.ContextVar[list | None] = contextvars.ContextVar("noted_calls", default=None)


@contextlib.contextmanager
def noting(called):
    """Scaled layers that are called in this context are appended to a list."""
    token = _noted.set(called)
    try:
        yield
    finally:
        _noted.reset(token)


def note_call(scaling, original, args, kwargs):
    """Runs `original(*args, **kwargs)`, and notes that something with a scale is called."""
    outputs = original(*args, **kwargs)
    called = _noted.get()
    if called is not None:
        called.append(scaling)
    return outputs
