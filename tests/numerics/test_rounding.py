"""Rounding to float8: the numbers that ml_dtypes has, and means that are exact."""

import keras
import ml_dtypes
import numpy as np
import pytest

import tf_adaptive_ls as als
from tests.backends import MODES, compiled
from tf_adaptive_ls.numerics.rounding import NOISE_BITS, fitting_factor, rounded

FORMATS = ["float8_e4m3fn", "float8_e5m2"]
EVERY_FLOAT16 = np.arange(2**16, dtype="uint16").view("float16")


def by_ml_dtypes(values, name):
    """The same by casts, but that what is too large saturates."""
    largest = np.float32(ml_dtypes.finfo(name).max)
    wide = values.astype("float32")
    inside = np.where(np.isfinite(wide), np.clip(wide, -largest, largest), 0)
    cast = inside.astype(getattr(ml_dtypes, name)).astype("float32")
    with np.errstate(invalid="ignore"):  # bfloat16 takes NaN for a number
        return np.where(np.isfinite(wide), cast, wide).astype(values.dtype)


def assert_same(found, expected):
    """Bit for bit, but for which NaN it is."""
    found, expected = np.array(found), np.array(expected)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found)[number], np.signbit(expected)[number])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_float16_is_rounded_as_ml_dtypes_casts(name, mode):
    run = compiled(lambda x: rounded(x, als.FloatFormat(name)), mode=mode)
    assert_same(run(keras.ops.convert_to_tensor(EVERY_FLOAT16)), by_ml_dtypes(EVERY_FLOAT16, name))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_cast_on_the_way_changes_no_number(name, mode):
    float_format = als.FloatFormat(name)

    def both(x, peak):
        factor = fitting_factor(peak, float_format, "float16")
        wide_factor = fitting_factor(peak, float_format)
        return (
            (rounded(x, float_format), rounded(x, float_format, cast=True)),
            (
                rounded(x, float_format, factor=wide_factor),
                rounded(x, float_format, factor=factor, cast=True),
            ),
        )

    run = compiled(both, mode=mode)
    finite = np.isfinite(EVERY_FLOAT16)
    for log2_peak in range(-24, 16):
        peak = np.float32(1.9 * 2.0**log2_peak)
        x = np.where(np.abs(EVERY_FLOAT16) <= peak, EVERY_FLOAT16, np.float16(0))
        bare, relative = run(keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(peak))
        assert_same(relative[1], np.array(relative[0]))
    bare, _ = run(keras.ops.convert_to_tensor(EVERY_FLOAT16), keras.ops.convert_to_tensor(peak))
    without, within = map(np.array, bare)
    assert_same(within[finite], without[finite])
    assert not np.isfinite(within[~finite]).any()


@pytest.mark.parametrize("name", FORMATS)
def test_every_bfloat16_is_rounded_as_ml_dtypes_casts(name):
    every = np.arange(2**16, dtype="uint16").view(ml_dtypes.bfloat16)
    found = rounded(keras.ops.convert_to_tensor(every), als.FloatFormat(name))
    expected = by_ml_dtypes(every, name).astype("float32")
    assert_same(keras.ops.cast(found, "float32"), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_float32_is_rounded_once(name):
    x = als.FloatFormat(name).smallest_normal * np.random.default_rng(0).normal(size=10_000)
    x = np.append(x, 1 + 2.0**-4 + 2.0**-20 * np.arange(-1, 2)).astype("float32")
    assert_same(rounded(x, als.FloatFormat(name)), by_ml_dtypes(x, name))


@pytest.mark.parametrize(
    "name, largest, lowest", [("float8_e4m3fn", 448, 2.0**-9), ("float8_e5m2", 57344, 2.0**-16)]
)
def test_edges(name, largest, lowest):
    x = np.float32(
        [largest, 1.1 * largest, -1e30, np.inf, -np.inf, lowest, lowest / 2, 1.01 * lowest / 2, 0]
    )
    expected = [largest, largest, -largest, np.inf, -np.inf, lowest, 0, lowest, 0]
    assert_same(rounded(x, als.FloatFormat(name)), np.float32(expected))
    assert np.isnan(rounded(np.float32([np.nan]), als.FloatFormat(name)))


@pytest.mark.parametrize("mode", MODES)
def test_stochastic_e5m2_is_unbiased_for_every_float16(mode):
    """One random byte is enough: 8 bits of the mantissa are dropped."""
    float_format = als.FloatFormat("float8_e5m2")
    # What is beyond the largest saturates, and has no mean.
    inside = EVERY_FLOAT16[np.abs(EVERY_FLOAT16) <= float_format.largest]
    run = compiled(lambda x, noise: rounded(x, float_format, noise=noise), mode=mode)
    total = np.zeros(len(inside))
    for byte in range(256):
        noise = np.full(len(inside), byte << (NOISE_BITS - 8), "int32")
        total += np.array(run(inside, noise)).astype("float64")
    np.testing.assert_array_equal(total / 256, inside.astype("float64"))


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_is_unbiased(name):
    float_format = als.FloatFormat(name)
    rng = np.random.default_rng(0)
    x = np.exp2(rng.uniform(-24, float_format.max_exponent, 100)) * rng.choice([-1, 1], 100)
    edges = [
        2.0**-24,
        3 * 2.0**-24,
        float_format.smallest_normal,
        1 - 2.0**-11,
        float_format.largest,
    ]
    x = np.append(x, edges).astype("float16")
    noise = np.arange(2**NOISE_BITS, dtype="int32")
    for value in x:
        found = np.array(rounded(np.full(len(noise), value), float_format, noise=noise))
        assert found.astype("float64").mean() == float(value)
        neighbors = np.unique(found.astype("float32"))
        assert len(neighbors) <= 2
        assert_same(neighbors, by_ml_dtypes(neighbors, name))


def test_stochastic_rounding_leaves_what_is_not_finite():
    x, noise = np.float16([np.inf, -np.inf, 65504]), np.full(3, 2**NOISE_BITS - 1, "int32")
    found = rounded(x, als.FloatFormat("float8_e4m3fn"), noise=noise)
    assert_same(found, np.float16([np.inf, -np.inf, 448]))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("log2_factor", [-20, -3, 0, 9, 30])
def test_factors_shift_the_format(name, log2_factor):
    float_format = als.FloatFormat(name)
    values = EVERY_FLOAT16[np.isfinite(EVERY_FLOAT16)]
    shifted = values.astype("float32") * np.float32(2.0**log2_factor)
    expected = by_ml_dtypes(shifted, name) * np.float32(2.0**-log2_factor)
    found = rounded(values, float_format, factor=np.float32(2.0**log2_factor))
    with np.errstate(over="ignore"):
        assert_same(found, expected.astype("float16"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name, max_exponent", [("float8_e4m3fn", 8), ("float8_e5m2", 15)])
def test_fitting_factors(name, max_exponent, mode):
    run = compiled(lambda peak: fitting_factor(peak, als.FloatFormat(name)), mode=mode)
    for peak, exponent in [(1, 0), (1.75, 0), (1.7500001, 1), (1.99, 1), (2, 1), (2.0**-24, -24)]:
        assert float(run(np.float32(peak))) == 2.0 ** (max_exponent - exponent)
    for peak in (0.0, np.inf, np.nan):
        assert float(run(np.float32(peak))) == 1.0
