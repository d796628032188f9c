"""Chooses the layers of a model that compute in float8."""

from collections.abc import Collection, Iterator

import keras

from tf_adaptive_ls.backend.keras_internals import graph_of, nodes_of
from tf_adaptive_ls.backend.layer_filter import with_path
from tf_adaptive_ls.models.walk import is_walked, layers_inside
from tf_adaptive_ls.training.float8.products import products_in
from tf_adaptive_ls.training.float8.settings import Float8, check_is_float8


def float8_layers(model: keras.Model, float8: Float8) -> set[int]:
    """The `id` of each layer of a model that computes in float8.

    Raises:
        ValueError: If there is no such layer, or if `float8` is not a `Float8`.
    """
    check_is_float8(float8)
    candidates = list(_with_products(model, ""))
    if float8.layer_filter is None:
        # As in Mellempudi et al. 2019: the first and last layer need more precision.
        candidates = candidates[1:-1]
    wants = with_path(float8.layer_filter)
    chosen = {id(layer) for layer, path in candidates if wants(layer, path)}
    if not chosen:
        raise ValueError(
            "Expected a model with layers to compute in float8: Dense, EinsumDense or convolution "
            f"layers, or layers that contain them. Received: model '{model.name}', in which "
            + (
                "there are none but the first and the last. Choose those with `layer_filter`."
                if float8.layer_filter is None
                else "`layer_filter` chooses none."
            )
        )
    return chosen


def _with_products(
    model: keras.layers.Layer, prefix: str
) -> Collection[tuple[keras.layers.Layer, str]]:
    """The layers that have matmuls, with their paths, once each, in the order of their calls."""
    found: dict[int, tuple[keras.layers.Layer, str]] = {}
    for layer in _in_order(model):
        path = prefix + layer.name
        if is_walked(layer):
            for each, at in _with_products(layer, f"{path}/"):
                found.setdefault(id(each), (each, at))
        elif products_in(layer):
            found.setdefault(id(layer), (layer, path))
    return found.values()


def _in_order(model: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """The layers of a model in the order of their calls, or as created if there is no graph."""
    graph = graph_of(model)
    if graph is None:
        yield from layers_inside(model)
        return
    for node in nodes_of(graph):
        if isinstance(node.operation, keras.layers.Layer):
            yield node.operation
