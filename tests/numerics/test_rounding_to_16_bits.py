"""Stochastic rounding to 16 bits: an exact mean, and never further than the neighbors."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops
from numpy.testing import assert_array_equal

from tf_adaptive_ls.numerics.rounding import NOISE_BITS_OF_16, rounded_to_16_bits

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Bits of float32 that each format drops.
DROPPED = {"float16": 13, "bfloat16": 16}
rng = np.random.default_rng(0)


def rounded(x, dtype, noise):
    x, noise = np.broadcast_arrays(np.float32(x), np.int32(noise))
    result = rounded_to_16_bits(ops.convert_to_tensor(x), dtype, ops.convert_to_tensor(noise))
    assert keras.backend.standardize_dtype(result.dtype) == dtype
    return np.array(ops.cast(result, "float32"))


def all_noise(dtype):
    """All that matters of it where a format has all its bits, as a column."""
    return (np.arange(2 ** DROPPED[dtype]) << (NOISE_BITS_OF_16 - DROPPED[dtype]))[:, None]


def neighbors(x, dtype):
    """Those below and above, of numbers that the format has not."""
    near = np.float32(x).astype(DTYPES[dtype])
    wide = near.astype("float32")
    toward = np.where(wide < x, np.inf, -np.inf).astype(DTYPES[dtype])
    other = np.nextafter(near, toward).astype("float32")
    return np.minimum(wide, other), np.maximum(wide, other)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_is_the_number(dtype, scale):
    x = (scale * rng.normal(size=16)).astype("float32")
    results = rounded(x, dtype, all_noise(dtype)).astype("float64")
    assert_array_equal(results.mean(axis=0), x)
    low, high = neighbors(x, dtype)
    assert np.all((results == low) | (results == high))
    assert_array_equal(results.min(axis=0), low)
    assert_array_equal(results.max(axis=0), high)


def test_the_mean_of_subnormal_numbers():
    x = np.float32([(n + k / 2**13) * 2.0**-24 for n in (0, 1, 513, 1022) for k in (1, 4096, 8191)])
    results = rounded(np.concatenate([x, -x]), "float16", all_noise("float16")).astype("float64")
    assert_array_equal(results.mean(axis=0), np.concatenate([x, -x]))
    assert np.all(np.abs(results - np.concatenate([x, -x])) < 2.0**-24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_the_format_stay(dtype):
    bits = rng.integers(0, 2**16, 4096).astype("uint16")
    x = bits.view(DTYPES[dtype]).astype("float32")
    x = x[np.abs(x) >= 2.0**-126]  # XLA takes smaller ones of float32 for zero
    x = np.append(x[np.isfinite(x)], [0.0, -0.0, np.inf, -np.inf])
    for noise in (0, 2**30, 2**31 - 1):
        result = rounded(x, dtype, noise)
        assert_array_equal(result, x)
        assert_array_equal(np.signbit(result), np.signbit(x))
    assert np.isnan(rounded(np.nan, dtype, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_too_large_becomes_the_largest(dtype):
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    x = np.float32(largest) * np.float32([1 + 2.0**-12, -1 - 2.0**-12])
    for noise in (0, 2**31 - 1):
        assert_array_equal(rounded(x, dtype, noise), [largest, -largest])
    assert_array_equal(rounded([70000.0], "float16", 0), [65504.0])


def test_tiny_numbers_are_mostly_zero():
    x = np.float32([2.0**-40, -(2.0**-54), 2.0**-60])
    assert_array_equal(rounded(x, "float16", 0), [2.0**-24, -(2.0**-24), 0])
    assert_array_equal(rounded(x, "float16", 2**15), [0, 0, 0])
    assert_array_equal(rounded(x[:1], "float16", 2**15 - 1), [2.0**-24])
