"""Functions that a backend compiles or traces, and what that makes of values."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tf_adaptive_ls.backend.types import Tensor


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of nested structures of tensors, compiled when it is first called."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, reduce_retracing=True)


def are_always_compiled() -> bool:
    """Whether steps are always compiled by XLA as a whole, as on JAX."""
    return keras.backend.backend() == "jax"


def only_values() -> bool:
    """Whether a conditional may not update variables, as on JAX, but has to return new values."""
    return keras.backend.backend() != "tensorflow"


def would_be_constant(value: Any) -> bool:
    """Whether a function that is being compiled would keep `value` as it is now, for good.

    So JAX does with what is not among the arguments of the function. TensorFlow reads variables
    anew. Computing gradients alone, without compiling, traces nothing.
    """
    if keras.backend.backend() != "jax":
        return False
    import jax

    compiles = isinstance(jax.lax.full((), 0.0), jax.core.Tracer)
    return compiles and not isinstance(value, jax.core.Tracer)


def is_traced_alone() -> bool:
    """Whether TensorFlow traces a function, and not one of several replicas."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly() and not tf.distribute.has_strategy()


def outside_of_traces() -> Any:
    """Context in which what is computed is not part of a function that is being traced."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def are_values_known(tensors: Sequence[Tensor]) -> bool:
    """Whether the numbers in tensors, and in what is computed from them, are known at once.

    They are not while a function is traced, even if the tensors come from outside of it.
    """
    if keras.backend.backend() == "jax":
        import jax

        return not any(isinstance(x, jax.core.Tracer) for x in (*tensors, jax.lax.full((), 0.0)))
    import tensorflow as tf

    return tf.executing_eagerly() and all(hasattr(x, "numpy") for x in tensors)
