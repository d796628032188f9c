"""Counts the multiplications of a layer call."""

import math
from collections.abc import Sequence
from typing import Any

import keras

from tf_adaptive_ls.backend.types import Tensor


def multiplications_of(
    operation: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> float:
    """The number of multiplications by weights and in attention in one call of a layer.

    0 for operations that are not layers, and for layers that multiply element by element.

    Args:
        operation: The layer or operation.
        inputs: List of the floating-point tensors that it takes.
        outputs: List of those that it returns.
    """
    if not isinstance(operation, keras.layers.Layer) or not inputs or not outputs:
        return 0.0
    weights = [math.prod(v.shape) for v in operation.trainable_variables if len(v.shape) >= 2]
    if isinstance(operation, keras.layers.Embedding) or not weights:
        return 0.0
    if isinstance(operation, keras.layers.MultiHeadAttention):
        return _places(inputs[0]) * sum(weights) + _of_scores(operation, inputs)
    if hasattr(operation, "kernel_size"):  # a convolution multiplies at each position of its output
        first = operation.data_format == "channels_first"
        channels = outputs[0].shape[1 if first else -1]
        return float(math.prod(outputs[0].shape) / channels * sum(weights))
    return _places(inputs[0]) * sum(weights)


def _places(tensor: Tensor) -> float:
    return float(math.prod(tensor.shape[:-1]))


def _of_scores(attention: Any, inputs: Sequence[Tensor]) -> float:
    """Multiplications of queries by keys, and of attention weights by values."""
    keys = inputs[1] if len(inputs) > 1 else inputs[0]
    config = attention.get_config()
    widths = config["key_dim"] + (config["value_dim"] or config["key_dim"])
    return _places(inputs[0]) * keys.shape[-2] * config["num_heads"] * float(widths)
