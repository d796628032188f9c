"""AdaRound: learns whether to round each weight up or down."""

import math

import numpy as np
from numpy.typing import NDArray

from tf_adaptive_ls.deploy.grids import Points, largest_integer
from tf_adaptive_ls.deploy.moments import Moments

Floats = NDArray[np.floating]

# Of the paper, sections 3.2 and 5, and of its authors' code.
STRETCH = (-0.1, 1.1)
PENALTY = 0.01
EXPONENTS = (20.0, 2.0)
WARM_UP = 0.2
LEARNING_RATE = 0.01


def rounded(weights: Floats, points: Points, moments: Moments, steps: int) -> Points:
    """Chooses for every weight one of the two neighbours on its grid.

    Nagel, Amjad, van Baalen, Louizos and Blankevoort, "Up or Down? Adaptive Rounding for
    Post-Training Quantization" (ICML 2020), equations 21 to 25: minimises the squared error of a
    layer's outputs over numbers h between rounding down (0) and up (1), with a penalty that drives
    them to either. The error is a quadratic function of weights, so that its gradient over all
    calibration data comes from `Moments` at once, and no step depends on chance.

    Args:
        weights: Shape (groups, channels, inputs).
        points: One for every channel; their scales stay.
        moments: Of the inputs.
        steps: Of Adam.

    Returns:
        Points of one for every channel. Where the error of a channel's outputs became no smaller,
        those that were given.
    """
    q = np.array([largest_integer(int(bits)) for bits in points.bits]).reshape(weights.shape[:2])
    scales = points.scales[0].reshape(weights.shape[:2])
    scales = scales[..., None]
    divisor = np.where(scales == 0, 1, scales)
    position = weights / divisor
    down = np.floor(position)
    v = _inverse(position - down)
    mean, square = np.zeros_like(v), np.zeros_like(v)
    # In units of the power of an average channel: the penalty weighs the same in every layer.
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
    """The rectified sigmoid (equation 23), and its derivative."""
    low, high = STRETCH
    sigmoid = 1 / (1 + np.exp(-v))
    h = sigmoid * (high - low) + low
    return np.clip(h, 0, 1), (high - low) * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))


def _inverse(h: Floats) -> Floats:
    """The v for which the rectified sigmoid is h."""
    low, high = STRETCH
    return -np.log((high - low) / (h - low) - 1)


def _penalty_gradient(h: Floats, progress: float) -> Floats | float:
    """Of the sum of 1 - |2h - 1|^beta (equation 24); none at the beginning."""
    if progress < WARM_UP:
        return 0.0
    # From the first exponent to the last along half a cosine.
    done = (progress - WARM_UP) / (1 - WARM_UP)
    first, last = EXPONENTS
    beta = last + 0.5 * (first - last) * (1 + math.cos(math.pi * done))
    centred = 2 * h - 1
    return -PENALTY * 2 * beta * np.sign(centred) * np.abs(centred) ** (beta - 1)
