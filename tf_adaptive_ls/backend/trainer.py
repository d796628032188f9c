"""The state and the training step of `fit`, for each backend."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls.backend.types import Tensor


def lasting_value(variable: keras.Variable) -> np.ndarray:
    """A value of the variable that later assignments do not change."""
    return variable.value if keras.backend.backend() == "jax" else variable.numpy()


def sync_state(model: keras.Model) -> None:
    """Writes the current values to the variables of a model during `fit`.

    On JAX, `fit` keeps them outside of the variables.
    """
    if keras.backend.backend() == "jax":
        model.jax_state_sync()


def no_step(model: keras.Model, arguments: tuple[Any, ...]) -> Any:
    """What `model.train_function(*arguments)` would return, without taking a step."""
    logs = model.get_metrics_result()
    return (logs, arguments[0]) if keras.backend.backend() == "jax" else logs


def num_replicas_of(model: keras.Model) -> int:
    """The number of `tf.distribute` replicas that run `model.fit`."""
    if keras.backend.backend() != "tensorflow":
        return 1
    return model.distribute_strategy.num_replicas_in_sync


def joined_batch(model: keras.Model, batch: Any) -> tuple[Tensor, Tensor]:
    """A batch from `model.fit` as a whole, if `tf.distribute` has split it."""
    if num_replicas_of(model) == 1:
        return batch
    import tensorflow as tf

    strategy = model.distribute_strategy
    return keras.tree.map_structure(
        lambda leaf: tf.concat(strategy.experimental_local_results(leaf), axis=0), batch
    )


def state_arguments(model: keras.Model) -> tuple[Any, ...]:
    """The arguments of `model.train_step` before the batch: on JAX, values of all variables."""
    if keras.backend.backend() != "jax":
        return ()
    return (tuple([v.value for v in variables] for variables in _groups_of(model)),)


def value_of_optimizer(model: keras.Model, variable: keras.Variable, arguments: Any) -> Tensor:
    """The value of an optimizer variable in the call `model.train_step(*arguments)`."""
    if keras.backend.backend() != "jax":
        return ops.convert_to_tensor(variable)
    _, _, values, _ = arguments[0]
    places = {id(v): i for i, v in enumerate(model.optimizer.variables)}
    return values[places[id(variable)]]


def undone_step(
    model: keras.Model,
    train_step: Callable[..., Any],
    arguments: tuple[Any, ...],
    values: Sequence[Tensor | None] = (),
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Runs a training step, and undoes its changes to the variables of the model.

    Changes to optimizer variables are not undone, so the step must not update them.

    Args:
        model: The model.
        train_step: Its `train_step`.
        arguments: The arguments of `train_step`.
        values: Values of the trainable weights during the step. Where there is `None` or nothing
            for a weight, it keeps its own value.

    Returns:
        The logs, and the values of all non-trainable weights after the step.
    """
    if keras.backend.backend() == "jax":
        (weights, *others), batch = arguments
        pairs = itertools.zip_longest(weights, values)
        weights = [own if other is None else other for own, other in pairs]
        logs, (_, non_trainable, _, _) = train_step((weights, *others), batch)
        return logs, list(non_trainable)
    import tensorflow as tf

    trainable, non_trainable, _, metrics = _groups_of(model)
    variables = [*trainable, *non_trainable, *metrics]
    kept = [tf.identity(v.value) for v in variables]
    for variable, value in zip(trainable, values, strict=False):
        if value is not None:
            variable.assign(value)
    logs = train_step(*arguments)
    left = [tf.identity(v.value) for v in non_trainable]
    for variable, value in zip(variables, kept, strict=True):
        variable.assign(value)
    return logs, left


def _groups_of(model: keras.Model) -> tuple[list[keras.Variable], ...]:
    """All variables, grouped as the state of `train_step` on JAX."""
    return (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )


def compiled_as_steps(model: keras.Model, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors, compiled as the training steps of `model` are."""
    if model.run_eagerly:
        return function
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function) if model.jit_compile else function
    import tensorflow as tf

    return tf.function(
        function, reduce_retracing=True, jit_compile=model.jit_compile, autograph=False
    )
