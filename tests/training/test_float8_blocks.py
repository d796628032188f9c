"""Float8 by blocks (MXFP8): which numbers share a power of two, in each of three products."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import COMPILED, MODES, ON_JAX, value_and_gradients
from tests.backends import compiled as compiled_in
from tf_adaptive_ls.numerics.float_format import FloatFormat
from tf_adaptive_ls.training.float8.operand import Axes, Operand

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def by_blocks(values, axes, size, name=E4M3):
    """The reference: one block after the other, by casts of NumPy, as the specification has it."""
    values = np.array(values, "float32")
    axes = [axis % values.ndim for axis in axes]
    others = [axis for axis in range(values.ndim) if axis not in axes]
    turned = values.transpose([*others, *axes])
    rows = turned.reshape([int(np.prod(turned.shape[: len(others)])), -1]).copy()
    for row in rows:
        for start in range(0, len(row), size):
            block = row[start : start + size]
            largest = np.abs(block).max()
            if largest > 0:
                factor = 2.0 ** np.floor(np.log2(LARGEST[name] / largest.astype("float64")))
                narrow = (block * np.float32(factor)).astype(getattr(ml_dtypes, name))
                block[:] = narrow.astype("float32") / np.float32(factor)
    return rows.reshape(turned.shape).transpose(np.argsort([*others, *axes]))


def random(shape, seed=0, spread=6.0):
    """So far apart that it matters which numbers share a power of two."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape) * np.exp2(rng.normal(size=shape) * spread)
    return values.astype("float32")


@pytest.mark.parametrize("name", [E4M3, E5M2])
@pytest.mark.parametrize(
    "axes", [(2,), (0,), (0, 1), (1, 2), (2, 0), (0, 1, 2), ()], ids=lambda axes: f"{axes}"
)
@pytest.mark.parametrize("size", [1, 4, 32])
def test_blocks_are_those_of_the_reference(axes, size, name):
    x = random((5, 7, 9), spread=9.0)
    x[1, 2] = 0
    operand = Operand(FloatFormat(name), True, block_size=size)
    found = np.array(operand.rounded_along(ops.convert_to_tensor(x), Axes(x.shape, axes)))
    np.testing.assert_array_equal(found, by_blocks(x, axes, size, name))
    if size > 1 and axes:
        assert (found != by_blocks(x, (), size, name)).any()


# Of each: the layer, the shape of inputs; which axes of inputs and kernel the product sums over;
# and which of the outputs' gradient and of the kernel that product sums over which the gradient
# by inputs is. The gradient by the kernel sums over all others of inputs and of the gradient.
CASES = {
    "Dense": (lambda **kw: layers.Dense(9, **kw), (11, 13), ([-1], [0]), ([-1], [1])),
    "Dense, sequences": (lambda **kw: layers.Dense(5, **kw), (3, 4, 6), ([-1], [0]), ([-1], [1])),
    "EinsumDense": (
        lambda **kw: layers.EinsumDense("abc,cde->abde", (None, 3, 5), bias_axes="de", **kw),
        (2, 4, 6),
        ([2], [0]),
        ([2, 3], [1, 2]),
    ),
    "EinsumDense, two axes": (
        lambda **kw: layers.EinsumDense("...cd,cde->...e", (5,), bias_axes="e", **kw),
        (3, 4, 2, 3),
        ([2, 3], [0, 1]),
        ([2], [2]),
    ),
    "Conv1D": (
        lambda **kw: layers.Conv1D(6, 3, padding="same", dilation_rate=2, **kw),
        (2, 8, 5),
        ([-1], [-2]),
        ([-1], [-1]),
    ),
    "Conv2D": (
        lambda **kw: layers.Conv2D(7, 3, strides=2, padding="same", **kw),
        (2, 6, 6, 5),
        ([-1], [-2]),
        ([-1], [-1]),
    ),
    "Conv3D": (lambda **kw: layers.Conv3D(6, 2, **kw), (1, 4, 4, 4, 5), ([-1], [-2]), ([-1], [-1])),
    "Conv2DTranspose": (
        lambda **kw: layers.Conv2DTranspose(6, 3, strides=2, **kw),
        (2, 4, 4, 5),
        ([-1], [-1]),
        ([-1], [-2]),
    ),
}
if ON_JAX:  # TensorFlow has no such convolution on a CPU
    CASES["Conv2D, channels first"] = (
        lambda **kw: layers.Conv2D(6, 3, data_format="channels_first", **kw),
        (2, 5, 4, 4),
        ([1], [2]),
        ([1], [3]),
    )


