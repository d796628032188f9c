"""The names of layers in tables, records and messages."""

from collections.abc import Iterator
from typing import Any

import keras

from tf_adaptive_ls.backend.keras_internals import parts_of
from tf_adaptive_ls.training.companion import Companion, scaling_of
from tf_adaptive_ls.training.layer_scaling import LayerScaling


def named_layers(model: keras.Model) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Pairs of a name and a layer, in the order of `model`.

    Models nested in it are gone through in turn, and prefix the names of their layers.
    Any other layer stands for all that is inside it, but is followed by the layers among that
    which have a scale, if it has none itself.

    Args:
        model: A `keras.Model`, or a layer to list by itself.
    """
    yield from _named(model.layers if isinstance(model, keras.Model) else [model], "")


def scaled_layers(model: keras.Model) -> list[tuple[str, LayerScaling]]:
    """Pairs of a name and a `LayerScaling`, of those of `named_layers` that have one."""
    named = ((name, scaling_of(layer)) for name, layer in named_layers(model))
    return [(name, scaling) for name, scaling in named if scaling is not None]


def owners_of_variables(model: keras.Model) -> dict[int, str]:
    """Names of layers, as in `named_layers`, by `id` of their variables: of the innermost."""
    return {id(v): name for name, layer in named_layers(model) for v in layer.variables}


def scaled_inside(layer: keras.layers.Layer) -> list[Any]:
    """The layers with a scale inside one that has none itself."""
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
