"""What the backward pass of one step tells about all layers.

A `LossScaled` layer *reports* what passes its border, as the "gradient" of its state: the
largest magnitude of each gradient, and a sample of them. The optimizer stacks the
reports, adds what it sees of the gradients of weights, and makes spectra of all at once.
So a gradient of a weight is read once, for its largest magnitude and for whether it is
finite, and samples of weights are drawn only when they are wanted.

Reports of several calls of a layer add up; a sum of k magnitudes is within log2(k)
binades of the largest.
"""

import dataclasses
import enum
import functools
from typing import Any

import numpy as np
from keras import ops

from tf_adaptive_ls import backend, spectrum
from tf_adaptive_ls.gradient_tap import power_of_two
from tf_adaptive_ls.scale_state import (
    FORMAT,
    LOG2_SCALE,
    MEASURE,
    NUM_BINS,
    SAMPLE_SIZE,
    SHAPE,
    Row,
)


class Figure(enum.IntEnum):
    """What the first row of a report holds; its samples follow."""

    # Before these a report has 0, where a state has LOG2_SCALE and MEASURE.
    ARRIVED = 2  # largest of the gradients that arrived at the outputs, at scale S
    PASSING = 3  # the same, but at a scale that a plan chose, or not in `FORMAT`
    ORIGIN = 4  # the largest that all gradients of the layer were computed from, in `FORMAT`
    PRODUCED = 5  # largest of the input gradients that are written in `FORMAT`
    SMALLEST = 6  # the smallest among the largest of each of these
    UNLIMITED = 7  # largest of those that are not written in `FORMAT`
    NUM_ARRIVED = 8  # how many elements the sample of those that arrived at S has
    NUM_PRODUCED = 9  # and that of the input gradients in `FORMAT`


# An output that nothing uses sends zeros back on purpose.
_NONZERO_BINS = np.ones(NUM_BINS, "float32")
_NONZERO_BINS[spectrum.ZERO] = 0.0

_OVERFLOW = 2.0 ** (FORMAT.max_exponent + 1)


def report_of_arrivals(gradients, divisors, *, at_s, limited):
    """What a backward pass has to tell of the gradients of a layer's outputs.

    Args:
        gradients: List of tensors, as they arrived.
        divisors: List of scalars, by which each is divided to be at S * 2**r, `None` for 1.
        at_s: Whether each arrived at scale S and in `FORMAT`.
        limited: Whether each is written in `FORMAT`.

    Returns:
        A state-shaped tensor, see `Figure`.
    """
    peaks = spectrum.peaks(gradients)
    divisors = [np.float32(1.0) if divisor is None else divisor for divisor in divisors]
    divisors = divisors[0] if len(divisors) == 1 else ops.stack(divisors)
    figures = [
        _largest(peaks, at_s),
        _largest(peaks, np.logical_not(at_s)),
        _largest(peaks / divisors, limited),
    ]
    samples, number = _sampled(_chosen(gradients, at_s))
    head = _figures(Figure.ARRIVED, figures, {Figure.NUM_ARRIVED: number})
    return _packed([*head, *samples, np.zeros(2 * SAMPLE_SIZE - number, "float32")])


def report_of_products(gradients, *, limited):
    """What a backward pass has to tell of the gradients of a layer's inputs.

    Args:
        gradients: List of tensors, at scale S * 2**r.
        limited: Whether each is written in `FORMAT`.

    Returns:
        A state-shaped tensor, see `Figure`.
    """
    gradients = [_dense(gradient) for gradient in gradients]
    peaks = spectrum.peaks(gradients)
    figures = [
        _largest(peaks, limited),
        _smallest(peaks, limited),
        _largest(peaks, np.logical_not(limited)),
    ]
    samples, number = _sampled(_chosen(gradients, limited))
    head = _figures(Figure.PRODUCED, figures, {Figure.NUM_PRODUCED: number})
    nothing = np.zeros(SAMPLE_SIZE, "float32")
    return _packed([*head, nothing, *samples, np.zeros(SAMPLE_SIZE - number, "float32")])


def _dense(gradient):
    """All numbers of a gradient; those of embeddings may be sparse (`tf.IndexedSlices`)."""
    return getattr(gradient, "values", gradient)


def _largest(peaks, chosen):
    """The largest of those peaks `[n]` that are `chosen`, 0 if none is."""
    return _reduced(ops.max, peaks, chosen, np.float32(0.0))


def _smallest(peaks, chosen):
    """The smallest of those peaks `[n]` that are `chosen`, 0 if none is."""
    return _reduced(ops.min, peaks, chosen, np.float32(np.inf))


