"""Numbers kept in 8 bits: all that there are."""

import ml_dtypes
import numpy as np
import pytest
from keras import ops
from numpy.testing import assert_array_equal

from tf_adaptive_ls.backend.functions import compiled
from tf_adaptive_ls.numerics.packing import packed, unpacked

ALL = np.arange(2**16, dtype="uint16").view("float16")
FINITE = ALL[np.isfinite(ALL)]


def kept(x, dtype="float16"):
    return np.array(unpacked(packed(ops.convert_to_tensor(x)), dtype))


@pytest.mark.parametrize("way", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_every_number_of_float16_becomes_the_nearest(way):
    # As ml_dtypes rounds it, but for what would become zero or infinite there.
    expected = FINITE.astype(ml_dtypes.float8_e5m2).astype("float16")
    expected = np.clip(expected, -57344, 57344)
    lost = (expected == 0) & (FINITE != 0)
    expected[lost] = np.sign(FINITE[lost]) * np.float16(2.0**-16)
    actual = np.array(way(lambda x: unpacked(packed(x), "float16"))(FINITE))
    assert_array_equal(actual.view("uint16"), expected.view("uint16"))


def test_what_is_not_finite_stays():
    assert_array_equal(kept(np.float16([np.inf, -np.inf])), [np.inf, -np.inf])
    assert np.isnan(kept(ALL[np.isnan(ALL)])).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wider_numbers(dtype):
    x = np.array([0, 1, -1.125, 1e5, -3e38, 1e-30, -1e-30, np.inf, -np.inf, np.nan, 0.3], "float32")
    expected = [0, 1, -1.0, 57344, -57344, 2**-16, -(2**-16), np.inf, -np.inf, np.nan, 0.3125]
    actual = kept(ops.cast(x, dtype), "float32")
    assert_array_equal(actual, np.array(expected, "float32"))


def test_one_byte_each():
    assert str(np.array(packed(ops.ones((3, 2), "float16"))).dtype) == "uint8"
    assert np.array(packed(ops.ones((0, 2)))).shape == (0, 2)
