"""What the backward pass of a layer reports: how large its gradients were.

A report is the only thing that a backward pass writes. It comes out as the "gradient" of
a weight, one vector `[SIZE]`, made of the largest magnitude of each gradient and a sample
of magnitudes. A layer has a *tap* where gradients arrive and one where they leave; their
reports, and those of several calls, add up. A sum of k magnitudes is within log2(k)
binades of the largest.
"""

from typing import NamedTuple

import numpy as np
from keras import ops

from tf_adaptive_ls.numerics import backend, spectrum
from tf_adaptive_ls.numerics.backend import Tensor
from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT
from tf_adaptive_ls.numerics.tiny_unit import NUM_UNITS, heard, told

# Elements that are looked at of each gradient of a weight, and of the gradients of all
# inputs and of all outputs of a layer. The binade that a share of 1e-3 lies below is then
# known to 1.2 (standard deviation, over weight gradients of a VGG and a transformer; 1.9
# with 256, 0.8 with 4096), and the default rule moves a scale by half of that.
SAMPLE_SIZE = 1008


class Report(NamedTuple):
    """A report, or those of several layers, stacked: float32 `[…]`, samples `[…, size]`.

    "Narrow" are gradients that are written in a format that has not the range of float32:
    those that a scale is for. What is "broken" is more than zero if anything is not finite.

    Attributes:
        arrived_broken: Of all gradients that arrived at the layer's outputs.
        shifted_broken: Of the narrow ones, once they are at the layer's own scale.
        arrived_at_s: The largest of the narrow gradients that arrived at scale S.
        set_out_from: The largest of all narrow ones that arrived, once they are at the
            layer's own scale.
        num_arrived: How many elements the next has.
        arrived_sample: Magnitudes of `arrived_at_s`, followed by zeros.
        produced_broken: Of all input gradients.
        produced: The largest of the narrow input gradients, at the layer's own scale.
        produced_least: The largest of that one of them that has the smallest.
        num_produced: How many elements the next has.
        produced_sample: Magnitudes of `produced`, followed by zeros.
    """

    arrived_broken: Tensor
    shifted_broken: Tensor
    arrived_at_s: Tensor
    set_out_from: Tensor
    num_arrived: Tensor
    arrived_sample: Tensor
    produced_broken: Tensor
    produced: Tensor
    produced_least: Tensor
    num_produced: Tensor
    produced_sample: Tensor

    @classmethod
    def unpacked(cls, vectors):
        """The fields of reports `[…, SIZE]`."""
        arrived, produced = vectors[..., : _OF_ARRIVALS.size], vectors[..., _OF_ARRIVALS.size :]
        return cls(*_OF_ARRIVALS.fields(arrived), *_OF_PRODUCTS.fields(produced))


class _Layout(NamedTuple):
    """Where in a vector figures and a sample are: behind the units, one after the other."""

    num_figures: int

    @property
    def size(self):
        return NUM_UNITS + self.num_figures + SAMPLE_SIZE

    @property
    def is_figure(self):
        return np.arange(self.size) < NUM_UNITS + self.num_figures

    def fields(self, vectors):
        numbers = heard(vectors)
        figures = (numbers[..., i] for i in range(self.num_figures - 1))
        number = ops.round(numbers[..., self.num_figures - 1])  # of elements
        return *figures, number, numbers[..., self.num_figures :]


_OF_ARRIVALS, _OF_PRODUCTS, _OF_OPERANDS = _Layout(5), _Layout(4), _Layout(3)
SIZE = _OF_ARRIVALS.size + _OF_PRODUCTS.size
OPERAND_SIZE = _OF_OPERANDS.size
_IS_FIGURE = np.concatenate([_OF_ARRIVALS.is_figure, _OF_PRODUCTS.is_figure])


class OperandReport(NamedTuple):
    """What is told of gradients that are about to be rounded to float8; float32.

    They are the operands of a product: what comes to its output. A vector of its own, since
    most layers have none. Those of several products in a layer add up, too.

    Attributes:
        largest: The largest magnitude, `[…]`.
        saturated: How many products had one that their format does not hold, `[…]`.
        number: How many elements the next has, `[…]`.
        sample: Magnitudes, each product's at a place of its own among zeros, `[…, size]`.
    """

    largest: Tensor
    saturated: Tensor
    number: Tensor
    sample: Tensor

    @classmethod
    def unpacked(cls, vectors):
        """The fields of reports `[…, OPERAND_SIZE]`."""
        return cls(*_OF_OPERANDS.fields(vectors))


