"""`Operand`: quantizes one operand of a matmul, as a whole or by blocks."""

import dataclasses
import math
from typing import Any, NamedTuple

import keras
from keras import ops

from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.float_format import FloatFormat
from tf_adaptive_ls.numerics.gradient_tap import redirect_gradient
from tf_adaptive_ls.numerics.rounding import fitting_factor, rounded


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand of a matmul is quantized.

    Attributes:
        float_format: The `FloatFormat`.
        fits_itself: Whether each tensor is scaled by the power of two that brings its amax to the
            top of the format. Otherwise it is quantized without a scale.
        is_stochastic: Whether rounding is stochastic, with an exact mean.
        block_size: How many numbers share a power-of-two scale, instead of a whole tensor.
    """

    float_format: FloatFormat
    fits_itself: bool
    is_stochastic: bool = False
    block_size: int | None = None

    def rounded(self, x: Tensor, noise: Tensor | None = None, cast: bool = False) -> Tensor:
        """Quantizes `x`. `noise` and `cast` are as in `numerics.rounding.rounded`."""
        factor = None
        if self.fits_itself:
            (peak,) = ops.unstack(spectrum.peaks([x]), 1)
            factor = self._factor(peak, x)
        return rounded(x, self.float_format, noise=noise, factor=factor, cast=cast)

    def rounded_along(self, x: Tensor, axes: "Axes", noise: Tensor | None = None) -> Tensor:
        """Quantizes `x` in blocks along `axes`. `noise` is as in `rounded`."""
        assert self.block_size is not None
        blocks = _Blocks(axes, self.block_size)
        cut = blocks.cut(x)
        peaks = ops.cast(ops.max(ops.abs(cut), axis=-1, keepdims=True), "float32")
        noise = None if noise is None else blocks.cut(noise)
        factor = self._factor(peaks, x)
        return blocks.joined(rounded(cut, self.float_format, noise=noise, factor=factor), x)

    def _factor(self, peaks: Tensor, x: Tensor) -> Tensor:
        return fitting_factor(peaks, self.float_format, keras.backend.standardize_dtype(x.dtype))

    def straight_through(self, x: Any, cast: bool = False) -> Tensor:
        """Quantizes `x` with a straight-through gradient."""
        x = tensor_of(x)
        return redirect_gradient(self.rounded(x, cast=cast), x)


def tensor_of(x: Any) -> Tensor:
    """A tensor as it is, or the value of a variable in its autocast dtype."""
    return ops.convert_to_tensor(x, dtype=keras.backend.standardize_dtype(x.dtype))


class Axes(NamedTuple):
    """Some axes of a tensor.

    Attributes:
        shape: The shape to give the tensor first: a tuple of ints, and of scalar tensors for sizes
            that are known only at run time.
        axes: Indices of the axes, in order.
    """

    shape: tuple[Any, ...]
    axes: tuple[int, ...]


class _Blocks:
    """Cuts the numbers along some axes of a tensor into blocks, `[…, blocks, size]`."""

    def __init__(self, axes: Axes, size: int) -> None:
        self._shape = axes.shape
        others = [axis for axis in range(len(axes.shape)) if axis not in axes.axes]
        self._order = (*others, *axes.axes)
        self._others = tuple(axes.shape[axis] for axis in others)
        self._length = math.prod(axes.shape[axis] for axis in axes.axes)
        # Fewer numbers than a block need no padding.
        known = isinstance(self._length, int)
        self._size = max(1, min(size, self._length)) if known else size

    def cut(self, x: Tensor) -> Tensor:
        """`x` in blocks. The last block is padded with zeros."""
        x = ops.transpose(ops.reshape(x, self._shape), self._order)
        x = ops.reshape(x, (*self._others, self._length))
        missing = -self._length % self._size
        if not (isinstance(missing, int) and missing == 0):
            x = ops.concatenate([x, ops.zeros((*self._others, missing), x.dtype)], axis=-1)
        number = (self._length + missing) // self._size
        return ops.reshape(x, (*self._others, number, self._size))

    def joined(self, blocks: Tensor, like: Tensor) -> Tensor:
        """Undoes `cut`. The result has the shape of `like`."""
        filled = self._length + -self._length % self._size
        x = ops.reshape(blocks, (*self._others, filled))[..., : self._length]
        x = ops.reshape(x, tuple(self._shape[axis] for axis in self._order))
        inverse = sorted(range(len(self._order)), key=self._order.__getitem__)
        return ops.reshape(ops.transpose(x, inverse), ops.shape(like))
