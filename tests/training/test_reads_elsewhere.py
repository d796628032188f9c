"""Layers that read weights where no tap is: right, at the scale around them, and named."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import value_and_gradients
from tests.graphs import floats
from tf_adaptive_ls.training.layer_scaling import is_of_scaling

WORKS = "works at the scale of its surroundings: it {}"


class OwnGradient(layers.Layer):
    """Defines the gradient of a weight for itself, as `tf.custom_gradient` has it."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")

    def call(self, x):
        @tf.custom_gradient
        def product(x):
            kernel = tf.convert_to_tensor(self.kernel)

            def backward(gradient, variables=None):
                of_kernel = tf.matmul(x, gradient, transpose_a=True)
                return tf.matmul(gradient, kernel, transpose_b=True), [of_kernel] * len(
                    variables or []
                )

            return tf.matmul(x, kernel), backward

        return product(x)


class OwnTape(OwnGradient):
    """Has a tape inside the gradient that it defines."""

    def call(self, x):
        @tf.custom_gradient
        def product(x):
            def backward(gradient, variables=()):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    y = tf.matmul(x, self.kernel)
                of_x, *others = tape.gradient(y, [x, *variables], gradient)
                return of_x, others

            return tf.matmul(x, self.kernel), backward

        return product(x)


class OwnVariable(OwnGradient):
    """Has a weight of TensorFlow, which Keras knows nothing of."""

    def build(self, shape):
        super().build(shape)
        self.variable = tf.Variable(tf.ones((shape[-1], 4)))

    def call(self, x):
        return tf.matmul(x, self.kernel + self.variable)


class OwnModule(OwnGradient):
    def build(self, shape):
        super().build(shape)
        self.module = tf.Module()
        self.module.w = tf.Variable(tf.ones((shape[-1], 4)))

    def call(self, x):
        return tf.matmul(x, self.kernel * self.module.w)


class OwnScope(OwnGradient):
    """Reads a weight in a scope of its own."""

    def call(self, x):
        with keras.StatelessScope():
            return ops.matmul(x, self.kernel)


class OwnFunction(OwnGradient):
    """Reads a weight in a function of its own, which TensorFlow traces once."""

    @tf.function
    def product(self, x):
        return tf.matmul(x, self.kernel)

    def call(self, x):
        return self.product(x)


class InABranch(OwnGradient):
    """Reads a weight in a branch, which is built anew whenever it is traced."""

    def call(self, x):
        return ops.cond(ops.sum(x) > 1e9, lambda: ops.zeros((5, 4)), lambda: x @ self.kernel)


class Unused(OwnGradient):
    """Has weights that it reads and does not use, or does not read."""

    def build(self, shape):
        super().build(shape)
        self.read = self.add_weight(shape=(), name="read")
        self.unread = self.add_weight(shape=(), name="unread")

    def call(self, x):
        return tf.matmul(x, self.kernel) + ops.stop_gradient(self.read * 2)


class Recomputed(OwnGradient):
    """Recomputes a product in the backward pass, where weights are recorded for the first time."""

    def call(self, x):
        return tf.recompute_grad(lambda x: tf.matmul(x, self.kernel))(x)


def exported(folder):
    inputs = keras.Input((3,))
    keras.Model(inputs, layers.Dense(4, "tanh")(inputs)).export(folder, verbose=False)
    return layers.TFSMLayer(folder, call_endpoint="serve", trainable=True)


KINDS = {
    "a gradient of its own": (OwnGradient, "has gradients of .*/kernel that only variables get"),
    "a tape in it": (OwnTape, "has gradients of .*/kernel that only variables get"),
    "a tf.Variable": (OwnVariable, "reads .*Variable:0 as a tf.Variable"),
    "a tf.Module": (OwnModule, "reads .*Variable:0 as a tf.Variable"),
    "a scope of its own": (OwnScope, "reads .*kernel.* as a tf.Variable"),
    "a tf.function": (OwnFunction, "reads .*kernel.* as a tf.Variable"),  # traced before
    "recomputation": (Recomputed, "reads .*/kernel where TensorFlow records nothing"),
    "a saved model": (exported, "reads .*kernel.* as a tf.Variable"),
}


def variables_of(layer):
    own = [v.value for v in layer.trainable_variables if not is_of_scaling(v)]
    module = getattr(layer, "module", None)
    others = [getattr(layer, "variable", None), module and module.w]
    return [*own, *(v for v in others if v is not None)]


def gradients(call, layer, graph, x):
    def compute(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(call(x) ** 2)
        return tape.gradient(loss, [x, *variables_of(layer)])

    return (tf.function(compute) if graph else compute)(tf.constant(x))


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("kind", KINDS)
def test_its_gradients_are_right_and_it_is_named(kind, graph, tmp_path):
    make, how = KINDS[kind]
    layer = make(str(tmp_path)) if make is exported else make()
    inputs = keras.Input((3,))
    plain = keras.Model(inputs, layers.Dense(1)(layers.Dense(4)(layer(layers.Dense(3)(inputs)))))
    x = floats(5, 3)
    expected = gradients(plain, plain, graph, x)
    of_layer = gradients(plain, layer, graph, x)
    with pytest.warns(UserWarning, match=WORKS.format(how)):
        wrapped = als.wrap_model(plain)
        for place, r in enumerate((-3, 5, 7, 2), 1):
            wrapped.layers[place].loss_scaling.log2_scale = r
        found = gradients(wrapped, plain, graph, x)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    # From then on without a warning, and with weights that have changed.
    for variable in plain.trainable_variables:
        variable.assign(variable * 2)
    if not graph and make is not OwnFunction:
        of_layer = gradients(plain, layer, graph, x)
        for a, b in zip(gradients(wrapped, layer, graph, x), of_layer, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_function_of_its_own_sees_weights_as_they_are():
    layer = OwnFunction()
    scaled = als.LossScaled(layer)
    x = floats(5, 3)
    how = "uses variables in a tf.function of its own"
    with pytest.warns(UserWarning, match=WORKS.format(how)):
        first = scaled(x)
    layer.kernel.assign(layer.kernel * 2)
    np.testing.assert_array_equal(scaled(x), 2 * first)


def test_its_overflows_are_not_blamed_on_its_scale():
    scaled = als.LossScaled(OwnVariable())
    assert not scaled.called_at_s
    with pytest.warns(UserWarning, match="tf.Variable"):
        scaled(floats(5, 3))
    assert scaled.called_at_s


@pytest.mark.parametrize("layer_class", [InABranch, Unused])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_others_keep_their_scale(layer_class, graph):
    layer = layer_class()
    layer.build((5, 3))
    x = floats(5, 3)
    expected = gradients(layer, layer, graph, x)
    scaled = als.LossScaled(layer)
    scaled.log2_scale = 5
    for found, plain in zip(gradients(scaled, layer, graph, x), expected, strict=True):
        assert (found is None) == (plain is None)
        if plain is not None:
            np.testing.assert_array_equal(found, plain)
    assert not scaled.called_at_s


class Counting(layers.Layer):
    """Counts its calls in Python."""

    calls = 0

    def build(self, shape):
        self.w = self.add_weight(shape=(), name="w")

    def call(self, x):
        Counting.calls += 1
        return x * self.w


def test_it_is_looked_at_once_and_only_where_gradients_are_wanted():
    scaled, x = als.LossScaled(Counting()), floats(2, 3)
    scaled(x)
    assert Counting.calls == 1
    for calls in (3, 4):
        value_and_gradients(lambda: ops.sum(scaled(x)), scaled.layer.trainable_variables)
        assert Counting.calls == calls
