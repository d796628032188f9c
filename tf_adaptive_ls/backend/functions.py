"""Compiling functions, and what tracing does to values."""

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


def current_trace() -> Any:
    """The trace of a function that is under way, of the innermost; `None` if values are known."""
    if keras.backend.backend() == "jax":
        import jax

        return getattr(jax.lax.full((), 0.0), "_trace", None)
    import tensorflow as tf

    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def belong_to(trace: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether what is computed from tensors now can be returned by the function of that trace.

    With `None` for the trace: whether its numbers are known at once. Nothing gets out of a loop
    that is traced by itself.
    """
    if any(isinstance(x, keras.KerasTensor) for x in tensors):
        return False
    own = "_trace" if keras.backend.backend() == "jax" else "graph"
    traces = [current_trace(), *(getattr(x, own, trace) for x in tensors)]
    return all(each is trace for each in traces)
