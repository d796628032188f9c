"""Makes the `LayerFacts` of scaled layers."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tf_adaptive_ls.backend.keras_internals import parts_of
from tf_adaptive_ls.numerics.layer_facts import Flow, LayerFacts, Ownership
from tf_adaptive_ls.training.layer_scaling import LayerScaling


def facts_of(layers: list[Any], weights: list[keras.Variable]) -> LayerFacts:
    """The `LayerFacts` of scaled layers and of all variables that have gradients."""
    return LayerFacts(
        float_formats=[layer.float_format for layer in layers],
        rounded_formats=[layer.operand_format for layer in layers],
        narrow=np.array([layer.is_narrow for layer in layers]),
        answerable=np.array([not layer.called_at_s for layer in layers]),
        ownership=_ownership_of(layers, weights),
        flow=_flow_of(layers),
    )


def _ownership_of(layers: list[Any], weights: list[keras.Variable]) -> Ownership:
    """The `Ownership` of weights by layers."""
    place_of_layer = {id(layer): place for place, layer in enumerate(layers)}
    place_of_weight = {id(weight): place for place, weight in enumerate(weights)}

    def places(
        items: list[keras.Variable | keras.layers.Layer], place_of: dict[int, int]
    ) -> list[int]:
        return [place_of[id(item)] for item in items if id(item) in place_of]

    def others_inside(layer: LayerScaling) -> list[keras.layers.Layer]:
        return [part for part in parts_of(layer.layer) if part is not layer]

    return Ownership.of(
        [places(layer.layer.trainable_variables, place_of_weight) for layer in layers],
        [places(others_inside(layer), place_of_layer) for layer in layers],
        len(weights),
    )


def _flow_of(layers: list[Any]) -> Flow:
    """The `Flow` of gradients between `layers` in their last calls."""
    place_of = {id(layer): place for place, layer in enumerate(layers)}

    def relation(others_of: Callable[..., Any]) -> np.ndarray:
        related = np.zeros((len(layers), len(layers)), bool)
        for place, layer in enumerate(layers):
            related[place, [place_of[id(o)] for o in others_of(layer) if id(o) in place_of]] = True
        return related

    passes_from = relation(lambda layer: layer.last_call.passes_from)
    passes_with = relation(lambda layer: set(layer.last_call.passes_with) - {layer})
    call_order = np.array([layer.last_call.at for layer in layers])
    return Flow(call_order, passes_from, np.logical_or(passes_from, passes_with))
