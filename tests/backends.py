"""Gradients and compiled steps: what Keras has no neutral name for, and tests need."""

import contextlib

import keras
import tensorflow as tf

ON_JAX = keras.backend.backend() == "jax"
# Whether `model.compile` is asked for XLA where a test wants the step compiled, however that be.
JIT = ON_JAX
# How functions are run, and how those are that Keras compiles without XLA where it can.
MODES = ["eager", "xla"] if ON_JAX else ["eager", "graph", "xla"]
COMPILED = "xla" if ON_JAX else "graph"


def compiled(function, variables=(), mode=COMPILED):
    """`function`, run in one of `MODES`.

    Args:
        function: Function of arrays, or nested lists of such, to the same.
        variables: All that it reads and updates.
        mode: One of `MODES`.
    """
    if mode == "eager":
        return function
    if not ON_JAX:
        return tf.function(function, jit_compile=mode == "xla")
    import jax

    updated = []

    @jax.jit
    def run(values, *args):
        with _Scope(zip(variables, values, strict=True)) as scope:
            outputs = function(*args)
        updated[:] = scope.updated
        return outputs, [scope.get_current_value(v) for v in updated]

    def call(*args):
        outputs, values = run([v.value for v in variables], *args)
        for variable, value in zip(updated, values, strict=True):
            variable.assign(value)
        return outputs

    return call


def value_and_gradients(function, variables, tensors=()):
    """What `function(*tensors)` returns, and gradients of the scalar that it returns first.

    Variables that the function updates are updated.

    Args:
        function: Function to a scalar, or a tuple of a scalar and anything.
        variables: List of `keras.Variable`s.
        tensors: Tuple of tensors.

    Returns:
        What the function returned, and a list of gradients: by the variables, then by the tensors.
        Without one TensorFlow has `None`, and JAX zeros.
    """

    def scalar(value):
        return value[0] if isinstance(value, tuple) else value

    if not ON_JAX:
        tensors = [tf.convert_to_tensor(x) for x in tensors]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(*tensors)
        return value, tape.gradient(scalar(value), [*(v.value for v in variables), *tensors])
    import jax

    updated = []

    def compute(values, tensors):
        with _Scope(zip(variables, values, strict=True)) as scope:
            value = function(*tensors)
        updated[:] = scope.updated
        return scalar(value), (value, [scope.get_current_value(v) for v in updated])

    arguments = [v.value for v in variables], list(map(jax.numpy.asarray, tensors))
    gradients, (value, values) = jax.grad(compute, argnums=(0, 1), has_aux=True)(*arguments)
    for variable, new in zip(updated, values, strict=True):
        variable.assign(new)
    return value, [*gradients[0], *gradients[1]]


def float64_enabled():
    """A context in which tensors may be of float64, which JAX has only if told to."""
    if not ON_JAX:
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True)


class _Scope(keras.StatelessScope):
    """Knows the variables that were updated in it, and the values of the scope around it."""

    def __init__(self, mapping):
        super().__init__(list(mapping))
        self._updated = {}

    def __enter__(self):
        super().__enter__()
        if self.original_scope is not None:
            self.state_mapping = {**self.original_scope.state_mapping, **self.state_mapping}
        return self

    def add_update(self, update):
        super().add_update(update)
        self._updated[id(update[0])] = update[0]

    @property
    def updated(self):
        return list(self._updated.values())


def dense(gradient):
    """A gradient, made dense if it is sparse; `None` as it is."""
    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient
