"""Rules: pure functions from spectra to changes of scales."""

import abc
import dataclasses
import math
import statistics
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls.backend.arguments import (
    MAX_LOG2_SCALE,
    checked_settings,
    is_number,
    is_scale_value,
    is_whole,
)
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.float_format import FloatFormat

# An exponent below that of any gradient.
NOTHING_SEEN = -1024.0


@dataclasses.dataclass(frozen=True)
class ScaleRule(abc.ABC):
    """Decides how far to move the log2 scale of each layer, from its gradients.

    To write your own rule, subclass it as a frozen dataclass; every field is then saved with the
    optimizer. This rule keeps the largest gradient `headroom` binades below the top of the format:

    ```python
    import dataclasses

    import keras
    from keras import ops

    @keras.saving.register_keras_serializable("my_package")
    @dataclasses.dataclass(frozen=True)
    class TopRule(als.ScaleRule):
        headroom: int = 4

        def __call__(self, samples, peaks, memory, float_format):
            top = als.top_exponent(peaks, float_format)
            change = float_format.max_exponent - self.headroom - top
            return ops.where(als.nonzero_total(peaks) > 0, change, 0.0), memory

    optimizer = als.AdaptiveLossScaleOptimizer("adam", rule=TopRule(headroom=3))
    ```
    """

    def backoff(self, float_format: FloatFormat) -> int:
        """By how many binades an overflow lowers the scale at fault, an int >= 0.

        By default as many as `float_format` has for subnormals: what was normal is
        then still there, if less precise, until the next step measures how far to
        come back up.
        """
        return float_format.min_normal_exponent - float_format.min_exponent

    @property
    def memory_size(self) -> int:
        """How many numbers the rule keeps about each layer, an int >= 0."""
        return 0

    def check(self, float_format: FloatFormat) -> None:
        """Raises a `ValueError` if the rule cannot be used for gradients of that format."""
        backoff = self.backoff(float_format)
        if not isinstance(backoff, int) or backoff < 0:
            raise ValueError(
                "Expected a rule's `backoff` to be a whole number of binades, at least 0. "
                f"Received: {backoff!r} from {self!r} for {float_format.name}."
            )

    @abc.abstractmethod
    def __call__(
        self, samples: Tensor, peaks: Tensor, memory: Tensor, float_format: FloatFormat
    ) -> tuple[Tensor, Tensor]:
        """The change of each layer's log2 scale, in whole binades.

        Each layer is treated by itself. The loss scale S is updated by the same call, as one more
        layer.

        Args:
            samples: Spectra `[layers, bins]` of a sample of each layer's gradients, at its current
                scale. All zero on most steps, because samples take time.
            peaks: Spectra `[layers, bins]` of the largest magnitude of each tensor, exact. A tensor
                of zeros counts as zero. The largest narrow gradient inside of the layer, at the
                scale of the layer, counts as well, unless it is zero.
            memory: Float32 `[layers, memory_size]`, the memory that the rule returned on the last
                step; `NOTHING_SEEN` at first. It must consist of exponents at the scale of the
                layer, because it is shifted along with the scale.
            float_format: The `FloatFormat` of the gradients.

        Returns:
            Float32 `[layers]`, whole numbers, 0 for a layer without gradients; and the new memory,
            at the scale before the change.
        """

    def get_config(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ScaleRule":
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**checked_settings(config, cls.__name__, names))


