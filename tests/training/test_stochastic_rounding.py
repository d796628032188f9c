"""`stochastic_rounding`: weights of 16 bits are updated in float32, and no small step is lost."""

import itertools

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers, ops, optimizers
from numpy.testing import assert_array_equal

import tf_adaptive_ls as als
from tests.backends import JIT, ON_JAX
from tests.graphs import floats

pytestmark = pytest.mark.filterwarnings(
    "ignore:AdaptiveLossScaleOptimizer was given a model without",
    "ignore:Loss scales do nothing",
    "ignore:.*received gradients, but `scale_loss` was never called",
)

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
X, Y = floats(64, 8), floats(64, 1, seed=1)


@pytest.fixture(params=DTYPES)
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


def network():
    inputs = keras.Input((8,))
    return keras.Model(inputs, layers.Dense(1)(layers.Dense(16, "relu")(inputs)))


def compiled(inner, seed=3, **mode):
    keras.utils.set_random_seed(seed)
    model = als.wrap_model(network())
    optimizer = als.AdaptiveLossScaleOptimizer(inner, 2.0**7, stochastic_rounding=True)
    model.compile(optimizer, "mse", **(mode or {"jit_compile": JIT}))
    return model


def fit(model, epochs=2):
    model.fit(X, Y, 16, epochs, verbose=0, shuffle=False)
    return [np.array(ops.cast(v.value, "float32")) for v in model.weights]


def assert_all_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_array_equal(a, b)


# One step of every optimizer.

INNER = {
    "SGD": lambda: optimizers.SGD(0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda: optimizers.Adam(0.01, amsgrad=True, clipnorm=0.5),
    "AdamW": lambda: optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=1.0),
    "Adamax": lambda: optimizers.Adamax(0.01),
    "Adadelta": lambda: optimizers.Adadelta(0.01),
    "Adafactor": lambda: optimizers.Adafactor(0.01),
    "Adagrad": lambda: optimizers.Adagrad(0.01),
    "Ftrl": lambda: optimizers.Ftrl(0.01),
    "Lamb": lambda: optimizers.Lamb(0.01),
    "Lion": lambda: optimizers.Lion(0.01, clipvalue=0.1),
    "Muon": lambda: optimizers.Muon(0.01, exclude_layers=["bias"]),
    "Nadam": lambda: optimizers.Nadam(0.01, use_ema=True),
    "RMSprop": lambda: optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "accumulated": lambda: optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "schedule": lambda: optimizers.SGD(optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)),
}


def variables(dtype):
    values = floats(6, 5), floats(5, seed=1)
    made = []
    for name, value in zip(("kernel", "bias"), values, strict=True):
        value = value.astype(DTYPES["bfloat16"]).astype("float32")  # both formats have these
        made.append(keras.Variable(value, dtype=dtype, name=name))
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INNER)
def test_a_step_is_that_of_float32_rounded_to_a_neighbor(name, dtype):
    wide, narrow = variables("float32"), variables(dtype)
    plain = INNER[name]()
    plain.build(wide)
    ours = als.AdaptiveLossScaleOptimizer(INNER[name](), 1.0, stochastic_rounding=True)
    ours.build(narrow)
    steps = 2 if name == "accumulated" else 1  # the first leaves weights alone
    for seed in range(2, 2 + steps):
        gradients = [ops.convert_to_tensor(floats(*v.shape, seed=seed)) for v in wide]
        plain.apply(gradients, wide)
        ours.apply(gradients, narrow)
    expected_states = {(v.name, v.shape): v for v in plain.variables}
    for actual in (v for v in ours.inner_optimizer.variables if v.name != "rounding_seed"):
        expected = expected_states[actual.name, actual.shape]
        assert expected.dtype == actual.dtype, actual.path
        if "average" not in actual.path:  # that of weights as they are, rounded
            np.testing.assert_allclose(actual, expected, rtol=1e-6, err_msg=actual.path)
    for expected, actual in zip(wide, narrow, strict=True):
        expected = np.array(expected.value)
        actual = np.array(actual.value).astype(DTYPES[dtype])
        near = expected.astype(DTYPES[dtype])
        neighbors = [
            np.nextafter(near, np.array(toward, near.dtype)) for toward in (-np.inf, np.inf)
        ]
        assert np.all((actual == near) | (actual == neighbors[0]) | (actual == neighbors[1]))
        difference = np.abs(actual.astype("float32") - expected)
        ulp = np.abs(neighbors[1].astype("float32") - neighbors[0].astype("float32"))
        assert np.all(difference < ulp)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundredth_of_the_last_bit_is_not_lost(dtype):
    ulp = float(ml_dtypes.finfo(DTYPES[dtype]).eps)
    means = {}
    for stochastic in (False, True):
        (weight,) = [keras.Variable(np.ones(40_000), dtype=dtype)]
        optimizer = als.AdaptiveLossScaleOptimizer(
            optimizers.SGD(ulp / 100), 1.0, stochastic_rounding=stochastic
        )
        optimizer.build([weight])
        gradient = [-ops.ones((40_000,))]
        for _ in range(100):
            optimizer.apply(gradient, [weight])
        means[stochastic] = np.mean(np.float64(weight.numpy()) - 1) / ulp
    assert means[False] == 0
    # Of 40,000 numbers, each moved by about one last bit, with a variance of less than that.
    assert abs(means[True] - 1) < 5 / 200


