"""Training in float8: what is rounded and what is not, and at whose scale."""

import concurrent.futures
import contextlib
import itertools
import re
import sys
import types

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import COMPILED, JIT, MODES, ON_JAX, compiled, value_and_gradients
from tests.graphs import floats
from tf_adaptive_ls.backend import devices
from tf_adaptive_ls.training.float8.products import casts, product_of, products_in

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
ROUNDINGS = {
    "e4m3": als.Float8(E4M3, E4M3),
    "e5m2": als.Float8(E5M2, E5M2),
    "hybrid": als.Float8.hybrid(),
    "mellempudi": als.Float8.mellempudi(),
}


def cast(values, name, factor=1.0):
    """`values` in float8 and back, saturating, by casts of NumPy."""
    largest = float(ml_dtypes.finfo(name).max)
    shifted = np.clip(np.array(values, "float32") * np.float32(factor), -largest, largest)
    return shifted.astype(getattr(ml_dtypes, name)).astype("float32") / np.float32(factor)


def cast_relative(values, name):
    """The same, from where the largest magnitude is just below the top of the format."""
    room = float(ml_dtypes.finfo(name).max) / np.abs(values).max()
    return cast(values, name, 2.0 ** np.floor(np.log2(room)))


PRODUCTS = {
    "Dense": (lambda **kw: layers.Dense(5, **kw), (4, 6)),
    "EinsumDense": (
        lambda **kw: layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d", **kw),
        (2, 4, 6),
    ),
    "Conv1D, causal": (
        lambda **kw: layers.Conv1D(4, 3, padding="causal", dilation_rate=2, **kw),
        (2, 8, 3),
    ),
    "Conv2D": (lambda **kw: layers.Conv2D(4, 3, strides=2, padding="same", **kw), (2, 6, 6, 3)),
    "Conv2D, groups": (lambda **kw: layers.Conv2D(4, 3, groups=2, **kw), (2, 6, 6, 4)),
    "Conv3D": (lambda **kw: layers.Conv3D(3, 2, **kw), (1, 4, 4, 4, 2)),
    "Conv1DTranspose": (lambda **kw: layers.Conv1DTranspose(3, 3, strides=2, **kw), (2, 5, 2)),
    "Conv2DTranspose": (
        lambda **kw: layers.Conv2DTranspose(3, 3, strides=2, padding="same", **kw),
        (2, 4, 4, 2),
    ),
    "Conv3DTranspose": (lambda **kw: layers.Conv3DTranspose(2, 2, **kw), (1, 3, 3, 3, 2)),
}
if not ON_JAX:  # on a CPU TensorFlow has no gradient of grouped convolutions
    del PRODUCTS["Conv2D, groups"]


def random(shape, seed=0, spread=3.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp2(rng.normal(size=shape) * spread)).astype("float32")


def gradients_of(layer, x, upstream, mode=COMPILED):
    """Outputs of a layer, and gradients of `sum(outputs * upstream)` by its weights and by `x`."""

    def function(x):
        outputs = layer(x)
        return ops.sum(outputs * upstream), outputs

    weights = layer.layer.trainable_variables if isinstance(layer, als.LossScaled) else None
    weights = weights or layer.trainable_variables

    def run(x):
        (_, outputs), gradients = value_and_gradients(function, weights, (x,))
        return outputs, gradients

    outputs, gradients = run(x) if ON_JAX else compiled(run, mode=mode)(x)
    return np.array(outputs), [np.array(each) for each in gradients]


