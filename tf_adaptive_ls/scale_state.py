"""The state of one scaled layer: a float32 array `[rows, bins]`.

It is a single array because it is a single weight with
`overwrite_with_gradient=True`: a *report* of what the backward pass saw comes out
of it as the weight's "gradient", and the optimizer puts the next state in its
place. An optimizer that knows nothing of this stores the report itself; r is then 0,
and as correct as any.

A report holds magnitudes: the largest of each gradient, and a sample of them. From
these the optimizer makes spectra of all layers at once. Reports of several calls of
a layer add up; a sum of k magnitudes is within log2(k) binades of the largest.
"""

import dataclasses
import enum
from typing import Any

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

# Elements of its gradients that each layer shows, of those that arrived and of those that
# it produced. The binade that a share of 1e-3 lies below is then known to 1.2 (standard
# deviation, over weight gradients of a VGG and a transformer; 1.9 with 256, 0.8 with
# 4096), and the default rule moves a scale by half of that.
_SAMPLE_ROWS = 24
SAMPLE_SIZE = _SAMPLE_ROWS * NUM_BINS

SHAPE = (1 + 2 * _SAMPLE_ROWS, NUM_BINS)


class Figure(enum.IntEnum):
    """What the first row of a report holds; its samples follow."""

    R = 0  # nothing: where the state has LOG2_SCALE
    ARRIVED = 1  # largest of the gradients that arrived at the outputs, at scale S
    PASSING = 2  # the same, but at a scale that a plan chose, or not in `FORMAT`
    PRODUCED = 3  # largest of the input and weight gradients that are written in `FORMAT`
    SMALLEST = 4  # the smallest among the largest of each of these
    UNLIMITED = 5  # largest of those that are not written in `FORMAT`
    ORIGIN = 6  # largest of the gradients that these were computed from, in `FORMAT`
    NUM_ARRIVED = 7  # how many there are of each
    NUM_PRODUCED = 8


# An output that nothing uses sends zeros back on purpose.
_NONZERO_BINS = np.ones(NUM_BINS, "float32")
_NONZERO_BINS[spectrum.ZERO] = 0.0

_OVERFLOW = 2.0 ** (FORMAT.max_exponent + 1)


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


def report(*, arrived=(), passing=(), produced=(), unlimited=(), origin=()):
    """What a backward pass has to tell.

    Args:
        arrived: Output gradients as they arrived, at scale S.
        passing: Largest magnitudes of those that arrived at a scale that a plan chose,
            or not in `FORMAT`.
        produced: Input and weight gradients, at scale S * 2**r, that are written in
            `FORMAT`.
        unlimited: The same, but that are not.
        origin: Largest magnitudes of the gradients that `produced` were computed from,
            at S * 2**r.

    Returns:
        A state-shaped tensor, see `Figure`.
    """
    # Gradients of embeddings may be sparse (`tf.IndexedSlices`): their `values`.
    produced, unlimited = (
        [getattr(gradient, "values", gradient) for gradient in gradients]
        for gradients in (produced, unlimited)
    )
    of_arrived, of_produced, of_unlimited = (
        [spectrum.peak(gradient) for gradient in gradients]
        for gradients in (arrived, produced, unlimited)
    )
    figures = [np.float32(0.0)] * len(Figure)
    figures[Figure.ARRIVED] = _largest(of_arrived)
    figures[Figure.PASSING] = _largest(passing)
    figures[Figure.PRODUCED] = _largest(of_produced)
    figures[Figure.SMALLEST] = _smallest(of_produced)
    figures[Figure.UNLIMITED] = _largest(of_unlimited)
    figures[Figure.ORIGIN] = _largest(origin)
    figures[Figure.NUM_ARRIVED] = np.float32(len(arrived))
    figures[Figure.NUM_PRODUCED] = np.float32(len(produced))
    rest = np.zeros(NUM_BINS - len(Figure), "float32")
    parts = [ops.stack(figures), rest, *_sampled(arrived), *_sampled(produced)]
    return ops.reshape(ops.concatenate(parts), SHAPE)


