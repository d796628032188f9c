"""The report of what was wrapped, what was not, and why."""

import keras
import numpy as np
from keras import layers

import tf_adaptive_ls as als
from tests.backends import JIT
from tests.graphs import floats


def network():
    inner_inputs = keras.Input((4,))
    inner = keras.Model(inner_inputs, layers.Dense(4, name="hidden")(inner_inputs), name="inner")
    x = inputs = keras.Input((4,), name="x")
    x = layers.ReLU(name="relu")(inner(x))
    x = layers.Dense(4, name="left_out")(x)
    x = layers.Dense(4, name="frozen", trainable=False)(x)
    x = layers.BatchNormalization(center=False, scale=False, name="statistics")(x)
    model = keras.Model(inputs, layers.Dense(2, name="scores")(x))
    return als.wrap_model(model, layer_filter=lambda layer: layer.name != "left_out")


def test_a_row_for_every_layer_and_the_reason_for_those_not_scaled():
    rows = als.scale_table(network())
    assert [(row.name, row.layer_class, row.log2_scale, row.note) for row in rows] == [
        ("x", "InputLayer", None, "no weights"),
        ("inner/" + "input_layer", "InputLayer", None, "no weights"),
        ("inner/hidden", "Dense", 0, ""),
        ("relu", "ReLU", None, "no weights"),
        ("left_out", "Dense", None, "not wrapped"),
        ("frozen", "Dense", None, "frozen"),
        ("statistics", "BatchNormalization", None, "no trainable weights"),
        ("scores", "Dense", 0, ""),
    ]
    assert rows[-1].binades is None and rows[-1].underflow is None


def test_scales_and_binades_after_a_step(mixed_float16):
    model = network()
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse", jit_compile=JIT)
    model.fit(floats(8, 4), floats(8, 2), epochs=5, verbose=0)
    (row,) = [row for row in als.scale_table(model) if row.name == "scores"]
    assert row.log2_total == row.log2_scale + np.log2(model.optimizer.loss_scale)
    layer = model.get_layer("scores").loss_scaling
    low, high = layer.spectrum.binades
    sampled_at = layer.snapshot.log2_sampled_at
    assert row.binades == (low - sampled_at, high - sampled_at)
    assert row.underflow == model.get_layer("scores").loss_scaling.spectrum.underflow_share
    assert als.scale_table(model, model.optimizer) == als.scale_table(model)


def test_the_table_is_aligned():
    text = str(als.scale_table(network()))
    header, line, *rows = text.splitlines()
    assert header.split()[:2] == ["layer", "class"]
    assert set(line.strip()) == {"─"}
    column = header.index("class")
    kinds = [row[column:].split()[0] for row in rows]
    assert kinds == [row.layer_class for row in als.scale_table(network())]


def test_layers_inside_layers_are_listed_too():
    class Holder(layers.Layer):
        def __init__(self):
            super().__init__(name="holder")
            self.inside = als.LossScaled(layers.Dense(2, name="inside"))

        def call(self, x):
            return self.inside(x)

    inputs = keras.Input((4,))
    rows = als.scale_table(keras.Model(inputs, Holder()(inputs)))
    assert [row.name for row in rows[1:]] == ["holder", "holder/inside"]
    assert rows[1].note == "has 1 scaled layer inside"
    assert als.scale_table(als.LossScaled(layers.Dense(3)))[0].log2_scale == 0
