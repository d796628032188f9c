"""Replaces layers in the graph of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tf_adaptive_ls.backend.keras_internals import graph_of, layers_in

# The layers that run instead of a layer, one after the other, by the `id` of the layer.
Parts = Mapping[int, Sequence[Any]]


def rebuilt(model: keras.Model, parts: Parts) -> keras.Model:
    """A Functional model around the same layers, with some of them replaced.

    Args:
        model: A Functional or Sequential model. Nested models are rebuilt, too.
        parts: Dict from the `id` of a layer to the list of layers that run instead of it. An empty
            list passes the inputs on.

    Returns:
        The new model, or `model` itself if it contains none of the layers.
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
    """Whether a layer is a Sequential or Functional model, and not a subclass that does more."""
    return (
        isinstance(layer, keras.Model)
        and graph_of(layer) is not None
        and type(layer) in (keras.Sequential, type(graph_of(layer)), keras.Model)
    )
