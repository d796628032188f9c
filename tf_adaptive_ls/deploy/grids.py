"""Integer grids: the weights of a channel as small integers times scales.

All functions take and return NumPy arrays, because quantization runs once, after training.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Integers = NDArray[np.int8]

# Scales to try, relative to the scale that maps the largest weight to the largest integer.
FRACTIONS = np.linspace(1.0, 0.1, 37)


def largest_integer(bits: int) -> int:
    """The q of a symmetric grid -q … q with `bits` bits, as in LiteRT."""
    return int(2 ** (bits - 1) - 1)


@dataclasses.dataclass(frozen=True)
class Points:
    """The weights of channels as sums of *points*: the sum over j of `scales[j] * integers[j]`.

    Attributes:
        integers: Int8 array `[points, channels, inputs]`.
        scales: Float32 array `[points, channels]`. Zero where a channel has fewer points.
        bits: Int array `[channels]`. Bits per integer.
    """

    integers: Integers
    scales: Floats
    bits: NDArray[np.int64]

    @property
    def values(self) -> Floats:
        """The weights, a float32 array `[channels, inputs]`."""
        points = self.integers * self.scales.astype(np.float64)[..., None]
        return points.sum(axis=0).astype(np.float32)

    @property
    def counts(self) -> NDArray[np.int64]:
        """The number of points of each channel, `[channels]`. A zero channel has one point."""
        return np.maximum((self.scales != 0).sum(axis=0), 1)

    @property
    def bytes(self) -> Floats:
        """The size of each channel, `[channels]`: packed integers and float32 scales."""
        return bytes_of_points(self.counts, self.integers.shape[-1], self.bits)

    def replaced(self, channels: NDArray[np.int64], others: "Points") -> "Points":
        """The same points, with some channels taken from `others`."""
        number = max(len(self.scales), len(others.scales))
        integers, scales = _padded(self.integers, number), _padded(self.scales, number)
        integers[:, channels] = _padded(others.integers, number)
        scales[:, channels] = _padded(others.scales, number)
        bits = self.bits.copy()
        bits[channels] = others.bits
        return Points(integers, scales, bits)


def bytes_of_points(counts: NDArray[np.int64], inputs: int, bits: NDArray[np.int64]) -> Floats:
    """The size of channels: `counts` points of `inputs` integers with `bits` bits each."""
    return np.asarray(counts * (inputs * bits / 8 + 4))


def _padded(points: NDArray[Any], number: int) -> NDArray[Any]:
    widths = [(0, number - len(points))] + [(0, 0)] * (points.ndim - 1)
    return np.pad(points, widths)


def nearest(weights: Floats, bits: int) -> Points:
    """Rounds weights to the grid whose largest integer is the largest weight of the channel.

    Args:
        weights: Float array `[channels, inputs]`.
        bits: 2 … 8.
    """
    largest = np.abs(weights).max(axis=1).astype(np.float64)
    return _stacked([_rounded(weights.astype(np.float64), largest, bits)], bits)


def best_scale(weights: Floats, bits: int) -> Points:
    """Rounds weights to the grid with the smallest squared error.

    It tries each of `FRACTIONS` of the scale of `nearest`, which clips larger weights. For the
    integers that each of them gives, it also tries the least-squares scale.

    Args:
        weights: Float array `[channels, inputs]`.
        bits: 2 … 8.
    """
    return _stacked([_best(weights.astype(np.float64), bits)], bits)


def multipoint(weights: Floats, bits: int, points: int) -> Points:
    """Rounds weights to a sum of points. Each point is the best for the remaining error.

    Liu, Ye, Zhou and Liu, "Post-training Quantization with Multiple Points" (AAAI 2021). The paper
    is greedy. This also tries all scales for the first point, and keeps the one that leads to the
    smallest final error.

    Args:
        weights: Float array `[channels, inputs]`.
        bits: 2 … 8.
        points: Number of points of each channel, at least 1.
    """
    weights = weights.astype(np.float64)
    best: Points | None = None
    smallest = np.full(len(weights), np.inf)
    for first in _candidates(weights, bits):
        chain, left = [first], _left(weights, first.values)
        for _ in range(points - 1):
            chain.append(_best(left, bits))
            left = _left(weights, np.sum([point.values for point in chain], axis=0))
        error = np.square(left).sum(axis=1)
        found = _stacked(chain, bits)
        (better,) = np.nonzero(error < smallest)
        smallest[better] = error[better]
        best = found if best is None else best.replaced(better, _of_channels(found, better))
    assert best is not None
    return best


def _left(weights: Floats, values: Floats) -> Floats:
    """The remaining error of weights. Zero where it is below the precision of float32."""
    left = weights - values
    return np.where(np.abs(left) <= np.abs(weights) * 2.0**-24, 0, left)


def _of_channels(points: Points, channels: NDArray[np.int64]) -> Points:
    return Points(points.integers[:, channels], points.scales[:, channels], points.bits[channels])


@dataclasses.dataclass(frozen=True)
class _Point:
    integers: Integers  # (channels, inputs)
    scales: Floats  # (channels,), float32
    errors: Floats  # (channels,)

    @property
    def values(self) -> Floats:
        return np.asarray(self.integers * self.scales.astype(np.float64)[:, None])


def _candidates(weights: Floats, bits: int) -> Iterator[_Point]:
    """Points for all scales to try, relative to the scale that maps the largest weight to q.

    The largest power of two among them is included, so that weights that lie on a grid of a power
    of two are quantized exactly.
    """
    largest, q = np.abs(weights).max(axis=1), largest_integer(bits)
    power = np.exp2(np.floor(np.log2(np.where(largest == 0, 1, largest) / q))) * q
    for last in [*(fraction * largest for fraction in FRACTIONS), np.minimum(power, largest)]:
        point = _rounded(weights, last, bits)
        yield point
        yield _with_scales(weights, point.integers, _least_squares(weights, point.integers))


def _best(weights: Floats, bits: int) -> _Point:
    return functools.reduce(_better, _candidates(weights, bits))


def _rounded(weights: Floats, largest: Floats, bits: int) -> _Point:
    """Rounds to the nearest integers on grids whose largest integer is at `largest`."""
    q = largest_integer(bits)
    scales = (largest / q).astype(np.float32)
    divisor = np.where(scales == 0, 1, scales).astype(np.float64)[:, None]
    integers = np.clip(np.rint(weights / divisor), -q, q).astype(np.int8)
    return _with_scales(weights, integers, scales)


def _with_scales(weights: Floats, integers: Integers, scales: Floats) -> _Point:
    values = integers * scales.astype(np.float64)[:, None]
    return _Point(integers, scales, np.square(weights - values).sum(axis=1))


def _least_squares(weights: Floats, integers: Integers) -> Floats:
    """For each channel, the scale that brings the integers nearest to the weights."""
    wide = integers.astype(np.float64)
    squares = np.square(wide).sum(axis=1)
    scales = (weights * wide).sum(axis=1) / np.where(squares == 0, 1, squares)
    return np.asarray(scales.astype(np.float32))


def _better(a: _Point, b: _Point) -> _Point:
    """For each channel, the one with the smaller error. `a` if they are equal."""
    is_b = b.errors < a.errors
    return _Point(
        np.where(is_b[:, None], b.integers, a.integers),
        np.where(is_b, b.scales, a.scales),
        np.where(is_b, b.errors, a.errors),
    )


def _stacked(points: list[_Point], bits: int) -> Points:
    return Points(
        np.stack([point.integers for point in points]),
        np.stack([point.scales for point in points]),
        np.full(len(points[0].scales), bits),
    )
