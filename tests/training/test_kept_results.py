"""What the second run of a layer with `saved_activations` takes over from the first."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers
from numpy.testing import assert_array_equal

import tf_adaptive_ls as als
from tests.backends import COMPILED, JIT
from tests.graphs import floats
from tests.steps import layer_stepper
from tf_adaptive_ls.training import kept_results

FORMAT = "float8_e5m2"
series, image, volume = floats(2, 5, 3), floats(2, 5, 5, 3), floats(2, 4, 4, 4, 3)
WITH_RELU = {
    "Dense": (lambda: layers.Dense(4, "relu"), series),
    "EinsumDense": (
        lambda: layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d", activation="relu"),
        series,
    ),
    "Conv1D": (lambda: layers.Conv1D(4, 2, padding="causal", activation="relu"), series),
    "Conv2D": (lambda: layers.Conv2D(4, 2, activation="relu"), image),
    "Conv3D": (lambda: layers.Conv3D(4, 2, activation="relu"), volume),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(4, 2, activation="relu"), series),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(4, 2, activation="relu"), image),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(4, 2, activation="relu"), volume),
    "DepthwiseConv1D": (lambda: layers.DepthwiseConv1D(2, activation="relu"), series),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(2, activation="relu"), image),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(4, 2, activation="relu"), series),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(4, 2, activation="relu"), image),
}


class Inside(layers.Layer):
    """A layer with another one inside, which it calls twice."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x) + self.inner(-x)


def gradients(layer, x, mode="eager", **settings):
    layer.__dict__.pop("_loss_scaled", None)
    scaled = als.LossScaled(layer, **settings)
    return layer_stepper(scaled, layer, {"args": (x,)}, training=True, mode=mode)().gradients


@pytest.mark.parametrize("mode", ["eager", pytest.param(COMPILED, marks=pytest.mark.long)])
@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
@pytest.mark.parametrize("name", WITH_RELU)
def test_relu_lets_the_same_gradients_through(name, inside, mode):
    make, x = WITH_RELU[name]
    layer = Inside(make()) if inside else make()
    layer.build(x.shape)
    (bias,) = [w for w in layer.weights if w.name == "bias"]
    bias.assign(floats(*bias.shape))
    plain, saved = gradients(layer, x, mode), gradients(layer, x, mode, saved_activations=FORMAT)
    # On inputs in 8 bits sums of products are others, some of another sign.
    (of_bias,) = [path for path in plain if path.endswith("bias")]
    assert_array_equal(saved[of_bias], plain[of_bias])
    assert any(not np.array_equal(saved[path], plain[path]) for path in plain)


class Counted:
    """A function, and how often it was called."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def test_statistics_are_computed_once(monkeypatch):
    moments = Counted(keras.ops.moments)
    monkeypatch.setattr("keras.src.ops.moments", moments)
    layer = layers.BatchNormalization()
    layer.build(image.shape)
    gradients(layer, image)
    assert moments.calls == 1
    gradients(layer, image, saved_activations=FORMAT)
    assert moments.calls == 2


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("renorm", [False, True])
def test_statistics_of_inputs_that_8_bits_hold(axis, renorm):
    layer = layers.BatchNormalization(axis, renorm=renorm)
    x = image.astype(ml_dtypes.float8_e5m2).astype("float32")
    layer.build(x.shape)
    plain, saved = gradients(layer, x), gradients(layer, x, saved_activations=FORMAT)
    for path, gradient in plain.items():
        if gradient is not None:
            np.testing.assert_allclose(saved[path], gradient, rtol=1e-4, atol=1e-5)


class ReluCell(layers.Layer):
    """A recurrent cell with a layer inside."""

    state_size = output_size = 3

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, "relu")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, inputs, states):
        y = self.dense(inputs + states[0])
        return y, [y]


@pytest.mark.parametrize("jit_compile", [False, JIT], ids=["graph", "compiled"])
def test_nothing_gets_out_of_a_loop(jit_compile, mixed_float16):
    inputs = keras.Input((5, 3))
    outputs = layers.TimeDistributed(layers.Dense(3, "relu"))(
        layers.RNN(ReluCell())(inputs)[:, None]
    )
    model = als.wrap_model(keras.Model(inputs, outputs), saved_activations=FORMAT)
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), "mse", jit_compile=jit_compile)
    before = model.get_weights()
    model.fit(series, np.ones((2, 1, 3)), verbose=0)
    assert all(np.isfinite(each).all() for each in model.get_weights())
    assert any(not np.array_equal(*pair) for pair in zip(before, model.get_weights(), strict=True))


def test_a_layer_computes_as_ever_once_it_is_not_scaled(mixed_float16):
    layer = layers.Dense(4, "relu")
    model = als.wrap_model(keras.Sequential([keras.Input((3,)), layer]), saved_activations=FORMAT)
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), "mse", jit_compile=JIT)
    x = floats(2, 3)
    model.fit(x, np.ones((2, 4)), verbose=0)
    expected = np.array(layer(x))
    als.strip_model(model)
    assert layer.activation is keras.activations.relu
    assert kept_results.activation_of(layer) is layer.activation
    assert_array_equal(np.array(layer(x)), expected)
    assert layer.get_config()["activation"] == "relu"
