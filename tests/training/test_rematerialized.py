"""Layers made in a `keras.RematScope` are run once more in the backward pass, and are exact."""

from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import JIT, ON_JAX
from tests.graphs import GRAPHS, floats
from tests.steps import (
    assert_equal,
    assert_gradients_within,
    layer_stepper,
    randomize_scales,
    scaled_layers,
    stepper,
)
from tests.training.test_layers_exact import CASES, WITH_XLA, built, training_of
from tf_adaptive_ls.backend.keras_internals import is_rematerialized, not_rematerialized

# TensorFlow fuses a product, a bias and an activation where no part is kept. JAX compiles what
# is rematerialized, even in eager mode.
FUSED = {("MultiHeadAttention", "eager")} if ON_JAX else {("Dense", "graph")}


def long(value):
    return pytest.param(value, marks=pytest.mark.long)


def in_scope(make, mode="full", **options):
    with keras.RematScope(mode, **options):
        return make()


@pytest.mark.parametrize("mode", ["eager", long("graph")])
@pytest.mark.parametrize("name", [n if n in WITH_XLA else long(n) for n in CASES])
def test_any_scale_gives_the_plain_layer(name, mode, rng):
    layer, inputs = built(CASES[name]), CASES[name].inputs
    options = {"mode": mode, "training": training_of(layer)}
    plain = layer_stepper(layer, layer, inputs, **options)()
    layer._remat_mode = in_scope(lambda: layers.Dense(1))._remat_mode
    scaled = als.LossScaled(layer)
    run = layer_stepper(scaled, layer, inputs, **options)
    neutral = run()
    if (name, mode) in FUSED:
        assert_gradients_within(neutral, plain, ulps=8)
    else:
        assert_equal(neutral, plain)
    for _ in range(2):
        randomize_scales(scaled, rng)
        assert_equal(run(), neutral)


class Counting(layers.Dense):
    """Counts its runs."""

    runs = 0

    def call(self, x):
        Counting.runs += 1
        return super().call(x)


def runs_of(layer):
    x = tf.constant(floats(2, 4))
    layer(x)
    with tf.GradientTape():
        layer(x)  # once it is looked where gradients come to
    Counting.runs = 0
    with tf.GradientTape() as tape:
        loss = ops.sum(layer(x))
    forward = Counting.runs
    tape.gradient(loss, layer.trainable_variables)
    return forward, Counting.runs - forward


@pytest.mark.parametrize(
    "options, again",
    [
        ({"mode": "full"}, True),
        ({"mode": "larger_than", "output_size_threshold": 5}, True),
        ({"mode": "larger_than", "output_size_threshold": 50}, False),
        ({"mode": "list_of_layers", "layer_names": ["counting"]}, True),
        ({"mode": "list_of_layers", "layer_names": ["other"]}, False),
        ({"mode": "activations"}, False),
    ],
)
def test_it_is_run_again_where_keras_would(options, again):
    def make():
        return Counting(3, "tanh", name="counting")

    expected = (1, int(again))
    assert runs_of(in_scope(make, **options)) == expected
    assert runs_of(als.LossScaled(in_scope(make, **options))) == expected
    # What counts is where the layer was made, not where it was wrapped.
    assert runs_of(in_scope(lambda: als.LossScaled(make()), **options)) == expected
    layer = make()
    assert runs_of(in_scope(lambda: als.LossScaled(layer), **options)) == (1, 0)


@pytest.mark.parametrize("wrapped_inside", [False, long(True)])
@pytest.mark.parametrize("mode", ["eager", long("graph"), long("xla")])
@pytest.mark.parametrize("name", ["residual", "nested", "densenet", "regularized", "stateful"])
def test_whole_models(name, mode, wrapped_inside, rng):
    model, inputs = in_scope(GRAPHS[name])
    with not_rematerialized(model):
        plain = layer_stepper(model, model, {"args": inputs}, mode=mode)()
        wrapped = als.wrap_model(model)
    if wrapped_inside:
        wrapped = in_scope(lambda: als.wrap_model(als.strip_model(wrapped)))
    run = layer_stepper(wrapped, model, {"args": inputs}, mode=mode)
    neutral = run()
    assert_gradients_within(neutral, plain, ulps=32)
    for _ in range(2):
        randomize_scales(wrapped, rng)
        assert_equal(run(), neutral)


class Block(layers.Layer):
    """A layer that is not wrapped, with scaled layers inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scaled = [als.LossScaled(layers.Dense(4, "tanh")) for _ in range(2)]

    def call(self, x):
        for layer in self.scaled:
            x = layer(x)
        return x


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_scaled_layers_inside_a_rematerialized_one(mode, wrap, rng):
    block = in_scope(Block)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(block(layers.Dense(4)(inputs))))
    weights = [v for v in model.trainable_variables if not v.overwrite_with_gradient]
    with not_rematerialized(model), als.neutral_scales():
        expected = stepper(model, {"args": (floats(3, 4),)}, weights, [], mode=mode)()
    wrapped = als.wrap_model(model, layer_filter=lambda layer: wrap or layer is not block)
    assert len(scaled_layers(wrapped)) == 4 + wrap
    run = stepper(wrapped, {"args": (floats(3, 4),)}, weights, [], mode=mode)
    for _ in range(3):
        assert_equal(run(), expected)
        randomize_scales(wrapped, rng)


def test_training_is_that_of_a_model_that_keeps_all(mixed_float16):
    def trained(make):
        keras.utils.set_random_seed(0)
        model = als.wrap_model(make())
        optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(0.1), 2.0**10)
        model.compile(optimizer, loss="mse", jit_compile=JIT)
        model.fit(floats(16, 4), floats(16, 2, seed=1), batch_size=4, epochs=3, verbose=0)
        rows = als.scale_table(model)
        return [v.numpy() for v in model.weights], [row.binades for row in rows]

    def make():
        x = inputs = keras.Input((4,))
        for _ in range(3):
            x = layers.BatchNormalization()(layers.Dense(8, "tanh")(x))
        return keras.Model(inputs, layers.Dense(2)(x))

    kept, again = trained(make), trained(lambda: in_scope(make))
    assert again[1] == kept[1]
    for a, b in zip(again[0], kept[0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_calls_in_other_threads_are_rematerialized_meanwhile():
    layer = in_scope(lambda: layers.Dense(2))
    arguments = layer, (floats(2, 3),), {}
    with ThreadPoolExecutor(1) as pool, not_rematerialized(layer):
        assert not is_rematerialized(*arguments)
        assert pool.submit(is_rematerialized, *arguments).result()
    assert is_rematerialized(*arguments)
