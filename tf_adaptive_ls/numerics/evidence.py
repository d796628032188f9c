"""The reports of all layers in one step, as counts that devices can sum.

Counts can be summed over replicas and over micro-batches. Magnitudes cannot, and `tf.distribute`
has no collective for maxima. So reports and weight gradients become spectra and counts of
non-finite gradients; `scale_update` sees nothing else.
"""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls.backend import arrays, devices
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT, is_narrow_dtype
from tf_adaptive_ls.numerics.layer_facts import LayerFacts
from tf_adaptive_ls.numerics.report import SAMPLE_SIZE, Arrived, Produced, Report, Rounded


class Counts(NamedTuple):
    """Counts for each layer, of one kind of gradients. Float32; spectra are in `COUNTING_FORMAT`.

    Attributes:
        beyond: Whether a gradient was beyond its format: not finite, or saturated by rounding.
            `[layers]`
        sample: Spectra of a sample, `[layers, bins]`; all zero on steps without a sample.
        peaks: Spectra of the largest magnitude of each gradient, `[layers, bins]`.
    """

    beyond: Tensor
    sample: Tensor
    peaks: Tensor


class Evidence(NamedTuple):
    """The evidence of one step, for all layers. All tensors are float32.

    A layer *produces* the gradients of its inputs and of its weights.

    Attributes:
        weights_broken: Whether a weight gradient was not finite, `[]`.
        arrived: `Counts` of gradients that arrived at each layer. `beyond` covers all of them;
            spectra cover those that arrived at scale S, and gradients of 16-bit weights, which are
            at S, too. Peaks of zero are left out.
        produced: `Counts` of gradients that each layer produced, at scale S * 2**r. `beyond` also
            covers gradients that the layer brought to its own scale. Peaks are the largest and the
            smallest peak, and the largest of the gradients that these were computed from. The zero
            bin is 1 if some gradient tensor is entirely zero, else 0.
        rounded: `Counts` of gradients before each layer rounds them to a narrower format, at scale
            S * 2**r. Peaks of zero are left out. `None` if no layer rounds.
    """

    weights_broken: Tensor
    arrived: Counts
    produced: Counts
    rounded: Counts | None = None

    @property
    def finite(self) -> Tensor:
        """Whether all weight gradients are finite, a boolean scalar."""
        return ops.equal(self.weights_broken, 0)

    def packed(self) -> Tensor:
        """All counts as one vector, for a sum over replicas."""
        counts = [each for each in self[1:] if each is not None]
        columns = [x for each in counts for x in (each.beyond[:, None], *each[1:])]
        of_layers = ops.concatenate(columns, axis=1)
        return ops.concatenate([self.weights_broken[None], ops.ravel(of_layers)])

    @classmethod
    def unpacked(cls, vector: Tensor, num_layers: int, num_replicas: int = 1) -> "Evidence":
        """The evidence from the sum of the `packed` vectors of several replicas.

        Gradients that are zero on some replicas do not count as lost: a replica without examples
        sends zeros.
        """
        bins = spectrum.num_bins(COUNTING_FORMAT)
        of_layers = ops.reshape(vector[1:], (num_layers, -1, 1 + 2 * bins))
        arrived, produced, *rounded = (
            Counts(x[:, 0], x[:, 1 : 1 + bins], x[:, 1 + bins :])
            for x in (of_layers[:, i] for i in range(of_layers.shape[1]))
        )
        on_others = np.zeros(bins, "float32")
        on_others[spectrum.ZERO] = num_replicas - 1
        peaks = ops.maximum(produced.peaks - on_others, 0.0)
        return cls(vector[0], arrived, produced._replace(peaks=peaks), *rounded)


