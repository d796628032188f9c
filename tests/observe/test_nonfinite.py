"""`explain_nonfinite` names the tensor that went non-finite first, and changes nothing."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import JIT
from tests.graphs import floats, tokens


class Log(layers.Layer):
    def call(self, x):
        return ops.log(ops.relu(x))


def network(middle=None, wrap=als.wrap_model):
    """Five layers `first`, `norm`, `middle`, `dropped`, `last`."""
    x = inputs = keras.Input((4,))
    x = layers.Dense(8, name="first")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = (middle or layers.Dense(8, name="middle"))(x)
    x = layers.Dropout(0.2, name="dropped")(x)
    model = keras.Model(inputs, layers.Dense(2, dtype="float32", name="last")(x))
    model = wrap(model)
    model.compile(als.AdaptiveLossScaleOptimizer("adam", 2.0**10), loss="mse", jit_compile=JIT)
    return model


X, Y = floats(16, 4), floats(16, 2)


@pytest.mark.parametrize("wrap", [als.wrap_model, lambda model: model], ids=["wrapped", "plain"])
class TestEachKindOfFault:
    @pytest.fixture
    def trained(self, mixed_float16, wrap):
        return lambda middle=None: network(middle, wrap)

    def test_none(self, trained):
        explanation = als.explain_nonfinite(trained(), X, Y)
        assert explanation.first is None
        phases = [reading.phase for reading in explanation.trail]
        assert phases == sorted(
            phases, key=["input", "weights", "forward", "loss", "backward"].index
        )
        assert str(explanation) == "Every tensor of this training step is finite."

    @pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "Inf")])
    def test_data(self, trained, value, kind):
        x = X.copy()
        x[3, 1] = value
        first = als.explain_nonfinite(trained(), x, Y).first
        assert (first.phase, first.tensor, first.kind) == ("input", "x", kind)
        assert first.infs + first.nans == 1

    def test_targets(self, trained):
        y = Y.copy()
        y[0, 0] = np.nan
        first = als.explain_nonfinite(trained(), X, y).first
        assert (first.phase, first.tensor, first.kind) == ("input", "y", "NaN")

    def test_a_weight(self, trained):
        model = trained()
        kernel = next(v for v in model.trainable_variables if "middle/kernel" in v.path)
        kernel.assign(np.where(np.eye(8), np.nan, kernel.numpy()))
        first = als.explain_nonfinite(model, X, Y).first
        assert (first.phase, first.layer, first.tensor) == ("weights", "middle", "kernel")
        assert (first.kind, first.nans) == ("NaN", 8)

    def test_the_logarithm_of_zero_inside_a_layer(self, trained):
        explanation = als.explain_nonfinite(trained(Log(name="log")), X, Y)
        first = explanation.first
        assert (first.phase, first.layer, first.tensor) == ("forward", "log", "output")
        assert first.infs > 0
        assert explanation.trail[-1].layer == "norm"
        assert explanation.trail[-1].largest > 0
        assert "logarithm" in str(explanation)

    def test_an_overflow_of_an_output(self, trained):
        model = trained(layers.Dense(8, name="middle", kernel_initializer=_constant(3e4)))
        explanation = als.explain_nonfinite(model, X, Y)
        first = explanation.first
        assert (first.phase, first.layer, first.dtype) == ("forward", "middle", "float16")
        assert first.kind == "Inf"
        assert "65504" in str(explanation)

    def test_the_loss(self, trained):
        model = trained()
        model.compile(
            als.AdaptiveLossScaleOptimizer("adam"),
            loss=lambda y, y_pred: ops.mean(ops.log(ops.abs(y_pred) * 0)),
        )
        first = als.explain_nonfinite(model, X, Y).first
        assert (first.phase, first.layer, first.kind) == ("loss", "", "Inf")

    def test_the_gradient_of_the_loss(self, trained):
        model = trained()
        model.compile(
            als.AdaptiveLossScaleOptimizer("adam"),
            loss=lambda y, y_pred: ops.mean(ops.sqrt(ops.abs(y_pred) * 0)),
        )
        first = als.explain_nonfinite(model, X, Y).first
        assert (first.phase, first.layer) == ("backward", "last")
        assert first.tensor == "gradient of the output"


def test_an_overflow_of_a_weight_gradient_is_blamed_on_its_layer(mixed_float16):
    model = network()
    model.get_layer("middle").loss_scaling.log2_scale = 40
    explanation = als.explain_nonfinite(model, X, Y)
    first = explanation.first
    assert (first.phase, first.layer) == ("backward", "middle")
    assert first.tensor in {"gradient of kernel", "gradient of bias"}
    before = explanation.trail[-1]
    assert (before.phase, before.kind) == ("backward", "")


def test_an_overflow_of_an_input_gradient_is_blamed_on_its_layer(mixed_float16):
    model = network()
    middle = model.get_layer("middle").loss_scaling
    middle.layer.kernel.assign(2.0**12 * np.eye(8))
    model.get_layer("first").kernel.assign(np.zeros((4, 8)))
    middle.log2_scale = 0
    model.compile(als.AdaptiveLossScaleOptimizer("adam", 2.0**18), loss="mse")
    first = als.explain_nonfinite(model, X, 1e-3 * Y).first
    assert (first.phase, first.layer) == ("backward", "middle")


def test_nothing_is_changed(mixed_float16):
    model = network()
    model.fit(X, Y, verbose=0)
    everything = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    before = [v.numpy() for v in everything]
    calls = {layer: layer.call for layer in model._flatten_layers()}
    als.explain_nonfinite(model, X, Y)
    for variable, value in zip(everything, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert {layer: layer.call for layer in model._flatten_layers()} == calls


def test_operations_between_layers_are_named(mixed_float16):
    inputs = keras.Input((4,))
    x = layers.Dense(4, name="before")(inputs)
    x = ops.log(ops.relu(x))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2, name="after")(x)))
    model.compile(als.AdaptiveLossScaleOptimizer("adam"), loss="mse")
    first = als.explain_nonfinite(model, X, Y).first
    assert (first.phase, first.layer) == ("forward", "log")


def test_layers_of_nested_models_and_recurrent_ones(mixed_float16):
    inner_inputs = keras.Input((5, 3))
    inner = keras.Model(
        inner_inputs, layers.Bidirectional(layers.GRU(4), name="gru")(inner_inputs), name="inner"
    )
    ids = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 3, name="embedding")(ids)
    model = als.wrap_model(keras.Model(ids, layers.Dense(2, name="last")(inner(x))))
    model.compile(als.AdaptiveLossScaleOptimizer("adam"), loss="mse")
    explanation = als.explain_nonfinite(model, tokens(16, 5), Y)
    assert explanation.first is None
    seen = {reading.layer for reading in explanation.trail if reading.phase == "backward"}
    assert seen == {"embedding", "inner/gru", "last"}
    model.get_layer("inner").get_layer("gru").loss_scaling.log2_scale = 60
    first = als.explain_nonfinite(model, tokens(16, 5), Y).first
    assert (first.phase, first.layer) == ("backward", "inner/gru")


def test_subclassed_models_with_a_loss_of_their_own():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = als.LossScaled(layers.Dense(3, name="hidden"))

        def call(self, x):
            return ops.log(ops.relu(self.hidden(x)))

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return ops.mean(y_pred["a"] if isinstance(y_pred, dict) else y_pred)

    model = Net()
    model(X)
    model.compile(als.AdaptiveLossScaleOptimizer("adam"))
    first = als.explain_nonfinite(model, X).first
    assert first.phase == "loss"


@pytest.mark.parametrize("case", ["layer", "unbuilt", "uncompiled"])
def test_what_it_cannot_run_is_refused(case):
    inputs = keras.Input((4,))
    model = {
        "layer": lambda: layers.Dense(2),
        "unbuilt": lambda: keras.Sequential([layers.Dense(2)]),
        "uncompiled": lambda: keras.Model(inputs, layers.Dense(2)(inputs)),
    }[case]()
    with pytest.raises(ValueError, match=r"expected a built and compiled model\. Received"):
        als.explain_nonfinite(model, X, Y)


@pytest.mark.parametrize("kind", ["tf.data", "a generator"])
def test_one_batch_is_asked_for(kind):
    data = {
        "tf.data": tf.data.Dataset.from_tensor_slices((X, Y)).batch(2),
        "a generator": (each for each in [(X, Y)]),
    }[kind]
    with pytest.raises(ValueError, match=r"Expected one batch of inputs.*next\(iter\(data\)\)"):
        als.explain_nonfinite(network(), data)


def _constant(value):
    return keras.initializers.Constant(value)
