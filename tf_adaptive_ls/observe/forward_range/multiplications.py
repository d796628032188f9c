"""Counts the multiplications in a call of a layer."""

import math
from collections.abc import Sequence
from typing import Any

import keras

from tf_adaptive_ls.backend.types import Tensor


def multiplications_of(
    operation: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> float:
    """The multiplications by the weights of a layer in one call, and of attention scores.

    0 for what is no layer, and for layers that multiply element by element.

    Args:
        operation: The layer, or an operation.
        inputs: The floating-point tensors that it takes.
        outputs: Those that it returns.
    """
    if not isinstance(operation, keras.layers.Layer) or not inputs or not outputs:
        return 0.0
    weights = [math.prod(v.shape) for v in operation.trainable_variables if len(v.shape) >= 2]
    if isinstance(operation, keras.layers.Embedding) or not weights:
        return 0.0
    if isinstance(operation, keras.layers.MultiHeadAttention):
        return _places(inputs[0]) * sum(weights) + _of_scores(operation, inputs)
    if hasattr(operation, "kernel_size"):  # a convolution, at each place of its output
        first = operation.data_format == "channels_first"
        channels = outputs[0].shape[1 if first else -1]
        return float(math.prod(outputs[0].shape) / channels * sum(weights))
    return _places(inputs[0]) * sum(weights)


def _places(tensor: Tensor) -> float:
    return float(math.prod(tensor.shape[:-1]))


def _of_scores(attention: Any, inputs: Sequence[Tensor]) -> float:
    """Of queries by keys, and of what follows by values."""
    keys = inputs[1] if len(inputs) > 1 else inputs[0]
    config = attention.get_config()
    widths = config["key_dim"] + (config["value_dim"] or config["key_dim"])
    return _places(inputs[0]) * keys.shape[-2] * config["num_heads"] * float(widths)
