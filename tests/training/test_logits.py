"""Crossentropies are computed from the logits behind a softmax or sigmoid, as in plain Keras."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import COMPILED, MODES, ON_JAX, compiled, value_and_gradients
from tests.graphs import floats

# Logits that a float32 probability is 0 or 1 for: what is computed from those is clipped.
LARGE = keras.initializers.RandomNormal(stddev=100.0, seed=0)
X, CLASSES = floats(16, 4), np.arange(16) % 3
TARGETS = {
    "sparse_categorical_crossentropy": CLASSES,
    "categorical_crossentropy": np.eye(3, dtype="float32")[CLASSES],
    "binary_crossentropy": np.eye(3, dtype="float32")[CLASSES],
    "categorical_focal_crossentropy": np.eye(3, dtype="float32")[CLASSES],
}


@keras.saving.register_keras_serializable("tests")
class EndsWith(layers.Layer):
    """Ends with an operation of Keras, which leaves no logits: in a graph Keras looks for it."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), initializer=LARGE, name="kernel")

    def call(self, x):
        return self.function(ops.matmul(x, self.kernel))


def dense(activation, **options):
    return layers.Dense(3, activation=activation, kernel_initializer=LARGE, **options)


def nested(head):
    inner = keras.Sequential([keras.Input((4,)), head])
    return lambda x: inner(x)


HEADS = {
    "softmax": lambda: dense("softmax"),
    "sigmoid": lambda: dense("sigmoid"),
    "a softmax of its own": lambda: EndsWith(ops.softmax),
    "a sigmoid of its own": lambda: EndsWith(ops.sigmoid),
    "a layer of its own": lambda: lambda x: layers.Softmax()(dense(None)(x)),
    "float32 over float16": lambda: (
        lambda x: layers.Activation("softmax", dtype="float32")(
            layers.Dense(3, dtype="mixed_float16")(x)
        )
    ),
    "nested": lambda: nested(dense("softmax")),
    "scaled twice": lambda: als.LossScaled(Holder(als.LossScaled(dense("softmax")))),
    "a convolution": lambda: (
        lambda x: layers.Flatten()(
            layers.Conv1D(3, 1, activation="softmax", kernel_initializer=LARGE)(
                layers.Reshape((1, 4))(x)
            )
        )
    ),
}


class Holder(layers.Layer):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x):
        return self.layer(x)


def loss_and_gradients(model, variables, loss, mode):
    criterion, y = keras.losses.get(loss), ops.convert_to_tensor(TARGETS[loss])

    def step(x):
        return value_and_gradients(
            lambda: ops.mean(criterion(y, model(x, training=True))), variables
        )

    value, gradients = compiled(step, variables, mode)(X)
    return np.array(value), [np.array(gradient) for gradient in gradients]


def cases():
    """All heads in a graph, where Keras looks for more; the rest with one loss of each kind."""
    for loss in TARGETS:
        for head in HEADS:
            for mode in MODES:
                often = mode == COMPILED or (head in ("softmax", "sigmoid") and "focal" not in loss)
                marks = () if often else pytest.mark.long
                yield pytest.param(loss, head, mode, marks=marks)


@pytest.mark.parametrize(("loss", "head", "mode"), list(cases()))
def test_loss_and_gradients_are_those_of_the_plain_model(loss, head, mode):
    inputs = keras.Input((4,))
    plain = keras.Model(inputs, HEADS[head]()(inputs))
    variables = [v for v in plain.trainable_variables if not v.overwrite_with_gradient]
    if head == "scaled twice":
        with als.neutral_scales():
            expected = loss_and_gradients(plain, variables, loss, mode)
        wrapped = plain
    else:
        expected = loss_and_gradients(plain, variables, loss, mode)
        wrapped = als.wrap_model(plain)
    for layer in wrapped._flatten_layers():
        if isinstance(layer, als.LossScaled):
            layer.log2_scale = 7
    found = loss_and_gradients(wrapped, variables, loss, mode)
    np.testing.assert_array_equal(found[0], expected[0])
    # XLA sums float16 in another order where a tap comes between two operations.
    rounds = head == "float32 over float16" and mode == "xla"
    for gradient, expected_gradient in zip(found[1], expected[1], strict=True):
        if rounds:
            np.testing.assert_allclose(gradient, expected_gradient, atol=2.0**-14)
        else:
            np.testing.assert_array_equal(gradient, expected_gradient)


@pytest.mark.filterwarnings("ignore:Loss scales do nothing")
@pytest.mark.parametrize("jit_compile", [True] if ON_JAX else [False, True])
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_fit_with_several_outputs(dtype, jit_compile):
    keras.config.set_dtype_policy(dtype)
    losses = {}
    for wrap in (False, True):
        keras.utils.set_random_seed(0)
        x = inputs = keras.Input((4,))
        x = layers.Dense(8, "relu")(x)
        first = dense("softmax", dtype="float32", name="first")(x)
        second = dense("sigmoid", dtype="float32", name="second")(x)
        model = keras.Model(inputs, {"first": first, "second": second})
        inner = keras.optimizers.SGD(1e-3)
        if wrap:
            model = als.wrap_model(model)
            optimizer = als.AdaptiveLossScaleOptimizer(inner, 1.0)
        else:
            optimizer = keras.optimizers.LossScaleOptimizer(inner, 1.0)
        model.compile(
            optimizer,
            loss={"first": "sparse_categorical_crossentropy", "second": "binary_crossentropy"},
            metrics={"first": ["accuracy"]},
            jit_compile=jit_compile,
        )
        y = {"first": CLASSES, "second": TARGETS["binary_crossentropy"]}
        history = model.fit(X, y, batch_size=16, epochs=3, shuffle=False, verbose=0).history
        losses[wrap] = history["loss"], history["first_accuracy"]
    # More than the logarithm of a clipped probability, where Keras has logits.
    assert ON_JAX or losses[False][0][0] > 20
    if dtype == "float32":
        assert losses[True] == losses[False]
    else:  # float16 rounds gradients at other scales otherwise
        np.testing.assert_allclose(losses[True][0], losses[False][0], rtol=1e-3)
