"""Folds batch normalization into the layer before it, as it acts at inference."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import layers

from tf_adaptive_ls.backend.keras_internals import graph_of, layers_in, node_of, nodes_of
from tf_adaptive_ls.deploy.graphs import is_graph, rebuilt
from tf_adaptive_ls.deploy.kernels import CONVOLUTIONS, DENSE, DEPTHWISE, SEPARABLE, TRANSPOSED

FOLDABLE = (*CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE, *SEPARABLE, *DENSE)


def folded(model: keras.Model) -> keras.Model:
    """A model without those batch normalizations that the preceding layers can absorb.

    The preceding layer absorbs the scale and offset if it has no activation, and if nothing else
    uses its outputs. The outputs of the model are the same except for rounding.

    Args:
        model: A model whose layers may be reused. Only its graph, and the graphs of nested models,
            are searched.
    """
    if not is_graph(model):
        return model
    parts: dict[int, list[Any]] = {}
    for node, normalization in _pairs(model):
        layer = node.operation
        parts[id(layer)] = [_with(layer, normalization, node.input_tensors[0].shape)]
        parts[id(normalization)] = []
    return rebuilt(model, parts)


def _pairs(model: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of a layer and the batch normalization of its outputs."""
    graph: Any = graph_of(model)
    for each in layers_in(graph):
        if is_graph(each):
            yield from _pairs(each)
    nodes = nodes_of(graph)
    calls = Counter(id(node.operation) for node in nodes)
    uses = Counter(id(x) for node in nodes for x in node.input_tensors)
    uses.update(id(x) for x in graph.outputs)
    for node in nodes:
        if not isinstance(node.operation, layers.BatchNormalization):
            continue
        (x,) = node.input_tensors
        above = node_of(x)
        before = getattr(above, "operation", None)
        if (
            isinstance(before, FOLDABLE)
            and calls[id(before)] == calls[id(node.operation)] == uses[id(x)] == 1
            and before.activation is keras.activations.linear
            and _axis(before, len(x.shape)) == node.operation.axis % len(x.shape)
        ):
            yield above, node.operation


def _axis(layer: Any, rank: int) -> int | None:
    """The axis of a layer's outputs that holds the channels, and nothing else."""
    if isinstance(layer, layers.EinsumDense):
        last = layer.equation[-1]
        channels = set(layer.equation.split("->")[1]) - set(layer.equation.split(",")[0])
        return rank - 1 if channels == {last} else None
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def _with(layer: Any, normalization: Any, input_shape: tuple[Any, ...]) -> Any:
    """Multiplies a normalization into the last kernel and the bias of a layer."""
    mean, variance = _wide(normalization.moving_mean), _wide(normalization.moving_variance)
    gamma, beta = _wide(normalization.gamma, 1.0), _wide(normalization.beta)
    factor = gamma / np.sqrt(variance + normalization.epsilon)
    config = layer.get_config()
    if isinstance(layer, layers.EinsumDense):
        config["bias_axes"] = layer.equation[-1]
    else:
        config["use_bias"] = True
    made = type(layer).from_config(config)
    made.build(input_shape)
    offset = beta + (_wide(layer.bias) - mean) * factor
    *others, kernel = [w.numpy() for w in layer.weights if w is not layer.bias]
    made.set_weights([*others, _scaled(layer, kernel, factor), offset])
    return made


def _wide(variable: Any, otherwise: float = 0.0) -> Any:
    return otherwise if variable is None else variable.numpy().astype(np.float64)


def _scaled(layer: Any, kernel: Any, factor: Any) -> Any:
    if isinstance(layer, DEPTHWISE):
        return kernel * np.reshape(factor, kernel.shape[-2:])
    if isinstance(layer, TRANSPOSED):
        return kernel * factor[:, None]
    if isinstance(layer, layers.EinsumDense):
        labels = layer.equation.split("->")[0].split(",")[1]
        return kernel * np.reshape(factor, [-1 if n == layer.equation[-1] else 1 for n in labels])
    return kernel * factor
