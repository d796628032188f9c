"""The report of one layer in one step: readings of its gradients.

The backward pass writes nothing but the report, as the "gradient" of a weight: one vector with
several *readings*, which are the largest magnitude of each gradient, and a sample of magnitudes. A
layer has one tap where gradients arrive, one where they leave, and possibly others where they are
rounded to a narrower format. Reports of several taps and calls add up: a sum of k magnitudes is
within log2(k) binades of the largest one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from tf_adaptive_ls.backend import arrays, devices
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT, FloatFormat
from tf_adaptive_ls.numerics.tiny_unit import NUM_UNITS, decoded, encoded

# Number of sampled elements of each weight gradient, and of the gradients of all inputs and all
# outputs of a layer. The standard deviation of the estimated binade below which a share of 1e-3
# lies is then 1.2 (over weight gradients of a VGG and a transformer; 1.9 with 256 elements, 0.8
# with 4096). The default rule moves a scale by half of the estimate.
SAMPLE_SIZE = 1008


class Arrived(NamedTuple):
    """A reading of the gradients that arrive at a layer's outputs: float32 `[…]`.

    In this and the other readings, "narrow" gradients have a format with less range than float32,
    which needs a loss scale. "Broken" is positive if any gradient is not finite. The sample comes
    last, `[…, SAMPLE_SIZE]`, padded with zeros, and the number of its elements comes before it.

    Attributes:
        broken: Of all gradients.
        shifted_broken: Of narrow gradients, at the scale of the layer.
        at_s: Largest magnitude of narrow gradients that arrived at scale S.
        largest_at_own_scale: Largest magnitude of all narrow gradients, at the scale of the layer.
        number: Number of elements of the sample.
        sample: Magnitudes of the gradients of `at_s`.
    """

    broken: Tensor
    shifted_broken: Tensor
    at_s: Tensor
    largest_at_own_scale: Tensor
    number: Tensor
    sample: Tensor


class Produced(NamedTuple):
    """A reading of the gradients of a layer's inputs, at the scale of the layer; see `Arrived`.

    Attributes:
        broken: Of all gradients.
        largest: Largest magnitude of the narrow gradients.
        least: The smallest per-tensor maximum among the narrow gradients.
        number: Number of elements of the sample.
        sample: Magnitudes of the gradients of `largest`.
    """

    broken: Tensor
    largest: Tensor
    least: Tensor
    number: Tensor
    sample: Tensor


class Rounded(NamedTuple):
    """A reading of gradients inside of a layer, before they are rounded to a narrower format.

    A layer may round at several places. See `Arrived`.

    Attributes:
        largest: Largest magnitude.
        beyond: Number of places with a gradient that saturates.
        number: Number of elements of the sample.
        sample: Magnitudes; each place has its own range of positions, the rest are zeros.
    """

    largest: Tensor
    beyond: Tensor
    number: Tensor
    sample: Tensor


class _Layout(NamedTuple):
    """The positions of a reading in a vector: units, then figures, then the sample."""

    kind: Any

    @property
    def num_figures(self) -> int:
        return len(self.kind._fields) - 1

    @property
    def size(self) -> int:
        return NUM_UNITS + self.num_figures + SAMPLE_SIZE

    @property
    def is_figure(self) -> np.ndarray:
        return np.arange(self.size) < NUM_UNITS + self.num_figures

    def unpacked(self, vectors: Tensor) -> Any:
        """The reading from vectors `[…, size]`."""
        numbers = decoded(vectors)
        *figures, number = (numbers[..., i] for i in range(self.num_figures))
        return self.kind(*figures, ops.round(number), numbers[..., self.num_figures :])


_OF_ARRIVED, _OF_PRODUCED, _OF_ROUNDED = map(_Layout, (Arrived, Produced, Rounded))
SIZE = _OF_ARRIVED.size + _OF_PRODUCED.size
SIZE_OF_ROUNDED = _OF_ROUNDED.size
_IS_FIGURE = np.concatenate([_OF_ARRIVED.is_figure, _OF_PRODUCED.is_figure])


class Report(NamedTuple):
    """The report of one layer, or of several, stacked.

    Attributes:
        arrived: `Arrived`.
        produced: `Produced`.
        rounded: `Rounded`, or `None` if no layer rounds gradients.
    """

    arrived: Arrived
    produced: Produced
    rounded: Rounded | None = None

    @classmethod
    def unpacked(cls, vectors: Tensor, of_rounded: Tensor | None = None) -> "Report":
        """The report from vectors `[…, SIZE]`, and `[…, SIZE_OF_ROUNDED]` of layers that round."""
        arrived, produced = vectors[..., : _OF_ARRIVED.size], vectors[..., _OF_ARRIVED.size :]
        rounded = None if of_rounded is None else _OF_ROUNDED.unpacked(of_rounded)
        return cls(_OF_ARRIVED.unpacked(arrived), _OF_PRODUCED.unpacked(produced), rounded)


def report_of_rounded(
    gradient: Tensor, float_format: FloatFormat, place: int, number: int
) -> Tensor:
    """The report of a gradient before it is rounded.

    Args:
        gradient: Tensor.
        float_format: The `FloatFormat` that it is rounded to.
        place: Index of the place, among those where the layer rounds, an int.
        number: Number of these places.

    Returns:
        A float32 vector `[SIZE_OF_ROUNDED]`, a `Rounded`.
    """
    size = SAMPLE_SIZE // number

    def of_part(gradients: list[Tensor]) -> Tensor:
        sample = spectrum.sample(gradients[0], size)
        before = np.zeros(place * size, "float32")
        after = np.zeros(SAMPLE_SIZE - len(before) - sample.shape[0], "float32")
        peak = spectrum.peaks(gradients)
        beyond = ops.logical_and(peak > np.float32(float_format.largest), ops.isfinite(peak))
        figures = [peak, ops.cast(beyond, "float32"), np.array([sample.shape[0]], "float32")]
        return encoded([*figures, before, sample, after])

    return _of_all_parts(of_part, [gradient], _OF_ROUNDED.is_figure)


def report_of_arrived(
    gradients: list[Tensor], divisors: list[Tensor | None], *, at_s: list[bool], narrow: list[bool]
) -> Tensor:
    """The report of the gradients of a layer's outputs.

    Args:
        gradients: List of tensors, as they arrived.
        divisors: List of scalars that bring each gradient to S * 2**r by division, `None` for 1.
        at_s: Whether each gradient is narrow and arrived at scale S.
        narrow: Whether each gradient is narrow.

    Returns:
        A float32 vector `[SIZE]` with an `Arrived`.
    """
    divisors = [np.float32(1.0) if divisor is None else divisor for divisor in divisors]

    def of_part(tensors: list[Tensor]) -> Tensor:
        gradients, divisors = tensors[: len(at_s)], tensors[len(at_s) :]
        peaks = spectrum.peaks(gradients)
        divisors = divisors[0] if len(divisors) == 1 else ops.stack(divisors)
        largest_at_own_scale = _largest(peaks / divisors, narrow)
        figures = [
            _is_broken(peaks),
            ops.cast(largest_at_own_scale >= COUNTING_FORMAT.overflow, "float32"),
            _largest(peaks, at_s),
            largest_at_own_scale,
        ]
        return encoded(_parts(figures, _chosen(gradients, at_s)), rest=_OF_PRODUCED.size)

    return _of_all_parts(of_part, [*map(arrays.real_numbers, gradients), *divisors], _IS_FIGURE)


def report_of_produced(gradients: list[Tensor], *, narrow: list[bool]) -> Tensor:
    """The report of the gradients of a layer's inputs.

    Args:
        gradients: List of tensors, at scale S * 2**r.
        narrow: Whether each gradient is narrow.

    Returns:
        A float32 vector `[SIZE]` with a `Produced`.
    """

    def of_part(gradients: list[Tensor]) -> Tensor:
        peaks = spectrum.peaks(gradients)
        figures = [_is_broken(peaks), _largest(peaks, narrow), _smallest(peaks, narrow)]
        return encoded(_parts(figures, _chosen(gradients, narrow)), place=_OF_ARRIVED.size)

    return _of_all_parts(of_part, list(map(arrays.real_numbers, gradients)), _IS_FIGURE)


def _of_all_parts(
    of_part: Callable[..., Any], tensors: list[Tensor], is_figure: np.ndarray
) -> Tensor:
    """The report of all devices, if one computation spans several.

    Each device reports the peaks of its part, and its part of the sample. The largest peaks are
    those of the whole, and the sample has the size of a single device's.
    """

    def report_of_part(tensors: list[Tensor], part: int, num_parts: int) -> Tensor:
        vector = of_part(tensors)
        if num_parts == 1:
            return vector
        places = np.arange(len(is_figure))
        return ops.where(ops.logical_or(is_figure, places % num_parts == part), vector, 0.0)

    return devices.max_over_shards(report_of_part, tensors)


def _parts(figures: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    gradients = gradients[:SAMPLE_SIZE]
    samples = [spectrum.sample(g, SAMPLE_SIZE // len(gradients)) for g in gradients]
    number = sum(sample.shape[0] for sample in samples)
    rest = np.zeros(SAMPLE_SIZE - number, "float32")
    return [ops.stack(figures), np.array([number], "float32"), *samples, rest]


def _is_broken(peaks: Tensor) -> Tensor:
    return ops.cast(ops.logical_not(ops.all(ops.isfinite(peaks))), "float32")


def _chosen(items: list[Tensor], chosen: list[bool]) -> list[Tensor]:
    return [item for item, is_so in zip(items, chosen, strict=True) if is_so]


def _largest(peaks: Tensor, chosen: list[bool]) -> Tensor:
    """The largest of the peaks `[n]` that are `chosen`, 0 if there is none."""
    return _reduced(ops.max, peaks, chosen, np.float32(0.0))


def _smallest(peaks: Tensor, chosen: list[bool]) -> Tensor:
    """The smallest of the peaks `[n]` that are `chosen`, 0 if there is none."""
    return _reduced(ops.min, peaks, chosen, np.finfo("float32").max)


def _reduced(reduce: Callable[..., Any], peaks: Tensor, chosen: list[bool], others: Any) -> Tensor:
    if not any(chosen):
        return np.float32(0.0)
    if len(chosen) == 1:
        return ops.reshape(peaks, ())
    return reduce(peaks if all(chosen) else ops.where(np.array(chosen), peaks, others))
