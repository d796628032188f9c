"""What a step tells of all layers: counts, before anything is decided.

Counts add up, over replicas as over micro-batches; magnitudes do not, and no collective
of `tf.distribute` takes a maximum. So reports and the gradients of weights become spectra,
and numbers of gradients that were not finite, and only these are looked at by
`scale_update`.
"""

from typing import NamedTuple

import numpy as np
from keras import ops

from tf_adaptive_ls.numerics import backend, spectrum
from tf_adaptive_ls.numerics.backend import Tensor
from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT
from tf_adaptive_ls.numerics.gradient_tap import power_of_two
from tf_adaptive_ls.numerics.report import SAMPLE_SIZE


class Operands(NamedTuple):
    """What a step tells of gradients that layers round to float8; float32.

    Attributes:
        saturated: Whether one was finite, but larger than its format holds, `[layers]`.
        sample: Spectra of a sample of them before, at scale S * 2**r, `[layers, bins]`; all
            zero if none was asked for.
        peaks: Spectra of the largest of them, unless it is zero.
    """

    saturated: Tensor
    sample: Tensor
    peaks: Tensor

    @classmethod
    def of(cls, reports, sampled):
        """Turns an `OperandReport` of arrays `[layers]` into counts.

        Args:
            reports: The `OperandReport`.
            sampled: Whether samples are asked for, a boolean scalar.
        """

        def counts(values):
            # What is finite stays so, in a wider format, too.
            finite = ops.minimum(values, np.float32(COUNTING_FORMAT.largest))
            values = ops.where(ops.isfinite(values), finite, values)
            return spectrum.spectrum(values, COUNTING_FORMAT)

        zeros = np.zeros(spectrum.num_bins(COUNTING_FORMAT), "float32")
        zeros[spectrum.ZERO] = 1.0

        def samples():
            padding = (SAMPLE_SIZE - reports.number)[:, None] * zeros
            return ops.maximum(counts(reports.sample) - padding, 0.0)

        nothing = (reports.number.shape[0], len(zeros))
        drawn = ops.cond(sampled, samples, lambda: ops.zeros(nothing))
        peaks = counts(reports.largest[:, None]) * (1 - zeros)
        return cls(ops.cast(reports.saturated > 0, "float32"), drawn, peaks)


class Evidence(NamedTuple):
    """What a step tells; all float32, spectra of `COUNTING_FORMAT`.

    A layer *produces* the gradients of its inputs and of its weights. "Peaks" are the
    largest magnitude of each gradient.

    Attributes:
        weights_broken: Whether a gradient of a weight was not finite, `[]`.
        arrived_broken: Whether one that arrived at the layer was not, `[layers]`.
        produced_broken: Whether one that the layer produced was not, or one that it
            shifted to its own scale, `[layers]`.
        arrived: Spectra of a sample of what arrived at scale S, `[layers, bins]`; all zero
            if none was asked for.
        arrived_peaks: Spectra of its peaks, zero ones left out.
        produced: Spectra of a sample of what the layer produced, at scale S * 2**r; all
            zero if none was asked for.
        produced_peaks: Spectra of the largest and the smallest of its peaks; and of the
            largest of what it was computed from. Of zeros there is one at most, for a
            gradient that is zero all over.
        operands: `Operands`, `None` if no layer rounds gradients to float8.
    """

    weights_broken: Tensor
    arrived_broken: Tensor
    produced_broken: Tensor
    arrived: Tensor
    arrived_peaks: Tensor
    produced: Tensor
    produced_peaks: Tensor
    operands: Operands | None = None

    @property
    def finite(self):
        """Whether all gradients of weights are finite, a boolean scalar."""
        return ops.equal(self.weights_broken, 0)

    def packed(self):
        """All of it as one vector: what replicas sum."""
        broken = ops.stack([self.arrived_broken, self.produced_broken], axis=1)
        of_layers = [broken, *self[3:7]]
        if self.operands is not None:
            of_layers += [self.operands.saturated[:, None], *self.operands[1:]]
        of_layers = ops.concatenate(of_layers, axis=1)
        return ops.concatenate([self.weights_broken[None], ops.ravel(of_layers)])

    @classmethod
    def unpacked(cls, vector, num_layers, num_replicas=1):
        """The evidence in the sum of vectors that `packed` made on so many replicas.

        What is zero on some is not lost: a replica without examples sends zeros.
        """
        of_layers = ops.reshape(vector[1:], (num_layers, -1))
        bins = spectrum.num_bins(COUNTING_FORMAT)
        spectra = ops.reshape(of_layers[:, 2 : 2 + 4 * bins], (num_layers, 4, bins))
        *others, produced_peaks = (spectra[:, i] for i in range(4))
        on_others = np.zeros(produced_peaks.shape[-1], "float32")
        on_others[spectrum.ZERO] = num_replicas - 1
        produced_peaks = ops.maximum(produced_peaks - on_others, 0.0)
        operands, rest = None, of_layers[:, 2 + 4 * bins :]
        if rest.shape[1]:
            operands = Operands(rest[:, 0], rest[:, 1 : 1 + bins], rest[:, 1 + bins :])
        return cls(vector[0], of_layers[:, 0], of_layers[:, 1], *others, produced_peaks, operands)


