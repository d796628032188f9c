"""The state of one scaled layer: a float32 array `[rows, bins]`.

It is a single array because it is a single weight with
`overwrite_with_gradient=True`: a *report* of what the backward pass saw comes out
of it as the weight's "gradient", and the optimizer puts the next state in its
place, see `observation`. An optimizer that knows nothing of this leaves the report
there; r is then 0, as correct as any, and nothing else is known.
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
LOG2_SCALE = 0  # r; 0 in a report, too
MEASURE = 1  # 1 to take samples on the next step, -1 not to; 0 in a report
SAMPLE_LOG2_SCALE = 2  # log2(S) + r when the samples were taken
OVERFLOWS = 3  # on how many steps this layer made finite gradients non-finite
MEMORY = 4  # and all after it: what the rule remembers

NUM_BINS = spectrum.num_bins(FORMAT)
MAX_MEMORY_SIZE = NUM_BINS - MEMORY

# Elements that are looked at of each gradient of a weight, and of the gradients of all
# inputs and of all outputs of a layer. The binade that a share of 1e-3 lies below is then
# known to 1.2 (standard deviation, over weight gradients of a VGG and a transformer; 1.9
# with 256, 0.8 with 4096), and the default rule moves a scale by half of that.
_SAMPLE_ROWS = 24
SAMPLE_SIZE = _SAMPLE_ROWS * NUM_BINS

SHAPE = (1 + 2 * _SAMPLE_ROWS, NUM_BINS)


def initial(shape=SHAPE, dtype="float32"):
    """A state of scale 2**0 that asks to be measured at once: an initializer."""
    return ops.convert_to_tensor(_initial(shape, dtype))


def _initial(shape=SHAPE, dtype="float32"):
    state = np.zeros(shape, dtype)
    state[Row.HEADER, MEASURE] = 1.0
    state[Row.HEADER, MEMORY:] = NOTHING_SEEN
    return state


def values_of(variable):
    """The state in a layer's variable, a NumPy array; a first one in place of a report."""
    state = np.array(variable.numpy())
    return state if state[Row.HEADER, MEASURE] else _initial()


def stacked(variables):
    """The states in several layers' variables, a tensor `[layers, rows, bins]`.

    With a first one in place of a report.
    """
    states = ops.stack([variable.value for variable in variables])
    is_state = ops.not_equal(states[:, Row.HEADER, MEASURE], 0)
    return ops.where(is_state[:, None, None], states, _initial())


def header(log2_scale, measure, sample_log2_scale, overflows, memory):
    """Row.HEADER of several states, `[layers, 1, bins]`, to concatenate with the rest.

    The arguments are the columns: tensors `[layers]`, but for `measure`, a scalar, and
    `memory`, `[layers, n]`.
    """
    measure = ops.zeros_like(log2_scale) + measure
    columns = ops.stack([log2_scale, measure, sample_log2_scale, overflows], axis=1)
    row = ops.concatenate([columns, memory], axis=1)
    return ops.pad(row, ((0, 0), (0, NUM_BINS - row.shape[1])))[:, None]


def with_header(header, spectra):
    """States of a header `[layers, 1, bins]` and what follows it, `[layers, n, bins]`."""
    used = header.shape[1] + spectra.shape[1]
    states = ops.concatenate([header, spectra], axis=1)
    return ops.pad(states, ((0, 0), (0, SHAPE[0] - used), (0, 0)))


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
    def of(cls, variable):
        """Reads the state in a layer's variable."""
        state = values_of(variable)
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


def is_limited(dtype):
    """Whether gradients of this dtype have no more range than `FORMAT`."""
    dtype = keras.backend.standardize_dtype(dtype)
    return FloatFormat(dtype).max_exponent <= FORMAT.max_exponent