def _largest(peaks):
    return peaks[0] if len(peaks) == 1 else ops.max(ops.stack(peaks)) if peaks else np.float32(0.0)


def _smallest(peaks):
    return peaks[0] if len(peaks) == 1 else ops.min(ops.stack(peaks)) if peaks else np.float32(0.0)


def _sampled(gradients):
    """Vectors of magnitudes, `SAMPLE_SIZE` in all."""
    if not gradients:
        return [np.zeros(SAMPLE_SIZE, "float32")]
    each, rest = divmod(SAMPLE_SIZE, len(gradients))
    sizes = [each + (i < rest) for i in range(len(gradients))]
    return [spectrum.sample(g, n) for g, n in zip(gradients, sizes, strict=True) if n]


@dataclasses.dataclass(frozen=True)
class Reports:
    """Reports of several layers, stacked `[layers, rows, bins]`, and what they tell."""

    stacked: Any

    def _figure(self, figure):
        return self.stacked[:, 0, figure]

    @property
    def arrived_broken(self):
        """Whether a gradient that arrived was not finite, `[layers]`."""
        return ops.logical_not(
            ops.logical_and(
                self._figure(Figure.ARRIVED) < _OVERFLOW,
                ops.isfinite(self._figure(Figure.PASSING)),
            )
        )

    @property
    def produced_broken(self):
        """Whether a gradient that the layer made was not finite, `[layers]`."""
        within = ops.logical_and(
            self._figure(Figure.PRODUCED) < _OVERFLOW, self._figure(Figure.ORIGIN) < _OVERFLOW
        )
        finite = ops.isfinite(self._figure(Figure.UNLIMITED))
        return ops.logical_not(ops.logical_and(within, finite))

    @property
    def arrived_peaks(self):
        """Spectra of the largest gradient that arrived at S, zeros left out, `[layers, bins]`."""
        return self._spectra_of_figures(Figure.ARRIVED) * _NONZERO_BINS

    @property
    def produced_peaks(self):
        """Spectra of the largest and the smallest of the peaks of what layers produced.

        And of that of what they came from, zeros left out. `[layers, bins]`.
        """
        produced = self._spectra_of_figures(Figure.PRODUCED, Figure.SMALLEST)
        any_produced = ops.cast(self._figure(Figure.NUM_PRODUCED) > 0, "float32")
        origin = self._spectra_of_figures(Figure.ORIGIN) * _NONZERO_BINS
        return produced * any_produced[:, None] + origin

    def _spectra_of_figures(self, *figures):
        values = ops.stack([self._figure(figure) for figure in figures], axis=1)
        return spectrum.spectrum(ops.maximum(values, 0.0), FORMAT)

    def samples(self, wanted):
        """Spectra of what arrived at S and of what was produced, two of `[layers, bins]`.

        All zero unless `wanted`, a boolean scalar tensor: they are the larger part of
        the work.
        """
        layers = self.stacked.shape[0]

        def spectra():
            samples = ops.reshape(self.stacked[:, 1:], (layers, 2, SAMPLE_SIZE))
            numbers = ops.stack(
                [self._figure(Figure.NUM_ARRIVED), self._figure(Figure.NUM_PRODUCED)], axis=1
            )
            any_there = ops.cast(numbers > 0, "float32")
            return spectrum.spectrum(samples, FORMAT) * any_there[..., None]

        both = ops.cond(wanted, spectra, lambda: ops.zeros((layers, 2, NUM_BINS)))
        return both[:, 0], both[:, 1]


def is_limited(dtype):
    """Whether gradients of this dtype have no more range than `FORMAT`."""
    dtype = keras.backend.standardize_dtype(dtype)
    return FloatFormat(dtype).max_exponent <= FORMAT.max_exponent