@pytest.mark.parametrize("name", PRODUCTS)
def test_operands_are_rounded_and_nothing_else(name):
    """In float32, and one scale for all: the layer, run on rounded operands."""
    make, shape = PRODUCTS[name]
    keras.utils.set_random_seed(1)
    x = random(shape)
    layer = make(bias_initializer="random_normal")
    layer(x)
    layer.kernel.assign(random(layer.kernel.shape, 1))
    plain = type(layer).from_config(layer.get_config())
    plain(x)
    plain.set_weights(layer.get_weights())
    plain.kernel.assign(cast_relative(np.array(layer.kernel), E4M3))
    rounded_x = cast_relative(x, E4M3)
    upstream = random(np.array(plain(x)).shape, 2)
    scaled = als.LossScaled(layer, float8=ROUNDINGS["e4m3"])
    scaled.log2_scale = 4

    outputs, (of_kernel, of_bias, of_x) = gradients_of(scaled, x, upstream)
    expected, (plain_kernel, _, plain_x) = gradients_of(
        plain, rounded_x, cast(upstream, E4M3, 2.0**4)
    )
    _, (_, plain_bias, _) = gradients_of(plain, rounded_x, upstream)
    for found, wanted in [
        (outputs, expected),
        (of_kernel, plain_kernel),
        (of_bias, plain_bias),
        (of_x, plain_x),
    ]:
        # In which order a compiler sums is its own affair.
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max())
    different, _ = gradients_of(plain, x, upstream)
    assert np.abs(outputs - different).max() > 1e-3 * np.abs(outputs).max()


@pytest.mark.parametrize("rank, make", [(1, layers.SeparableConv1D), (2, layers.SeparableConv2D)])
def test_of_separable_convolutions_the_pointwise_part_is_rounded(rank, make):
    x = random((2, *[6] * rank, 3))
    layer = make(4, 3, padding="same", strides=2)
    layer(x)
    between = {1: layers.DepthwiseConv1D, 2: layers.DepthwiseConv2D}[rank]
    depthwise = between(3, padding="same", strides=2, use_bias=False)
    depthwise(x)
    depthwise.set_weights([np.array(layer.depthwise_kernel)])
    middle = np.array(depthwise(x))
    kernel = cast_relative(np.array(layer.pointwise_kernel), E4M3).reshape(3, 4)
    expected = cast_relative(middle, E4M3) @ kernel
    found = np.array(als.LossScaled(layer, float8=als.Float8())(x))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", ROUNDINGS)
def test_the_gradient_of_a_product_is_rounded_where_the_layer_works(settings, mode):
    """A product with 1, where all can be seen: what comes out is what was rounded, exactly."""
    float8 = ROUNDINGS[settings]
    layer = layers.EinsumDense("ab,b->ab", (64,), kernel_initializer="ones")
    scaled = als.LossScaled(layer, float8=float8)
    scaled(np.ones((8, 64), "float32"))
    upstream = random((8, 64))
    for log2_scale in (-5, 0, 7):
        scaled.log2_scale = log2_scale
        _, (_, of_x) = gradients_of(scaled, np.ones((8, 64), "float32"), upstream, mode)
        factor = 2.0**log2_scale
        np.testing.assert_array_equal(of_x, cast(of_x, float8.backward, factor))
        if float8.rounding == "nearest":
            np.testing.assert_array_equal(of_x, cast(upstream, float8.backward, factor))
        else:
            inside = np.abs(upstream * factor) < ml_dtypes.finfo(float8.backward).max
            step = np.maximum(np.abs(upstream) / 4, 2.0**-16 / factor)
            assert np.all(np.abs(of_x - upstream)[inside] <= step[inside])
            assert np.any(of_x != cast(upstream, float8.backward, factor))


@pytest.fixture
def on_a_device_of_8_bits(monkeypatch):
    monkeypatch.setattr(devices, "has_products_of_8_bits", lambda: True)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("settings", ["e4m3", "hybrid"])
