"""The state and the training step of `fit`, for each backend."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls.backend.types import Tensor


def lasting_value(variable: keras.Variable) -> np.ndarray:
    """The value of a variable, which no later assignment changes."""
    return variable.value if keras.backend.backend() == "jax" else variable.numpy()


def sync_state(model: keras.Model) -> None:
    """Brings the variables of a model up to date in the middle of `fit`.

    On JAX, `fit` keeps their values elsewhere.
    """
    if keras.backend.backend() == "jax":
        model.jax_state_sync()


def no_step(model: keras.Model, arguments: tuple[Any, ...]) -> Any:
    """What `model.train_function(*arguments)` returns, without a training step."""
    logs = model.get_metrics_result()
    return (logs, arguments[0]) if keras.backend.backend() == "jax" else logs


def num_replicas_of(model: keras.Model) -> int:
    """On how many replicas `tf.distribute` runs the steps of `model.fit`."""
    if keras.backend.backend() != "tensorflow":
        return 1
    return model.distribute_strategy.num_replicas_in_sync


def joined_batch(model: keras.Model, batch: Any) -> tuple[Tensor, Tensor]:
    """A batch from the data of `model.fit` in one piece, if `tf.distribute` has divided it."""
    if num_replicas_of(model) == 1:
        return batch
    import tensorflow as tf

    strategy = model.distribute_strategy
    return keras.tree.map_structure(
        lambda leaf: tf.concat(strategy.experimental_local_results(leaf), axis=0), batch
    )


def state_arguments(model: keras.Model) -> tuple[Any, ...]:
    """What `model.train_step` takes before the batch: on JAX, the values of all variables."""
    if keras.backend.backend() != "jax":
        return ()
    return (tuple([v.value for v in variables] for variables in _groups_of(model)),)


def value_of_optimizer(model: keras.Model, variable: keras.Variable, arguments: Any) -> Tensor:
    """The value of a variable of the optimizer in a call of `model.train_step(*arguments)`."""
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
    """Runs a training step, and takes back what it does to variables.

    Variables of the optimizer are not taken back: it must not update any.

    Args:
        model: The model.
        train_step: Its `train_step`.
        arguments: Those of `train_step`.
        values: Of the trainable weights during that step. Those for which it is `None`, or which
            it leaves out at the end, have their own.

    Returns:
        The logs, and the values of all non-trainable weights as the step has left them.
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
    """All variables, as the state of JAX's `train_step` has them."""
    return (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )


def compiled_as_steps(model: keras.Model, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors, compiled in the way the training steps of a model are."""
    if model.run_eagerly:
        return function
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function) if model.jit_compile else function
    import tensorflow as tf

    return tf.function(
        function, reduce_retracing=True, jit_compile=model.jit_compile, autograph=False
    )
