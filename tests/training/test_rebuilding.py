"""A program that builds many models keeps none of them: searches, tests, notebooks."""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from tensorflow.python.framework.ops import gradient_registry

import tf_adaptive_ls as als
from tests.graphs import GRAPHS, chain, floats
from tests.steps import scaled_layers


def registered_gradients():
    """How many custom gradients TensorFlow holds on to."""
    return len(gradient_registry.list())


def trained(build=chain, **options):
    keras.config.set_dtype_policy("mixed_float16")  # clear_session resets it
    model, inputs = build()
    model = als.wrap_model(model)
    options.setdefault("jit_compile", False)
    optimizer = als.AdaptiveLossScaleOptimizer("adam")
    model.compile(optimizer, loss=lambda y, prediction: ops.mean(prediction**2), **options)
    x = inputs[0]
    model.fit(x, np.zeros(len(keras.tree.flatten(x)[0])), verbose=0)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"jit_compile": True}, marks=pytest.mark.long),
        pytest.param({"run_eagerly": True}, marks=pytest.mark.long),
    ],
)
def test_a_model_that_was_trained_goes_and_leaves_no_gradients_behind(options):
    trained(**options)
    keras.backend.clear_session()
    gc.collect()
    before = registered_gradients()
    model = trained(**options)
    gone = weakref.ref(model), weakref.ref(scaled_layers(model)[0]), weakref.ref(model.optimizer)
    del model
    keras.backend.clear_session()
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert registered_gradients() == before


def test_classes_of_models_are_registered_once():
    registered = keras.saving.get_custom_objects()
    trained()
    before = dict(registered)
    trained()
    trained(GRAPHS["siamese"])
    assert registered == before


def test_gradients_of_a_function_are_there_as_long_as_it():
    """A tape around a function looks its custom gradients up long after it was traced."""
    layer = als.LossScaled(layers.Dense(3))
    layer.build((None, 4))
    x = tf.constant(floats(2, 4))

    @tf.function
    def inner(x):
        return layer(x)

    @tf.function
    def outer(x):
        def body(_, y):
            return y + inner(x)

        return tf.while_loop(lambda i, _: i < 2, lambda i, y: (i + 1, body(i, y)), (0, inner(x)))[1]

    def gradient(function):
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(function(x) ** 2)
        return tape.gradient(y, layer.layer.kernel.value).numpy()

    inner(x), outer(x)
    gc.collect()
    np.testing.assert_array_equal(gradient(inner), gradient(layer))
    np.testing.assert_allclose(gradient(outer), 9 * gradient(layer), rtol=1e-6)
