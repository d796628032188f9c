"""What had better be float32 is named beforehand."""

import keras
import numpy as np
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import JIT
from tf_adaptive_ls.observe.narrow_reductions import narrow_reductions


def named(model):
    return {each.name: each.reason for each in narrow_reductions(model)}


def network(dtype=None, regularizer="l2"):
    x = inputs = keras.Input((5, 4))
    x = layers.MultiHeadAttention(2, 2, name="attention", dtype=dtype)(x, x)
    x = layers.Dense(4, activity_regularizer=regularizer, name="regularized", dtype=dtype)(x)
    inner_inputs = keras.Input((5, 4))
    gate = layers.Dense(4, "softmax", name="gate", dtype=dtype)(inner_inputs)
    x = keras.Model(inner_inputs, gate, name="inner")(x)
    total = ops.logsumexp(ops.cast(x, dtype) if dtype else x, axis=1)
    return keras.Model(inputs, layers.Dense(3, name="scores", dtype=dtype)(total))


def test_softmax_logsumexp_regularisers_and_outputs(mixed_float16):
    model = network()
    found = named(model)
    (operation,) = [name for name in found if "logsumexp" in name]
    assert found == {
        "attention": "softmax",
        "regularized": "activity regularizer",
        "inner/gate": "softmax",
        operation: "logsumexp",
        "scores": "output of the model",
    }
    assert named(als.wrap_model(model)) == found


def test_nothing_is_said_of_what_is_float32(mixed_float16):
    model = network("float32")
    assert named(model) == {}
    assert "float32" not in str(als.scale_table(als.wrap_model(model)))


def test_nothing_is_said_of_formats_with_the_range_of_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert named(network()) == {}


def test_tables_say_it_once(mixed_float16):
    model = als.wrap_model(network(regularizer=None))
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse", jit_compile=JIT)
    table = als.scale_table(model)
    calibration = als.calibrate(model, [(np.ones((2, 5, 4)), np.ones((2, 3)))])
    for text in (str(table), str(calibration)):
        assert text.count('Better computed in float32, by `dtype="float32"`:') == 1
        assert "\n  inner/gate: softmax\n" in text
    assert table.narrow_reductions == calibration.narrow_reductions == narrow_reductions(model)
