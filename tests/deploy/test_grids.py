"""Integer grids: weights as one or more multiples of small integers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tf_adaptive_ls.deploy import grids

BITS = (2, 3, 4, 8)
FLOATS = st.floats(-100, 100, width=32).map(lambda x: x if abs(x) > 1e-3 else 0.0)
WEIGHTS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=FLOATS
)
METHODS = {
    "nearest": grids.nearest,
    "best scale": grids.best_scale,
    "two points": lambda weights, bits: grids.multipoint(weights, bits, 2),
    "three points": lambda weights, bits: grids.multipoint(weights, bits, 3),
}


def squares(errors):
    return np.square(errors.astype(np.float64)).sum(axis=1)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_on_the_grid_stays(rng, bits):
    q = 2 ** (bits - 1) - 1
    integers = rng.integers(-q, q + 1, (5, 9))
    integers[:, 0] = q
    weights = (integers * 2.0 ** np.array([[-9], [-1], [0], [3], [20]])).astype("float32")
    for method in (grids.nearest, grids.best_scale):
        found = method(weights, bits)
        np.testing.assert_array_equal(found.values, weights)
        np.testing.assert_array_equal(found.integers[0], integers)


@given(weights=WEIGHTS, bits=st.sampled_from(BITS))
@settings(deadline=None, max_examples=50)
def test_nearest_is_within_half_a_step(weights, bits):
    q = 2 ** (bits - 1) - 1
    found = grids.nearest(weights, bits)
    largest = np.abs(weights).max(axis=1, keepdims=True)
    assert (np.abs(found.values - weights) <= largest / (2 * q) * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", METHODS)
@given(weights=WEIGHTS, bits=st.sampled_from((2, 4)))
@settings(deadline=None, max_examples=8)
def test_every_point_reaches_both_ends_of_the_grid_or_is_zero(name, weights, bits):
    """So a converter that takes the largest weight for the last integer finds the same grid."""
    found = METHODS[name](weights, bits)
    ends = np.abs(found.integers).max(axis=-1)
    assert np.isin(ends[found.scales != 0], 2 ** (bits - 1) - 1).all()
    assert (np.abs(found.integers) <= 2 ** (bits - 1) - 1).all()


@given(weights=WEIGHTS, bits=st.sampled_from((2, 4)))
@settings(deadline=None, max_examples=8)
def test_the_best_scale_and_more_points_are_never_worse(weights, bits):
    nearest, best, two, three = (
        squares(method(weights, bits).values - weights) for method in METHODS.values()
    )
    slack = 1e-9 * squares(weights) + 1e-12  # values are rounded to float32
    assert (best <= nearest + slack).all()
    assert (two <= best + slack).all()
    assert (three <= two + slack).all()


@given(weights=WEIGHTS, bits=st.sampled_from((2, 4)))
@settings(deadline=None, max_examples=8)
def test_points_leave_no_more_than_halving_steps_would(weights, bits):
    """At the largest scale, each point leaves half a step of what the ones before it left."""
    q = 2 ** (bits - 1) - 1
    largest = np.abs(weights).max(axis=1).astype(np.float64)
    for number in (1, 2, 3):
        found = grids.multipoint(weights, bits, number)
        bound = np.sqrt(weights.shape[1]) * largest / (2 * q) ** number
        assert (
            np.sqrt(squares(found.values - weights)) <= bound * (1 + 1e-4) + 1e-6 * largest
        ).all()


def test_two_points_of_four_bits_hold_sixteenths_exactly(rng):
    k, m = rng.integers(-7, 8, (2, 6, 20))
    k[:, 0], m[:, 0], k[:, 1], m[:, 1] = 7, 0, 3, 7
    weights = (k + m / 16).astype("float32")
    found = grids.multipoint(weights, 4, 2)
    np.testing.assert_array_equal(found.values, weights)
    np.testing.assert_array_equal(found.scales, np.repeat([[1.0], [1 / 16]], 6, axis=1))
    np.testing.assert_array_equal(found.counts, 2)


@given(weights=arrays.arrays(np.float32, (1, 2), elements=FLOATS))
@settings(deadline=None, max_examples=80)
def test_the_best_scale_of_two_weights_of_two_bits(weights):
    """Against all pairs of integers, each at the scale that is best for it."""
    smallest = squares(weights)[0]
    for pair in itertools.product((-1, 0, 1), repeat=2):
        if pair != (0, 0):
            scale = (weights[0] @ pair) / np.dot(pair, pair)
            smallest = min(smallest, squares(weights - scale * np.array([pair]))[0])
    found = squares(grids.best_scale(weights, 2).values - weights)[0]
    assert found == pytest.approx(smallest, rel=1e-4, abs=1e-6 * squares(weights)[0])


@pytest.mark.parametrize("name", METHODS)
def test_zeros_are_zeros(name):
    weights = np.zeros((2, 4), "float32")
    weights[1, 2] = 3
    found = METHODS[name](weights, 4)
    np.testing.assert_array_equal(found.values, weights)
    np.testing.assert_array_equal(found.scales[:, 0], 0)
    np.testing.assert_array_equal(found.counts, 1)


def test_a_subnormal_channel():
    tiny = np.float32(2**-149)
    weights = np.array([[tiny, -tiny, 0]])
    assert np.abs(grids.nearest(weights, 4).values - weights).max() <= tiny
    assert np.isfinite(grids.multipoint(weights, 4, 2).values).all()


def test_bytes():
    weights = np.random.default_rng(0).normal(size=(3, 10)).astype("float32")
    two = grids.multipoint(weights[1:2], 4, 2)
    some = grids.best_scale(weights, 4).replaced(np.array([1]), two)
    np.testing.assert_array_equal(some.counts, [1, 2, 1])
    np.testing.assert_array_equal(some.bytes, [9, 18, 9])
    np.testing.assert_array_equal(some.values[1], two.values[0])
    eight = some.replaced(np.array([2]), grids.best_scale(weights[2:], 8))
    np.testing.assert_array_equal(eight.bytes, [9, 18, 14])
