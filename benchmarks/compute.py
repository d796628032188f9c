"""What Keras has no backend-neutral API for: compiling, differentiating, devices."""

import contextlib

import keras

ON_JAX = keras.backend.backend() == "jax"
if ON_JAX:
    import jax
else:
    import tensorflow as tf


def compiled(function):
    """A function of lists of tensors, compiled by XLA."""
    if ON_JAX:
        return jax.jit(function)
    return tf.function(function, jit_compile=True, autograph=False)


def gradients(function, tensors):
    """Gradients of the scalar `function(tensors)`: dense tensors, zeros where there is none."""
    if ON_JAX:
        return jax.grad(function)(tensors)
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = function(tensors)
    pairs = zip(tape.gradient(value, tensors), tensors, strict=True)
    return [tf.zeros_like(x) if g is None else tf.convert_to_tensor(g) for g, x in pairs]


def updated(optimizer, variables, optimizer_values, gradients, values):
    """New values of `variables` and of the optimizer's variables: `stateless_apply`.

    On TensorFlow, where Keras does not have it, the variables are updated.
    """
    if ON_JAX:
        return optimizer.stateless_apply(optimizer_values, gradients, values)
    both = [*variables, *optimizer.variables]
    for variable, value in zip(both, [*values, *optimizer_values], strict=True):
        variable.assign(value)
    optimizer.apply(gradients, variables)
    new = [tf.convert_to_tensor(variable) for variable in both]
    return new[: len(variables)], new[len(variables) :]


def float64_enabled():
    """Context manager that allows float64 tensors, which JAX otherwise does not."""
    return jax.enable_x64(True) if ON_JAX else contextlib.nullcontext()


def gpu_names():
    """Names of the GPUs of the backend."""
    if ON_JAX:
        return [device.device_kind for device in jax.devices() if device.platform == "gpu"]
    gpus = tf.config.list_physical_devices("GPU")
    return [tf.config.experimental.get_device_details(gpu).get("device_name", "") for gpu in gpus]


def peak_bytes_on_gpu():
    """Peak memory of this process on the first GPU, in bytes."""
    if ON_JAX:
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


def step_of(model, batch):
    """Two functions. The first takes a training step of a compiled model on a batch, as `fit` does.

    It returns the loss once the step has ended. The second brings the model up to date.
    """
    if not ON_JAX:
        model.make_train_function()
        data = tf.data.Dataset.from_tensors(batch).cache().repeat()
        batches = iter(data.prefetch(2))
        return lambda: float(model.train_function(batches)["loss"]), lambda: None

    # On JAX, `fit` hides its compiled function. This compiles what Keras's guides compile.
    model.optimizer.build(model.trainable_variables)
    variables = [
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    ]
    step = jax.jit(model.train_step, donate_argnums=0)
    state = [[keras.ops.copy(v.value) for v in kind] for kind in variables]
    batch = jax.device_put(batch)

    def take():
        nonlocal state
        logs, state = step(state, batch)
        return float(logs["loss"])

    def finish():
        for kind, values in zip(variables, state, strict=True):
            for variable, value in zip(kind, values, strict=True):
                variable.assign(value)

    return take, finish
