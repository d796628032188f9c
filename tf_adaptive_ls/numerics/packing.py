"""Packs numbers into 8 bits: float8_e5m2, the upper byte of float16.

The format has the range of float16, so it needs no scale, and two bits after the leading bit. Bytes
are stored as integers, which every device and compiler supports.
"""

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls.backend import arrays
from tf_adaptive_ls.backend.types import Tensor

FORMAT = "float8_e5m2"

# Bits of float16 without the sign: infinity, the largest and the smallest number that packing
# keeps, and a NaN.
_INFINITY, _LARGEST, _SMALLEST, _NAN = 0x7C00, 0x7B00, 0x0100, 0x7E00


def packed(x: Tensor) -> Tensor:
    """Rounds to the nearest float8_e5m2 numbers, ties to even.

    Numbers above 57344 saturate; non-zero numbers do not become zero. Infinities and NaN are kept.

    Args:
        x: Floating-point tensor.

    Returns:
        Uint8 tensor of the shape of `x`.
    """
    bits = ops.cast(arrays.bitcast(_as_float16(x), "uint16"), "int32")
    sign, size = ops.bitwise_and(bits, 0x8000), ops.bitwise_and(bits, 0x7FFF)
    last = ops.bitwise_and(ops.right_shift(size, 8), 1)
    nearest = ops.bitwise_and(size + 0x7F + last, 0xFF00)
    nearest = ops.clip(nearest, ops.where(size > 0, _SMALLEST, 0), _LARGEST)
    nearest = ops.where(size >= _INFINITY, ops.where(size > _INFINITY, _NAN, _INFINITY), nearest)
    return ops.cast(ops.right_shift(ops.bitwise_or(sign, nearest), 8), "uint8")


def unpacked(bits: Tensor, dtype: str) -> Tensor:
    """The inverse of `packed`.

    Args:
        bits: Uint8 tensor.
        dtype: Dtype of the result.
    """
    wide = ops.left_shift(ops.cast(bits, "int32"), 8)
    return ops.cast(arrays.bitcast(ops.cast(wide, "uint16"), "float16"), dtype)


def _as_float16(x: Tensor) -> Tensor:
    if keras.backend.standardize_dtype(x.dtype) == "float16":
        return x
    largest = np.float32(np.finfo("float16").max)
    wide = ops.cast(x, "float32")
    held = ops.clip(wide, -largest, largest)
    # Only zero becomes zero.
    least = np.float32(np.finfo("float16").smallest_subnormal)
    held = ops.where(ops.abs(held) < least, ops.sign(held) * least, held)
    return ops.cast(ops.where(ops.isfinite(wide), held, wide), "float16")
