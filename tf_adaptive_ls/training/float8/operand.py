"""`Operand`: how one operand of a product is rounded to 8 bits."""

import dataclasses

import keras
from keras import ops

from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.float_format import FloatFormat
from tf_adaptive_ls.numerics.gradient_tap import redirect_gradient
from tf_adaptive_ls.numerics.rounding import fitting_factor, rounded


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand of a product is rounded.

    Attributes:
        float_format: The `FloatFormat` that it is rounded to.
        fits_itself: Whether each tensor is shifted by the power of two that brings its largest
            magnitude to the top of the format. Otherwise it is rounded as it is.
        is_stochastic: Whether it is rounded up or down at random, with the mean exact.
    """

    float_format: FloatFormat
    fits_itself: bool
    is_stochastic: bool = False

    def rounded(self, x, noise=None, cast=False):
        """`x`, rounded; `noise` and `cast` as those of `numerics.rounding.rounded`."""
        factor = None
        if self.fits_itself:
            (peak,) = ops.unstack(spectrum.peaks([x]), 1)
            dtype = keras.backend.standardize_dtype(x.dtype)
            factor = fitting_factor(peak, self.float_format, dtype)
        return rounded(x, self.float_format, noise=noise, factor=factor, cast=cast)

    def straight_through(self, x, cast=False):
        """`x`, rounded; its gradient is that of `x`."""
        x = ops.convert_to_tensor(x, dtype=keras.backend.standardize_dtype(x.dtype))
        return redirect_gradient(self.rounded(x, cast=cast), x)
