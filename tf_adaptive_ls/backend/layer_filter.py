"""The `layer_filter` argument: functions by which users choose layers."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import keras

LayerFilter: TypeAlias = (
    Callable[[keras.layers.Layer], bool] | Callable[[keras.layers.Layer, str], bool]
)


def with_path(
    layer_filter: Callable[..., bool] | None,
) -> Callable[[keras.layers.Layer, str], bool]:
    """A layer filter as a function of a layer and its path. `None` selects every layer."""
    if layer_filter is None:
        return lambda layer, path: True
    try:
        parameters = [*inspect.signature(layer_filter).parameters.values()]
    except ValueError:  # some callables written in C have no signature
        parameters = []
    required = [each for each in parameters if each.default is each.empty]
    if len(required) == 2:
        return layer_filter

    def of_layer(layer: keras.layers.Layer, path: str) -> bool:
        try:
            return layer_filter(layer)
        except TypeError as error:
            raise ValueError(
                "Expected `layer_filter` to be a function that takes a layer, or a layer and its "
                f"path. Received: layer_filter={layer_filter!r}, which for '{path}' raises: {error}"
            ) from error

    return of_layer


def check_layer_filter(layer_filter: Any, what: str) -> None:
    """Raises a `ValueError` unless the argument is `None` or a function."""
    if layer_filter is not None and not callable(layer_filter):
        raise ValueError(
            "Expected `layer_filter` to be a function that takes a layer and returns "
            f"whether to {what} it. Received: layer_filter={layer_filter!r}."
        )
