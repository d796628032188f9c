"""Compiles functions, and tells whether values are being traced."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tf_adaptive_ls.backend.types import Tensor


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function of nested structures of tensors on its first call."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, reduce_retracing=True)


def are_always_compiled() -> bool:
    """Whether XLA always compiles whole steps, as on JAX."""
    return keras.backend.backend() == "jax"


def only_values() -> bool:
    """Whether a conditional must return new values instead of updating variables, as on JAX."""
    return keras.backend.backend() != "tensorflow"


def would_be_constant(value: Any) -> bool:
    """Whether a function that is being compiled would keep the current `value` as a constant.

    JAX does so with everything that is not an argument of the function. TensorFlow reads variables
    on each call. Computing gradients without compiling does not count as tracing.
    """
    if keras.backend.backend() != "jax":
        return False
    import jax

    compiles = isinstance(jax.lax.full((), 0.0), jax.core.Tracer)
    return compiles and not isinstance(value, jax.core.Tracer)


def is_traced_alone() -> bool:
    """Whether TensorFlow is tracing a function outside of a replica context."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly() and not tf.distribute.has_strategy()


def outside_of_traces() -> Any:
    """Context manager that computes outside of the function that is being traced."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def current_trace() -> Any:
    """The innermost running trace, or `None` if values are concrete."""
    if keras.backend.backend() == "jax":
        import jax

        return getattr(jax.lax.full((), 0.0), "_trace", None)
    import tensorflow as tf

    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def belong_to(trace: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether a value computed from `tensors` can be returned by the function of the given trace.

    For `None` as the trace: whether the tensors are concrete. Values inside a loop cannot leave it.
    """
    if any(isinstance(x, keras.KerasTensor) for x in tensors):
        return False
    own = "_trace" if keras.backend.backend() == "jax" else "graph"
    traces = [current_trace(), *(getattr(x, own, trace) for x in tensors)]
    return all(each is trace for each in traces)
