"""Rounding to a float8 format, to 16 bits, and to integers.

It uses integer operations on bits, because XLA on a GPU may remove a chain of casts, and the casts
of TensorFlow and JAX neither saturate nor round stochastically.
"""

import numpy as np
from keras import ops

from tf_adaptive_ls.backend import arrays
from tf_adaptive_ls.backend.arrays import power_of_two
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.float_format import FloatFormat

# Random bits per number. The last bit of a float16 number is at least 2**-15 of the last bit in any
# float8 format, so the mean over all random bits is exactly the float16 number.
NOISE_BITS = 16

# Bound of log2 of a factor, so that the inverse is also a normal float32 number.
_MAX_LOG2_FACTOR = 100

_FLOAT32 = np.finfo(np.float32)
_MAGNITUDE = np.int32(np.iinfo(np.int32).max)
_BIAS = _FLOAT32.maxexp - 1


def rounded(
    x: Tensor,
    float_format: FloatFormat,
    *,
    noise: Tensor | None = None,
    factor: Tensor | None = None,
    cast: bool = False,
) -> Tensor:
    """Rounds to the nearest numbers of a float8 format, in the dtype of `x`.

    Ties go to even, as in IEEE 754. Values that are too large saturate. Infinities and NaN are
    kept, even if the format has none.

    Args:
        x: Tensor of float16, bfloat16 or float32.
        float_format: A `FloatFormat` of 8 bits.
        noise: Int32 tensor of the shape of `x`, random integers in [0, 2**16), for stochastic
            rounding: the mean over all values of `noise` is `x`.
        factor: Float32 tensor of powers of two that broadcasts to `x`: `x * factor` is rounded, and
            divided by it again.
        cast: Whether to cast to the float8 dtype and back, which changes no number. XLA recognizes
            a matmul of two such tensors as a float8 matmul, if the device has it. Infinities become
            NaN if the format has no infinity.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    wide = ops.cast(x, "float32")
    if factor is not None:
        wide = wide * factor
    bits = arrays.bitcast(wide, "int32")
    magnitude = ops.bitwise_and(bits, _MAGNITUDE)
    size = arrays.bitcast(magnitude, "float32")

    # For normal numbers of the format: drop this many bits of float32.
    dropped = _FLOAT32.nmant - float_format.mantissa_bits
    if noise is None:
        last = ops.bitwise_and(ops.right_shift(magnitude, dropped), np.int32(1))
        up = last + np.int32(2 ** (dropped - 1) - 1)
    else:
        up = ops.left_shift(noise, dropped - NOISE_BITS)
    normal = ops.bitwise_and(magnitude + up, np.int32(-(2**dropped)))
    # For subnormal numbers of the format, which have a fixed point.
    steps = size * np.float32(2.0**-float_format.min_exponent)
    if noise is None:
        steps = ops.round(steps)
    else:
        steps = ops.floor(steps + ops.cast(noise, "float32") * np.float32(2.0**-NOISE_BITS))
    subnormal = steps * np.float32(2.0**float_format.min_exponent)

    result = ops.where(
        size < np.float32(float_format.smallest_normal),
        subnormal,
        ops.minimum(arrays.bitcast(normal, "float32"), np.float32(float_format.largest)),
    )
    sign = ops.bitwise_and(bits, np.int32(~_MAGNITUDE))
    result = arrays.bitcast(ops.bitwise_or(arrays.bitcast(result, "int32"), sign), "float32")
    result = ops.where(size <= _FLOAT32.max, result, wide)
    if cast:
        # The pattern that XLA looks for: a cast back, followed only by a multiplication by a
        # scalar.
        narrow = ops.cast(ops.cast(result, x.dtype), float_format.name)
        result = ops.cast(narrow, x.dtype)
        return result if factor is None else result * ops.cast(1 / factor, x.dtype)
    if factor is not None:
        result = arrays.divide_by_power_of_two(result, factor)
    return ops.cast(result, x.dtype)


# Random bits per number in `rounded_to_16_bits` and `rounded_to_integers`.
NOISE_BITS_OF_16 = 31


def rounded_to_16_bits(x: Tensor, dtype: str, noise: Tensor) -> Tensor:
    """Rounds stochastically to one of the two neighbors in a 16-bit format.

    The mean over all values of `noise` is `x`, exactly if `x` is a multiple of 2**-31 of the
    distance between the neighbors. That is the case for every float32 number with bfloat16, and
    with float16 for numbers of at least 2**-32; for smaller numbers, bits below 2**-55 are dropped.
    Values that are too large saturate. Infinities and NaN are kept.

    Args:
        x: Float32 tensor.
        dtype: "float16" or "bfloat16".
        noise: Int32 tensor of the shape of `x`, random integers in [0, 2**31).

    Returns:
        Tensor of the shape of `x`, of that dtype.

    Reference: Gupta, Agrawal, Gopalakrishnan, Narayanan, "Deep Learning with Limited Numerical
    Precision", 2015 (arXiv 1502.02551).
    """
    float_format = FloatFormat(dtype)
    bits = arrays.bitcast(x, "int32")
    magnitude = ops.bitwise_and(bits, _MAGNITUDE)
    size = arrays.bitcast(magnitude, "float32")

    # For normal numbers of the format: drop this many bits of float32.
    dropped = _FLOAT32.nmant - float_format.mantissa_bits
    low = ops.bitwise_and(magnitude, np.int32(-(2**dropped)))
    chance = ops.left_shift(magnitude - low, NOISE_BITS_OF_16 - dropped)
    normal = low + ops.where(noise < chance, np.int32(2**dropped), np.int32(0))
    result = arrays.bitcast(normal, "float32")

    # for subnormal numbers, which have a fixed point
    if float_format.smallest_normal > _FLOAT32.tiny:
        steps = size * np.float32(2.0**-float_format.min_exponent)
        below = ops.floor(steps)
        chance = ops.cast((steps - below) * np.float32(2.0**NOISE_BITS_OF_16), "int32")
        steps = below + ops.cast(noise < chance, "float32")
        subnormal = steps * np.float32(2.0**float_format.min_exponent)
        result = ops.where(size < np.float32(float_format.smallest_normal), subnormal, result)

    result = ops.minimum(result, np.float32(float_format.largest))
    sign = ops.bitwise_and(bits, np.int32(~_MAGNITUDE))
    result = arrays.bitcast(ops.bitwise_or(arrays.bitcast(result, "int32"), sign), "float32")
    return ops.cast(ops.where(size <= _FLOAT32.max, result, x), dtype)


def rounded_to_integers(x: Tensor, bits: int, noise: Tensor) -> Tensor:
    """Rounds stochastically to one of the two neighboring integers; saturates at `bits` bits.

    The mean over all values of `noise` is `x`, exactly if `x` is a multiple of 2**-31 and within
    the range of the integers. NaN becomes 0.

    Args:
        x: Float32 tensor.
        bits: An int in 2 … 16. Integers are from -2**(bits - 1) to 2**(bits - 1) - 1.
        noise: Int32 tensor of the shape of `x`, random integers in [0, 2**31).

    Returns:
        Int32 tensor of the shape of `x`.
    """
    largest = 2 ** (bits - 1)
    size = ops.minimum(ops.abs(x), np.float32(largest))
    below = ops.floor(size)
    chance = ops.cast((size - below) * np.float32(2.0**NOISE_BITS_OF_16), "int32")
    whole = ops.cast(below, "int32") + ops.cast(noise < chance, "int32")
    whole = ops.where(x < 0, -whole, whole)
    whole = ops.clip(whole, np.int32(-largest), np.int32(largest - 1))
    return ops.where(ops.isnan(x), np.int32(0), whole)


def fitting_factor(peak: Tensor, float_format: FloatFormat, dtype: str = "float32") -> Tensor:
    """The largest power of two by which `peak` can be multiplied without exceeding a float8 format.

    Args:
        peak: Float32 tensor of magnitudes.
        float_format: A `FloatFormat` of 8 bits.
        dtype: Name of a dtype that must be able to represent the inverse of the factor. With the
            largest factors left out, all float16 numbers are still normal float8 numbers.

    Returns:
        Float32 tensor of the shape of `peak`; 1 where `peak` is zero or not finite.
    """
    bits = arrays.bitcast(peak, "int32")
    exponent = ops.right_shift(bits, _FLOAT32.nmant) - _BIAS
    mantissa = ops.bitwise_and(bits, np.int32(2**_FLOAT32.nmant - 1))
    largest = np.float32(float_format.largest).view(np.int32) & (2**_FLOAT32.nmant - 1)
    beyond = ops.cast(mantissa > np.int32(largest), "int32")
    most = min(_MAX_LOG2_FACTOR, -FloatFormat(dtype).min_exponent)
    log2_factor = ops.clip(float_format.max_exponent - beyond - exponent, -_MAX_LOG2_FACTOR, most)
    usable = ops.logical_and(peak > 0, peak <= _FLOAT32.max)
    return power_of_two(ops.where(usable, log2_factor, ops.zeros_like(log2_factor)))
