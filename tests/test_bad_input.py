"""Bad input is refused with what was expected, what was received and what to do."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, optimizers

import tf_adaptive_ls as als
from tests.backends import ON_JAX
from tests.graphs import chain, floats
from tests.steps import assert_equal, layer_stepper


class Subclassed(keras.Model):
    def call(self, x):
        return x


class WithAttribute(layers.Dense):
    loss_scaling = 3


def hidden_wrapper():
    class Holder(layers.Layer):
        def __init__(self):
            super().__init__(name="holder")
            self.inside = als.LossScaled(layers.Dense(2))

        def call(self, x):
            return self.inside(x)

    inputs = keras.Input((4,))
    return keras.Model(inputs, Holder()(inputs))


def scaled_dense():
    return als.LossScaled(layers.Dense(2, name="d"))


REFUSED = {
    "not a layer": (lambda: als.LossScaled("dense"), "Expected a keras.layers.Layer.*'dense'"),
    "a wrapper": (lambda: als.LossScaled(scaled_dense()), "not scaled yet.*'d'. Use it as it is"),
    "a wrapper's own layer": (
        lambda: als.LossScaled(scaled_dense().layer),
        "'d', which a LossScaled layer already wraps. Call that wrapper",
    ),
    "not a model": (lambda: als.wrap_model(42), "wrap_model` expected.*42.*not a model"),
    "a layer for a model": (
        lambda: als.wrap_model(layers.Dense(2)),
        r"not a model. Wrap a single layer with `LossScaled\(layer\)`",
    ),
    "a layer that has what scales it": (
        lambda: als.wrap_model(keras.Sequential([keras.Input((2,)), WithAttribute(2)])),
        "without an attribute `loss_scaling`.*WithAttribute",
    ),
    "a filter that is none": (
        lambda: als.wrap_model(chain()[0], layer_filter="dense"),
        "layer_filter='dense'",
    ),
    "wrappers out of reach": (
        lambda: als.strip_model(hidden_wrapper()),
        "which has others: \\['dense'\\]. Build it",
    ),
    "an optimizer that scales": (
        lambda: als.AdaptiveLossScaleOptimizer(optimizers.LossScaleOptimizer(optimizers.SGD())),
        "Pass the optimizer inside it",
    ),
    "a loss scale factor": (
        lambda: als.AdaptiveLossScaleOptimizer(optimizers.SGD(loss_scale_factor=8.0)),
        "loss_scale_factor=8.0",
    ),
    "an unknown optimizer": (lambda: als.AdaptiveLossScaleOptimizer("sdg"), "sdg"),
    "a rule that is none": (
        lambda: als.AdaptiveLossScaleOptimizer("sgd", rule="quantile"),
        "Expected `rule` to be a ScaleRule.*'quantile'",
    ),
    "no steps": (
        lambda: als.AdaptiveLossScaleOptimizer("sgd", sample_every=0),
        "sample_every=0",
    ),
    "half a step": (
        lambda: als.AdaptiveLossScaleOptimizer("sgd", sample_every=1.5),
        "sample_every=1.5",
    ),
    "no variables": (
        lambda: als.AdaptiveLossScaleOptimizer("sgd").apply([1.0]),
        "trainable_variables=None",
    ),
    "a table of nothing": (lambda: als.scale_table("model"), "Expected a model or layer"),
    "a table with another optimizer": (
        lambda: als.scale_table(chain()[0], optimizers.SGD()),
        "AdaptiveLossScaleOptimizer. Received",
    ),
    "no format": (lambda: als.FloatFormat("float17"), "float17"),
    "an integer format": (lambda: als.FloatFormat("int8"), "int8"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    attempt, message = REFUSED[what]
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        attempt()
    if what != "an unknown optimizer":  # Keras's own words
        assert "Received" in str(caught.value)


@pytest.mark.parametrize(
    "scale", [0, -2.0, 3.0, 2.0**15 + 1, np.inf, np.nan, 2.0**61, "2", None, True]
)
def test_an_initial_scale_that_is_no_power_of_two(scale):
    with pytest.raises(ValueError, match="`initial_scale` to be a power of two"):
        als.AdaptiveLossScaleOptimizer("sgd", initial_scale=scale)


@pytest.mark.parametrize("scale", [1, 0.5, 2**10, np.float32(8), 2.0**-60, 2.0**60])
def test_an_initial_scale_that_is_one(scale):
    assert als.AdaptiveLossScaleOptimizer("sgd", initial_scale=scale).loss_scale == scale


@pytest.mark.parametrize("rule", [als.QuantileRule, als.GaussianRule])
@pytest.mark.parametrize(
    "setting",
    [{"underflow": s} for s in (0, 1, -0.1, 2, "x", None, True)]
    + [{"headroom": h} for h in (-1, 2.5, "x", None, True)],
    ids=str,
)
def test_impossible_rule_settings(rule, setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"Expected `{name}`"):
        rule(**setting)


@pytest.mark.parametrize(
    "minimums",
    [
        (),
        None,
        8.0,
        (8.0,),
        ((0, 3.0),),
        ((0, 0.0),),
        ((0, 2.0**61),),
        ((-1, 1.0),),
        ((0.5, 1.0),),
        ((5, 1.0), (5, 2.0)),
        ((5, 1.0), (3, 2.0)),
        ((0, 1.0, 2.0),),
    ],
    ids=str,
)
def test_minimums_that_are_no_steps_and_scales(minimums):
    with pytest.raises(ValueError, match=r"Expected `minimums` to be pairs \(steps, scale\)"):
        als.RisingMinimumRule(minimums=minimums)


@pytest.mark.parametrize("steps", [0, -1, 1.5, None, True])
def test_growth_steps_that_are_no_steps(steps):
    with pytest.raises(ValueError, match="Expected `growth_steps`"):
        als.RisingMinimumRule(growth_steps=steps)


@pytest.mark.parametrize("rule", [als.QuantileRule, als.GaussianRule])
def test_headroom_that_the_format_in_use_does_not_have(rule, mixed_float16):
    layer = scaled_dense()
    optimizer = als.AdaptiveLossScaleOptimizer("sgd", rule=rule(headroom=29))
    with pytest.raises(ValueError, match="less than the 29 binades"):
        optimizer.build(layer.trainable_variables)
    als.AdaptiveLossScaleOptimizer("sgd", rule=rule(headroom=28)).build(layer.trainable_variables)


def test_a_rule_that_backs_off_by_no_whole_number():
    class Timid(als.FixedRule):
        def backoff(self, float_format):
            return 0.5

    optimizer = als.AdaptiveLossScaleOptimizer("sgd", rule=Timid())
    with (
        pytest.warns(UserWarning, match="none of its LossScaled layers"),
        pytest.raises(ValueError, match="`backoff` to be a whole number"),
    ):
        optimizer.build(scaled_dense().trainable_variables)


@pytest.mark.parametrize("forget", [-0.1, np.inf, np.nan, "x", None, True])
def test_an_impossible_rate_of_forgetting(forget):
    with pytest.raises(ValueError, match="Expected `forget`"):
        als.QuantileRule(forget=forget)


@pytest.mark.parametrize("size", [-1, 1.0, None])
def test_a_rule_that_remembers_no_whole_number(size):
    class Forgetful(als.FixedRule):
        memory_size = size

    with pytest.raises(ValueError, match=r"`rule\.memory_size` to be a whole number"):
        als.AdaptiveLossScaleOptimizer("sgd", rule=Forgetful())


@pytest.mark.parametrize("value", [61, -61, 1.0, "3", None, np.float32(2)])
def test_a_scale_out_of_bounds_changes_nothing(value):
    layer = scaled_dense()
    layer.log2_scale = np.int64(7)
    before = layer.loss_scale.numpy()
    with pytest.raises(ValueError, match=r"whole number from -60 to 60.*layer 'd'"):
        layer.log2_scale = value
    np.testing.assert_array_equal(layer.loss_scale.numpy(), before)
    assert layer.log2_scale == 7 and type(layer.log2_scale) is int


def test_a_model_refused_halfway_is_left_as_it_was():
    inputs = keras.Input((4,))
    inner = keras.Sequential([keras.Input((2,)), layers.Dense(2), WithAttribute(2)])
    model = keras.Model(inputs, inner(layers.Dense(2)(inputs)))
    before = [(type(part), set(vars(part))) for part in model._flatten_layers()]
    with pytest.raises(ValueError, match="without an attribute"):
        als.wrap_model(model)
    assert [(type(part), set(vars(part))) for part in model._flatten_layers()] == before


def test_a_layer_that_rematerializes_a_part_for_itself():
    class Own(layers.Dense):
        def call(self, x):
            return keras.remat(super().call)(x)

    plain = Own(2, name="own")
    scaled, inputs = als.LossScaled(plain), {"args": (floats(3, 4),)}
    scaled.build((3, 4))
    scaled.log2_scale = 5
    told = contextlib.nullcontext() if ON_JAX else pytest.warns(UserWarning, match="recompute_grad")
    with told:
        ours = layer_stepper(scaled, plain, inputs, training=None)()
    assert_equal(ours, layer_stepper(plain, plain, inputs, training=None)())
