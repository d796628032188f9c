"""The unit 2^-84 of scales among weights, and of reports among gradients.

Only trainable weights come to a stateless optimizer on JAX, so scales and reports are among them,
and user code walks over those: it clips weights and gradients, averages, perturbs and penalises
them, and takes norms of all. In a unit of 2**-84 a number is nothing beside any weight or
gradient, and so is its square. With numbers goes one unit itself: it tells by what
they were multiplied since, or that they are not what they were.
"""

import numpy as np
from keras import ops

from tf_adaptive_ls.backend.types import Tensor

UNIT = np.float32(2.0**-84)

NUM_UNITS = 2

# What is larger or smaller is told as that: float16 holds neither.
BOTTOM, TOP = np.float32(2.0**-40), np.float32(2.0**17)

# More than there are calls of a layer in a step, or micro-batches that anybody adds up.
_MOST_CALLS = 1024


def told(parts: list[Tensor], place: int = 0, rest: int = 0) -> Tensor:
    """A float32 vector of the magnitudes of several vectors, to be read by `heard`.

    They are zero, or from `BOTTOM` to `TOP`. Those of several calls, told by vectors of one length,
    add up.

    Args:
        parts: List of vectors.
        place: How many zeros come before what `heard` is to be given.
        rest: How many come after it.
    """
    # One concatenation of all: XLA may compile for hours what concatenates parts of it.
    before, units = np.zeros(place, "float32"), np.ones(NUM_UNITS, "float32")
    magnitudes = ops.abs(ops.concatenate([before, units, *parts, np.zeros(rest, "float32")]))
    magnitudes = ops.where(magnitudes > 0, ops.maximum(magnitudes, BOTTOM), magnitudes)
    return ops.where(magnitudes < TOP, magnitudes, TOP) * UNIT  # NaN is not below anything


def heard(vectors: Tensor) -> Tensor:
    """The sums of magnitudes `[…, n]` in vectors `[…, 2 + n]`, or in sums of such vectors.

    If somebody has multiplied them, as by clipping, by a factor that is none of several calls, it
    is taken back. If somebody has added to them, as noise, or if there was no call, all are zero.
    """
    unit, same_unit = vectors[..., 0], vectors[..., 1]
    calls = unit / UNIT
    finite = unit < np.finfo("float32").max
    is_told = ops.logical_and(ops.equal(unit, same_unit), ops.logical_and(unit > 0, finite))
    added_up = ops.logical_and(calls >= 1, calls <= _MOST_CALLS)
    factor = ops.where(ops.logical_and(is_told, ops.logical_not(added_up)), unit, UNIT)
    magnitudes = vectors[..., NUM_UNITS:] / factor[..., None]
    return ops.where(is_told[..., None], magnitudes, 0.0)
