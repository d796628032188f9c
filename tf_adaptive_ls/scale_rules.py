"""Rules that choose loss scales from spectra: pure functions, one object each."""

import abc
import dataclasses
import math
import statistics

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls import spectrum
from tf_adaptive_ls.float_format import FloatFormat


class ScaleRule(abc.ABC):
    """How far to move each layer's log2 scale, given what was seen at it.

    Subclass it as a frozen dataclass to bring a rule of your own; every field is
    then saved with the optimizer.
    """

    @property
    @abc.abstractmethod
    def backoff(self):
        """By how many binades an overflow lowers the scale at fault, an int >= 0."""

    @abc.abstractmethod
    def __call__(self, samples, peaks, float_format):
        """Change of log2 scale, in whole binades.

        Args:
            samples: Spectra `[layers, bins]` of a sample of each layer's
                gradients at its present scale.
            peaks: Spectra `[layers, bins]` of the exact largest magnitude of
                each tensor that the sample was taken from, and of the gradient
                that the layer set out from.
            float_format: The `FloatFormat` that the gradients are written in.

        Returns:
            Whole numbers `[layers]`, float32; 0 for a layer that saw nothing.
        """

    def get_config(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@dataclasses.dataclass(frozen=True)
class _TailRule(ScaleRule):
    """Moves a layer up as far as its tail needs and its largest gradient leaves room.

        room   = (largest binade) - headroom - (binade of the largest gradient)
        change = min(max(needed, 0), room)

    What is `needed` tells the subclass. When both cannot hold, overflow wins. A layer
    whose gradients all underflowed moves up by all the room there is.
    """

    underflow: float = 1e-3
    headroom: int = 3

    def __post_init__(self):
        _check_share("underflow", self.underflow)
        _check_headroom(self.headroom)

    @property
    def backoff(self):
        return max(self.headroom, 1)

    @abc.abstractmethod
    def needed(self, samples, float_format):
        """By how many binades to move up, `[layers]`, for spectra `[layers, bins]`."""

    def __call__(self, samples, peaks, float_format):
        top = ops.maximum(
            spectrum.top_exponent(samples, float_format),
            spectrum.top_exponent(peaks, float_format),
        )
        seen = top >= float_format.min_exponent
        room = float_format.max_exponent - self.headroom - top
        all_underflowed = spectrum.nonzero_total(samples) == 0
        needed = ops.maximum(self.needed(samples, float_format), 0.0)
        return ops.where(seen, ops.minimum(ops.where(all_underflowed, room, needed), room), 0.0)


@keras.saving.register_keras_serializable("tf_adaptive_ls")
@dataclasses.dataclass(frozen=True)
class QuantileRule(_TailRule):
    """Keeps all but a share of a layer's gradients at full precision.

    With `q` the binade of the `underflow` quantile of a layer's non-zero gradients,
    and `p` that of its largest one:

        needed = (smallest normal binade) - q
        room   = (largest binade) - headroom - p
        change = min(max(needed, 0), room)

    so that at most a share `underflow` of the gradients lacks full precision (the
    tail that underflows to zero begins another ten binades below in float16),
    and the largest keeps `headroom` binades from overflow. When both cannot
    hold, overflow wins. A layer whose gradients all underflowed moves up by all
    the room there is. Zeros are left out of `q`: a ReLU makes them on purpose.

    Args:
        underflow: Float in (0, 1). Share of the non-zero gradients that may lie
            below the smallest normal value.
        headroom: Int >= 0. Binades kept free above the largest gradient, for the
            next batches to differ in.

    Raises:
        ValueError: If a setting is impossible.
    """

    def needed(self, samples, float_format):
        lowest = spectrum.quantile_exponent(samples, self.underflow, float_format)
        return float_format.min_normal_exponent - lowest


@keras.saving.register_keras_serializable("tf_adaptive_ls")
@dataclasses.dataclass(frozen=True)
class GaussianRule(_TailRule):
    """The rule of Zhao, Vogel and Ahmed (2019), for comparison.

    Takes the gradients as normal with mean zero and the measured second moment
    `s**2`, and the scale `a` for which a share `underflow` of them lies below the
    smallest representable value `u`, P(|x| < u) = erf(u / (a s sqrt(2))):

        a = u / (sqrt(2) erfinv(underflow) s)          (arXiv 1910.12385, section 3)

    rounded down to a power of two, at least 1, and limited by the room there is.
    Real gradients have heavier tails than that, so that more of them underflow
    than asked for.

    Args:
        underflow: Float in (0, 1). Share of gradients that may underflow if they
            are normal; the authors use 1e-3.
        headroom: Int >= 0. Binades kept free above the largest gradient.

    Raises:
        ValueError: If a setting is impossible.
    """

    def needed(self, samples, float_format):
        # The mean square over a binade [v, 2v) of even density is 7/3 v**2. The
        # exponents are taken relative to the top, lest float32 leave its range.
        exponents = np.asarray(float_format.exponents, "float32")
        top = spectrum.top_exponent(samples, float_format)
        relative = ops.minimum(exponents - top[..., None], 0.0)
        squares = samples[..., 1 : spectrum.NONFINITE] * 4.0**relative * (7 / 3)
        total = ops.sum(samples[..., : spectrum.NONFINITE], axis=-1)
        mean_square = ops.sum(squares, axis=-1) / ops.maximum(total, 1.0)
        log2_s = top + 0.5 * ops.log2(ops.maximum(mean_square, 1e-30))
        # sqrt(2) erfinv(T) is the standard normal quantile at (1 + T) / 2.
        quantile = statistics.NormalDist().inv_cdf((1 + self.underflow) / 2)
        return ops.floor(math.log2(float_format.smallest_subnormal / quantile) - log2_s)


@keras.saving.register_keras_serializable("tf_adaptive_ls")
@dataclasses.dataclass(frozen=True)
class FixedRule(ScaleRule):
    """Leaves every scale where it is, whatever happens: a baseline."""

    @property
    def backoff(self):
        return 0

    def __call__(self, samples, peaks, float_format):
        return ops.zeros_like(samples[..., 0])


def _check_share(name, value):
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
        raise ValueError(
            f"Expected `{name}` to be a share of gradients, between 0 and 1. "
            f"Received: {name}={value!r}. The default is 1e-3."
        )


def _check_headroom(value):
    # A format narrower than float16 may hold less: the rule is then all headroom.
    float16 = FloatFormat("float16")
    most = float16.max_exponent - float16.min_normal_exponent
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < most:
        raise ValueError(
            "Expected `headroom` to be a whole number of binades, at least 0 and "
            f"less than the {most} that float16 has. Received: headroom={value!r}. "
            "The default is 3."
        )
