"""The unit 2^-84 of scales among weights, and of reports among gradients.

On JAX, a stateless optimizer only receives trainable weights, so scales and reports are among them.
User code processes all weights: it clips, averages, perturbs and penalizes weights and gradients,
and takes norms. In a unit of 2**-84, scales and reports are negligible in any such sum, and so are
their squares. One extra element holds the unit itself. It shows by which factor the vector was
multiplied since, or that the vector is no longer valid.
"""

import numpy as np
from keras import ops

from tf_adaptive_ls.backend.types import Tensor

UNIT = np.float32(2.0**-84)

NUM_UNITS = 2

# Magnitudes outside of these limits are clipped; float16 represents neither of the limits.
BOTTOM, TOP = np.float32(2.0**-40), np.float32(2.0**17)

# More than a layer has calls in a step, and more than the number of micro-batches that anyone
# accumulates.
_MOST_CALLS = 1024


def encoded(parts: list[Tensor], place: int = 0, rest: int = 0) -> Tensor:
    """A float32 vector of the magnitudes of several vectors, to be read by `decoded`.

    Magnitudes are zero, or from `BOTTOM` to `TOP`. Vectors of the same length from several calls
    can be added.

    Args:
        parts: List of vectors.
        place: Number of zeros before the magnitudes.
        rest: Number of zeros after them.
    """
    # One concatenation for all parts: XLA may need hours to compile nested ones.
    before, units = np.zeros(place, "float32"), np.ones(NUM_UNITS, "float32")
    magnitudes = ops.abs(ops.concatenate([before, units, *parts, np.zeros(rest, "float32")]))
    magnitudes = ops.where(magnitudes > 0, ops.maximum(magnitudes, BOTTOM), magnitudes)
    return ops.where(magnitudes < TOP, magnitudes, TOP) * UNIT  # false for NaN


def decoded(vectors: Tensor) -> Tensor:
    """The sums of magnitudes `[…, n]` from vectors `[…, 2 + n]`, or from sums of such vectors.

    A factor by which the vectors were multiplied, for example by clipping, is divided out, except
    factors that several calls explain. If something was added to the vectors, such as noise, or if
    there was no call, all magnitudes are zero.
    """
    unit, same_unit = vectors[..., 0], vectors[..., 1]
    calls = unit / UNIT
    finite = unit < np.finfo("float32").max
    is_told = ops.logical_and(ops.equal(unit, same_unit), ops.logical_and(unit > 0, finite))
    added_up = ops.logical_and(calls >= 1, calls <= _MOST_CALLS)
    factor = ops.where(ops.logical_and(is_told, ops.logical_not(added_up)), unit, UNIT)
    magnitudes = vectors[..., NUM_UNITS:] / factor[..., None]
    return ops.where(is_told[..., None], magnitudes, 0.0)
