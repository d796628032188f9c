"""Replaces layers in the graph of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tf_adaptive_ls.backend.keras_internals import graph_of, layers_in

# What runs in the place of a layer, by the layer's `id`: one layer after another.
Parts = Mapping[int, Sequence[Any]]


def rebuilt(model: keras.Model, parts: Parts) -> keras.Model:
    """A Functional model around the same layers, but for some in whose place others run.

    Args:
        model: A model that is a graph. Models in its graph are gone into.
        parts: What runs instead of a layer. None at all for what hands on its inputs.

    Returns:
        The model, or `model` itself if none of these layers is in it.
    """
    graph = graph_of(model)
    assert graph is not None
    inner = {id(each): each for each in layers_in(graph) if is_graph(each)}
    changed = {key: rebuilt(each, parts) for key, each in inner.items()}
    others: dict[int, Sequence[Any]] = {
        key: [each] for key, each in changed.items() if each is not inner[key]
    }
    others |= {id(each): parts[id(each)] for each in layers_in(graph) if id(each) in parts}
    if not others:
        return model

    def called(operation: Any, *args: Any, **kwargs: Any) -> Any:
        if id(operation) not in others:
            return operation(*args, **kwargs)
        (x, *_) = args
        for part in others[id(operation)]:
            x = part(x)
        return x

    return keras.models.clone_model(
        keras.Model(graph.input, graph.output, name=model.name),
        input_tensors=graph.input,
        clone_function=lambda operation: operation,
        call_function=called,
    )


def is_graph(layer: keras.layers.Layer) -> bool:
    """Whether a layer is a model that is a graph and nothing more: Sequential or Functional."""
    return (
        isinstance(layer, keras.Model)
        and graph_of(layer) is not None
        and type(layer) in (keras.Sequential, type(graph_of(layer)), keras.Model)
    )
