"""What `fit` keeps to itself, and how each backend keeps it."""

from typing import Any

import keras
import numpy as np

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
