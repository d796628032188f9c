"""`saved_activations`: what the backward pass needs is kept in 8 bits, and nothing else changes."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers, ops
from numpy.testing import assert_array_equal

import tf_adaptive_ls as als
from tests import any_models
from tests.backends import COMPILED, JIT, ON_JAX
from tests.graphs import floats
from tests.steps import assert_equal, assert_gradients_within, layer_stepper, randomize_scales
from tests.training.test_layers_exact import CASES, WITH_XLA, built, training_of
from tf_adaptive_ls.backend import routes
from tf_adaptive_ls.training.functional_call import rematerialized_from_8_bits

FORMAT = "float8_e5m2"


def of_8_bits(inputs):
    """Inputs that 8 bits hold exactly."""

    def rounded(x):
        x = np.asarray(x)
        return x.astype(ml_dtypes.float8_e5m2).astype(x.dtype) if x.dtype.kind == "f" else x

    return keras.tree.map_structure(rounded, inputs)


def saving(layer):
    return als.LossScaled(layer, saved_activations=FORMAT)


# A layer. On JAX attention is compiled as one function, or, where it is differentiated, as others,
# which round otherwise.
ATTENTION = ("GroupQueryAttention", "MultiHeadAttention") if ON_JAX else ()


def assert_same_forward(actual, expected, name):
    actual.gradients = expected.gradients
    if name in ATTENTION:
        for y, y_expected in zip(actual.outputs, expected.outputs, strict=True):
            np.testing.assert_allclose(y, y_expected, rtol=4e-3 if y.dtype == "float16" else 1e-5)
    else:
        assert_equal(actual, expected)


@pytest.mark.parametrize("mode", ["eager", pytest.param(COMPILED, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in WITH_XLA else pytest.mark.long) for name in CASES],
)
def test_of_inputs_that_8_bits_hold_all_is_the_same(name, mode, rng):
    layer, inputs = built(CASES[name]), of_8_bits(CASES[name].inputs)
    options = {"mode": mode, "training": training_of(layer)}
    plain = layer_stepper(als.LossScaled(layer), layer, inputs, **options)()
    layer.__dict__.pop("_loss_scaled")
    scaled = saving(layer)
    run = layer_stepper(scaled, layer, inputs, **options)
    for _ in range(2):
        actual = run()
        exact = mode == "eager" and name not in (*ATTENTION, "BatchNormalization")
        assert_gradients_within(actual, plain, ulps=0 if exact else 8)
        assert_same_forward(actual, plain, name)
        randomize_scales(scaled, rng)


@pytest.mark.parametrize("name", WITH_XLA)
def test_forward_is_untouched_in_float16(name, rng, mixed_float16):
    layer, inputs = built(CASES[name]), CASES[name].inputs
    options = {"training": training_of(layer)}
    plain = layer_stepper(layer, layer, inputs, **options)()
    scaled = saving(layer)
    randomize_scales(scaled, rng)
    assert_same_forward(layer_stepper(scaled, layer, inputs, **options)(), plain, name)


def test_gradients_are_those_at_the_inputs_in_8_bits():
    layer, x = built(CASES["Dense"]), floats(3, 4)
    options = {"training": None}
    expected = layer_stepper(layer, layer, {"args": (of_8_bits(x),)}, **options)()
    actual = layer_stepper(saving(layer), layer, {"args": (x,)}, **options)()
    assert not np.array_equal(x, of_8_bits(x))
    assert_gradients_within(actual, expected, ulps=0)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_stays_so(bad):
    layer, x = built(CASES["Dense"]), floats(3, 4)
    x[1, 2] = bad
    plain = layer_stepper(als.LossScaled(layer), layer, {"args": (x,)}, training=None)()
    layer.__dict__.pop("_loss_scaled")
    actual = layer_stepper(saving(layer), layer, {"args": (x,)}, training=None)()
    for name, value in plain.gradients.items():
        assert_array_equal(np.isfinite(actual.gradients[name]), np.isfinite(value))


@pytest.mark.parametrize("value", ["float8", "int8", 8, True, "float8_e4m3fn"])
def test_other_formats_are_refused(value):
    dense = layers.Dense(2)
    with pytest.raises(ValueError, match=r"Expected `saved_activations` to be 'float8_e5m2'"):
        als.LossScaled(dense, saved_activations=value)
    model = keras.Sequential([keras.Input((2,)), dense])
    with pytest.raises(ValueError, match=r"Received: saved_activations="):
        als.wrap_model(model, saved_activations=value)
    assert type(model) is keras.Sequential


# Models.


def network():
    inputs = keras.Input((8, 8, 3))
    x = inputs
    for filters in (4, 8):
        x = layers.Conv2D(filters, 3, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Activation("gelu")(layers.MaxPooling2D()(x))
    x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(5, dtype="float32")(x))


X, Y = floats(32, 8, 8, 3), np.arange(32) % 5


def trained(model, epochs=2, steps=2, **mode):
    loss = keras.losses.SparseCategoricalCrossentropy()
    model.compile(
        als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(0.003), initial_scale=64.0),
        loss,
        **(mode or {"jit_compile": JIT}),
    )
    n = 16 * steps
    return model.fit(X[:n], Y[:n], 16, epochs, verbose=0, shuffle=False).history["loss"]


def one_step(model, float8=None, saved_activations=None, **mode):
    """How a step changes the weights of a model, and the loss."""
    keras.utils.set_random_seed(0)
    for weight, fresh in zip(model.weights, network().weights, strict=True):
        weight.assign(fresh)
    model = als.wrap_model(model, float8=float8, saved_activations=saved_activations)
    before = model.get_weights()
    (loss,) = trained(model, epochs=1, steps=1, **mode)
    moves = [b - a for a, b in zip(before, model.get_weights(), strict=True)]
    return np.concatenate([each.ravel() for each in moves]), loss


@pytest.mark.parametrize(
    "mode",
    [{"run_eagerly": True}, {"jit_compile": JIT}, {"jit_compile": True}],
    ids=["eager", "graph", "xla"],
)
def test_a_step_is_nearly_the_same(mode, mixed_float16):
    (plain, loss), (saved, loss_of_saved) = (
        one_step(network(), saved_activations=saved, **mode) for saved in (None, FORMAT)
    )
    assert 0 < np.linalg.norm(saved - plain) < 0.1 * np.linalg.norm(plain)
    assert loss == loss_of_saved


def test_outputs_and_predictions_are_the_same_bit_for_bit(mixed_float16):
    keras.utils.set_random_seed(0)
    model = network()
    expected, in_training = model.predict(X, verbose=0), np.array(model(X, training=True))
    keras.utils.set_random_seed(0)
    wrapped = als.wrap_model(network(), saved_activations=FORMAT)
    assert_array_equal(wrapped.predict(X, verbose=0), expected)
    assert_array_equal(np.array(wrapped(X, training=True)), in_training)


def test_crossentropy_comes_from_logits_of_100_as_well(mixed_float16):
    inputs = keras.Input((4,))
    scores = layers.Dense(3, "softmax", use_bias=False, name="scores", dtype="float32")
    outputs = scores(layers.Dense(4, kernel_initializer="identity")(inputs))
    weights = np.float32([[100, -100, 0]] * 4)
    losses = []
    for saved in (None, FORMAT):
        model = als.wrap_model(keras.Model(inputs, outputs), saved_activations=saved)
        model.get_layer("scores").set_weights([weights])
        model.compile(
            als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(1.0)),
            "sparse_categorical_crossentropy",
            jit_compile=JIT,
        )
        x = np.ones((2, 4), "float32")
        loss = model.train_on_batch(x, np.int32([1, 2]))
        losses.append((loss, model.get_layer("scores").get_weights()[0]))
        als.strip_model(model)
    assert losses[0][0] == losses[1][0]
    assert ON_JAX or losses[0][0] == 600  # on JAX Keras computes it from probabilities
    assert_array_equal(losses[0][1], losses[1][1])


@pytest.mark.parametrize(
    "kind",
    [
        any_models.shared,
        any_models.recurrent,
        any_models.submodel_twice,
        any_models.losses_inside,
        # Neither can Keras on JAX, on a CPU.
        *(() if ON_JAX else (any_models.vit, any_models.remat_layers)),
    ],
    ids=lambda kind: kind.__name__,
)
def test_any_model(kind, mixed_float16):
    model, (x, y) = kind()
    model(x)
    als.wrap_model(model, saved_activations=FORMAT)
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse", jit_compile=JIT)
    before = model.get_weights()
    loss = model.fit(x, y, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(loss).all()
    assert any(not np.array_equal(*pair) for pair in zip(before, model.get_weights(), strict=True))


def test_with_float8(mixed_float16):
    float8 = als.Float8(layer_filter=lambda layer: True)
    plain, loss = one_step(network(), float8=float8)
    model = network()
    saved, loss_of_saved = one_step(model, float8=float8, saved_activations=FORMAT)
    assert 0 < np.linalg.norm(saved - plain) < 0.15 * np.linalg.norm(plain)
    assert loss == loss_of_saved
    assert all(
        layer.loss_scaling.snapshot.operands.nonzero
        for layer in model.layers
        if isinstance(layer, layers.Conv2D)
    )


def test_it_is_saved_and_taken_away_again(tmp_path, mixed_float16):
    model = als.wrap_model(network(), saved_activations=FORMAT)
    trained(model, epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    (relu, *_) = [layer for layer in loaded.layers if isinstance(layer, layers.ReLU)]
    assert routes.route_of(relu, "call") is not None
    (conv, *_) = [layer for layer in loaded.layers if isinstance(layer, layers.Conv2D)]
    assert conv.loss_scaling.saved_activations == FORMAT
    assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    als.strip_model(loaded)
    assert routes.route_of(relu, "call") is None and type(loaded) is type(network())


def test_the_table_tells_what_each_layer_keeps(mixed_float16):
    model = als.wrap_model(network(), saved_activations=FORMAT)
    assert {row.saved_bytes for row in als.scale_table(model)} == {None}
    trained(model, epochs=1)
    table = als.scale_table(model)
    # The inputs; of the ReLU the outputs.
    inputs, outputs = 8 * 8 * 3, 6 * 6 * 4
    assert [row.saved_bytes for row in table[:4]] == [None, inputs, outputs, outputs]
    (pooling,) = (row for row in table if row.layer_class == "MaxPooling2D")
    assert pooling.saved_bytes == 2 * 2 * 8  # of each window
    assert "kept in 8 bits" in str(table) and "144 B" in str(table)
    stripped = als.strip_model(model)
    assert {row.saved_bytes for row in als.scale_table(stripped)} == {None}


def test_a_wrapper_is_saved(tmp_path):
    scaled = saving(layers.Dense(2, name="d"))
    again = als.LossScaled.from_config(scaled.get_config())
    assert again.saved_activations == FORMAT
    plain = als.LossScaled(layers.Dense(2)).get_config()
    assert als.LossScaled.from_config(plain).saved_activations is None


# What it is for.


@pytest.mark.skipif(not ON_JAX, reason="TensorFlow does not tell what waits for a backward pass")
def test_less_is_kept(mixed_float16):
    import jax

    def bytes_kept(saved):
        model = als.wrap_model(network(), saved_activations=saved)
        values = [v.value for v in model.trainable_variables]
        others = [v.value for v in model.non_trainable_variables]

        def loss(values):
            outputs, _ = model.stateless_call(values, others, X, training=True)
            return ops.sum(outputs)

        _, pull = jax.vjp(loss, values)
        kept = {id(array): array for array in jax.tree.leaves(pull)}
        return sum(array.nbytes for array in kept.values() if array.shape[:1] == (32,))

    kept, saved = bytes_kept(None), bytes_kept(FORMAT)
    assert 0 < saved < 0.5 * kept, (saved, kept)


@pytest.mark.skipif(ON_JAX, reason="there XLA is told by a barrier")
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_the_second_run_waits_for_gradients(jit_compile):
    """Or all would be unpacked in the forward pass already, and kept."""
    import tensorflow as tf

    def step(x, gradient):
        with tf.GradientTape() as tape:
            tape.watch(x)
            again = rematerialized_from_8_bits(
                layers.Layer(), lambda x: ([tf.square(x)], None), lambda tensors: tensors
            )
            ((y,), _) = again(x)
        return tape.gradient(y, x, gradient)

    spec = tf.TensorSpec((4,), "float16")
    traced = tf.function(step).get_concrete_function(spec, spec)
    (first,) = (op for op in traced.graph.get_operations() if op.type == "LeftShift")
    behind, waiting = set(), [first]
    while waiting:
        op = waiting.pop()
        behind.add(op.name)
        waiting += [x.op for x in op.inputs]
    assert {"x", "gradient"} <= behind
    x = tf.constant([1.0, 2.0, np.inf, np.nan], "float16")
    for gradient in (np.float16([1, 2, 3, 4]), np.float16([np.nan, 2, np.inf, 4])):
        result = tf.function(step, jit_compile=jit_compile)(x, gradient)
        expected = 2 * x * gradient
        if np.isfinite(gradient[0]):
            assert_array_equal(result, expected)
        else:
            assert not np.isfinite(result)[~np.isfinite(expected)].any()