def test_casts_for_products_of_8_bits_change_no_number(settings, policy, request):
    keras.config.set_dtype_policy(policy)
    make, shape = PRODUCTS["EinsumDense"]
    scaled = als.LossScaled(make(), float8=ROUNDINGS[settings])
    scaled(np.ones(shape, "float32"))
    scaled.log2_scale = 3
    x, upstream = random(shape), random((*shape[:-1], 5))
    state = [np.array(v) for v in scaled.variables]
    expected = gradients_of(scaled, x, upstream)
    request.getfixturevalue("on_a_device_of_8_bits")
    for variable, value in zip(scaled.variables, state, strict=True):
        variable.assign(value)
    found = gradients_of(scaled, x, upstream)
    np.testing.assert_array_equal(found[0], expected[0])
    for actual, wanted in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_which_products_are_cast(on_a_device_of_8_bits):
    dense, convolution = layers.Dense(3), layers.Conv2D(3, 1)
    assert casts(dense, als.Float8()) and casts(dense, als.Float8.hybrid())
    assert not casts(dense, als.Float8.mellempudi()) and not casts(convolution, als.Float8())


@pytest.mark.skipif(not ON_JAX, reason="on JAX only")
def test_products_see_what_was_cast(on_a_device_of_8_bits):
    """Both operands of all three products: XLA takes those for products of 8 bits."""
    import jax

    keras.config.set_dtype_policy("mixed_float16")
    scaled = als.LossScaled(layers.Dense(5, use_bias=False), float8=als.Float8.hybrid())
    scaled(np.ones((4, 6), "float32"))

    def run(x, kernel, upstream):
        with keras.StatelessScope([(scaled.layer.kernel, kernel)]):
            return ops.sum(scaled(x) * upstream)

    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((4, 6), (6, 5), (4, 5))]
    program = jax.jit(jax.grad(run, (0, 1))).lower(*shapes).compile().as_text()
    assert {"f8e4m3fn[4,6]", "f8e4m3fn[6,5]", "f8e5m2[4,5]"} <= set(
        re.findall(r"f8\w+\[[\d,]+\]", program)
    )


@pytest.mark.skipif(not ON_JAX, reason="on JAX only")
@pytest.mark.parametrize(
    "flags, capability, expected",
    [
        ("--xla_gpu_enable_triton_gemm=false", "9.0", True),
        ("--xla_gpu_enable_triton_gemm=false", "8.9", True),
        ("--xla_gpu_enable_triton_gemm=false", "12.0", True),
        ("--xla_gpu_enable_triton_gemm=false", "8.0", False),
        ("--xla_gpu_enable_triton_gemm=false", "gfx942", False),
        ("", "9.0", False),
    ],
)
def test_which_devices_have_products_of_8_bits(flags, capability, expected, monkeypatch):
    import jax

    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert devices.has_products_of_8_bits.__wrapped__() is expected


def test_random_bits_are_others_on_every_step_and_in_every_product():
    class Two(layers.Layer):
        def __init__(self):
            super().__init__()
            self.one, self.other = (
                layers.EinsumDense("ab,b->ab", (64,), kernel_initializer="ones") for _ in range(2)
            )

        def call(self, x):
            return self.one(x[:8]), self.other(x[8:])

    both = Two()
    both(np.ones((16, 64), "float32"))
    scaled = als.LossScaled(both, float8=als.Float8.mellempudi())
    upstream = random((8, 64))

    def function(x):
        return sum(ops.sum(y * upstream) for y in scaled(x))

    def gradient():
        (of_x,) = value_and_gradients(function, (), (np.ones((16, 64), "float32"),))[1]
        return np.array(of_x)

    first, second = gradient(), gradient()
    assert np.mean(first != second) > 0.1
    assert np.mean(first[:8] != first[8:]) > 0.1


def test_biases_and_activations_see_what_is_not_rounded():
    layer = layers.Dense(3, "relu", bias_initializer="ones")
    scaled = als.LossScaled(layer, float8=als.Float8())
    x, upstream = np.ones((1, 2), "float32"), np.float32([[1.03, 2.07, 3.1]])
    scaled(x)
    layer.kernel.assign([[1, 1, -8], [1, 1, -8]])
    outputs, (_, of_bias, of_x) = gradients_of(scaled, x, upstream)
    np.testing.assert_array_equal(outputs, [[3, 3, 0]])
    np.testing.assert_array_equal(of_bias, np.float32([1.03, 2.07, 0]))
    np.testing.assert_array_equal(of_x, [[3, 3]])  # 1 + 2


