"""Stochastic rounding to integers: the mean is exact, and nothing is outside of the format."""

import keras
import numpy as np
import pytest

from tests.backends import MODES, compiled
from tf_adaptive_ls.numerics.rounding import NOISE_BITS_OF_16, rounded_to_integers


def rounded(x, bits, noise, mode="eager"):
    run = compiled(lambda x, noise: rounded_to_integers(x, bits, noise), mode=mode)
    x = np.asarray(x, "float32")
    noise = np.broadcast_to(np.asarray(noise, "int32"), x.shape)
    tensors = map(keras.ops.convert_to_tensor, (x, noise))
    return keras.ops.convert_to_numpy(run(*tensors))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("x", [0.0, 0.25, -0.25, 1.625, -126.5, 126.0625, -127.9375])
def test_the_mean_over_all_noise_is_exact(x, mode):
    noise = np.arange(16) * 2 ** (NOISE_BITS_OF_16 - 4)  # of each 16th, one
    assert rounded(np.full(16, x), 8, noise, mode).mean() == x


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_what_is_outside_saturates(bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = [high + 0.5, high + 1, 1e30, np.inf, low - 0.5, low - 1, -1e30, -np.inf, np.nan, low, high]
    expected = [high] * 4 + [low] * 4 + [0, low, high]
    for noise in (0, 2**NOISE_BITS_OF_16 - 1):
        np.testing.assert_array_equal(rounded(x, bits, noise), expected)


def test_integers_stay(rng):
    x = np.arange(-128, 128)
    noise = rng.integers(0, 2**NOISE_BITS_OF_16, x.shape)
    np.testing.assert_array_equal(rounded(x, 8, noise), x)


@pytest.mark.parametrize("x", [2.0**-40, -(2.0**-40), 1e-45])
def test_what_is_tiny_is_all_but_never_rounded_away_from_zero(x):
    assert rounded(x, 8, 0) in (0, np.sign(x))
    assert rounded(x, 8, 1) == 0
