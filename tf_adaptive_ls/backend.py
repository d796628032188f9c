"""What Keras has no neutral name for: all that depends on the backend is here."""

import functools

import keras


def custom_gradient(function, constant):
    """Custom gradient of `function(constant, *inputs)` by `inputs`.

    TensorFlow gathers all inputs of such a function in one `IdentityN` node, so that
    even inference would compute `constant`, which only the backward pass needs: there
    it must not be an input. JAX does not let the backward pass close over anything
    that depends on what is differentiated: there it must be one.
    """
    if keras.backend.backend() != "jax":
        return keras.ops.custom_gradient(lambda *inputs: function(constant, *inputs))

    @keras.ops.custom_gradient
    def with_constant(constant, *inputs):
        outputs, backward = function(constant, *inputs)
        return outputs, lambda *gradients: (
            keras.ops.zeros_like(constant),
            *backward(*gradients),
        )

    return functools.partial(with_constant, constant)


def gradients(function, tensors):
    """Gradients of a function by its arguments, computed operation by operation.

    Args:
        function: Function of a list of tensors to a scalar tensor.
        tensors: The list.

    Returns:
        A list of gradients; `None`, where the backend can tell, for a tensor that the
        scalar does not depend on.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.grad(function)(tensors)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = function(tensors)
    return tape.gradient(value, tensors)


def sync_state(model):
    """Brings the variables of a model up to date in the middle of `fit`.

    On JAX, `fit` keeps their values elsewhere.
    """
    if keras.backend.backend() == "jax":
        model.jax_state_sync()


def no_step(model, arguments):
    """What `model.train_function(*arguments)` returns, without a training step."""
    logs = model.get_metrics_result()
    return (logs, arguments[0]) if keras.backend.backend() == "jax" else logs
