"""The state of one scaled layer: a float32 array `[rows, bins]`.

It is a single array because it is a single weight with
`overwrite_with_gradient=True`: a *report* of what the backward pass saw comes out
of it as the weight's "gradient", and the optimizer puts the next state in its
place. Reports add up. An optimizer that knows nothing of this stores the report
itself; its header is zero, which reads as scale 2**0 and is as correct as any.
"""

import enum

import numpy as np
from keras import ops

from tf_adaptive_ls import spectrum
from tf_adaptive_ls.float_format import FloatFormat

# The scale keeps gradients inside this format. A layer that computes in a wider
# one is measured against it too: its neighbours may be writing float16, and in
# float32 any scale gives the same result.
FORMAT = FloatFormat("float16")

# Bound of log2 scales, of layers and of the loss alike, either way. The largest
# shift between two layers is then 2**120, which float32 holds.
MAX_LOG2_SCALE = 60


class Row(enum.IntEnum):
    """What each row of a state holds."""

    HEADER = 0
    ARRIVED = 1  # sample of the gradients that arrived at the outputs, at scale S
    ARRIVED_PEAK = 2  # the largest of each; non-finite arrivals at any scale
    PRODUCED = 3  # sample of the input and weight gradients, at scale S * 2**r
    PRODUCED_PEAK = 4  # the largest of each, and of the gradients they came from


# Columns of Row.HEADER.
LOG2_SCALE = 0
MEASURE = 1

NUM_BINS = spectrum.num_bins(FORMAT)
SHAPE = (len(Row), NUM_BINS)

_NONFINITE_BIN = np.zeros(NUM_BINS, "float32")
_NONFINITE_BIN[spectrum.NONFINITE] = 1.0


def initial(shape=SHAPE, dtype="float32"):
    """A state of scale 2**0 that asks to be measured at once: an initializer."""
    state = np.zeros(shape, dtype)
    state[Row.HEADER, MEASURE] = 1.0
    return ops.convert_to_tensor(state)


def header(log2_scales, measure):
    """Row.HEADER of several states, `[layers, 1, bins]`, to concatenate with the rest.

    Args:
        log2_scales: Tensor `[layers]`.
        measure: Scalar tensor, 1 to measure the next step and 0 not to.
    """
    zero = ops.zeros_like(log2_scales)
    columns = {LOG2_SCALE: log2_scales, MEASURE: zero + measure}
    row = ops.stack([columns.get(i, zero) for i in range(NUM_BINS)], axis=1)
    return row[:, None]


def report(measure, *, arrived=(), passing=(), produced=(), origin=()):
    """What a backward pass has to tell.

    That a gradient is not finite is told on every step, spectra only when asked
    for, behind a real conditional.

    Args:
        measure: Boolean scalar tensor: whether to take spectra.
        arrived: Output gradients as they arrived, at scale S.
        passing: The same, at a scale that a plan chose.
        produced: Input and weight gradients, at scale S * 2**r.
        origin: The gradients that `produced` were computed from, at S * 2**r.

    Returns:
        A state-shaped tensor with a header of zeros.
    """
    # Gradients of embeddings may be sparse (`tf.IndexedSlices`): their `values`.
    produced = [getattr(gradient, "values", gradient) for gradient in produced]

    def spectra():
        return ops.stack(
            [
                _sampled(arrived),
                _peaks(arrived),
                _sampled(produced),
                _peaks([*produced, *origin]),
            ]
        )

    def nothing():
        return ops.zeros((len(Row) - 1, NUM_BINS))

    nowhere = np.zeros(NUM_BINS, "float32")
    faults = ops.stack(
        [
            nowhere,
            _count_nonfinite([*arrived, *passing]) * _NONFINITE_BIN,
            nowhere,
            _count_nonfinite(produced) * _NONFINITE_BIN,
        ]
    )
    rows = ops.cond(measure, spectra, nothing) + faults
    return ops.concatenate([ops.zeros((1, NUM_BINS)), rows], axis=0)


def _sampled(gradients):
    if not gradients:
        return ops.zeros((NUM_BINS,))
    values = ops.concatenate([spectrum.magnitudes(spectrum.sample(g)) for g in gradients])
    return spectrum.spectrum(values, FORMAT)


def _peaks(gradients):
    if not gradients:
        return ops.zeros((NUM_BINS,))
    return spectrum.spectrum(ops.stack([spectrum.peak(g) for g in gradients]), FORMAT)


def _count_nonfinite(gradients):
    return sum((spectrum.has_nonfinite(g) for g in gradients), ops.zeros(()))