def _reduced(reduce, peaks, chosen, others):
    if not any(chosen):
        return np.float32(0.0)
    if len(chosen) == 1:
        return ops.reshape(peaks, ())
    return reduce(peaks if all(chosen) else ops.where(np.array(chosen), peaks, others))


def _figures(first, figures, numbers):
    """The first row of a report: three figures from `first` on, and numbers."""
    row = np.zeros(NUM_BINS, "float32")
    for place, number in numbers.items():
        row[place] = number
    return row[:first], ops.stack(figures), row[first + len(figures) :]


def _packed(parts):
    """A report of all its parts, whose samples may still have a sign."""
    # One concatenation of all: XLA may compile for hours what concatenates parts of it.
    return ops.reshape(ops.abs(ops.concatenate(parts)), SHAPE)


def _sampled(gradients):
    """Vectors of at most `SAMPLE_SIZE` elements in all, and how many they are."""
    gradients = gradients[:SAMPLE_SIZE]
    samples = [spectrum.sample(g, SAMPLE_SIZE // len(gradients)) for g in gradients]
    return samples, sum(sample.shape[0] for sample in samples)


def _chosen(items, chosen):
    return [item for item, is_so in zip(items, chosen, strict=True) if is_so]


def _samples(gradients):
    """Magnitudes of each gradient, and zeros for none, `[gradients + 1, SAMPLE_SIZE]`.

    Tensors without so many elements are gone through repeatedly.
    """
    samples = [spectrum.sample(gradient, SAMPLE_SIZE) for gradient in gradients]
    sizes = [*(sample.shape[0] for sample in samples), 1]
    starts = np.cumsum([0, *sizes[:-1]])
    places = starts[:, None] + np.arange(SAMPLE_SIZE) % np.array(sizes)[:, None]
    return ops.take(
        ops.abs(ops.concatenate([*samples, np.zeros(1, "float32")])), places.astype("int32")
    )


class Ownership:
    """Which weights each of several layers has of its own.

    A weight belongs to every innermost `LossScaled` layer that has it: there its gradient
    is written, at the scale of that layer and of all around it together.

    Args:
        layers: List of `LossScaled` layers.
        weights: List of variables.
    """

    def __init__(self, layers, weights):
        place_of = {id(layer): place for place, layer in enumerate(layers)}
        inside = [
            [place_of[id(e)] for e in layer.layer._flatten_layers() if id(e) in place_of]
            for layer in layers
        ]
        tracked = [{id(v) for v in layer.layer.trainable_variables} for layer in layers]
        own = []
        for mine, others in zip(tracked, inside, strict=True):
            mine = mine.difference(*(tracked[other] for other in others))
            own.append([place for place, v in enumerate(weights) if id(v) in mine])
        most = max(1, *map(len, own))
        nothing = len(weights)
        # Places in `weights`, of which the last means none, `[layers, most]`.
        self.places = np.array([[*each, *[nothing] * (most - len(each))] for each in own], "int32")
        self.is_weight = self.places < nothing
        # Whether layer j is around layer i, `[i, j]`.
        self._around = np.zeros((len(layers), len(layers)), "float32")
        for place, others in enumerate(inside):
            self._around[others, place] = 1.0

    def scales(self, r):
        """2**r of each layer and of those around it together, `[layers]`."""
        if self._around.any():
            r = ops.clip(r + ops.sum(self._around * r, axis=1), -126.0, 127.0)
        return power_of_two(r)


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a step tells, made by `observe`: counts, which add up over replicas.

    Args:
        packed: A float32 vector of all of it.
        num_layers: The number of layers.
    """

    packed: Any
    num_layers: int

    def summed_over_replicas(self):
        """The same of all replicas of a distributed step."""
        return Observation(backend.sum_over_replicas(self.packed), self.num_layers)

    @property
    def finite(self):
        """Whether all gradients of weights are finite, a boolean scalar."""
        return self.packed[0] == 0

    @functools.cached_property
    def _of_layers(self):
        return ops.reshape(self.packed[1:], (self.num_layers, -1))

    @property
    def arrived_broken(self):
        """Whether a gradient that arrived was not finite, `[layers]`."""
        return self._of_layers[:, 0] > 0

    @property
    def produced_broken(self):
        """Whether a gradient that the layer made was not finite, `[layers]`."""
        return self._of_layers[:, 1] > 0

    @functools.cached_property
    def spectra(self):
        """What each `Row` after the header is to hold, `[layers, rows, bins]`.

        Samples are all zero if none were asked for.
        """
        return ops.reshape(self._of_layers[:, 2:], (self.num_layers, -1, NUM_BINS))

    def __getitem__(self, row):
        """Spectra of one `Row`, `[layers, bins]`."""
        return self.spectra[:, row - Row.ARRIVED]


def observe(weights, reports, layers, states):
    """What the gradients of a step tell.

    Args:
        weights: List of pairs of a gradient, at scale S, and its variable.
        reports: List of reports of layers.
        layers: List of these `LossScaled` layers.
        states: Their states, stacked `[layers, rows, bins]`.

    Returns:
        An `Observation`.
    """
    weights = [(_dense(gradient), v) for gradient, v in weights if gradient is not None]
    gradients = [gradient for gradient, _ in weights]
    owners = Ownership(layers, [v for _, v in weights])
    reports = ops.stack(reports)
    figures = {figure: reports[:, 0, figure] for figure in Figure}
    scales = owners.scales(states[:, Row.HEADER, LOG2_SCALE])
    limited = np.array([layer.is_limited for layer in layers])

    # The peaks of weights, at the scales that the layers wrote them at.
    peaks = ops.concatenate([spectrum.peaks(gradients), np.zeros(1, "float32")])
    of_weights = ops.take(peaks, owners.places, axis=0) * scales[:, None]
    any_weight = owners.is_weight.any(axis=1)
    largest = ops.max(of_weights, axis=1)
    smallest = ops.min(ops.where(owners.is_weight, of_weights, np.float32(np.inf)), axis=1)
    unlimited = ops.maximum(figures[Figure.UNLIMITED], ops.where(limited, 0.0, largest))

    # Together with those of input gradients.
    any_input = figures[Figure.NUM_PRODUCED] > 0
    largest = ops.maximum(figures[Figure.PRODUCED], ops.where(limited, largest, 0.0))
    smallest = ops.minimum(
        ops.where(any_input, figures[Figure.SMALLEST], np.float32(np.inf)),
        ops.where(limited, smallest, np.float32(np.inf)),
    )
    any_produced = ops.logical_or(any_input, np.logical_and(limited, any_weight))

    arrived_whole = ops.logical_and(
        figures[Figure.ARRIVED] < _OVERFLOW, ops.isfinite(figures[Figure.PASSING])
    )
    produced_whole = ops.logical_and(
        ops.maximum(largest, figures[Figure.ORIGIN]) < _OVERFLOW, ops.isfinite(unlimited)
    )

    def of_peaks(values):
        return spectrum.spectrum(ops.maximum(values, 0.0)[:, None], FORMAT)

    arrived_peaks = of_peaks(figures[Figure.ARRIVED]) * _NONZERO_BINS
    produced_peaks = of_peaks(largest) + of_peaks(smallest)
    produced_peaks = produced_peaks * ops.cast(any_produced, "float32")[:, None]
    produced_peaks = produced_peaks + of_peaks(figures[Figure.ORIGIN]) * _NONZERO_BINS

    def samples():
        """Spectra of what arrived at S and of what was produced, `[layers, 2, bins]`."""
        reported = ops.reshape(reports[:, 1:], (len(layers), 2, SAMPLE_SIZE))
        reported = spectrum.spectrum(reported, FORMAT)
        numbers = [figures[Figure.NUM_ARRIVED], figures[Figure.NUM_PRODUCED]]
        padding = SAMPLE_SIZE - ops.stack(numbers, axis=1)[..., None]
        reported = ops.maximum(reported - padding * (1 - _NONZERO_BINS), 0.0)
        drawn = ops.take(_samples(gradients), owners.places, axis=0) * scales[:, None, None]
        drawn = spectrum.spectrum(drawn, FORMAT)
        counted = np.logical_and(owners.is_weight, limited[:, None])
        drawn = ops.sum(drawn * counted[..., None].astype("float32"), axis=1)
        return ops.stack([reported[:, 0], reported[:, 1] + drawn], axis=1)

    asked = ops.any(states[:, Row.HEADER, MEASURE] > 0)
    samples = ops.cond(asked, samples, lambda: ops.zeros((len(layers), 2, NUM_BINS)))

    spectra = [samples[:, 0], arrived_peaks, samples[:, 1], produced_peaks]
    broken = [ops.logical_not(arrived_whole), ops.logical_not(produced_whole)]
    of_layers = [ops.cast(ops.stack(broken, axis=1), "float32"), *spectra]
    not_finite = ops.logical_not(ops.all(ops.isfinite(peaks)))
    packed = [ops.cast(not_finite, "float32")[None], ops.ravel(ops.concatenate(of_layers, axis=1))]
    return Observation(ops.concatenate(packed), len(layers))
