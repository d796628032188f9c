"""What this library knows of Keras's inside. A failure here: Keras has changed it."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_adaptive_ls as als
from tests.graphs import floats
from tf_adaptive_ls.backend import keras_internals

FUNCTION = "`keras_internals.{}` has to follow Keras"


def functional():
    inputs = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="inside")], name="inner")
    x = ops.tanh(layers.Dense(4, name="first")(inputs))
    return keras.Model(inputs, layers.Dense(2, name="last")(inner(x)))


def test_parts_of_a_layer():
    names = [part.name for part in keras_internals.parts_of(functional())]
    assert {"first", "inner", "inside", "last"} <= set(names), FUNCTION.format("parts_of")
    bidirectional = layers.Bidirectional(layers.LSTM(2))
    kinds = [type(part) for part in keras_internals.parts_of(bidirectional)]
    assert kinds.count(layers.LSTMCell) == 2, FUNCTION.format("parts_of")


def test_graph_and_nodes_of_models():
    model = functional()
    message = FUNCTION.format("graph_of")
    assert keras_internals.graph_of(model) is model, message
    sequential = keras.Sequential([layers.Dense(2)])
    assert keras_internals.graph_of(sequential) is None, message
    sequential.build((None, 3))
    assert keras_internals.graph_of(sequential).inputs[0].shape == (None, 3), message
    nodes = keras_internals.nodes_of(model)
    message = FUNCTION.format("nodes_of")
    names = [node.operation.name for node in nodes]
    assert [name for name in names if "tanh" not in name] == ["first", "inner", "last"], message
    assert nodes[0].input_tensors[0] is model.inputs[0], message
    assert nodes[-1].output_tensors[0] is model.outputs[0], message
    assert nodes[0].arguments.args[0] is model.inputs[0], message
    assert nodes[0].arguments.kwargs == {}, message


def test_what_a_remat_scope_leaves_on_a_layer():
    with keras.RematScope("full"):
        inside = layers.Dense(2)
        never = als.LossScaled(layers.Dense(2))
    outside = layers.Dense(2)
    is_rematerialized = keras_internals.is_rematerialized
    found = [is_rematerialized(layer, (floats(2, 3),), {}) for layer in (inside, outside)]
    assert found == [True, False], FUNCTION.format("is_rematerialized")
    with keras_internals.not_rematerialized(inside):
        found = is_rematerialized(inside, (floats(2, 3),), {})
        assert not found, FUNCTION.format("not_rematerialized")
    assert is_rematerialized(inside, (floats(2, 3),), {}), FUNCTION.format("not_rematerialized")
    assert never._remat_mode is None, FUNCTION.format("NEVER_REMATERIALIZED")


def test_building_for_a_call_whatever_the_signature():
    wrapped = als.LossScaled(layers.MultiHeadAttention(2, 2))
    wrapped(floats(2, 3, 4), value=floats(2, 3, 5))
    message = FUNCTION.format("build_for_call") + "; so has `LossScaled._maybe_build`"
    assert wrapped.layer.built, message
    kernels = wrapped.layer.query_dense.kernel, wrapped.layer.value_dense.kernel
    assert [kernel.shape[0] for kernel in kernels] == [4, 5], message


def test_names_of_weights_inside_a_wrapper():
    def paths(layer):
        x = keras.Input((4,))
        model = keras.Model(x, layer(x), name="model")
        return [v.path for v in model.weights if not v.overwrite_with_gradient]

    def dense():
        return layers.Dense(2, name="d")

    expected = paths(dense())
    assert paths(als.LossScaled(dense())) == expected, "`LossScaled._open_name_scope` has to follow"


def test_losses_are_forgotten():
    layer = layers.Dense(2, activity_regularizer="l2")
    with keras.StatelessScope(collect_losses=True):
        for expected in (1, 2):
            keras_internals.in_call_context  # noqa: B018
            layer(floats(3, 4))
            assert len(layer.losses) == 1, expected
        keras_internals.forget_losses(layer, layer.losses)
        assert not layer.losses, FUNCTION.format("forget_losses")


def test_what_is_not_a_tensor_may_be_passed_by_position():
    class Any(layers.Layer):
        def call(self, x, mode):
            return x

    with pytest.raises(ValueError, match="positional"):
        Any()(floats(2, 3), "text")
    layer = Any()
    keras_internals.allow_any_positional_arguments(layer)
    layer(floats(2, 3), "text")


def test_the_value_of_a_variable_in_no_scope():
    variable = keras.Variable(1.0)
    message = FUNCTION.format("own_value")
    with keras.StatelessScope([(variable, ops.ones(()) * 2)]):
        assert float(ops.convert_to_tensor(keras_internals.own_value(variable))) == 1, message
        deferred = keras.Variable(initializer="zeros", shape=(2,))
        assert keras_internals.own_value(deferred) is None, message


def test_masks_of_tensors():
    x = ops.convert_to_tensor(floats(2, 3))
    assert keras_internals.mask_of(x) is None
    keras_internals.set_mask(x, ops.ones((2,), "bool"))
    assert keras_internals.mask_of(x).shape == (2,), FUNCTION.format("mask_of")
    tokens = np.array([[1, 0]])
    embedded = layers.Embedding(3, 2, mask_zero=True)(tokens)
    mask = np.array(keras_internals.mask_of(embedded))
    assert mask.tolist() == [[True, False]], FUNCTION.format("mask_of")


def test_what_a_model_was_compiled_with():
    def loss(y, y_pred):
        return ops.mean(y - y_pred)

    model = functional()
    model.compile("sgd", loss=loss, jit_compile=False)
    arguments = keras_internals.arguments_of_compile(model)
    assert arguments["loss"] is loss, FUNCTION.format("arguments_of_compile")
    assert arguments["jit_compile"] is False, FUNCTION.format("arguments_of_compile")


def test_what_an_optimizer_was_built_for():
    model = functional()
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    variables = keras_internals.variables_built_for(optimizer)
    message = FUNCTION.format("variables_built_for")
    assert len(variables) == len(model.trainable_variables), message
    assert all(a is b for a, b in zip(variables, model.trainable_variables, strict=True)), message