def evidence_of(
    reports: Report, gradients: list[Tensor], facts: LayerFacts, log2_scales: Tensor, sampled: Any
) -> Evidence:
    """Turns reports and weight gradients into counts.

    Args:
        reports: The `Report` of all layers, of arrays `[layers]`.
        gradients: List of all weight gradients, at scale S.
        facts: The `LayerFacts`.
        log2_scales: r of each layer, float32 `[layers]`.
        sampled: Whether this step takes a sample, a boolean scalar.

    Returns:
        An `Evidence`.
    """
    gradients = list(map(arrays.real_numbers, gradients))
    ownership, narrow, answerable = facts.ownership, facts.narrow, facts.answerable
    scales = ownership.scales(log2_scales)
    beyond_all = np.finfo("float32").max

    # The peaks of weight gradients, at the scales at which the layers wrote them.
    peaks = ops.concatenate([spectrum.peaks(gradients), np.zeros(1, "float32")])
    of_weights_at_s = ops.take(peaks, ownership.places, axis=0)
    of_weights = of_weights_at_s * scales[:, None]
    largest = ops.max(of_weights, axis=1)
    smallest = ops.min(ops.where(ownership.is_weight, of_weights, beyond_all), axis=1)
    made_narrow = ops.where(np.logical_and(narrow, answerable), largest, 0.0)
    made_wide = ops.where(np.logical_and(np.logical_not(narrow), answerable), largest, 0.0)

    # Together with the gradients of inputs.
    any_input = reports.produced.number > 0
    largest = ops.maximum(reports.produced.largest, ops.where(narrow, largest, 0.0))
    smallest = ops.minimum(
        ops.where(any_input, reports.produced.least, beyond_all),
        ops.where(narrow, smallest, beyond_all),
    )
    any_produced = ops.logical_or(any_input, np.logical_and(narrow, ownership.is_weight.any(1)))

    overflow = np.array([each.overflow for each in facts.float_formats], "float32")
    weights_whole = ops.logical_and(made_narrow < overflow, ops.isfinite(made_wide))
    inputs_broken = ops.maximum(reports.produced.broken, reports.arrived.shifted_broken)
    produced_broken = ops.logical_or(inputs_broken > 0, ops.logical_not(weights_whole))

    narrow_at_s = _are_narrow(gradients)[ownership.places]
    largest_at_s = reports.arrived.at_s
    if narrow_at_s.any():
        largest_of_weights = ops.max(ops.where(narrow_at_s, of_weights_at_s, 0.0), axis=1)
        largest_at_s = ops.maximum(largest_at_s, largest_of_weights)
    of_one = ops.stack([largest_at_s, reports.arrived.largest_at_own_scale, largest, smallest])
    at_s, set_out, largest, smallest = ops.unstack(_counts(of_one[..., None]), 4)
    # The gradient of an output that nothing uses is zero, and not lost.
    made = (largest * _NONZERO + smallest) * _flag(any_produced)[:, None]

    def samples() -> Tensor:
        """Spectra of what arrived at S and of what was produced, `[layers, 2, bins]`."""
        both: list[Arrived | Produced] = [reports.arrived, reports.produced]
        sampled = ops.stack([each.sample for each in both], axis=1)
        reported = _of_samples(sampled, ops.stack([each.number for each in both], axis=1))
        drawn_at_s = ops.take(_samples(gradients), ownership.places, axis=0)
        counted = np.logical_and(ownership.is_weight, narrow[:, None])
        of_weights = _sum_of_counts(drawn_at_s * scales[:, None, None], counted)
        at_s = reported[:, 0]
        if narrow_at_s.any():
            at_s = at_s + _sum_of_counts(drawn_at_s, narrow_at_s)
        return ops.stack([at_s, reported[:, 1] + of_weights], axis=1)

    drawn = devices.zeros_unless(sampled, samples, (len(narrow), 2, len(_NONZERO)))
    return Evidence(
        _flag(ops.logical_not(ops.all(ops.isfinite(peaks)))),
        Counts(_flag(reports.arrived.broken > 0), drawn[:, 0], at_s * _NONZERO),
        Counts(_flag(produced_broken), drawn[:, 1], made + set_out * _NONZERO),
        None if reports.rounded is None else _counts_of_rounded(reports.rounded, sampled),
    )


def _counts_of_rounded(reading: Rounded, sampled: Any) -> Counts:
    """`Counts` of a `Rounded` of arrays `[layers]`."""

    def finite(values: Tensor) -> Tensor:
        # A gradient that is finite in a narrow format is finite in a wider one.
        limited = ops.minimum(values, np.float32(COUNTING_FORMAT.largest))
        return ops.where(ops.isfinite(values), limited, values)

    drawn = devices.zeros_unless(
        sampled,
        lambda: _of_samples(finite(reading.sample), reading.number),
        (reading.number.shape[0], len(_NONZERO)),
    )
    peaks = _counts(finite(reading.largest)[:, None]) * _NONZERO
    return Counts(_flag(reading.beyond > 0), drawn, peaks)


def _counts(values: Tensor) -> Tensor:
    return spectrum.spectrum(values, COUNTING_FORMAT)


# 1 for every bin of a spectrum except the zero bin.
_NONZERO = np.ones(spectrum.num_bins(COUNTING_FORMAT), "float32")
_NONZERO[spectrum.ZERO] = 0.0


def _of_samples(samples: Tensor, numbers: Tensor) -> Tensor:
    """Spectra `[…, bins]` of the first `[…]` elements of samples `[…, SAMPLE_SIZE]`."""
    padding = (SAMPLE_SIZE - numbers)[..., None] * (1 - _NONZERO)
    return ops.maximum(_counts(samples) - padding, 0.0)


def _sum_of_counts(values: Tensor, counted: np.ndarray) -> Tensor:
    """Spectra `[layers, bins]` of the values `[layers, n, m]` whose `[layers, n]` is true."""
    return ops.sum(_counts(values) * counted[..., None].astype("float32"), axis=1)


def _are_narrow(gradients: list[Tensor]) -> np.ndarray:
    """Whether each gradient has less range than float32, then False, `[gradients + 1]`."""
    dtypes = (keras.backend.standardize_dtype(gradient.dtype) for gradient in gradients)
    return np.array([*map(is_narrow_dtype, dtypes), False])


def _flag(condition: Any) -> Tensor:
    return ops.cast(condition, "float32")


def _samples(gradients: list[Tensor]) -> Tensor:
    """Magnitudes of each gradient, then zeros, `[gradients + 1, SAMPLE_SIZE]`.

    Smaller tensors are repeated.
    """
    samples = [spectrum.sample(gradient, SAMPLE_SIZE) for gradient in gradients]
    sizes = [*(sample.shape[0] for sample in samples), 1]
    starts = np.cumsum([0, *sizes[:-1]])
    places = starts[:, None] + np.arange(SAMPLE_SIZE) % np.array(sizes)[:, None]
    return ops.take(
        ops.abs(ops.concatenate([*samples, np.zeros(1, "float32")])), places.astype("int32")
    )
