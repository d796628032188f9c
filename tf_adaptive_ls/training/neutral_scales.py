"""`neutral_scales`: a context in which no layer is scaled."""

import contextlib
import contextvars
from collections.abc import Iterator

_neutral = contextvars.ContextVar("neutral_scales", default=False)


@contextlib.contextmanager
def neutral_scales() -> Iterator[None]:
    """Context manager in which scaled layers behave like plain layers.

    Gradients pass a layer at the scale of its surroundings, nothing is measured, and derivatives of
    any order are right. Use it around forward passes whose gradients are differentiated again:

    ```python
    with tf.GradientTape() as tape:
        tape.watch(x)
        with als.neutral_scales():
            score = critic(x)
    penalty = (tf.norm(tape.gradient(score, x)) - 1) ** 2
    ```

    In compiled code, it takes effect when the code is traced.
    """
    token = _neutral.set(True)
    try:
        yield
    finally:
        _neutral.reset(token)


def are_scales_neutral() -> bool:
    """Whether the current context is one of `neutral_scales`."""
    return _neutral.get()
