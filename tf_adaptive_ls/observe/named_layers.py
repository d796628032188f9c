"""The layers of a model under the names that tables, records and messages use."""

import keras

from tf_adaptive_ls.training.keras_internals import parts_of
from tf_adaptive_ls.training.loss_scaled import LossScaled


def named_layers(model):
    """Pairs of a name and a layer, in the order of `model`.

    Models nested in it are gone through in turn, and prefix the names of their layers.
    Any other layer stands for all that is inside it, but is followed by the
    `LossScaled` layers among that.

    Args:
        model: A `keras.Model`, or a layer to list by itself.
    """
    yield from _named(model.layers if isinstance(model, keras.Model) else [model], "")


def scaled_layers(model):
    """Those of `named_layers` that are `LossScaled`."""
    return [(name, layer) for name, layer in named_layers(model) if isinstance(layer, LossScaled)]


def owners_of_variables(model):
    """Names of layers, as in `named_layers`, by `id` of their variables: of the innermost."""
    return {id(v): name for name, layer in named_layers(model) for v in layer.variables}


def scaled_inside(layer):
    """The `LossScaled` layers inside a layer that is not one itself."""
    if isinstance(layer, LossScaled):
        return []
    return [each for each in parts_of(layer) if isinstance(each, LossScaled)]


def _named(layers, prefix):
    for layer in layers:
        name = prefix + layer.name
        if isinstance(layer, keras.Model):
            yield from _named(layer.layers, f"{name}/")
        else:
            yield name, layer
            yield from _named(scaled_inside(layer), f"{name}/")
