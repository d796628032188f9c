"""Spectra: histograms of magnitudes by binade, and readings of them.

A spectrum is a float32 vector of counts, with one *bin* each for

    [zero, binade min_exponent, …, binade max_exponent, non-finite]

of a `FloatFormat`. Counts add up: the spectrum of two tensors is the sum of their spectra, whether
they come from two calls of a layer, two replicas or two micro-batches. Values of a wider format
that are too small for this one count in its lowest binade, and values that are too large as
non-finite.
"""

import dataclasses
import functools
import math

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls.backend import arrays
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.float_format import FloatFormat

ZERO = 0
NONFINITE = -1


def num_bins(float_format: FloatFormat) -> int:
    """The length of a spectrum of `float_format`."""
    return len(float_format.exponents) + 2


def sample(x: Tensor, size: int) -> Tensor:
    """At most `size` elements, spread evenly over `x`, a float32 vector.

    The stride has no common factor with the size of `x`; otherwise, only some channels would be
    sampled. If the size is unknown before the computation runs, there are always `size` elements,
    all zero if `x` is empty.
    """
    x = ops.reshape(x, (-1,))
    if x.shape[0] is None:
        places = ((np.arange(size) + 0.5) / size).astype("float32")
        total = ops.shape(x)[0]
        places = ops.cast(places * ops.cast(total, "float32"), "int32")
        # A tensor without elements, such as that of a replica without examples, has no samples.
        number = size * ops.minimum(total, 1)
        taken = ops.take(x, places[:number])
        x = ops.reshape(ops.concatenate([taken, ops.zeros(size - number, x.dtype)]), (size,))
    else:
        stride = max(-(-x.shape[0] // size), 1)
        while math.gcd(stride, x.shape[0]) > 1:
            stride += 1
        x = x[::stride] if stride > 1 else x
    return ops.cast(x, "float32")


def peaks(tensors: list[Tensor]) -> Tensor:
    """Largest magnitude of each of several tensors, float32 `[len(tensors)]`.

    Infinite if any element is not finite, zero if there are no elements. Read as integers, the bits
    of magnitudes are in the order finite < infinite < NaN, so one integer maximum finds the peak
    and whether all elements are finite. (A floating-point maximum may ignore NaN, or is not
    vectorized if it must not.)
    """
    places: dict[str, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(keras.backend.standardize_dtype(tensor.dtype), []).append(place)
    if not places:
        return ops.zeros(0)
    of_dtypes = [_peaks([tensors[place] for place in places[dtype]], dtype) for dtype in places]
    if len(of_dtypes) == 1:
        return of_dtypes[0]
    order = np.argsort(np.concatenate(list(places.values()))).astype("int32")
    return ops.take(ops.concatenate(of_dtypes), order)


def _peaks(tensors: list[Tensor], dtype: str) -> Tensor:
    infinity = np.array(np.inf, dtype)
    bits = f"int{8 * infinity.itemsize}"
    no_sign = np.array(np.iinfo(bits).max, bits)
    magnitudes = [ops.bitwise_and(arrays.bitcast(x, bits), no_sign) for x in tensors]
    largest = arrays.largest_of_each(magnitudes)
    # The maximum of a tensor that turns out to be empty is the smallest integer, which is minus
    # zero.
    largest = ops.minimum(largest, infinity.view(bits))
    return ops.cast(arrays.bitcast(largest, dtype), "float32")


def spectrum(values: Tensor, float_format: FloatFormat) -> Tensor:
    """Spectrum `[..., bins]` of magnitudes `values[..., n]`, float32; NaN counts as infinite."""
    values = ops.where(ops.isnan(values), np.finfo("float32").max, values)
    edges = np.ldexp(np.float32(1), float_format.exponents)
    # The lowest binade also counts smaller float32 numbers, except subnormals, which processors may
    # flush to zero.
    edges[0] = 0.0
    edges = np.maximum(edges, np.finfo(np.float32).tiny)
    edges = np.append(edges, 2 * edges[-1])
    reached = ops.sum(ops.cast(values[..., None] >= edges, "float32"), axis=-2)
    total = ops.sum(ops.ones_like(values), axis=-1, keepdims=True)
    reached = ops.concatenate([total, reached], axis=-1)
    beyond = ops.concatenate([reached[..., 1:], ops.zeros_like(total)], axis=-1)
    return reached - beyond


def rebinned(counts: Tensor, source: FloatFormat, target: FloatFormat) -> Tensor:
    """Spectra `[…, bins]` of the format `source`, as spectra of the format `target`."""
    if source == target:
        return counts
    return counts @ _rebinning(source, target)


@functools.cache
def _rebinning(source: FloatFormat, target: FloatFormat) -> np.ndarray:
    matrix = np.zeros((num_bins(source), num_bins(target)), "float32")
    matrix[ZERO, ZERO] = matrix[NONFINITE, NONFINITE] = 1.0
    for place, exponent in enumerate(source.exponents, 1):
        within = 1 + max(exponent - target.min_exponent, 0)
        matrix[place, NONFINITE if exponent > target.max_exponent else within] = 1.0
    return matrix


def shifted(counts: Tensor, binades: int) -> Tensor:
    """Spectra `[…, bins]` of values times `2**binades`, an int.

    Values that become too small count in the lowest binade, values that become too large as
    non-finite.
    """
    finite = counts.shape[-1] - 2
    matrix = np.zeros((finite + 2, finite + 2), "float32")
    matrix[ZERO, ZERO] = matrix[NONFINITE, NONFINITE] = 1.0
    for place in range(1, finite + 1):
        matrix[place, min(max(place + binades, 1), finite + 1)] = 1.0
    return counts @ matrix


def nonzero_total(counts: Tensor) -> Tensor:
    """Number of finite, non-zero values of spectra `counts[..., bins]`, `[...]`.

    See `ScaleRule` for an example.
    """
    return ops.sum(counts[..., 1:NONFINITE], axis=-1)


def top_exponent(counts: Tensor, float_format: FloatFormat) -> Tensor:
    """Highest occupied binade of spectra `counts[..., bins]`, `[...]`.

    `min_exponent - 1` where there is no finite, non-zero value. See `ScaleRule` for an example.
    """
    exponents = np.asarray(float_format.exponents, "float32")
    occupied = counts[..., 1:NONFINITE] > 0
    return ops.max(ops.where(occupied, exponents, exponents[0] - 1), axis=-1)


def quantile_exponent(counts: Tensor, share: float, float_format: FloatFormat) -> Tensor:
    """Lowest binade with more than `share` of the non-zero values in it or below it.

    ```python
    samples = als.snapshot_run(model, optimizer).spectra[-1]
    print(als.quantile_exponent(samples, 0.5, als.FloatFormat("float16")))
    ```

    Args:
        counts: Spectra `[..., bins]`.
        share: Float in `[0, 1)`.
        float_format: The `FloatFormat` of the bins.

    Returns:
        Exponents `[...]`; `max_exponent + 1` where there is no finite, non-zero value.
    """
    exponents = np.asarray(float_format.exponents, "float32")
    up_to = ops.cumsum(counts[..., 1:NONFINITE], axis=-1)
    enough = up_to > share * nonzero_total(counts)[..., None]
    return ops.min(ops.where(enough, exponents, exponents[-1] + 1), axis=-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """A histogram of magnitudes by binade, with readings.

    ```python
    figure = als.snapshot_run(model, optimizer)
    spectrum = als.Spectrum(figure.spectra[-1, 0], als.FloatFormat("float16"))
    print(spectrum.binades, spectrum.zeros)
    ```

    Args:
        counts: Float32 array `[bins]`: zeros, each binade of the format, non-finite values.
        float_format: The `FloatFormat` of the bins.
    """

    counts: np.ndarray
    float_format: FloatFormat

    @property
    def zeros(self) -> float:
        """Number of zeros: from underflow, and on purpose, such as a ReLU's."""
        return float(self.counts[ZERO])

    @property
    def nonfinite(self) -> float:
        """Number of infinities and NaN."""
        return float(self.counts[NONFINITE])

    @property
    def nonzero(self) -> float:
        """Number of finite, non-zero values."""
        return float(np.sum(self.counts[1:NONFINITE]))

    @property
    def binades(self) -> tuple[int, int] | None:
        """Lowest and highest occupied binade. `None` if all values are zero."""
        occupied = np.flatnonzero(self.counts[1:NONFINITE])
        if not occupied.size:
            return None
        lowest = self.float_format.min_exponent
        return lowest + int(occupied[0]), lowest + int(occupied[-1])

    @property
    def subnormal_share(self) -> float:
        """Share of the non-zero values that are subnormal. NaN if there are none."""
        normal = self.float_format.min_normal_exponent - self.float_format.min_exponent
        return self._share(np.sum(self.counts[1 : 1 + normal]))

    @property
    def underflow_share(self) -> float:
        """Estimated share of values that became zero by underflow. NaN if no values were seen.

        Counting zeros would not work, because a ReLU produces many. The estimate uses the lowest
        binade: rounding fills it from `[u/2, 3u/2)`, with u the smallest subnormal, and makes `[0,
        u/2)` zero. The second interval is half as wide, so it holds about half as many values, for
        any density that is nearly constant close to zero.
        """
        lost = 0.5 * float(self.counts[1])
        return lost / (self.nonzero + lost) if self.nonzero else float("nan")

    def _share(self, count: np.ndarray) -> float:
        return float(count / self.nonzero) if self.nonzero else float("nan")
