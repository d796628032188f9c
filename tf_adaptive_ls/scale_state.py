"""The state of one scaled layer: a float32 array `[rows, bins]`.

It is a single array because it is a single weight with
`overwrite_with_gradient=True`: a *report* of what the backward pass saw comes out
of it as the weight's "gradient", and the optimizer puts the next state in its
place. Reports add up. An optimizer that knows nothing of this stores the report
itself; its header is zero, which reads as scale 2**0 and is as correct as any.

The largest magnitude of each gradient is reported on every step: to find it costs
no more than to find out whether all are finite, and it is what overflows. Samples
cost more, and the tails that they show change slowly.
"""

import enum

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls import spectrum
from tf_adaptive_ls.float_format import FloatFormat
from tf_adaptive_ls.scale_rules import NOTHING_SEEN

# The scale keeps gradients inside this format.
FORMAT = FloatFormat("float16")

# Bound of log2 scales, of layers and of the loss alike, either way. The largest
# shift between two layers is then 2**120, which float32 holds.
MAX_LOG2_SCALE = 60


class Row(enum.IntEnum):
    """What each row of a state holds."""

    HEADER = 0
    ARRIVED = 1  # sample of the gradients that arrived at the outputs, at scale S
    ARRIVED_PEAK = 2  # the largest of each, zeros left out; any that is not finite
    PRODUCED = 3  # sample of the input and weight gradients, at scale S * 2**r
    PRODUCED_PEAK = 4  # the largest of each; of what they came from, zeros left out


# Columns of Row.HEADER.
LOG2_SCALE = 0
MEASURE = 1
MEMORY = 2  # and all after it: what the rule remembers

MAX_MEMORY_SIZE = 40

NUM_BINS = spectrum.num_bins(FORMAT)
SHAPE = (len(Row), NUM_BINS)

_NONFINITE_BIN = np.zeros(NUM_BINS, "float32")
_NONFINITE_BIN[spectrum.NONFINITE] = 1.0

# An output that nothing uses sends zeros back on purpose.
_NONZERO_BINS = np.ones(NUM_BINS, "float32")
_NONZERO_BINS[spectrum.ZERO] = 0.0


def initial(shape=SHAPE, dtype="float32"):
    """A state of scale 2**0 that asks to be measured at once: an initializer."""
    state = np.zeros(shape, dtype)
    state[Row.HEADER, MEASURE] = 1.0
    state[Row.HEADER, MEMORY:] = NOTHING_SEEN
    return ops.convert_to_tensor(state)


def header(log2_scales, measure, memory):
    """Row.HEADER of several states, `[layers, 1, bins]`, to concatenate with the rest.

    Args:
        log2_scales: Tensor `[layers]`.
        measure: Scalar tensor, 1 to measure the next step and 0 not to.
        memory: Tensor `[layers, n]`.
    """
    columns = [log2_scales[:, None], ops.zeros_like(log2_scales)[:, None] + measure, memory]
    row = ops.concatenate(columns, axis=1)
    return ops.pad(row, ((0, 0), (0, NUM_BINS - row.shape[1])))[:, None]


def report(measure, *, arrived=(), passing=(), produced=(), unlimited=(), origin=()):
    """What a backward pass has to tell.

    The largest magnitude of each gradient is told on every step, samples only when
    asked for, behind a real conditional.

    Args:
        measure: Boolean scalar tensor: whether to take samples.
        arrived: Output gradients as they arrived, at scale S.
        passing: The same, but at a scale that a plan chose, or not in `FORMAT`.
        produced: Input and weight gradients, at scale S * 2**r, that are written in
            `FORMAT`.
        unlimited: The same, but that are not.
        origin: The gradients that `produced` were computed from, at S * 2**r.

    Returns:
        A state-shaped tensor with a header of zeros.
    """
    # Gradients of embeddings may be sparse (`tf.IndexedSlices`): their `values`.
    produced, unlimited = (
        [getattr(gradient, "values", gradient) for gradient in gradients]
        for gradients in (produced, unlimited)
    )

    def samples():
        return ops.stack([_sampled(arrived), _sampled(produced)])

    def no_samples():
        return ops.zeros((2, NUM_BINS))

    of_arrived, of_produced = ops.unstack(ops.cond(measure, samples, no_samples), num=2)
    return ops.stack(
        [
            ops.zeros((NUM_BINS,)),
            of_arrived,
            _peaks(arrived) * _NONZERO_BINS + _nonfinite(passing),
            of_produced,
            _peaks(produced) + _nonfinite(unlimited) + _peaks(origin) * _NONZERO_BINS,
        ]
    )


def _sampled(gradients):
    if not gradients:
        return ops.zeros((NUM_BINS,))
    values = ops.concatenate([spectrum.magnitudes(spectrum.sample(g)) for g in gradients])
    return spectrum.spectrum(values, FORMAT)


def _peaks(gradients):
    if not gradients:
        return ops.zeros((NUM_BINS,))
    return spectrum.spectrum(ops.stack([spectrum.peak(g) for g in gradients]), FORMAT)


def _nonfinite(gradients):
    count = sum((spectrum.has_nonfinite(g) for g in gradients), ops.zeros(()))
    return count * _NONFINITE_BIN


def is_limited(dtype):
    """Whether gradients of this dtype have no more range than `FORMAT`."""
    dtype = keras.backend.standardize_dtype(dtype)
    return FloatFormat(dtype).max_exponent <= FORMAT.max_exponent
