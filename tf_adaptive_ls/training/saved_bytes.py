"""Counts the bytes that layers save in 8 bits for the backward pass."""

import math
import weakref
from collections.abc import Sequence

import keras

from tf_adaptive_ls.backend.types import Tensor

_noted: weakref.WeakKeyDictionary[keras.layers.Layer, int] = weakref.WeakKeyDictionary()


def note_saved(layer: keras.layers.Layer, kept: Sequence[Tensor]) -> None:
    """Notes what the last call of a layer keeps.

    Args:
        layer: The layer.
        kept: List of uint8 tensors of any shape whose first axis is that of examples.
    """
    shapes = [tuple(tensor.shape)[1:] for tensor in kept]
    if any(None in shape for shape in shapes):
        _noted.pop(layer, None)
    else:
        _noted[layer] = sum(map(math.prod, shapes))


def forget_saved(layer: keras.layers.Layer) -> None:
    """From now on nothing is known of a layer."""
    _noted.pop(layer, None)


def saved_bytes(layer: keras.layers.Layer) -> int | None:
    """How many bytes of each example the last call of a layer keeps, `None` if it is not known."""
    return _noted.get(layer)
