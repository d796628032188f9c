"""`quantize_weights`: plain models with weights in few bits."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_adaptive_ls as als
from tf_adaptive_ls.backend.model_copy import rebuilt_from_config
from tf_adaptive_ls.deploy.folding import folded

ON_JAX = keras.backend.backend() == "jax"
METHODS = ("nearest", "mse", "multipoint", "mixed", "adaround")
SPENDING = ("multipoint", "mixed", "adaround")
QUICK = {"verbose": False, "steps": 100}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


IMAGES = normal(16, 8, 8, 3)


def randomized(model):
    """As if it was trained: no weight is special, and channels are of different sizes."""
    rng = np.random.default_rng(1)
    for w in model.weights:
        if "seed" in w.path:
            continue
        if any(name in w.path for name in ("variance", "gamma")):
            w.assign(rng.uniform(0.5, 2, w.shape))
        else:
            w.assign(rng.normal(size=w.shape) * rng.uniform(0.1, 1, w.shape[-1:]))
    return model


def convolutions():
    """Every kind of layer that can be quantized, normalized or not, in a graph in a graph."""
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x)
    x = layers.ReLU()(layers.BatchNormalization(scale=False)(x))
    block = [
        keras.Input((4, 4, 16)),
        layers.SeparableConv2D(8, 3, padding="same"),
        layers.BatchNormalization(center=False),
        layers.Conv2D(8, 3, padding="same", groups=2, activation="relu"),
    ]
    x = keras.Sequential(block, name="block")(x)
    y = layers.BatchNormalization()(layers.Conv2DTranspose(8, 3, padding="same")(x))
    x = layers.Reshape((16, 8))(x + y)
    x = layers.Conv1D(8, 3, padding="causal")(x)
    x = layers.BatchNormalization()(layers.EinsumDense("abc,cd->abd", (None, 6))(x))
    x = x + layers.MultiHeadAttention(2, 3)(x, x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Dense(8, "relu")(x)))


def error_of(quantized, model, x=IMAGES):
    expected = model.predict(x, verbose=0)
    return np.sqrt(np.mean((quantized.predict(x, verbose=0) - expected) ** 2) / np.var(expected))


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return randomized(convolutions())


def normalizations(model):
    return sum(type(each) is layers.BatchNormalization for each in model._flatten_layers())


def test_normalizations_are_folded(model):
    result = folded(rebuilt_from_config(model))
    assert normalizations(model) == 5 and normalizations(result) == 0
    expected = model.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(result.predict(IMAGES, verbose=0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["activation", "used twice", "output", "shared", "axis"])
def test_what_cannot_be_folded_stays(case):
    x = inputs = keras.Input((4, 6))
    dense = layers.Dense(6, activation="relu" if case == "activation" else None)
    y = dense(x)
    z = layers.BatchNormalization(axis=1 if case == "axis" else -1)(y)
    if case == "used twice":
        z = z + y
    if case == "shared":
        z = z + dense(z)
    model = randomized(keras.Model(inputs, [z, y] if case == "output" else z))
    copy = rebuilt_from_config(model)
    assert folded(copy) is copy


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_model_with_every_weight_on_its_grid(method, model, tmp_path):
    before = model.get_weights()
    quantized, report = als.quantize_weights(model, IMAGES, 4, method=method, **QUICK)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert error_of(quantized, model) < 0.7
    kernels = {w.path: w.numpy() for w in quantized.weights}
    assert "head/kernel" in kernels and len(report.kernels) == 14
    for row in report.kernels:
        assert row.positions > 0 and (row.points == 1).all()
        if "depthwise" in row.name or "transpose" in row.name or "attention" in row.name:
            continue  # channels are not the last axis
        for channel, bits in zip(np.moveaxis(kernels[row.name], -1, 0), row.bits, strict=True):
            assert len(np.unique(np.abs(channel))) <= 2 ** (bits - 1)
    # Nothing of this library is in its file.
    assert not any("tf_adaptive_ls" in type(p).__module__ for p in quantized._flatten_layers())
    quantized.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = quantized.predict(IMAGES, verbose=0)
    np.testing.assert_array_equal(loaded.predict(IMAGES, verbose=0), expected)


def test_first_and_last_bits(model):
    for bits, expected in ((8, 8), (None, 4), (6, 6)):
        _, report = als.quantize_weights(
            model, IMAGES, 4, method="mse", first_and_last_bits=bits, **QUICK
        )
        first, *inside, last = report.kernels
        assert (first.name, last.name) == ("conv2d/kernel", "head/kernel")
        assert {*first.bits, *last.bits} == {expected}
        assert {bit for row in inside for bit in row.bits} == {4}


@pytest.mark.parametrize("method", SPENDING)
def test_a_budget_is_kept_and_well_spent(method, model):
    options = {**QUICK, "method": method}
    plain, base = als.quantize_weights(model, IMAGES, 4, **options)
    errors = [error_of(plain, model)]
    for budget in (0.1, 0.4):
        quantized, report = als.quantize_weights(model, IMAGES, 4, budget=budget, **options)
        of_kernels = [sum(row.bytes.sum() for row in each.kernels) for each in (base, report)]
        assert of_kernels[0] < of_kernels[1] <= of_kernels[0] * (1 + budget)
        errors.append(error_of(quantized, model))
    assert errors[2] < errors[0] / 2
    if method == "multipoint":
        assert max(max(row.points) for row in report.kernels) >= 2
    else:
        assert {bit for row in report.kernels for bit in row.bits} == {4, 8}


def test_points_are_channels_in_the_graph(model):
    """Each kernel of the wide layers is on one grid per channel, with its ends reached."""
    quantized, _report = als.quantize_weights(
        model, IMAGES, 4, method="multipoint", budget=0.5, **QUICK
    )
    sums = [each for each in quantized._flatten_layers() if each.name.endswith("_points")]
    assert {type(each) for each in sums} == {layers.Dense, layers.Conv1D, layers.Conv2D}
    for each in sums:
        kernel = each.kernel.numpy()
        assert np.isin(kernel, (0, 1)).all() and (kernel.sum(axis=-1) == 1).all()
        wide = next(p for p in quantized._flatten_layers() if p.name == each.name[:-7])
        weights = wide.kernel.numpy()
        if isinstance(wide, layers.Conv2DTranspose):
            weights = np.moveaxis(weights, -2, -1)
        if isinstance(wide, layers.DepthwiseConv2D):
            weights = weights.reshape(3, 3, -1)
        for channel in weights.reshape(-1, weights.shape[-1]).T:
            largest = np.abs(channel).max()
            integers = channel / (largest / 7 if largest else 1)
            np.testing.assert_allclose(integers, np.rint(integers), atol=1e-4)
    # The same sums of points in one kernel, as where layers are not in a graph.
    summed, _ = als.quantize_weights(
        Around(model), IMAGES, 4, method="multipoint", budget=0.5, **QUICK
    )
    assert not any(each.name.endswith("_points") for each in summed._flatten_layers())


@keras.saving.register_keras_serializable("tests")
class Around(keras.Model):
    """A subclass, whose call is no graph."""

    def __init__(self, inner=None, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner
        self.build(inner.input_shape)

    def build(self, shape):
        self.built = True

    def call(self, x):
        return self.inner(x)

    def get_config(self):
        return {"inner": keras.saving.serialize_keras_object(self.inner)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["inner"]))


def test_points_next_to_a_padded_shortcut_run_in_a_graph():
    # As in the ResNets of the paper. Plain Keras crashes TensorFlow with a convolution of one pixel
    # there whose padding is "valid": `keras.Model(x, ops.pad(x, …) + layers.Conv2D(8, 1)(x))`.
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same")(inputs)
    shortcut = ops.pad(inputs, ((0, 0), (0, 0), (0, 0), (2, 3)))
    model = randomized(keras.Model(inputs, shortcut + x))
    options = {**QUICK, "method": "multipoint", "budget": 0.5, "first_and_last_bits": None}
    quantized, report = als.quantize_weights(model, IMAGES, 4, **options)
    assert report.kernels[0].points.max() > 1
    np.testing.assert_allclose(quantized.predict(IMAGES, verbose=0), quantized(IMAGES), rtol=1e-5)


def test_points_do_what_their_sum_does():
    """The wide layers against the same points summed up in one kernel."""
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, activation="relu")(x)
    x = layers.SeparableConv2D(8, 3, depth_multiplier=2, activation="relu")(x)
    x = layers.DepthwiseConv2D(3, use_bias=False)(x)
    x = layers.Conv2DTranspose(4, 3, strides=2)(x)
    model = randomized(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))))
    options = {**QUICK, "method": "multipoint", "budget": 3.0, "first_and_last_bits": None}
    wide, report = als.quantize_weights(model, IMAGES, 2, **options)
    summed, other = als.quantize_weights(Around(model), IMAGES, 2, **options)
    assert {max(row.points) for row in report.kernels} == {3}
    assert len(wide._flatten_layers()) > len(summed._flatten_layers()) + 5
    for a, b in zip(report.kernels, other.kernels, strict=True):
        np.testing.assert_array_equal(a.points, b.points)
    expected = summed.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(wide.predict(IMAGES, verbose=0), expected, rtol=1e-4, atol=1e-4)


def test_the_report_tells_errors_of_outputs():
    """Against a run of the model."""
    inputs = keras.Input((8, 8, 3))
    model = randomized(keras.Model(inputs, layers.Conv2D(5, 3, padding="same")(inputs)))
    quantized, report = als.quantize_weights(
        model, IMAGES, 3, method="mse", first_and_last_bits=None, **QUICK
    )
    (row,) = report.kernels
    bias = model.layers[-1].bias.numpy()
    outputs, others = (m.predict(IMAGES, verbose=0) - bias for m in (model, quantized))
    errors = np.sqrt(np.mean((outputs - others) ** 2, axis=(0, 1, 2)) / np.mean(outputs**2))
    np.testing.assert_allclose(row.output_error, errors, rtol=1e-3)
    kernels = [m.layers[-1].kernel.numpy().reshape(-1, 5) for m in (model, quantized)]
    norms = np.linalg.norm(kernels[0] - kernels[1], axis=0) / np.linalg.norm(kernels[0], axis=0)
    np.testing.assert_allclose(row.weight_error, norms, rtol=1e-5)
    assert row.positions == 16 * 64 and row.shape == (3, 3, 3, 5)
    np.testing.assert_array_equal(row.bytes, 27 * 3 / 8 + 4)
    assert report.float32_bytes == 4 * (27 * 5 + 5)
    assert report.bytes == pytest.approx(row.bytes.sum() + 20)
    assert "conv2d/kernel" in str(report) and "3x3x3x5" in str(report)
    assert report.to_dict()["kernels"][0]["bits"] == [3] * 5
    assert report.not_quantized == ("conv2d/bias",)


def test_a_picture(model):
    from tf_adaptive_ls import plots

    _, report = als.quantize_weights(model, IMAGES, method="mixed", budget=0.1, **QUICK)
    axes, sizes = plots.plot_quantization(report).axes
    dots = [each.get_offsets() for each in axes.collections]
    for dot, kernel in zip(dots, report.kernels, strict=True):
        np.testing.assert_allclose(dot[:, 0], kernel.output_error)
    shown = [bar.get_width() * 1024 for bar in sizes.patches[len(dots) :]]
    np.testing.assert_allclose(shown, [kernel.bytes.sum() for kernel in report.kernels])
    with pytest.raises(ValueError, match=r"`quantize_weights` returned\. Received: 'report'"):
        plots.plot_quantization("report")


def test_rounding_is_learnt(model):
    """Outputs of layers get nearer, on grids that stay; and the same again in another run."""
    reports = []
    for method in ("mse", "adaround", "adaround"):
        _quantized, report = als.quantize_weights(
            model, IMAGES, 3, method=method, steps=500, verbose=False
        )
        reports.append(report)
    nearest, learnt, again = (
        np.array([np.square(row.output_error).sum() for row in each.kernels]) for each in reports
    )
    np.testing.assert_array_equal(learnt, again)
    assert (learnt <= nearest).all() and (learnt < 0.8 * nearest).mean() > 0.5


def test_of_two_weights_the_best_rounding_is_found():
    """Against all four roundings, for inputs that are nearly the same."""
    inputs = keras.Input((2,))
    model = keras.Model(inputs, layers.Dense(1, use_bias=False)(inputs))
    x = normal(64, 1) + 0.1 * normal(64, 2, seed=1)
    model.layers[-1].kernel.assign([[7.0], [3.45]])
    _, report = als.quantize_weights(
        model, x, 4, method="mse", first_and_last_bits=None, verbose=False
    )
    quantized, learnt = als.quantize_weights(
        model, x, 4, first_and_last_bits=None, steps=1000, verbose=False
    )
    scale = np.abs(quantized.layers[-1].kernel.numpy()).max() / 7
    errors = {
        (a, b): np.mean((x @ ([7.0 - a * scale, 3.45 - b * scale])) ** 2)
        for a in (6, 7)
        for b in (3, 4)
    }
    best = min(errors, key=errors.get)
    found = np.rint(quantized.layers[-1].kernel.numpy()[:, 0] / scale)
    assert tuple(found) == best
    assert learnt.kernels[0].output_error <= report.kernels[0].output_error


def test_what_calibration_takes(model):
    targets = np.zeros((16, 3))
    _, expected = als.quantize_weights(model, IMAGES, 4, method="mixed", budget=0.1, **QUICK)
    for data in ((IMAGES, targets), [(IMAGES[:9], targets), (IMAGES[9:], targets)]):
        _, report = als.quantize_weights(model, data, 4, method="mixed", budget=0.1, **QUICK)
        for a, b in zip(report.kernels, expected.kernels, strict=True):
            np.testing.assert_array_equal(a.bits, b.bits)
            np.testing.assert_allclose(a.output_error, b.output_error, rtol=1e-3)


def test_several_inputs_and_layers_that_are_not_called():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    shared = layers.Dense(4)
    model = keras.Model({"a": a, "b": b}, layers.Dense(2)(shared(a) * shared(b)))
    data = {"a": normal(8, 4), "b": normal(8, 4, seed=1)}
    _, report = als.quantize_weights(model, data, **QUICK)
    assert [row.positions for row in report.kernels] == [16, 8]


def test_a_filter(model):
    _quantized, report = als.quantize_weights(
        model, IMAGES, layer_filter=lambda layer, path: path.startswith("block/"), **QUICK
    )
    assert len(report.kernels) == 3
    assert "head/kernel" in report.not_quantized
    with pytest.raises(ValueError, match="has none for which `layer_filter` is true"):
        als.quantize_weights(model, IMAGES, layer_filter=lambda layer: False)


def test_in_any_dtype(model):
    keras.config.set_dtype_policy("mixed_bfloat16")
    inputs = keras.Input((4,))
    half = keras.Model(inputs, layers.Dense(2)(layers.Dense(8, "relu")(inputs)))
    quantized, _ = als.quantize_weights(half, normal(8, 4), **QUICK)
    assert {each.compute_dtype for each in quantized.layers} == {"float32"}


BAD = {
    "bits 1": ({"bits": 1}, "`bits` to be 2 … 8. Received: bits=1"),
    "bits 9": ({"bits": 9}, "Received: bits=9"),
    "bits 4.0": ({"bits": 4.0}, "Received: bits=4.0"),
    "first": ({"first_and_last_bits": 16}, "Received: first_and_last_bits=16"),
    "method": ({"method": "gptq"}, "one of .*'adaround'.*Received: method='gptq'"),
    "budget": ({"budget": -0.1}, "not below 0. Received: budget=-0.1"),
    "budget of none": ({"method": "mse", "budget": 0.1}, "spends none. Received: budget=0.1"),
    "steps": ({"steps": 0}, "Received: steps=0"),
    "filter": ({"layer_filter": "head"}, "to quantize it. Received: layer_filter='head'"),
    "empty": ({"calibration": IMAGES[:0]}, "at least one example"),
    "no batches": ({"calibration": []}, "at least one example"),
    "NaN": ({"calibration": IMAGES * np.nan}, "NaN or infinity in the inputs of 'conv2d/kernel'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, model):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        als.quantize_weights(
            **{"model": model, "calibration": IMAGES, **QUICK, **options},
        )


def test_bad_models(model):
    with pytest.raises(ValueError, match=r"plain model.*LossScaling|plain model.*plain_copy"):
        als.quantize_weights(als.wrap_model(rebuilt_from_config(model)), IMAGES)
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match=r"model 'bare', which has none\."):
        als.quantize_weights(keras.Model(inputs, layers.ReLU()(inputs), name="bare"), normal(2, 4))
    with pytest.raises(ValueError, match=r"built keras\.Model"):
        als.quantize_weights(keras.Sequential([layers.Dense(2)]), normal(2, 4))
    broken = rebuilt_from_config(model)
    broken.get_layer("head").kernel.assign(np.full((8, 3), np.nan))
    with pytest.raises(ValueError, match="'head/kernel' with NaN or infinity"):
        als.quantize_weights(broken, IMAGES)


def test_zeros_stay_zeros():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3, use_bias=False)(inputs))
    model.layers[-1].kernel.assign(np.zeros((4, 3)))
    for method in METHODS:
        budget = 1.0 if method in SPENDING else 0.0
        quantized, report = als.quantize_weights(
            model, normal(8, 4), method=method, budget=budget, **QUICK
        )
        np.testing.assert_array_equal(quantized.layers[-1].kernel, 0)
        np.testing.assert_array_equal(report.kernels[0].output_error, 0)


def test_ops_between_layers():
    x = inputs = keras.Input((8, 4))
    x = layers.Dense(6, "relu")(x)
    x = ops.concatenate([x, ops.square(x)], axis=-1)
    model = randomized(keras.Model(inputs, layers.Dense(2)(x)))
    quantized, _ = als.quantize_weights(
        model, normal(8, 8, 4), 4, method="multipoint", budget=0.5, **QUICK
    )
    assert error_of(quantized, model, normal(8, 8, 4)) < 0.2


def test_any_size_of_images():
    x = inputs = keras.Input((None, None, 3))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same")(x))
    x = layers.SeparableConv2D(4, 3)(layers.DepthwiseConv2D(3)(x))
    model = randomized(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))
    quantized, report = als.quantize_weights(
        model, [IMAGES, normal(8, 12, 9, 3)], 4, method="multipoint", budget=0.5, **QUICK
    )
    assert report.kernels[0].positions == 16 * 64 + 8 * 12 * 9
    assert error_of(quantized, model, normal(4, 20, 20, 3)) < 0.2
