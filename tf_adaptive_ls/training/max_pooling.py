"""Max pooling that saves the position of the maximum, one byte per window.

The gradient of a window goes to this position alone, so it is exact. If the inputs were saved
in 8 bits, many of them would be equal, and the gradient would go to other positions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import layers, ops

from tf_adaptive_ls.backend import autodiff
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.training.saved_bytes import note_saved

_KINDS = (layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D)
_LARGEST_WINDOW = 16


def saves_positions(layer: keras.layers.Layer) -> bool:
    """Whether a layer is max pooling whose windows do not overlap."""
    return (
        type(layer) in _KINDS
        and tuple(layer.strides) == tuple(layer.pool_size)
        and math.prod(layer.pool_size) <= _LARGEST_WINDOW
    )


def pool(layer: keras.layers.Layer, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The outputs of a max pooling that saves positions for its backward pass.

    Args:
        layer: A layer for which `saves_positions` is true.
        call: Its `call`.
        x: Its inputs, a tensor.
    """
    size, dtype = tuple(x.shape[1:]), x.dtype
    if None in size:
        return call(x)
    places = ops.cast(ops.arange(math.prod(layer.pool_size)), "uint8")

    def function(constants: Sequence[Tensor], x: Tensor) -> Any:
        largest = _first_largest(_windows(layer, x))
        note_saved(layer, [largest])

        def backward(gradient: Tensor) -> list[Tensor]:
            is_largest = ops.equal(ops.expand_dims(largest, -1), places)
            wide = ops.expand_dims(gradient, -1)
            of_windows = ops.where(is_largest, wide, ops.zeros_like(wide))
            any_inputs = ops.zeros((ops.shape(gradient)[0], *size), dtype)
            return [autodiff.pulled_back(lambda x: _windows(layer, x), any_inputs, of_windows)]

        return call(x), backward

    return autodiff.custom_gradient(function)(x)


def _first_largest(windows: Tensor) -> Tensor:
    """The index of the largest number along the last axis, the first of several, as uint8."""
    # XLA would save the result of an `argmax` in 32 bits.
    largest = windows[..., 0]
    place = ops.zeros(ops.shape(largest), "uint8")
    for at in range(1, windows.shape[-1]):
        is_larger = windows[..., at] > largest
        largest = ops.where(is_larger, windows[..., at], largest)
        place = ops.where(is_larger, ops.cast(at, "uint8"), place)
    return place


def _windows(layer: keras.layers.Layer, x: Tensor) -> Tensor:
    """The windows of the inputs: the shape of the outputs, and a last axis along the window."""
    first = 1 if layer.data_format == "channels_last" else 2
    shape, margins, cuts = list(x.shape), [(0, 0)] * len(x.shape), [slice(None)] * len(x.shape)
    split: list[int] = []
    behind: list[int] = []
    for axis, size in enumerate(shape):
        place = axis - first
        if not 0 <= place < len(layer.pool_size):
            split.append(-1 if axis == 0 else size)
            continue
        width = layer.pool_size[place]
        if layer.padding == "same":
            count = -(-size // width)
            before = (count * width - size) // 2
            margins[axis] = before, count * width - size - before
        else:
            count = size // width
            cuts[axis] = slice(count * width)
        behind.append(len(split) + 1)
        split += [count, width]
    x = x[tuple(cuts)]
    if any(map(any, margins)):
        x = ops.pad(x, margins, constant_values=-math.inf)
    in_front = [axis for axis in range(len(split)) if axis not in behind]
    x = ops.transpose(ops.reshape(x, split), in_front + behind)
    return ops.reshape(x, [split[axis] for axis in in_front] + [math.prod(layer.pool_size)])