def test_weights_of_32_bits_are_updated_as_ever():
    (wide, narrow), (expected, _) = (
        [keras.Variable(floats(5), dtype=dtype) for dtype in dtypes]
        for dtypes in (("float32", "float16"), ("float32", "float32"))
    )
    gradients = [ops.convert_to_tensor(floats(5, seed=1))] * 2
    ours = als.AdaptiveLossScaleOptimizer("adamw", 1.0, stochastic_rounding=True)
    ours.build([wide, narrow])
    plain = optimizers.AdamW()
    plain.build([expected])
    for _ in range(3):
        ours.apply(gradients, [wide, narrow])
        plain.apply(gradients[:1], [expected])
    assert_array_equal(wide.numpy(), expected.numpy())


# Random bits.


def test_bits_differ_from_step_to_step_and_weight_to_weight():
    weights = [keras.Variable(np.ones(64), dtype="float16") for _ in range(2)]
    optimizer = als.AdaptiveLossScaleOptimizer(
        optimizers.SGD(0.0002), 1.0, stochastic_rounding=True
    )
    optimizer.build(weights)
    seen = []
    for _ in range(3):
        for weight in weights:
            weight.assign(ops.ones((64,)))
        optimizer.apply([-ops.ones((64,))] * 2, weights)
        seen += [weight.numpy() for weight in weights]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_a_skipped_step_draws_nothing(policy):
    ends = []
    for bad in (False, True):
        model = compiled("sgd")
        fit(model, epochs=1)
        if bad:
            model.fit(np.full_like(X[:16], np.nan), Y[:16], verbose=0)
            assert model.optimizer.last_step_skipped
        ends.append(fit(model, epochs=1))
    assert_all_equal(*ends)


def test_it_is_reproducible_and_follows_the_seed(policy):
    first, again, other = (fit(compiled("adam", seed=seed)) for seed in (3, 3, 4))
    assert_all_equal(first, again)
    assert not np.array_equal(first[0], other[0])


def test_a_run_is_resumed_bit_for_bit(policy, tmp_path):
    model = compiled(optimizers.AdamW(0.01))
    fit(model)
    model.save(tmp_path / "model.keras")
    expected = fit(model)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.stochastic_rounding
    assert_all_equal(fit(loaded), expected)