def test_infinities_and_nan_are_not_hidden():
    layer = layers.Dense(1, kernel_initializer="ones")
    scaled = als.LossScaled(layer, float8=ROUNDINGS["e4m3"])
    for value in (np.inf, np.nan):
        x = np.float32([[value, 1.0]])
        assert not np.isfinite(np.array(scaled(x))).any()
        _, (of_kernel, _, of_x) = gradients_of(
            scaled, np.ones((1, 2), "float32"), np.float32([[value]])
        )
        assert not np.isfinite(of_kernel).any() and not np.isfinite(of_x).any()
    _, (_, _, of_x) = gradients_of(scaled, np.ones((1, 2), "float32"), np.float32([[1e6]]))
    np.testing.assert_array_equal(of_x, [[448, 448]])


def test_neutral_scales_leave_nothing_rounded():
    x = random((4, 6))
    layer = layers.Dense(5)
    expected = np.array(layer(x))
    scaled = als.LossScaled(layer, float8=ROUNDINGS["e4m3"])
    assert np.any(np.array(scaled(x)) != expected)
    with als.neutral_scales():
        np.testing.assert_array_equal(np.array(scaled(x)), expected)
    np.testing.assert_array_equal(np.array(layer(x)), expected)  # nor is the layer itself


def test_what_is_inside_a_wrapper_of_its_own_is_its_own():
    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.first, self.second = layers.Dense(4), als.LossScaled(layers.Dense(4))

        def call(self, x):
            return self.second(self.first(x))

    block = Block()
    x = random((3, 4))
    block(x)
    scaled = als.LossScaled(block, float8=als.Float8())
    first = cast_relative(x, E4M3) @ cast_relative(np.array(block.first.kernel), E4M3)
    expected = first @ np.array(block.second.layer.kernel)
    np.testing.assert_allclose(np.array(scaled(x)), expected, rtol=1e-5)


# Whole models.


def convolutional():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="first")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Conv2D(4, 3, activation="relu", name="second")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(8, "relu", name="third")(x)
    return keras.Model(inputs, layers.Dense(3, name="last")(x))


def float8_layers(model):
    return [each.name for each in model.layers if float8_of(each)]


def float8_of(layer):
    return getattr(getattr(layer, "loss_scaling", None), "float8", None)


def compile_(model, **kwargs):
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(0.05, momentum=0.9), **kwargs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=JIT)
    return model


def data(number=64, shape=(8, 8, 3)):
    rng = np.random.default_rng(0)
    return rng.normal(size=(number, *shape)).astype("float32"), rng.integers(3, size=number)


def test_the_first_and_the_last_product_stay_wide():
    assert float8_layers(als.wrap_model(convolutional(), float8=als.Float8())) == [
        "second",
        "third",
    ]


def test_layers_are_chosen_by_a_filter():
    def model_with(layer_filter):
        return als.wrap_model(convolutional(), float8=als.Float8(layer_filter=layer_filter))

    everything = model_with(lambda layer: True)
    assert float8_layers(everything) == ["first", "second", "third", "last"]
    assert float8_layers(model_with(lambda layer, path: path == "last")) == ["last"]
    # Nested models count with those around them.
    inner = keras.Sequential([layers.Input((4,)), layers.Dense(4), layers.Dense(4)], name="inner")
    inputs = keras.Input((4,))
    outer = keras.Model(inputs, layers.Dense(2)(inner(layers.Dense(4)(inputs))))
    wrapped = als.wrap_model(outer, float8=als.Float8())
    assert len(float8_layers(wrapped.get_layer("inner"))) == 2 and not float8_layers(wrapped)


def test_projections_of_attention_are_products():
    attention = layers.MultiHeadAttention(2, 3)
    x = random((2, 5, 4), spread=0.0)
    expected = np.array(attention(x, x))
    assert len(products_in(attention)) == 4
    scaled = als.LossScaled(attention, float8=als.Float8())
    found = np.array(scaled(x, x))
    assert 0 < np.abs(found - expected).max() < 0.5 * np.abs(expected).max()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32"])