@keras.saving.register_keras_serializable("tf_adaptive_ls")
@dataclasses.dataclass(frozen=True)
class QuantileRule(ScaleRule):
    """Moves the gradients of a layer to the middle of the normal range of its format.

    With `q` the binade of the `underflow` quantile of the non-zero gradients of the layer, and `p`
    the binade of the largest gradient, now or in the past:

        p      = max(binade of the largest gradient, last p - forget)
        spare  = (largest binade) - (smallest normal binade) - (p - q)
        above  = max(spare // 2, headroom)
        change = (largest binade) - above - p

    Unused binades of the format are thus divided equally between growth, which would overflow, and
    shrinking, which would lose precision. If there are too few, the largest gradient keeps
    `headroom` binades of distance from overflow, and the smallest gradients become subnormal. On
    steps without a sample, the rule only maintains `headroom`.

    A gradient that is not finite counts as one of the next binade. Overflows between taps are
    thereby remembered, even if the gradients that the taps see are small.

    Zeros do not count for `q`, because a ReLU produces them on purpose. A tensor that is zero
    everywhere may have underflowed completely, so the layer then raises its scale as far as
    `headroom` allows.

    ```python
    optimizer = als.AdaptiveLossScaleOptimizer("adam", rule=als.QuantileRule(headroom=7))
    ```

    Args:
        underflow: Float in (0, 1). Share of the non-zero gradients that counts as the tail.
        headroom: Int >= 0. Minimum number of binades between the largest gradient and overflow, for
            differences between batches.
        forget: Float >= 0. Number of binades per step by which the largest past gradient is
            reduced.

    Raises:
        ValueError: If a setting is impossible.
    """

    # Defaults were chosen by `./dev benchmark convergence --variations`: the number of skipped
    # steps out of 2,000 (three seeds) on the model whose gradients change most, 17 layers with
    # vanishing gradients. The share makes no difference between 1e-1 and 1e-3, the share of the
    # paper.
    underflow: float = 1e-3
    # The smallest headroom that skips no step: 1 skips eleven, 3 skips some in two of eight runs.
    headroom: int = 5
    # The largest factor that skips no step: 0.1 skips three, no memory at all 107. Scales still
    # follow a loss that shrinks by 2**20 in 2,000 steps.
    forget: float = 0.01

    def __post_init__(self) -> None:
        _check_share("underflow", self.underflow)
        _check_headroom(self.headroom)
        _check_forget(self.forget)

    def check(self, float_format: FloatFormat) -> None:
        super().check(float_format)
        _check_headroom_fits(self.headroom, float_format)

    @property
    def memory_size(self) -> int:
        return 1

    def __call__(
        self, samples: Tensor, peaks: Tensor, memory: Tensor, float_format: FloatFormat
    ) -> tuple[Tensor, Tensor]:
        seen = _top(samples, peaks, float_format)
        # A non-finite gradient was too large by at least one binade.
        overflowed = peaks[..., spectrum.NONFINITE] > 0
        now = ops.where(overflowed, float_format.max_exponent + 1.0, seen)
        # The lowest binade also contains everything smaller, so it is not remembered.
        remembered = ops.where(now > float_format.min_exponent, now, NOTHING_SEEN)
        remembered = ops.maximum(remembered, memory[:, 0] - self.forget)
        top = ops.maximum(now, ops.ceil(remembered))
        room = float_format.max_exponent - self.headroom - top
        tail = spectrum.quantile_exponent(samples, self.underflow, float_format)
        normal = float_format.max_exponent - float_format.min_normal_exponent
        spare = normal - (top - ops.minimum(tail, top))
        to_middle = float_format.max_exponent - ops.floor(spare / 2) - top
        change = ops.where(_is_sampled(samples), ops.minimum(to_middle, room), ops.minimum(room, 0))
        change = ops.where(_any_vanished(peaks), room, change)
        return _if_seen(seen, change, float_format), remembered[:, None]