def gradients_of(layer, x, upstream, mode=COMPILED):
    """Outputs, and gradients of `sum(outputs * upstream)` by kernel, bias and `x`."""

    def function(x):
        outputs = layer(x)
        return ops.sum(outputs * upstream), outputs

    inner = layer.layer if isinstance(layer, als.LossScaled) else layer

    def run(x):
        (_, outputs), gradients = value_and_gradients(function, inner.trainable_variables[:2], (x,))
        return outputs, gradients

    outputs, gradients = run(x) if ON_JAX else compiled_in(run, mode=mode)(x)
    return np.array(outputs), [np.array(each) for each in gradients]


def others(rank, axes):
    return [axis for axis in range(rank) if axis not in axes and axis - rank not in axes]


@pytest.mark.parametrize("name", CASES)
def test_each_product_is_that_of_the_reference(name):
    """In float64 where there is, in which the sums have all their bits: equal, bit for bit."""
    make, shape, forward, by_inputs = CASES[name]
    dtype, size = "float32" if ON_JAX else "float64", 4
    layer, plain = (make(dtype=dtype, bias_initializer="random_normal") for _ in range(2))
    x = random(shape)
    g = random(layer(x.astype(dtype)).shape, 2)
    plain(x.astype(dtype))
    w, bias = random(layer.kernel.shape, 1), random(layer.bias.shape, 3)
    layer.kernel.assign(w)
    layer.bias.assign(bias)

    def computed(x, w, g):
        plain.kernel.assign(w.astype(dtype))
        plain.bias.assign(bias.astype(dtype))
        return gradients_of(plain, x.astype(dtype), g.astype(dtype))

    of_x, of_g = others(x.ndim, forward[0]), others(g.ndim, by_inputs[0])
    outputs, _ = computed(by_blocks(x, forward[0], size), by_blocks(w, forward[1], size), g)
    for_x = (x, by_blocks(w, by_inputs[1], size), by_blocks(g, by_inputs[0], size))
    _, (_, _, by_x) = computed(*for_x)
    _, (by_w, _, _) = computed(by_blocks(x, of_x, size), w, by_blocks(g, of_g, size))
    _, (_, by_bias, _) = computed(x, w, g)

    scaled = als.LossScaled(layer, float8=als.Float8(E4M3, E4M3, block_size=size))
    scaled.log2_scale = 3
    found, gradients = gradients_of(scaled, x.astype(dtype), g.astype(dtype))
    for ours, reference in zip((found, *gradients), (outputs, by_w, by_bias, by_x), strict=True):
        if ON_JAX:
            near = 2e-6 * np.abs(reference).max()
            np.testing.assert_allclose(ours, reference, rtol=2e-6, atol=near)
        else:
            np.testing.assert_array_equal(ours, reference)
    wide, _ = computed(x, w, g)
    assert np.abs(found - wide).max() > 1e-3 * np.abs(wide).max()


