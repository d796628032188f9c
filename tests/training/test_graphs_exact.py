"""Invariants 2, 3 and 4 for whole models."""

import keras
import numpy as np
import pytest
from keras import layers

import tf_adaptive_ls as als
from tests.graphs import FORKS, GRAPHS
from tests.steps import (
    assert_equal,
    assert_gradients_within,
    layer_stepper,
    randomize_scales,
    scaled_layers,
)

# A fork adds three gradients in another order: each sum rounds once more, and what
# it feeds a few times over; measured 3 ulps of the largest element at most.
FORK_ULPS = 16


# Where nothing is tapped between two normalizations, TensorFlow's graph optimizer (its
# constant folding) moves their constant factors about: also in the plain model, whose
# gradients then are not those of eager code; and in another way with taps around.
REASSOCIATED = {("normalized", "graph")}


def stepper_of(model, plain, inputs, **options):
    return layer_stepper(model, plain, {"args": inputs}, **options)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("name", GRAPHS)
def test_any_scales_give_the_plain_model(name, mode, rng):
    model, inputs = GRAPHS[name]()
    plain = stepper_of(model, model, inputs, mode=mode)()
    wrapped = als.wrap_model(model)
    assert scaled_layers(wrapped)
    run = stepper_of(wrapped, model, inputs, mode=mode)
    neutral = run()
    if name in FORKS or (name, mode) in REASSOCIATED:
        assert_gradients_within(neutral, plain, ulps=FORK_ULPS)
        neutral_gradients, neutral.gradients = neutral.gradients, plain.gradients
        assert_equal(neutral, plain)
        neutral.gradients = neutral_gradients
    else:
        assert_equal(neutral, plain)
    for _ in range(3):
        randomize_scales(wrapped, rng)
        assert_equal(run(), neutral)


@pytest.mark.parametrize(
    "name", ["chain", "residual", "nested", "encoder_decoder", "added_losses", "normalized"]
)
def test_any_scales_give_the_same_under_xla(name, rng):
    model, inputs = GRAPHS[name]()
    plain = stepper_of(model, model, inputs, mode="xla")()
    wrapped = als.wrap_model(model)
    run = stepper_of(wrapped, model, inputs, mode="xla")
    neutral = run()
    # XLA may tile reductions otherwise in the larger graph, on top of the forks.
    assert_gradients_within(neutral, plain, ulps=2 * FORK_ULPS)
    for _ in range(2):
        randomize_scales(wrapped, rng)
        assert_equal(run(), neutral)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", GRAPHS)
def test_forward_is_untouched_in_float16(name, training, rng, mixed_float16):
    model, inputs = GRAPHS[name]()
    plain = stepper_of(model, model, inputs, training=training)()
    wrapped = als.wrap_model(model)
    randomize_scales(wrapped, rng)
    result = stepper_of(wrapped, model, inputs, training=training)()
    result.gradients = plain.gradients
    assert_equal(result, plain)
    assert [y.dtype for y in result.outputs] == [y.dtype for y in plain.outputs]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("policy", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["chain", "batch_norm", "nested"])
def test_a_model_of_16_bits_computes_in_16_bits(name, policy, mode, rng):
    """Weights as well: none is widened, and products with it."""
    keras.config.set_dtype_policy(policy)
    model, inputs = GRAPHS[name]()
    plain = stepper_of(model, model, inputs, mode=mode)()
    wrapped = als.wrap_model(model)
    result = stepper_of(wrapped, model, inputs, mode=mode)()
    assert_equal(result, plain)
    assert [y.dtype for y in result.outputs] == [y.dtype for y in plain.outputs]
    randomize_scales(wrapped, rng)
    scaled = stepper_of(wrapped, model, inputs, mode=mode)()
    scaled.gradients = plain.gradients
    assert_equal(scaled, plain)


@pytest.mark.parametrize("name", GRAPHS)
def test_wrapping_and_stripping_keep_what_a_user_sees(name):
    model, inputs = GRAPHS[name]()

    def seen(model):
        return [
            model.name,
            [*map(id, model.layers)],
            [*map(id, model.weights)],
            [w.path for w in model.weights],
            [t.name for t in model.inputs],
            None if isinstance(model, keras.Sequential) else model.output_names,
            model.count_params(),
        ]

    kind, before = type(model), seen(model)
    expected = stepper_of(model, model, inputs)()
    assert als.wrap_model(model) is model
    assert isinstance(model, kind) and seen(model) == before
    assert scaled_layers(model)
    assert als.wrap_model(model) is model and seen(model) == before
    assert als.strip_model(model) is model
    assert type(model) is kind and seen(model) == before
    assert not scaled_layers(model)
    assert_equal(stepper_of(model, model, inputs)(), expected)


@pytest.mark.filterwarnings("ignore:Loss scales do nothing")
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_masks_that_attention_takes_away_are_gone(policy):
    """Keras's takes that of a tensor it is called on: what comes after sees none, nor the loss."""
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(inputs)
    y = layers.MultiHeadAttention(2, 4, dtype="float32")(x, x)
    model = keras.Model(inputs, layers.Dense(3, dtype="float32")(layers.Add()([x, y])))
    tokens = np.array([[1, 2, 3, 0, 0, 0], [4, 5, 0, 0, 0, 0]])
    losses = []
    for change in (lambda model: model, als.wrap_model):
        model = change(model)
        model.compile(loss="mse")
        losses.append(model.evaluate(tokens, np.ones((2, 6, 3)), verbose=0))
    assert losses[0] == losses[1]
