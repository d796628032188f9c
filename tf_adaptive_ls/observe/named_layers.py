"""The names of layers in tables, records and messages."""

from collections.abc import Iterator
from typing import Any

import keras

from tf_adaptive_ls.backend.keras_internals import parts_of
from tf_adaptive_ls.training.companion import Companion, scaling_of
from tf_adaptive_ls.training.layer_scaling import LayerScaling


def named_layers(model: keras.Model) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Pairs of a name and a layer, in the order of `model`.

    Nested models are entered, and their names are prefixes of the names of layers. Any other layer
    is listed without the layers inside of it. If it is not scaled, but layers inside of it are,
    these follow it.

    Args:
        model: A `keras.Model`, or a single layer to list.
    """
    yield from _named(model.layers if isinstance(model, keras.Model) else [model], "")


def scaled_layers(model: keras.Model) -> list[tuple[str, LayerScaling]]:
    """Pairs of a name and a `LayerScaling`, of the scaled layers in `named_layers`."""
    named = ((name, scaling_of(layer)) for name, layer in named_layers(model))
    return [(name, scaling) for name, scaling in named if scaling is not None]


def owners_of_variables(model: keras.Model) -> dict[int, str]:
    """By `id` of variable, the name of the innermost layer that owns it, as in `named_layers`."""
    return {id(v): name for name, layer in named_layers(model) for v in layer.variables}


def scaled_inside(layer: keras.layers.Layer) -> list[Any]:
    """The scaled layers inside of a layer that is not scaled."""
    if scaling_of(layer) is not None:
        return []
    return [
        each
        for each in parts_of(layer)
        if scaling_of(each) is not None and not isinstance(each, Companion)
    ]


def _named(
    layers: list[keras.layers.Layer], prefix: str
) -> Iterator[tuple[str, keras.layers.Layer]]:
    for layer in layers:
        name = prefix + layer.name
        if isinstance(layer, keras.Model):
            yield from _named(layer.layers, f"{name}/")
        else:
            yield name, layer
            yield from _named(scaled_inside(layer), f"{name}/")
