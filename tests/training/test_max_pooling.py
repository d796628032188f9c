"""Max pooling with `saved_activations`: its gradient is the same, from a byte for each window."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from numpy.testing import assert_array_equal

import tf_adaptive_ls as als
from tests.backends import JIT, ON_JAX
from tf_adaptive_ls.backend import autodiff
from tf_adaptive_ls.training.max_pooling import pool, saves_positions

CASES = [
    (layers.MaxPooling1D, (2, 7, 3), 2),
    (layers.MaxPooling2D, (2, 7, 9, 3), (2, 3)),
    (layers.MaxPooling2D, (2, 8, 8, 3), 2),
    (layers.MaxPooling3D, (2, 5, 7, 9, 3), 2),
]


def both_gradients(layer, x, gradient=None):
    """Keras's and ours."""
    x = ops.convert_to_tensor(x)
    y = layer(x)
    if gradient is None:
        gradient = np.random.default_rng(1).normal(size=y.shape)
    gradient = ops.cast(gradient, y.dtype)
    assert_array_equal(np.array(pool(layer, layer.call, x)), np.array(y))
    return [
        np.array(autodiff.pulled_back(call, x, gradient))
        for call in (layer.call, lambda x: pool(layer, layer.call, x))
    ]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"][: 1 + ON_JAX])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("make, shape, size", CASES, ids=["1D", "2D", "2D even", "3D"])
def test_of_equal_numbers_the_first_has_the_gradient(make, shape, size, padding, data_format):
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 2, shape).astype("float32")
    if make is layers.MaxPooling3D and not ON_JAX:
        x = rng.permuted(np.arange(x.size, dtype="float32")).reshape(
            shape
        )  # there all would have it
    layer = make(size, padding=padding, data_format=data_format)
    assert saves_positions(layer)
    if data_format == "channels_first":
        x = np.moveaxis(x, -1, 1)
    expected, actual = both_gradients(layer, x)
    assert_array_equal(actual, expected)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_stays_in_its_place(bad):
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 1)).astype("float32")
    gradient = np.float32([[[[1], [bad]], [[2], [3]]]])
    expected, actual = both_gradients(layers.MaxPooling2D(), x, gradient)
    assert_array_equal(actual, expected)
    assert np.sum(~np.isfinite(actual)) == 1


@pytest.mark.parametrize(
    "layer",
    [
        layers.MaxPooling2D(3, strides=2),
        layers.MaxPooling2D(5),
        layers.AveragePooling2D(2),
        layers.GlobalMaxPooling2D(),
    ],
    ids=["overlapping", "large", "average", "global"],
)
def test_others_are_left_alone(layer):
    assert not saves_positions(layer)


def test_in_a_model_of_any_size(mixed_float16):
    """As with a plain one: a layer behind it has the same inputs in 8 bits."""
    x, y = np.random.default_rng(0).normal(size=(4, 9, 9, 2)), np.ones((4, 1))
    weights = []
    for shape in ((9, 9, 2), (None, None, 2)):
        keras.utils.set_random_seed(0)
        inputs = keras.Input(shape)
        outputs = layers.MaxPooling2D()(layers.Conv2D(3, 2)(inputs))
        outputs = layers.Dense(1, dtype="float32")(layers.GlobalAveragePooling2D()(outputs))
        model = als.wrap_model(keras.Model(inputs, outputs), saved_activations="float8_e5m2")
        model.compile(als.AdaptiveLossScaleOptimizer("sgd"), "mse", jit_compile=JIT)
        model.fit(x, y, verbose=0)
        weights.append(model.get_weights())
    for known, unknown in zip(*weights, strict=True):
        np.testing.assert_allclose(known, unknown, rtol=1e-3, atol=1e-6)