def as_mellempudi_et_al():
    """Operands of products in 8 bits, weights in 16, a loss scale with a rising minimum."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8,))
    x = layers.Dense(16, "relu", dtype="mixed_float16", name="first")(inputs)
    x = layers.Dense(16, "relu", name="middle")(x)
    outputs = layers.Dense(1, dtype="float32", name="last")(x)
    model = als.wrap_model(keras.Model(inputs, outputs), float8=als.Float8.mellempudi())
    rule = als.RisingMinimumRule(minimums=((0, 2.0**4), (6, 2.0**9)))
    optimizer = als.AdaptiveLossScaleOptimizer(
        optimizers.SGD(0.05, momentum=0.9), 1.0, rule, stochastic_rounding=True
    )
    model.compile(optimizer, "mse", jit_compile=JIT)
    return model


@pytest.mark.parametrize("policy", ["float16"], indirect=True)
def test_all_of_mellempudi_et_al(policy, tmp_path):
    model = as_mellempudi_et_al()
    fit(model, epochs=1)  # four steps
    assert model.optimizer.loss_scale == 2.0**4
    assert {v.dtype for v in model.get_layer("middle").weights[:2]} == {"float16"}
    assert model.get_layer("middle").loss_scaling.float8 == als.Float8.mellempudi()
    model.save(tmp_path / "model.keras")
    expected = fit(model, epochs=1)
    assert model.optimizer.loss_scale == 2.0**9
    assert [layer.loss_scaling.log2_scale for layer in model.layers[1:3]] == [0, 0]
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_all_equal(fit(loaded, epochs=1), expected)
    assert loaded.optimizer.loss_scale == 2.0**9


MODES = [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}]


def test_it_is_the_same_in_eager_code_graphs_and_xla():
    keras.config.set_dtype_policy("bfloat16")
    try:
        first, *others = (fit(compiled(optimizers.SGD(0.01), **mode), epochs=1) for mode in MODES)
    finally:
        keras.config.set_dtype_policy("float32")
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=2**-6, atol=1e-2)


# Averages of weights.


@pytest.mark.parametrize("frequency", [None, 1])
def test_averages_are_of_float32_and_move(policy, frequency):
    inner = optimizers.SGD(
        0.01, use_ema=True, ema_momentum=0.9999, ema_overwrite_frequency=frequency
    )
    model = compiled(inner)
    fit(model, epochs=1)
    averages = [v.numpy() for v in inner.variables if "average" in v.path and v.shape]
    assert averages and all(each.dtype == np.float32 for each in averages)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    for average, weight in zip(averages, model.trainable_weights, strict=False):
        near = average.astype(DTYPES[policy]).astype("float32")
        assert_array_equal(np.array(ops.cast(weight.value, "float32")), near)


# Bad input.


def test_a_model_of_32_bits_is_warned_of():
    model = als.wrap_model(network())
    optimizer = als.AdaptiveLossScaleOptimizer("sgd", stochastic_rounding=True)
    with pytest.warns(UserWarning, match="stochastic_rounding=True does nothing for this model"):
        optimizer.build(model.trainable_variables)


def test_a_model_without_scales_trains_too(policy):
    keras.utils.set_random_seed(3)
    model = network()
    optimizer = als.AdaptiveLossScaleOptimizer("sgd", 2.0**7, stochastic_rounding=True)
    model.compile(optimizer, "mse", jit_compile=JIT)
    before = [np.array(ops.cast(v.value, "float32")) for v in model.weights]
    moved = [np.any(a != b) for a, b in zip(before, fit(model), strict=True)]
    assert all(moved) and {v.dtype for v in model.weights} == {policy}


def test_an_optimizer_that_is_built_is_refused():
    inner = optimizers.SGD()
    inner.build([keras.Variable(np.ones(2))])
    with pytest.raises(ValueError, match="Expected an `inner_optimizer` that is not built yet"):
        als.AdaptiveLossScaleOptimizer(inner, stochastic_rounding=True)


@pytest.mark.skipif(ON_JAX, reason="the same")
def test_weights_of_8_bits_are_refused():
    weight = keras.Variable(np.ones(2), dtype="float8_e5m2")
    optimizer = als.AdaptiveLossScaleOptimizer("sgd", stochastic_rounding=True)
    with pytest.raises(ValueError, match="Expected weights of 16 or 32 bits"):
        optimizer.build([weight])


@pytest.mark.parametrize("value", [1, "yes", None])
def test_it_is_a_bool(value):
    with pytest.raises(ValueError, match="Expected `stochastic_rounding` to be True or False"):
        als.AdaptiveLossScaleOptimizer("sgd", stochastic_rounding=value)
