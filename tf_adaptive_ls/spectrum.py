"""The exponent spectrum of a tensor, and what can be read off it.

A spectrum is a float32 vector of counts, one *bin* each for

    [zero, binade min_exponent, …, binade max_exponent, non-finite]

of a `FloatFormat`. Counts add up: the spectrum of two tensors is the sum of
their spectra, whether they are two calls of a layer, two replicas or two
micro-batches. Values of a wider format that are too small for this one count in its
lowest binade, those too large as non-finite.
"""

import dataclasses

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls.float_format import FloatFormat

ZERO = 0
NONFINITE = -1


def num_bins(float_format):
    """Length of a spectrum of `float_format`."""
    return len(float_format.exponents) + 2


def sample(x, size):
    """Magnitudes of `size` elements spread over `x`, a float32 vector.

    One element is drawn from each of `size` equal stretches, at a fixed pseudo-random
    place in it: a constant stride would visit only some channels of a tensor whose row
    length it shares a factor with. Smaller tensors are gone through repeatedly.
    """
    x = ops.reshape(x, (-1,))
    within = np.random.default_rng(1910_12385).random(size)
    if x.shape[0] is not None:
        places = np.arange(size) + (within if x.shape[0] > size else 0.0)
        indices = (places * x.shape[0] / size).astype("int32")
    else:
        # Below 1 in float32, too, times any size of a tensor.
        places = np.minimum((np.arange(size) + within) / size, 1 - 2.0**-20)
        total = ops.cast(ops.shape(x)[0], "float32")
        indices = ops.cast(places.astype("float32") * total, "int32")
    return ops.abs(ops.cast(ops.take(x, indices), "float32"))


def peak(x):
    """Largest magnitude of all of `x`, a float32 scalar; infinite if any element is not finite.

    Negative if `x` is empty.
    """
    # XLA's maximum passes over NaN on a CPU.
    infinite = np.array(np.inf, keras.backend.standardize_dtype(x.dtype))
    return ops.cast(ops.max(ops.where(ops.isnan(x), infinite, ops.abs(x))), "float32")


def spectrum(values, float_format):
    """Spectrum `[..., bins]` of the magnitudes `values[..., n]`, float32; NaN is infinite."""
    values = ops.where(ops.isnan(values), np.float32(np.inf), values)
    edges = np.ldexp(np.float32(1), float_format.exponents)
    # The lowest binade also takes what is smaller still in float32, but for its
    # subnormals: processors may flush those to zero.
    edges[0] = 0.0
    edges = np.maximum(edges, np.finfo(np.float32).tiny)
    edges = np.append(edges, 2 * edges[-1])
    reached = ops.sum(ops.cast(values[..., None] >= edges, "float32"), axis=-2)
    total = ops.sum(ops.ones_like(values), axis=-1, keepdims=True)
    reached = ops.concatenate([total, reached], axis=-1)
    beyond = ops.concatenate([reached[..., 1:], ops.zeros_like(total)], axis=-1)
    return reached - beyond


def nonzero_total(counts):
    """How many finite, non-zero values `counts[..., bins]` holds, `[...]`."""
    return ops.sum(counts[..., 1:NONFINITE], axis=-1)


def top_exponent(counts, float_format):
    """Highest occupied binade of `counts[..., bins]`, `[...]`.

    `min_exponent - 1` where there is no finite, non-zero value.
    """
    exponents = np.asarray(float_format.exponents, "float32")
    occupied = counts[..., 1:NONFINITE] > 0
    return ops.max(ops.where(occupied, exponents, exponents[0] - 1), axis=-1)


def quantile_exponent(counts, share, float_format):
    """Lowest binade that more than `share` of the non-zero values do not exceed.

    Args:
        counts: Spectra `[..., bins]`.
        share: Float in `[0, 1)`.
        float_format: The `FloatFormat` of the bins.

    Returns:
        Exponents `[...]`; `max_exponent + 1` where there is no finite, non-zero
        value.
    """
    exponents = np.asarray(float_format.exponents, "float32")
    up_to = ops.cumsum(counts[..., 1:NONFINITE], axis=-1)
    enough = up_to > share * nonzero_total(counts)[..., None]
    return ops.min(ops.where(enough, exponents, exponents[-1] + 1), axis=-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """A spectrum as a person reads it.

    Args:
        counts: Float32 array `[bins]`, see the module.
        float_format: The `FloatFormat` of the bins.
    """

    counts: np.ndarray
    float_format: FloatFormat

    @property
    def zeros(self):
        """Count of zeros: structural ones (a ReLU's) and underflow together."""
        return float(self.counts[ZERO])

    @property
    def nonfinite(self):
        """Count of infinities and NaNs."""
        return float(self.counts[NONFINITE])

    @property
    def nonzero(self):
        """Count of finite, non-zero values."""
        return float(np.sum(self.counts[1:NONFINITE]))

    @property
    def binades(self):
        """Lowest and highest occupied binade, or `None` if all is zero."""
        occupied = np.flatnonzero(self.counts[1:NONFINITE])
        if not occupied.size:
            return None
        lowest = self.float_format.min_exponent
        return lowest + int(occupied[0]), lowest + int(occupied[-1])

    @property
    def subnormal_share(self):
        """Share of the non-zero values that lack full precision, `nan` if none."""
        normal = self.float_format.min_normal_exponent - self.float_format.min_exponent
        return self._share(np.sum(self.counts[1 : 1 + normal]))

    @property
    def underflow_share(self):
        """Estimated share of values lost to underflow, `nan` if nothing was seen.

        Zeros cannot be counted: most are no loss but a ReLU's. What is lost is
        inferred from the lowest binade, which rounding fills from
        `[u/2, 3u/2)` (u the smallest subnormal) while `[0, u/2)` becomes zero:
        half as wide, so half as many, for any density that is even near zero.
        """
        lost = 0.5 * float(self.counts[1])
        return lost / (self.nonzero + lost) if self.nonzero else float("nan")

    def _share(self, count):
        return float(count / self.nonzero) if self.nonzero else float("nan")