@pytest.mark.skipif(not ON_JAX, reason="TensorFlow has no gradient of them on a CPU")
def test_groups_of_a_convolution_share_no_block():
    """One of two groups is, bit for bit, two of half the channels beside each other."""
    float8 = als.Float8(E4M3, E4M3, block_size=4)
    x, g = random((2, 5, 5, 12)), random((2, 3, 3, 10), 1)
    whole = als.LossScaled(layers.Conv2D(10, 3, groups=2), float8=float8)
    halves = [als.LossScaled(layers.Conv2D(5, 3), float8=float8) for _ in range(2)]
    whole(x)
    outputs, (by_kernel, _, by_x) = gradients_of(whole, x, g)
    for half, at, out in zip(
        halves, (slice(0, 6), slice(6, 12)), (slice(0, 5), slice(5, 10)), strict=True
    ):
        half(x[..., at])
        half.layer.kernel.assign(whole.layer.kernel[..., out])
        of_half, (kernel, _, by_half) = gradients_of(half, x[..., at], g[..., out])
        np.testing.assert_allclose(outputs[..., out], of_half, rtol=2e-6)
        np.testing.assert_allclose(by_kernel[..., out], kernel, rtol=2e-6)
        np.testing.assert_allclose(by_x[..., at], by_half, rtol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_scale_of_the_layer_changes_no_bit(mode):
    """In float32, between the products: blocks shift gradients themselves."""
    x, g = random((6, 40)), random((6, 35), 1)
    scaled = als.LossScaled(layers.Dense(35, activation="relu"), float8=als.Float8.mx())
    scaled(x)
    reference = gradients_of(scaled, x, g, mode)
    for log2_scale in (-20, 7, 20):
        scaled.log2_scale = log2_scale
        found = gradients_of(scaled, x, g, mode)
        for ours, expected in zip(
            [found[0], *found[1]], [reference[0], *reference[1]], strict=True
        ):
            np.testing.assert_array_equal(ours, expected)


def test_at_random_the_mean_is_exact():
    """Over many rounded gradients by inputs, each by noise of its own."""
    float8 = als.Float8(E4M3, E4M3, "stochastic", block_size=8)
    x, g = random((8, 16), spread=1.0), random((8, 16), 1, spread=1.0)
    scaled = als.LossScaled(layers.Dense(16, kernel_initializer="identity"), float8=float8)
    times = 400
    x, repeated = (np.tile(each, (times, 1)) for each in (x, g))
    scaled(x)
    _, (_, _, by_x) = gradients_of(scaled, x, repeated)
    found = by_x.reshape(times, *g.shape)
    assert len({each.tobytes() for each in found}) == times
    largest = np.abs(g.reshape(8, 2, 8)).max(axis=-1).repeat(8, axis=-1)
    step = np.maximum(np.abs(g) / 8, largest * 2.0**-17)
    assert np.all(np.abs(found - g) <= step)
    assert np.all(np.abs(found.mean(axis=0) - g) < step * 5 * 0.5 / times**0.5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_models_are_trained_saved_and_resumed(policy, tmp_path):
    """With batches of two sizes; there is no report, for there is nothing to choose a scale by."""
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation="relu")(inputs)
    x = layers.SeparableConv2D(5, 3, activation="relu")(x)
    x = layers.Dense(40, activation="relu")(layers.Flatten()(x))
    model = als.wrap_model(
        keras.Model(inputs, layers.Dense(1, dtype="float32")(x)), float8=als.Float8.mx()
    )
    model.compile(als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(3e-3)), "mse")
    images = random((20, 8, 8, 3), spread=1.0)
    targets = images.mean((1, 2, 3))[:, None]

    def train(model, epochs):
        history = model.fit(images, targets, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
        return history.history["loss"]

    losses = train(model, 30)
    assert losses[-1] < losses[0] / 4
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    chosen = [each.loss_scaling for each in loaded.layers if hasattr(each, "loss_scaling")]
    assert [each.float8 for each in chosen] == [None, *[als.Float8.mx()] * 2, None]
    assert all(each.float8_report is None for each in chosen)
    assert train(loaded, 3) == train(model, 3)
    for ours, reference in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(reference))


def test_another_optimizer_will_do(mixed_float16):
    """No scale has to bring gradients into the range of 8 bits."""
    inputs = keras.Input((8,))
    x = layers.Dense(40, activation="relu")(layers.Dense(8)(inputs))
    plain = keras.Model(inputs, layers.Dense(1, dtype="float32")(x))
    model = als.wrap_model(plain, float8=als.Float8.mx())
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "mse")
    with pytest.warns(UserWarning, match="leaves their scales at 1"):
        model.fit(random((8, 8), spread=1.0), np.ones((8, 1)), verbose=0)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "32"])
def test_sizes_that_cannot_be(size):
    with pytest.raises(ValueError, match="Expected `block_size` to be a positive int or None"):
        als.Float8(block_size=size)