@keras.saving.register_keras_serializable("tf_adaptive_ls")
@dataclasses.dataclass(frozen=True)
class GaussianRule(ScaleRule):
    """The rule of Zhao, Vogel and Ahmed (2019), for comparison.

    It assumes that gradients are normal with mean zero and the measured second moment `s**2`. The
    scale `a` is such that a share `underflow` of them is below the smallest representable value
    `u`, P(|x| < u) = erf(u / (a s sqrt(2))):

        a = u / (sqrt(2) erfinv(underflow) s)          (arXiv 1910.12385, section 3)

    The result is rounded down to a power of two, at least 1, and limited by `headroom`. Real
    gradients have heavier tails, so more of them underflow than specified.

    ```python
    optimizer = als.AdaptiveLossScaleOptimizer("adam", rule=als.GaussianRule(underflow=1e-3))
    ```

    Args:
        underflow: Float in (0, 1). Share of normal gradients that may underflow. The authors use
            1e-3.
        headroom: Int >= 0. Number of binades between the largest gradient and overflow.

    Raises:
        ValueError: If a setting is impossible.
    """

    underflow: float = 1e-3
    headroom: int = 3

    def __post_init__(self) -> None:
        _check_share("underflow", self.underflow)
        _check_headroom(self.headroom)

    def check(self, float_format: FloatFormat) -> None:
        super().check(float_format)
        _check_headroom_fits(self.headroom, float_format)

    def __call__(
        self, samples: Tensor, peaks: Tensor, memory: Tensor, float_format: FloatFormat
    ) -> tuple[Tensor, Tensor]:
        # The mean square over a binade [v, 2v) of uniform density is 7/3 v**2. Exponents are
        # relative to the top one, to stay in the range of float32.
        exponents = np.asarray(float_format.exponents, "float32")
        top = spectrum.top_exponent(samples, float_format)
        relative = ops.minimum(exponents - top[..., None], 0.0)
        squares = samples[..., 1 : spectrum.NONFINITE] * 4.0**relative * (7 / 3)
        total = ops.sum(samples[..., : spectrum.NONFINITE], axis=-1)
        mean_square = ops.sum(squares, axis=-1) / ops.maximum(total, 1.0)
        log2_s = top + 0.5 * ops.log2(ops.maximum(mean_square, 1e-30))
        # sqrt(2) erfinv(T) is the standard normal quantile at (1 + T) / 2.
        quantile = statistics.NormalDist().inv_cdf((1 + self.underflow) / 2)
        log2_a = ops.floor(math.log2(float_format.smallest_subnormal / quantile) - log2_s)

        top = _top(samples, peaks, float_format)
        room = float_format.max_exponent - self.headroom - top
        needed = ops.where(_is_sampled(samples), ops.maximum(log2_a, 0.0), 0.0)
        return _if_seen(top, ops.minimum(needed, room), float_format), memory


@keras.saving.register_keras_serializable("tf_adaptive_ls")
@dataclasses.dataclass(frozen=True)
class RisingMinimumRule(ScaleRule):
    """Halves and doubles scales, but not below a minimum that rises during training.

    This is the loss scaling of Mellempudi et al. (2019), section 3.1. An overflow halves a scale,
    and `growth_steps` steps without an overflow double it, as in Keras. A scale below the minimum
    returns to it at once. A rare overflow therefore cannot lower the scale so far that small
    gradients are lost, and gradients become smaller during training. The authors use one scale for
    the whole model. Here, all scales move together until a layer overflows; then only that layer
    lowers its scale.

    ```python
    optimizer = als.AdaptiveLossScaleOptimizer(
        "adam", rule=als.RisingMinimumRule(minimums=((0, 2**5), (1_000, 2**13)))
    )
    ```

    Args:
        minimums: Pairs `(steps, scale)`: the number of steps after which a minimum holds, in
            ascending order. Scales are powers of two from 2**-60 to 2**60. The default is what the
            authors used for GNMT, which they trained for 340,000 steps.
        growth_steps: Int >= 1. Number of steps without an overflow after which a scale is doubled.

    Raises:
        ValueError: If a setting is impossible.

    Reference: Mellempudi et al., "Mixed Precision Training With 8-bit Floating Point", 2019
    (arXiv 1905.12334).
    """

    minimums: tuple[tuple[int, float], ...] = ((40_000, 2.0**13), (150_000, 2.0**15))
    growth_steps: int = 2000

    def __post_init__(self) -> None:
        _check_minimums(self.minimums)
        if not is_whole(self.growth_steps, 1):
            raise ValueError(
                "Expected `growth_steps` to be a whole number of steps, at least 1. "
                f"Received: growth_steps={self.growth_steps!r}. Keras has 2000."
            )
        pairs = ((int(steps), float(scale)) for steps, scale in self.minimums)
        object.__setattr__(self, "minimums", tuple(pairs))

    def backoff(self, float_format: FloatFormat) -> int:
        return 1

    @property
    def memory_size(self) -> int:
        return 3

    def __call__(
        self, samples: Tensor, peaks: Tensor, memory: Tensor, float_format: FloatFormat
    ) -> tuple[Tensor, Tensor]:
        # The whole memory is shifted with the scale. Nothing else changes the first number, so it
        # tells the scale, and the other numbers count relative to it. All are whole numbers, so
        # sums are exact.
        start = memory[:, 0]
        log2_scale, steps, calm = start - NOTHING_SEEN, memory[:, 1] - start, memory[:, 2] - start
        overflowed = peaks[..., spectrum.NONFINITE] > 0
        minimum = ops.full_like(start, -float(MAX_LOG2_SCALE))
        for first, scale in self.minimums:
            minimum = ops.where(steps >= first, math.log2(scale), minimum)
        calm = ops.where(overflowed, 0.0, calm + 1)
        grows = calm >= self.growth_steps
        change = ops.where(grows, 1.0, 0.0)
        change = ops.maximum(change, minimum - log2_scale)
        steps, calm = ops.where(overflowed, steps, steps + 1), ops.where(grows, 0.0, calm)
        kept = ops.stack([start, start + steps, start + calm], axis=-1)
        return _if_seen(_top(samples, peaks, float_format), change, float_format), kept


