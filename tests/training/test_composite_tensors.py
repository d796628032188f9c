"""Ragged, sparse and complex tensors cross the border of a layer as dense ones do."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import MODES, ON_JAX, compiled, value_and_gradients
from tests.graphs import floats
from tf_adaptive_ls.backend import arrays
from tf_adaptive_ls.numerics.gradient_tap import gradient_tap

SCALES = (0, 3, -5)


class WithWeight(layers.Layer):
    """Multiplies all numbers of a tensor with a weight, one by one."""

    dtype_of_weight = "float32"

    def build(self, shape):
        self.w = self.add_weight(
            shape=(3,), initializer=keras.initializers.RandomUniform(1, 2, seed=0), name="w"
        )

    def call(self, x):
        parts, rebuild = arrays.dense_parts(x)
        return rebuild([self.on_numbers(part) for part in parts])

    def on_numbers(self, part):
        if not arrays.is_inexact_dtype(part.dtype):
            return part
        return part * ops.cast(self.w, part.dtype)[: ops.shape(part)[-1]]

    def compute_output_spec(self, x):
        return x


class ToComplex(WithWeight):
    def call(self, x):
        return arrays.complex_number(x * self.w, x + self.w)


class Structured(WithWeight):
    """Takes and returns what is nested."""

    def call(self, inputs):
        call = super().call
        return {"a": [call(inputs["a"][0])], "b": call(inputs["b"])}


def numbers(x):
    """All floating-point numbers in a structure, a list of dense tensors."""
    for leaf in keras.tree.flatten(x):
        for part in arrays.dense_parts(leaf)[0]:
            if arrays.is_inexact_dtype(part.dtype):
                yield arrays.real_numbers(part)


def composites(x):
    """Values by name, made of the numbers `x[4, 3]`."""
    found = {"complex": arrays.complex_number(x, 2 * x)}
    if ON_JAX:
        from jax.experimental import sparse

        found["sparse"] = sparse.BCOO((x, np.array([[0], [1], [3], [4]])), shape=(6, 3))
        return found
    ragged = tf.RaggedTensor.from_row_lengths(x, [3, 0, 1])
    found["ragged"] = ragged
    found["doubly ragged"] = tf.RaggedTensor.from_row_lengths(ragged, [1, 2])
    places = tf.constant([[i, j] for i in range(4) for j in range(3)], "int64")
    found["slices"] = tf.IndexedSlices(x, tf.constant([0, 2, 3, 5]), tf.constant([6, 3]))
    found["nested"] = {"a": [ragged], "b": tf.SparseTensor(places, tf.reshape(x, [-1]), [4, 3])}
    return found


class OnSparse(Structured):
    def on_numbers(self, part):
        if not arrays.is_inexact_dtype(part.dtype):
            return part
        return part * ops.cast(self.w[0], part.dtype)


def gradients_at(layer, name, mode):
    """The loss, and its gradients by the numbers of the input and by the weight."""
    inner = getattr(layer, "layer", layer)

    def step(x):
        def loss(x):
            return sum(ops.sum(ops.square(y)) for y in numbers(layer(composites(x)[name])))

        return value_and_gradients(loss, inner.trainable_variables, (x,))

    value, gradients = compiled(step, inner.trainable_variables, mode)(floats(4, 3))
    return [np.array(value), *map(np.array, gradients)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", composites(ops.ones((4, 3))))
def test_gradients_do_not_depend_on_the_scale(name, mode):
    layer = OnSparse() if name == "nested" else WithWeight()
    layer.build((None, 3))
    expected = gradients_at(layer, name, mode)
    scaled = als.LossScaled(layer)
    for r in SCALES:
        scaled.log2_scale = r
        for found, plain in zip(gradients_at(scaled, name, mode), expected, strict=True):
            np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("mode", MODES)
def test_complex_tensors_between_layers(mode):
    first, second = ToComplex(), WithWeight()
    for layer in (first, second):
        layer.build((None, 3))
    variables = [first.w, second.w]

    def gradients(first, second):
        def step(x):
            def loss(x):
                return ops.sum(arrays.real_numbers(second(first(x))) ** 3)

            return value_and_gradients(loss, variables, (x,))

        return compiled(step, variables, mode)(floats(4, 3))

    _, expected = gradients(first, second)
    layers_ = [als.LossScaled(first), als.LossScaled(second)]
    layers_[0].log2_scale, layers_[1].log2_scale = 9, -4
    _, found = gradients(*layers_)
    for gradient, plain in zip(found, expected, strict=True):
        np.testing.assert_array_equal(gradient, plain)


def test_infinities_of_complex_gradients_stay_beside_zeros():
    def loss(x):
        (shifted,) = gradient_tap([arrays.complex_number(x, x)], [ops.ones(()) * 4])
        return ops.sum(ops.real(shifted) * np.float32([np.inf, 1]))

    _, (gradient,) = value_and_gradients(loss, [], (np.ones(2, "float32"),))
    np.testing.assert_array_equal(gradient, [np.inf, 0.25])  # and not NaN


@pytest.mark.skipif(ON_JAX, reason="ragged tensors are TensorFlow's")
def test_a_model_with_a_ragged_embedding_trains_as_the_plain_one():
    """And what arrives at the layer is counted."""
    rows = tf.ragged.constant([[1, 2], [3], [0, 1, 2]])
    embedding = layers.Embedding(5, 3)
    embedding.build(None)
    scaled = als.LossScaled(embedding)
    variables = [scaled.loss_scale, scaled.loss_scale_report, embedding.embeddings]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(scaled(rows).flat_values ** 2)
    _, report, _ = tape.gradient(loss, [v.value for v in variables])
    assert np.any(np.array(report))


class ComplexWeight(layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(3,), dtype="complex64", initializer="ones", name="w")

    def call(self, x):
        return ops.abs(ops.cast(x, "complex64") * self.w)


def test_complex_weights_are_weights():
    layer = ComplexWeight()
    layer.build((None, 3))
    scaled = als.LossScaled(layer)
    found = []
    for r in SCALES:
        scaled.log2_scale = r
        _, (gradient,) = value_and_gradients(lambda: ops.sum(scaled(floats(4, 3))), [layer.w])
        found.append(np.array(gradient))
    assert np.any(found[0])
    for gradient in found[1:]:
        np.testing.assert_array_equal(gradient, found[0])


@pytest.mark.skipif(ON_JAX, reason="arrays of tensors are TensorFlow's")
def test_a_layer_whose_tensors_cannot_be_reached_is_refused():
    class Rows(WithWeight):
        def call(self, x):
            rows = tf.TensorArray("float32", 4, infer_shape=False)
            return rows.unstack(x * self.w)

    with pytest.raises(ValueError, match="which hides its gradients"):
        als.LossScaled(Rows())(floats(4, 3))
