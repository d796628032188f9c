"""Counts the bytes that layers save in 8 bits for the backward pass."""

import math
import weakref
from collections.abc import Sequence

import keras

from tf_adaptive_ls.backend.types import Tensor

_noted: weakref.WeakKeyDictionary[keras.layers.Layer, int] = weakref.WeakKeyDictionary()


def note_saved(layer: keras.layers.Layer, kept: Sequence[Tensor]) -> None:
    """Records what the last call of a layer has saved.

    Args:
        layer: The layer.
        kept: List of uint8 tensors of shape `[examples, ...]`.
    """
    shapes = [tuple(tensor.shape)[1:] for tensor in kept]
    if any(None in shape for shape in shapes):
        _noted.pop(layer, None)
    else:
        _noted[layer] = sum(map(math.prod, shapes))


def forget_saved(layer: keras.layers.Layer) -> None:
    """Deletes the record of a layer."""
    _noted.pop(layer, None)


def saved_bytes(layer: keras.layers.Layer) -> int | None:
    """Bytes per example that the last call of a layer saved. `None` if not known."""
    return _noted.get(layer)