class Ownership(NamedTuple):
    """Which weights each of several layers has of its own, NumPy arrays.

    A weight belongs to every innermost layer that has it: there its gradient is written,
    at the scale of that layer and of all around it together.

    Attributes:
        places: Places of a layer's weights among all, int32 `[layers, most]`; the number
            of all weights stands for none.
        around: Whether layer j is around layer i, float32 `[i, j]`.
        is_weight: Which of `places` are weights, boolean `[layers, most]`.
    """

    places: np.ndarray
    around: np.ndarray
    is_weight: np.ndarray

    @classmethod
    def of(cls, weights_of_layers, inside, num_weights):
        """From lists, by layer, of the places of its weights and of the layers inside it."""
        own = [
            sorted(set(weights).difference(*(weights_of_layers[other] for other in others)))
            for weights, others in zip(weights_of_layers, inside, strict=True)
        ]
        most = max(1, *map(len, own))
        places = np.full((len(own), most), num_weights, "int32")
        around = np.zeros((len(own), len(own)), "float32")
        for layer, (weights, others) in enumerate(zip(own, inside, strict=True)):
            places[layer, : len(weights)] = weights
            around[others, layer] = 1.0
        return cls(places, around, places < num_weights)

    def scales(self, log2_scales):
        """2**r of each layer and of those around it together, `[layers]`."""
        if self.around.any():
            outer = ops.sum(self.around * log2_scales, axis=1)
            log2_scales = ops.clip(log2_scales + outer, -126.0, 127.0)
        return power_of_two(log2_scales)


def evidence_of(
    reports, gradients, ownership, log2_scales, *, narrow, sampled, float_formats, answerable=True
):
    """Turns what was seen into counts.

    Args:
        reports: The layers' reports, a `Report` of arrays `[layers]`.
        gradients: List of all gradients of weights, at scale S.
        ownership: Their `Ownership`.
        log2_scales: r of each layer, float32 `[layers]`.
        narrow: Whether each layer computes in a narrow format, NumPy `[layers]`.
        sampled: Whether samples are asked for, a boolean scalar.
        float_formats: The `FloatFormat` of each layer, a list.
        answerable: Whether all gradients of each layer's weights have come at its own scale, NumPy
            `[layers]`. Otherwise only its report tells whether it made what is not finite.

    Returns:
        An `Evidence`.
    """
    gradients = list(map(backend.real_numbers, gradients))
    scales = ownership.scales(log2_scales)
    num_layers = len(narrow)
    beyond_all = np.finfo("float32").max

    # The peaks of weights, at the scales that the layers wrote them at.
    peaks = ops.concatenate([spectrum.peaks(gradients), np.zeros(1, "float32")])
    of_weights = ops.take(peaks, ownership.places, axis=0) * scales[:, None]
    largest = ops.max(of_weights, axis=1)
    smallest = ops.min(ops.where(ownership.is_weight, of_weights, beyond_all), axis=1)
    made_narrow = ops.where(np.logical_and(narrow, answerable), largest, 0.0)
    made_wide = ops.where(np.logical_and(np.logical_not(narrow), answerable), largest, 0.0)

    # Together with those of inputs.
    any_input = reports.num_produced > 0
    largest = ops.maximum(reports.produced, ops.where(narrow, largest, 0.0))
    smallest = ops.minimum(
        ops.where(any_input, reports.produced_least, beyond_all),
        ops.where(narrow, smallest, beyond_all),
    )
    any_produced = ops.logical_or(any_input, np.logical_and(narrow, ownership.is_weight.any(1)))

    overflow = np.float32([each.overflow for each in float_formats])
    weights_whole = ops.logical_and(made_narrow < overflow, ops.isfinite(made_wide))
    inputs_broken = ops.maximum(reports.produced_broken, reports.shifted_broken)
    produced_broken = ops.logical_or(inputs_broken > 0, ops.logical_not(weights_whole))

    def counts(values):
        return spectrum.spectrum(values, COUNTING_FORMAT)

    # An output that nothing uses sends zeros back on purpose.
    nonzero = np.ones(spectrum.num_bins(COUNTING_FORMAT), "float32")
    nonzero[spectrum.ZERO] = 0.0
    of_one = ops.stack([reports.arrived_at_s, reports.set_out_from, largest, smallest])
    arrived_peaks, set_out, largest, smallest = ops.unstack(counts(of_one[..., None]), 4)
    arrived_peaks = arrived_peaks * nonzero
    made = (largest * nonzero + smallest) * ops.cast(any_produced, "float32")[:, None]
    produced_peaks = made + set_out * nonzero

    def samples():
        """Spectra of what arrived at S and of what was produced, `[layers, 2, bins]`."""
        reported = counts(ops.stack([reports.arrived_sample, reports.produced_sample], axis=1))
        sizes = ops.stack([reports.num_arrived, reports.num_produced], axis=1)
        padding = (SAMPLE_SIZE - sizes)[..., None] * (1 - nonzero)
        reported = ops.maximum(reported - padding, 0.0)
        drawn = ops.take(_samples(gradients), ownership.places, axis=0) * scales[:, None, None]
        counted = np.logical_and(ownership.is_weight, narrow[:, None])
        drawn = ops.sum(counts(drawn) * counted[..., None].astype("float32"), axis=1)
        return ops.stack([reported[:, 0], reported[:, 1] + drawn], axis=1)

    nothing = (num_layers, 2, len(nonzero))
    drawn = ops.cond(sampled, samples, lambda: ops.zeros(nothing))
    return Evidence(
        _count(ops.logical_not(ops.all(ops.isfinite(peaks)))),
        _count(reports.arrived_broken > 0),
        _count(produced_broken),
        drawn[:, 0],
        arrived_peaks,
        drawn[:, 1],
        produced_peaks,
    )


def _count(condition):
    return ops.cast(condition, "float32")


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