def report_of_operand(gradient, float_format, place, number):
    """What is to be told of the gradient of a product's output before it is rounded.

    Args:
        gradient: Tensor.
        float_format: The `FloatFormat` that it is rounded to.
        place: Which of the products of its layer it belongs to, an int.
        number: How many of them there are.

    Returns:
        A float32 vector `[OPERAND_SIZE]`, an `OperandReport`.
    """
    size = SAMPLE_SIZE // number

    def of_part(gradients):
        sample = spectrum.sample(gradients[0], size)
        before = np.zeros(place * size, "float32")
        after = np.zeros(SAMPLE_SIZE - len(before) - sample.shape[0], "float32")
        peak = spectrum.peaks(gradients)
        beyond = ops.logical_and(peak > np.float32(float_format.largest), ops.isfinite(peak))
        figures = [peak, ops.cast(beyond, "float32"), np.float32([sample.shape[0]])]
        return told([*figures, before, sample, after])

    return _of_all_parts(of_part, [gradient], _OF_OPERANDS.is_figure)


def report_of_arrivals(gradients, divisors, *, at_s, narrow):
    """What is to be told of the gradients of a layer's outputs.

    Args:
        gradients: List of tensors, as they arrived.
        divisors: List of scalars, by which each is divided to be at S * 2**r, `None` for 1.
        at_s: Whether each is narrow and arrived at scale S.
        narrow: Whether each is narrow.

    Returns:
        A float32 vector `[SIZE]`, the first half of a `Report`.
    """
    divisors = [np.float32(1.0) if divisor is None else divisor for divisor in divisors]

    def of_part(tensors):
        gradients, divisors = tensors[: len(at_s)], tensors[len(at_s) :]
        peaks = spectrum.peaks(gradients)
        divisors = divisors[0] if len(divisors) == 1 else ops.stack(divisors)
        set_out_from = _largest(peaks / divisors, narrow)
        figures = [
            _is_broken(peaks),
            ops.cast(set_out_from >= COUNTING_FORMAT.overflow, "float32"),
            _largest(peaks, at_s),
            set_out_from,
        ]
        return told(_parts(figures, _chosen(gradients, at_s)), rest=_OF_PRODUCTS.size)

    return _of_all_parts(of_part, [*map(backend.real_numbers, gradients), *divisors], _IS_FIGURE)


def report_of_products(gradients, *, narrow):
    """What is to be told of the gradients of a layer's inputs.

    Args:
        gradients: List of tensors, at scale S * 2**r.
        narrow: Whether each is narrow.

    Returns:
        A float32 vector `[SIZE]`, the second half of a `Report`.
    """

    def of_part(gradients):
        peaks = spectrum.peaks(gradients)
        figures = [_is_broken(peaks), _largest(peaks, narrow), _smallest(peaks, narrow)]
        return told(_parts(figures, _chosen(gradients, narrow)), place=_OF_ARRIVALS.size)

    return _of_all_parts(of_part, list(map(backend.real_numbers, gradients)), _IS_FIGURE)


def _of_all_parts(of_part, tensors, is_figure):
    """The report of all devices, where one computation spans several.

    Each tells the peaks of its part, and of its samples every so many elements: the
    largest of all are then those of the whole, and its sample is as large as of one.
    """

    def told_by(tensors, part, num_parts):
        vector = of_part(tensors)
        if num_parts == 1:
            return vector
        places = np.arange(len(is_figure))
        return ops.where(ops.logical_or(is_figure, places % num_parts == part), vector, 0.0)

    return backend.max_over_shards(told_by, tensors)


def _parts(figures, gradients):
    gradients = gradients[:SAMPLE_SIZE]
    samples = [spectrum.sample(g, SAMPLE_SIZE // len(gradients)) for g in gradients]
    number = sum(sample.shape[0] for sample in samples)
    rest = np.zeros(SAMPLE_SIZE - number, "float32")
    return [ops.stack(figures), np.float32([number]), *samples, rest]


def _is_broken(peaks):
    return ops.cast(ops.logical_not(ops.all(ops.isfinite(peaks))), "float32")


def _chosen(items, chosen):
    return [item for item, is_so in zip(items, chosen, strict=True) if is_so]


def _largest(peaks, chosen):
    """The largest of those peaks `[n]` that are `chosen`, 0 if none is."""
    return _reduced(ops.max, peaks, chosen, np.float32(0.0))


def _smallest(peaks, chosen):
    """The smallest of those peaks `[n]` that are `chosen`, 0 if none is."""
    return _reduced(ops.min, peaks, chosen, np.finfo("float32").max)


def _reduced(reduce, peaks, chosen, others):
    if not any(chosen):
        return np.float32(0.0)
    if len(chosen) == 1:
        return ops.reshape(peaks, ())
    return reduce(peaks if all(chosen) else ops.where(np.array(chosen), peaks, others))