@keras.saving.register_keras_serializable("tf_adaptive_ls")
@dataclasses.dataclass(frozen=True)
class FixedRule(ScaleRule):
    """Leaves every scale as it is.

    Use it as a baseline, or to set scales yourself:

    ```python
    optimizer = als.AdaptiveLossScaleOptimizer("adam", rule=als.FixedRule())
    model.layers[0].loss_scaling.log2_scale = 5
    ```
    """

    def backoff(self, float_format: FloatFormat) -> int:
        return 0

    def __call__(
        self, samples: Tensor, peaks: Tensor, memory: Tensor, float_format: FloatFormat
    ) -> tuple[Tensor, Tensor]:
        return ops.zeros_like(samples[..., 0]), memory


def _top(samples: Tensor, peaks: Tensor, float_format: FloatFormat) -> Tensor:
    """Binade of the largest gradient of each layer."""
    return ops.maximum(
        spectrum.top_exponent(samples, float_format), spectrum.top_exponent(peaks, float_format)
    )


def _is_sampled(samples: Tensor) -> Tensor:
    return spectrum.nonzero_total(samples) > 0


def _any_vanished(peaks: Tensor) -> Tensor:
    """Whether a tensor of each layer holds nothing but zeros."""
    return peaks[..., spectrum.ZERO] > 0


def _if_seen(top: Tensor, change: Tensor, float_format: FloatFormat) -> Tensor:
    """`change`, but 0 where there was no finite, non-zero gradient."""
    return ops.where(top >= float_format.min_exponent, change, 0.0)


def _check_share(name: str, value: float) -> None:
    if not is_number(value) or not 0 < value < 1:
        raise ValueError(
            f"Expected `{name}` to be a share of gradients, between 0 and 1. "
            f"Received: {name}={value!r}. The default is 1e-3."
        )


def _check_forget(value: float) -> None:
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(
            "Expected `forget` to be a number of binades per step, at least 0. "
            f"Received: forget={value!r}. The default is 0.01."
        )


def _check_minimums(value: Any) -> None:
    try:
        pairs = [(steps, scale) for steps, scale in value]
    except (TypeError, ValueError):
        pairs = []
    steps = [pair[0] for pair in pairs]
    usable = all(is_whole(first) and is_scale_value(scale) for first, scale in pairs)
    if not pairs or not usable or steps != sorted(set(steps)):
        raise ValueError(
            "Expected `minimums` to be pairs (steps, scale): whole numbers of steps that grow from "
            f"pair to pair, and powers of two from 2**-{MAX_LOG2_SCALE} to 2**{MAX_LOG2_SCALE}. "
            f"Received: minimums={value!r}. Use for example ((0, 2**5), (1000, 2**13))."
        )


def _check_headroom(value: int) -> None:
    if not is_whole(value):
        raise ValueError(
            "Expected `headroom` to be a whole number of binades, at least 0. "
            f"Received: headroom={value!r}. QuantileRule's default is 5."
        )


def _check_headroom_fits(value: int, float_format: FloatFormat) -> None:
    most = float_format.max_exponent - float_format.min_normal_exponent
    if value >= most:
        raise ValueError(
            f"Expected `headroom` to be less than the {most} binades between the smallest and "
            f"the largest normal value of {float_format.name}, which layers of the model "
            f"compute in. Received: headroom={value}. QuantileRule's default is 5."
        )
