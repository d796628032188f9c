"""AdaRound: learns whether to round each weight up or down."""

import math

import numpy as np
from numpy.typing import NDArray

from tf_adaptive_ls.deploy.grids import Points, largest_integer
from tf_adaptive_ls.deploy.moments import Moments

Floats = NDArray[np.floating]

# From sections 3.2 and 5 of the paper, and the code of its authors.
STRETCH = (-0.1, 1.1)
PENALTY = 0.01
EXPONENTS = (20.0, 2.0)
WARM_UP = 0.2
LEARNING_RATE = 0.01


def rounded(weights: Floats, points: Points, moments: Moments, steps: int) -> Points:
    """Chooses one of the two neighboring grid points for each weight.

    Nagel, Amjad, van Baalen, Louizos and Blankevoort, "Up or Down? Adaptive Rounding for
    Post-Training Quantization" (ICML 2020), equations 21 to 25: minimizes the squared error of the
    outputs of a layer over numbers h between rounding down (0) and rounding up (1), with a penalty
    that drives h to 0 or 1. The error is a quadratic function of the weights, so `Moments` give its
    exact gradient over all calibration data, and nothing is random.

    Args:
        weights: Float array `[groups, channels, inputs]`.
        points: `Points` with one point per channel. Their scales are kept.
        moments: `Moments` of the inputs.
        steps: Number of Adam steps.

    Returns:
        `Points` with one point per channel. A channel whose output error did not decrease keeps the
        given points.
    """
    q = np.array([largest_integer(int(bits)) for bits in points.bits]).reshape(weights.shape[:2])
    scales = points.scales[0].reshape(weights.shape[:2])
    scales = scales[..., None]
    divisor = np.where(scales == 0, 1, scales)
    position = weights / divisor
    down = np.floor(position)
    v = _inverse(position - down)
    mean, square = np.zeros_like(v), np.zeros_like(v)
    # Relative to the mean power of a channel, so that the penalty has the same weight in each
    # layer.
    power = np.float32(moments.squares(weights).mean() or 1.0)
    limit = q[..., None].astype(np.float32)
    for step in range(steps):
        h, slope = _stretched(v)
        integers = np.clip(down + h, -limit, limit)
        inside = integers == down + h
        error = scales * integers - weights
        gradient = 2 * moments.times(error) * scales * inside / power
        gradient = gradient + _penalty_gradient(h, step / steps)
        gradient = gradient * slope
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        corrected = mean / (1 - 0.9 ** (step + 1))
        root = np.sqrt(square / (1 - 0.999 ** (step + 1)))
        v = v - LEARNING_RATE * corrected / (root + 1e-8)
    integers = np.clip(down + (_stretched(v)[0] >= 0.5), -limit, limit)
    before = points.integers[0].reshape(weights.shape)
    worse = moments.squares(scales * integers - weights) >= moments.squares(
        scales * before - weights
    )
    integers = np.where(worse[..., None] | (scales == 0), before, integers)
    return Points(
        integers.astype(np.int8).reshape(1, -1, weights.shape[-1]), points.scales, points.bits
    )


def _stretched(v: Floats) -> tuple[Floats, Floats]:
    """The rectified sigmoid h(v) of equation 23, and its derivative."""
    low, high = STRETCH
    sigmoid = 1 / (1 + np.exp(-v))
    h = sigmoid * (high - low) + low
    return np.clip(h, 0, 1), (high - low) * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))


def _inverse(h: Floats) -> Floats:
    """The v for which the rectified sigmoid is h."""
    low, high = STRETCH
    return -np.log((high - low) / (h - low) - 1)


def _penalty_gradient(h: Floats, progress: float) -> Floats | float:
    """The gradient of the sum of 1 - |2h - 1|^beta (equation 24). Zero at the beginning."""
    if progress < WARM_UP:
        return 0.0
    # The exponent goes from the first to the last value along half a cosine.
    done = (progress - WARM_UP) / (1 - WARM_UP)
    first, last = EXPONENTS
    beta = last + 0.5 * (first - last) * (1 + math.cos(math.pi * done))
    centered = 2 * h - 1
    return -PENALTY * 2 * beta * np.sign(centered) * np.abs(centered) ** (beta - 1)
