"""Formats, spectra and what is read off them, at their edges."""

import dataclasses

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import tf_adaptive_ls as als
from tests.backends import MODES, ON_JAX, compiled
from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT, narrowest
from tf_adaptive_ls.numerics.report import SAMPLE_SIZE

FLOAT16 = als.FloatFormat("float16")


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float8_e5m2", "float8_e4m3fn"])
def test_formats_are_what_their_dtype_is(name):
    float_format = als.FloatFormat(name)
    dtype = np.dtype(name) if name in ("float16", "float32") else getattr(ml_dtypes, name)
    for value in ("largest", "smallest_normal", "smallest_subnormal"):
        value = getattr(float_format, value)
        assert float(np.array(value, dtype)) == value
    assert float(np.array(float_format.smallest_subnormal / 2, dtype)) == 0
    assert (
        2.0**float_format.max_exponent
        <= float_format.largest
        < 2.0 ** (float_format.max_exponent + 1)
    )
    assert 2.0**float_format.min_exponent == float_format.smallest_subnormal
    assert 2.0**float_format.min_normal_exponent == float_format.smallest_normal


def test_float16():
    assert (FLOAT16.largest, FLOAT16.max_exponent) == (65504.0, 15)
    assert (FLOAT16.min_normal_exponent, FLOAT16.min_exponent) == (-14, -24)
    assert FLOAT16.exponents == range(-24, 16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        FLOAT16.name = "float32"


def counts_of(*values, dtype="float32"):
    magnitudes = np.abs(np.array(values, dtype)).astype("float32")
    counts = np.array(spectrum.spectrum(magnitudes, FLOAT16))
    assert counts.shape == (spectrum.num_bins(FLOAT16),) == (42,)
    assert counts.sum() == len(values)
    return counts


def bins(*values, dtype="float32"):
    """Occupied bins by name: a binade, or "zero" or "nonfinite"."""
    names = ["zero", *FLOAT16.exponents, "nonfinite"]
    counts = counts_of(*values, dtype=dtype)
    return {name: int(n) for name, n in zip(names, counts, strict=True) if n}


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0.0, "zero"),
        (-0.0, "zero"),
        (2.0**-24, -24),  # the one smallest subnormal
        (-(2.0**-24), -24),
        (2.0**-14, -14),  # the smallest normal
        (np.nextafter(np.float32(1), np.float32(0)), -1),
        (1.0, 0),
        (np.nextafter(np.float32(2), np.float32(0)), 0),
        (65504.0, 15),
        (np.inf, "nonfinite"),
        (-np.inf, "nonfinite"),
        (np.nan, "nonfinite"),
        # Only a wider dtype has these.
        (1e-30, -24),
        (np.nextafter(np.float32(2.0**16), np.float32(0)), 15),
        (2.0**16, "nonfinite"),
        (1e30, "nonfinite"),
    ],
)
def test_each_value_has_its_bin(value, name):
    assert bins(value) == {name: 1}


def test_every_float16_has_its_bin():
    values = np.arange(2**16, dtype="uint16").view("float16")
    expected = {"zero": 2, "nonfinite": 2 * 1024}
    expected |= {e: 2 * 1024 for e in range(-14, 16)}  # the normal binades
    expected |= {e: 2 * 2 ** (e + 24) for e in range(-24, -14)}
    assert bins(*values, dtype="float16") == expected


def test_spectra_add_up():
    a, b = [0.0, 1.0, 3.0, np.inf], [1.5, 2.0**-20, np.nan]
    np.testing.assert_array_equal(counts_of(*a) + counts_of(*b), counts_of(*a, *b))