def test_models_learn_at_scales_that_their_format_needs(policy):
    if policy == "mixed_float16" and not ON_JAX:
        pytest.skip("float16 convolutions on a CPU take seconds without XLA")
    keras.utils.set_random_seed(3)
    keras.config.set_dtype_policy(policy)
    model = compile_(als.wrap_model(convolutional(), float8=als.Float8()))
    x, y = data()
    history = model.fit(x, y, epochs=12, batch_size=32, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]
    assert model.optimizer.skipped_steps <= 1
    for layer in model.layers:
        if float8_of(layer):
            seen = layer.loss_scaling.snapshot
            assert -9 <= seen.operands.binades[1] <= 8 and seen.flushed_share < 0.02
            assert seen.saturations <= 3


def test_first_what_is_too_large_saturates_and_is_counted():
    keras.utils.set_random_seed(3)
    model = compile_(
        als.wrap_model(convolutional(), float8=ROUNDINGS["e4m3"]),
        initial_scale=2.0**40,
        rule=als.FixedRule(),
    )
    x, y = data()
    model.fit(x, y, batch_size=16, verbose=0)
    assert model.optimizer.skipped_steps == 0
    assert model.get_layer("third").loss_scaling.snapshot.saturations == 4


@pytest.mark.parametrize("settings", ["e4m3", "mellempudi"])
def test_a_resumed_run_goes_on_bit_for_bit(settings, tmp_path):
    keras.utils.set_random_seed(5)
    inputs = keras.Input((6,))
    x = layers.Dense(16, "relu")(inputs)
    x = layers.Dense(16, "relu")(x)
    plain = keras.Model(inputs, layers.Dense(3)(x))
    x, y = data(shape=(6,))
    model = compile_(als.wrap_model(plain, float8=ROUNDINGS[settings]))
    model.fit(x, y, batch_size=16, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [float8_of(each) for each in loaded.layers[1:]] == [None, ROUNDINGS[settings], None]
    for each in (model, loaded):
        each.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    for one, other in zip(
        [*model.variables, *model.optimizer.variables],
        [*loaded.variables, *loaded.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_a_rematerialized_layer_rounds_the_same_twice():
    """Random bits, too: those of the second run are those of the first."""
    models = []
    for scope in (keras.RematScope, contextlib.nullcontext):
        keras.utils.set_random_seed(7)
        with scope():
            inputs = keras.Input((6,))
            x = layers.Dense(8, "relu")(layers.Dense(16, "relu")(inputs))
            plain = keras.Model(inputs, layers.Dense(3)(x))
        models.append(compile_(als.wrap_model(plain, float8=als.Float8.mellempudi())))
    for model in models:
        x, y = data(shape=(6,))
        model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    for one, other in zip(*(model.variables for model in models), strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_stripped_models_are_plain():
    model = compile_(als.wrap_model(convolutional(), float8=als.Float8.mellempudi()))
    x, y = data(32)
    model.fit(x, y, verbose=0)
    with als.neutral_scales():
        expected = np.array(model(x))
    plain = als.strip_model(model)
    assert "LossScaled" not in plain.to_json() and "Float8" not in plain.to_json()
    np.testing.assert_allclose(np.array(plain(x)), expected, rtol=1e-5, atol=1e-5)
    assert len(plain.weights) == len(convolutional().weights)


def test_the_table_shows_formats_and_why_layers_stay_wide():
    model = compile_(als.wrap_model(convolutional(), float8=als.Float8.hybrid()))
    rows = {row.name: row for row in als.scale_table(model)}
    assert {name: row.float8 for name, row in rows.items() if row.float8} == {
        "first": "first product",
        "norm": "no product",
        "second": "e4m3fn, e5m2",
        "third": "e4m3fn, e5m2",
        "last": "last product",
    }
    assert rows["second"].flushed is None
    x, y = data(32)
    model.fit(x, y, verbose=0)
    row = next(row for row in als.scale_table(model) if row.name == "second")
    assert row.flushed == 0 and row.saturations == 0
    text = str(als.scale_table(model))
    assert "saturated steps" in text and "e4m3fn, e5m2" in text
    assert "float8" not in str(als.scale_table(als.wrap_model(convolutional())))


# Bad input.


def test_the_default_is_hybrid():
    assert als.Float8() == als.Float8.hybrid() == als.Float8(E4M3, E5M2, "nearest")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"forward": "float16"}, "`forward` to be one of 'float8_e4m3fn', 'float8_e5m2'"),
        ({"backward": "float8_e4m3b11fnuz"}, "`backward` to be one of"),
        ({"rounding": "up"}, "`rounding` to be one of 'nearest', 'stochastic'"),
        ({"layer_filter": 3}, "`layer_filter` to be a function"),
    ],
)
def test_settings_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        als.Float8(**arguments)


