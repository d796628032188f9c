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

import dataclasses
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
LOG2_SCALE = 0  # r
MEASURE = 1  # 1 to take samples on the next step, 0 not to
SAMPLE_LOG2_SCALE = 2  # log2(S) + r when the samples were taken
OVERFLOWS = 3  # on how many steps this layer made finite gradients non-finite
MEMORY = 4  # and all after it: what the rule remembers

MAX_MEMORY_SIZE = 38

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


def header(log2_scale, measure, sample_log2_scale, overflows, memory):
    """Row.HEADER of several states, `[layers, 1, bins]`, to concatenate with the rest.

    The arguments are the columns: tensors `[layers]`, but for `measure`, a scalar, and
    `memory`, `[layers, n]`.
    """
    measure = ops.zeros_like(log2_scale) + measure
    columns = ops.stack([log2_scale, measure, sample_log2_scale, overflows], axis=1)
    row = ops.concatenate([columns, memory], axis=1)
    return ops.pad(row, ((0, 0), (0, NUM_BINS - row.shape[1])))[:, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """What a state tells a person.

    Attributes:
        log2_scale: The int r.
        log2_sampled_at: log2 of the scale S * 2**r that `spectrum` was taken at.
        overflows: On how many steps the layer made finite gradients non-finite.
        spectrum: `Spectrum` of the last sample of its input and weight gradients.
        peaks: `Spectrum` of the largest of each of them on that step.
    """

    log2_scale: int
    log2_sampled_at: int
    overflows: int
    spectrum: spectrum.Spectrum
    peaks: spectrum.Spectrum

    @classmethod
    def of(cls, state):
        """Reads a state given as a NumPy array."""
        return cls(
            int(state[Row.HEADER, LOG2_SCALE]),
            int(state[Row.HEADER, SAMPLE_LOG2_SCALE]),
            int(state[Row.HEADER, OVERFLOWS]),
            spectrum.Spectrum(np.array(state[Row.PRODUCED]), FORMAT),
            spectrum.Spectrum(np.array(state[Row.PRODUCED_PEAK]), FORMAT),
        )

    @property
    def binades(self):
        """Lowest and highest binade of the gradients themselves, `None` if all are zero."""
        if self.spectrum.binades is None:
            return None
        low, high = self.spectrum.binades
        return low - self.log2_sampled_at, high - self.log2_sampled_at


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