@pytest.mark.parametrize("size", [1, 7, 1023, 1024, 1025, 5000, 100_000])
def test_a_sample_is_spread_over_the_tensor(size):
    x = np.arange(size, dtype="float32").reshape(1, size, 1)
    sample = np.array(spectrum.sample(x, 1024))
    assert len(set(sample)) == len(sample) <= 1024
    if size <= 1024:
        assert len(sample) == size
    else:
        assert len(sample) > 500
        parts = np.bincount((sample * 16 // size).astype(int))
        assert len(parts) == 16 and max(parts) - min(parts) <= 2


@pytest.mark.parametrize("channels", [2, 10, 64])
def test_a_sample_visits_all_channels_alike(channels):
    x = np.broadcast_to(np.arange(channels, dtype="float32"), (128 * 1024 // channels, channels))
    visits = np.bincount(np.array(spectrum.sample(x, 1024)).astype(int), minlength=channels)
    assert max(visits) - min(visits) <= 1


def test_a_sample_knows_the_tail_of_a_heavy_tailed_tensor():
    """What `SAMPLE_SIZE` is chosen by: a standard deviation of about a binade."""
    rng = np.random.default_rng(0)
    misses = []
    for _ in range(30):
        x = rng.normal(size=50_000) * np.exp2(rng.normal(scale=3, size=50_000) - 4)
        written = x.astype("float16")
        exact = spectrum.quantile_exponent(counts_of(*written[written != 0]), 1e-3, FLOAT16)
        sample = np.abs(spectrum.sample(written, SAMPLE_SIZE))
        sampled = spectrum.quantile_exponent(counts_of(*sample), 1e-3, FLOAT16)
        misses.append(float(sampled) - float(exact))
    assert np.sqrt(np.mean(np.square(misses))) < 2.0


def test_peaks_are_exact():
    x = np.zeros((200, 200), "float16")
    x[137, 31] = -65504.0
    smallest = np.full(3, -(2.0**-24), "float16")
    wide = np.array([1e-9], "float32" if ON_JAX else "float64")
    tensors = [x, np.float32([1, -3]), smallest, np.zeros((0, 4), "float16"), wide]
    expected = np.float32([65504, 3, 2.0**-24, 0, 1e-9])
    np.testing.assert_array_equal(spectrum.peaks(tensors), expected)
    for value in (np.nan, np.inf, -np.inf):
        x[12, 8] = value
        np.testing.assert_array_equal(spectrum.peaks([smallest, x]), [2.0**-24, np.inf])


def test_the_peak_of_a_tensor_that_turns_out_to_be_empty_is_zero():
    @tf.function(input_signature=[tf.TensorSpec([None], "float16")])
    def peaks(x):
        return spectrum.peaks([x])

    assert peaks(tf.zeros(0, "float16")).numpy() == [0.0]


def test_what_is_read_off():
    counts = counts_of(0.0, 0.0, 2.0**-20, 2.0**-3, 1.0, 1.5, np.inf)
    assert float(spectrum.nonzero_total(counts)) == 4
    assert float(spectrum.top_exponent(counts, FLOAT16)) == 0
    quantiles = [
        float(spectrum.quantile_exponent(counts, s, FLOAT16)) for s in (0.0, 0.24, 0.25, 0.6)
    ]
    assert quantiles == [-20, -20, -3, 0]
    nothing = counts_of(0.0, np.nan)
    assert float(spectrum.top_exponent(nothing, FLOAT16)) == -25
    assert float(spectrum.quantile_exponent(nothing, 0.5, FLOAT16)) == 16


def test_as_a_person_reads_it():
    seen = als.Spectrum(counts_of(0.0, 2.0**-24, 2.0**-15, 1.0, 1.0, np.nan), FLOAT16)
    assert (seen.zeros, seen.nonfinite, seen.nonzero) == (1, 1, 4)
    assert seen.binades == (-24, 0)
    assert seen.subnormal_share == 0.5
    assert seen.underflow_share == 0.5 / 4.5
    nothing = als.Spectrum(counts_of(0.0), FLOAT16)
    assert nothing.binades is None
    assert np.isnan(nothing.underflow_share) and np.isnan(nothing.subnormal_share)


def test_the_estimate_of_underflow():
    """Against the share that really is lost, for gradients of even density near zero."""
    x = np.random.default_rng(0).normal(size=200_000).astype("float32")
    for exponent in (-21, -19, -17):
        written = (x * 2.0**exponent).astype("float16")
        estimate = als.Spectrum(counts_of(*written, dtype="float16"), FLOAT16).underflow_share
        assert estimate == pytest.approx(np.mean(written == 0), rel=0.1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_peaks_find_what_is_not_finite_in_every_mode(dtype, mode):
    # XLA's maximum alone passes over NaN.
    peaks = compiled(lambda x: spectrum.peaks([x]), mode=mode)
    for value in (np.nan, np.inf, -np.inf):
        x = np.ones(1000, dtype)
        x[567] = value
        assert peaks(keras.ops.array(x))[0] == np.inf


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("size", [0, 1, 300, 10_000_000])
def test_a_sample_of_a_tensor_of_unknown_size(size, jit_compile):
    @tf.function(input_signature=[tf.TensorSpec([None])], jit_compile=jit_compile)
    def sampled(x):
        return spectrum.sample(x, SAMPLE_SIZE)

    assert sampled.get_concrete_function().structured_outputs.shape == (SAMPLE_SIZE,)
    values = sampled(tf.range(size, dtype="float32")).numpy()
    if not size:
        np.testing.assert_array_equal(values, np.zeros(SAMPLE_SIZE))
    else:
        assert values[0] < max(size / SAMPLE_SIZE, 1)
        assert values[-1] >= size - size / SAMPLE_SIZE - 1


@pytest.mark.parametrize("name", ["float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"])
def test_counts_of_one_format_are_those_of_a_narrower_one(name):
    values = np.exp2(np.arange(-26, 17, dtype="float32")) * np.float32(1.5)
    values = np.concatenate([values, [0, np.inf]]).astype("float32")
    target = als.FloatFormat(name)
    rebinned = spectrum.rebinned(counts_of(*values), FLOAT16, target)
    np.testing.assert_array_equal(rebinned, spectrum.spectrum(values, target))
    # All narrow formats find their binades among those that spectra are counted in.
    assert set(target.exponents) <= set(COUNTING_FORMAT.exponents)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["float32"], "float32"),
        (["float32", "float16", "bfloat16"], "float16"),
        (["float16", "float8_e5m2"], "float8_e5m2"),
        (["float8_e5m2", "float8_e4m3fn"], "float8_e4m3fn"),
        (["int64", "float16", "string"], "float16"),
        (["int64"], "float32"),
    ],
)
def test_the_narrowest_of_several_formats(dtypes, expected):
    found = narrowest(dtypes)
    assert found.name == expected
    assert found.is_narrow == (expected != "float32")


def test_which_formats_are_narrow():
    names = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
    narrow = [name for name in names if als.FloatFormat(name).is_narrow]
    assert narrow == ["float16", "float8_e4m3fn", "float8_e5m2"]