def test_layers_without_a_product():
    norm = layers.BatchNormalization()
    norm.build((None, 3))
    with pytest.raises(ValueError, match="matrix product or a convolution"):
        als.LossScaled(norm, float8=als.Float8())
    scaled = als.LossScaled(norm)  # it is still free

    class Own(layers.Dense):
        def call(self, inputs):
            return inputs

    with pytest.raises(ValueError, match="only with a `call` of its own"):
        als.LossScaled(Own(3), float8=als.Float8())(np.ones((1, 3), "float32"))
    with pytest.raises(ValueError, match="Expected `float8` to be a Float8"):
        als.LossScaled(layers.Dense(3), float8="float8_e4m3fn")
    with pytest.raises(ValueError, match="Expected `float8` to be a Float8"):
        als.wrap_model(convolutional(), float8=True)
    two = keras.Sequential([layers.Input((3,)), scaled.layer, layers.Dense(3), layers.Dense(2)])
    with pytest.raises(ValueError, match="none but the first and the last"):
        als.wrap_model(two, float8=als.Float8())
    with pytest.raises(ValueError, match="chooses none"):
        als.wrap_model(two, float8=als.Float8(layer_filter=lambda layer: False))


def test_quantized_by_keras_too():
    model = als.wrap_model(convolutional(), float8=als.Float8())
    before = model.get_weights()
    with pytest.raises(ValueError, match="to be quantized once"):
        model.quantize("float8")
    with pytest.raises(ValueError, match="to be quantized once"):
        model.get_layer("third").quantize("float8")
    for one, other in itertools.zip_longest(before, model.get_weights()):
        np.testing.assert_array_equal(one, other)
    dense = layers.Dense(3)
    dense.build((None, 3))
    dense.quantize("int8")
    with pytest.raises(ValueError, match="not to be quantized by Keras, too"):
        als.LossScaled(dense, float8=als.Float8())


def test_under_an_optimizer_that_knows_nothing_of_scales():
    model = als.wrap_model(convolutional(), float8=als.Float8())
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match="compiled with AdaptiveLossScaleOptimizer"):
        model.fit(*data(), verbose=0)


def test_calls_in_several_threads(mixed_float16):
    model = als.wrap_model(convolutional(), float8=als.Float8())
    x, _ = data()
    expected = np.array(model(x))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: np.array(model(x)), range(40)))
    finally:
        sys.setswitchinterval(interval)
    for each in found:
        np.testing.assert_array_equal(each, expected)


def test_a_layer_in_float8_computes_as_ever_elsewhere():
    """What makes it compute in float8 stays on it, and acts inside its wrapper alone."""
    layer = layers.Dense(4)
    x = floats(3, 5)
    plain = np.array(layer(x))
    scaled = als.LossScaled(layer, float8=als.Float8())
    rounded = np.array(scaled(x))
    assert not np.array_equal(rounded, plain)
    np.testing.assert_array_equal(layer(x), plain)
    assert product_of(layer) is not None
    layer.call = lambda x: x
    assert product_of(layer) is None
