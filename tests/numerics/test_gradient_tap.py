"""The one custom-gradient op, at the edges of float16."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from tests.backends import MODES, compiled, value_and_gradients
from tf_adaptive_ls.backend import devices
from tf_adaptive_ls.backend.arrays import power_of_two
from tf_adaptive_ls.numerics.gradient_tap import gradient_tap


@pytest.mark.parametrize("mode", MODES)
def test_powers_of_two_are_exact(mode):
    exponents = np.arange(-126, 128)
    powers = compiled(power_of_two, mode=mode)(ops.array(exponents, "float32"))
    np.testing.assert_array_equal(powers, np.ldexp(np.float32(1), exponents))


def shifted(gradient, shift, dtype, mode="eager"):
    """What a gradient of `dtype` is behind a tap, and what the tap reports."""

    def report(gradients, divisors):
        gradient = ops.cast(gradients[0], "float32")
        return ops.stack([gradient, gradient / divisors[0]])

    def run(gradient, shift):
        def of(x, scale, reported):
            (y,) = gradient_tap([x], [power_of_two(-shift)], (scale, reported), report)
            return y * gradient, y

        return value_and_gradients(of, [], (ops.ones_like(gradient), ops.ones(3), ops.zeros(2)))

    arguments = ops.array(gradient, dtype), ops.array(shift, "float32")
    (_, y), (result, of_scale, reported) = compiled(run, mode=mode)(*arguments)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    assert y == 1 and y.dtype == result.dtype
    np.testing.assert_array_equal(of_scale, np.zeros(3))
    if dtype == "bfloat16":
        result = ops.cast(result, "float32")  # NumPy has none, float32 holds all of them
    return np.array(result), np.array(reported)


SMALLEST, LARGEST = 2.0**-24, 65504.0


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("gradient", "shift", "expected"),
    [
        (SMALLEST, 39, 2.0**15),  # the whole range in one step
        (2.0**15, -39, SMALLEST),
        (-SMALLEST, 16, -(2.0**-8)),  # 2**16 itself is no float16
        (LARGEST, 0, LARGEST),
        (LARGEST, 1, np.inf),
        (LARGEST, -120, 0.0),
        (3 * SMALLEST, -1, 2 * SMALLEST),  # 1.5: rounded to even, and once
        (1.25, -24, SMALLEST),
        (0.0, 120, 0.0),
        (np.inf, -20, np.inf),
    ],
)
def test_float16_gradients_are_shifted_and_rounded_once(
    gradient, shift, expected, mode, gpu, monkeypatch
):
    monkeypatch.setattr(devices, "on_gpu", lambda: gpu)
    result, _ = shifted(gradient, shift, "float16", mode)
    assert result == expected
    assert np.isnan(shifted(np.nan, shift, "float16", mode)[0])


def test_the_report_sees_gradients_before_and_after_before_rounding():
    _, reported = shifted(SMALLEST, -20, "float16")
    np.testing.assert_array_equal(reported, [2.0**-24, 2.0**-44])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_other_dtypes_keep_their_precision(dtype):
    value = {"bfloat16": 1.0078125}.get(dtype, 1.0000001)
    result, _ = shifted(value, 100, dtype)
    assert result == float(ops.array(value, dtype)) * 2.0**100


def test_sparse_gradients_stay_sparse():
    weights = tf.Variable(tf.ones((5, 2)))
    with tf.GradientTape() as tape:
        (tapped,) = gradient_tap(
            [weights.value()],
            [tf.constant(0.125)],
            (tf.zeros(()), tf.zeros(())),
            lambda *_: tf.zeros(()),
        )
        loss = tf.reduce_sum(tf.gather(tapped, [1, 1, 3]))
    gradient = tape.gradient(loss, weights)
    assert isinstance(gradient, tf.IndexedSlices)
    dense = tf.convert_to_tensor(gradient)
    np.testing.assert_array_equal(dense[:, 0], [0, 16, 0, 8, 0])
    assert keras.ops.all(dense[:, 0] == dense[:, 1])
