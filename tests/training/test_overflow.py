"""Invariant 5: an overflow skips the step and lowers exactly the scale at fault."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import JIT, value_and_gradients
from tests.steps import scaled_layers
from tf_adaptive_ls.numerics.tiny_unit import UNIT

EAGER, GRAPH, XLA = {"run_eagerly": True}, {"jit_compile": JIT}, {"jit_compile": True}
X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = X @ np.random.default_rng(1).normal(size=(4, 2)).astype("float32")


class Faulty(layers.Dense):
    """A Dense layer whose backward pass can be made to break."""

    def __init__(self, units, activation="relu", **kwargs):
        super().__init__(units, activation, **kwargs)

    def build(self, input_shape):
        super().build(input_shape)
        self.input_fault = self.add_weight(name="input_fault", initializer="zeros", trainable=False)
        self.weight_fault = self.add_weight(
            name="weight_fault", initializer="zeros", trainable=False
        )

    def call(self, x):
        x = _broken(x, ops.cast(self.input_fault, x.dtype))
        x = ops.matmul(
            x, _broken(ops.convert_to_tensor(self.kernel), ops.cast(self.weight_fault, x.dtype))
        )
        return self.activation(ops.add(x, self.bias))


def _broken(x, fault):
    @ops.custom_gradient
    def identity(x, fault):
        return ops.convert_to_tensor(x), lambda gradient: (gradient + fault, ops.zeros_like(fault))

    return identity(x, fault)


@pytest.fixture
def mode():
    return GRAPH


@pytest.fixture
def trained(mode, mixed_float16):
    """A compiled model that has taken a few steps: one for each mode, always as it was then."""
    model, state = _trained(tuple(mode.items()))
    for variable, value in state:
        variable.assign(value)
    return model


@functools.cache
def _trained(mode):
    x = inputs = keras.Input((4,))
    for i in range(3):
        x = Faulty(8, name=f"faulty_{i}")(x)
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2)(x)))
    fault = keras.Variable(1.0, trainable=False, name="loss_fault")

    def loss(y, y_pred):
        return ops.mean((y - y_pred) ** 2) * fault

    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(0.01))
    model.compile(optimizer, loss=loss, **dict(mode))
    model.loss_fault = fault
    model.fit(X, Y, batch_size=32, epochs=5, verbose=0)
    assert optimizer.skipped_steps == 0
    variables = [*model.variables, *optimizer.variables, fault]
    return model, [(variable, variable.numpy()) for variable in variables]


def state_of(model):
    """Everything a skipped step must leave alone, and the scales."""
    optimizer = model.optimizer
    return {
        "weights": [v.numpy() for v in model.variables if not v.overwrite_with_gradient],
        "slots": [v.numpy() for v in optimizer.inner_optimizer.variables],
        "r": {layer.name: layer.log2_scale for layer in scaled_layers(model)},
        "S": optimizer.loss_scale,
    }


def one_step(model, x=X):
    model.fit(x, Y, batch_size=32, verbose=0)


def assert_skipped(model, before):
    after = state_of(model)
    assert model.optimizer.last_step_skipped
    for kind in ("weights", "slots"):
        for a, b in zip(after[kind], before[kind], strict=True):
            np.testing.assert_array_equal(a, b)
    return after


@pytest.mark.parametrize(
    "mode",
    [EAGER, GRAPH, pytest.param(XLA, marks=pytest.mark.long)],
    ids=["eager", "graph", "xla"],
)
@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("place", ["data", "loss"])
def test_a_fault_before_any_layer_lowers_the_loss_scale(trained, place, value):
    before = state_of(trained)
    x = X.copy()
    if place == "data":
        x[3, 1] = value
    else:
        trained.loss_fault.assign(value)
        before = state_of(trained)
    one_step(trained, x)
    after = assert_skipped(trained, before)
    assert after["S"] == before["S"] * 2.0**-10
    assert after["r"] == before["r"]
    assert trained.optimizer.skipped_steps == 1


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("kind", ["input_fault", "weight_fault"])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize(
    "mode", [pytest.param(EAGER, marks=pytest.mark.long), GRAPH], ids=["eager", "graph"]
)
def test_a_fault_inside_a_layer_lowers_its_scale(trained, at, kind, value):
    getattr(trained.get_layer(f"faulty_{at}"), kind).assign(value)
    before = state_of(trained)
    one_step(trained)
    after = assert_skipped(trained, before)
    assert after["S"] == before["S"]
    lowered = {name for name in before["r"] if after["r"][name] < before["r"][name]}
    assert lowered == {f"faulty_{at}"}
    assert after["r"][f"faulty_{at}"] == before["r"][f"faulty_{at}"] - 10
    others = before["r"].keys() - lowered
    assert all(after["r"][name] == before["r"][name] for name in others)


def test_a_fault_inside_a_float32_layer_is_its_own(mixed_float16):
    """Its weight gradients are not limited by float16, and yet looked at."""
    inputs = keras.Input((4,))
    x = layers.Dense(4)(Faulty(8, dtype="float32", name="faulty")(layers.Dense(8)(inputs)))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2)(x)))
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse", **GRAPH)
    model.fit(X, Y, batch_size=32, epochs=5, verbose=0)
    model.get_layer("faulty").weight_fault.assign(np.inf)
    before = state_of(model)
    one_step(model)
    after = assert_skipped(model, before)
    assert after["S"] == before["S"]
    changed = {name for name in before["r"] if after["r"][name] != before["r"][name]}
    assert changed == {"faulty"}


@pytest.fixture
def normalized(mode, mixed_float16):
    """A trained model whose normalizations pass gradients on as they come."""
    x = inputs = keras.Input((4,))
    for i in range(3):
        x = Faulty(8, "linear", name=f"f_{i}")(x)
        x = layers.LayerNormalization(epsilon=1e-12, name=f"norm_{i}")(x)
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2, name="last")(x)))
    model.compile(als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(0.01)), loss="mse", **mode)
    model.fit(X, Y, batch_size=32, epochs=5, verbose=0)
    return model


@pytest.mark.parametrize("mode", [GRAPH, XLA], ids=["graph", "xla"])
def test_a_layer_that_passes_a_fault_on_is_not_to_blame(normalized):
    for name in ("f_1", "f_2"):
        fault = normalized.get_layer(name).input_fault
        fault.assign(np.inf)
        before = state_of(normalized)
        one_step(normalized)
        after = assert_skipped(normalized, before)
        blamed = {each.name for each in scaled_layers(normalized) if each.overflows}
        assert blamed == {name} and after["S"] == before["S"]
        # Those before it that are held to it go along.
        place = list(before["r"]).index(name)
        lowered = [r for r in before["r"] if after["r"][r] < before["r"][r]]
        assert set(lowered) <= {name, list(before["r"])[place - 1]} and name in lowered
        fault.assign(0)
        normalized.fit(X, Y, batch_size=32, epochs=5, verbose=0)
        normalized.optimizer._keeper._of_layers["overflows"].assign(np.zeros(7))


def test_a_normalization_that_overflows_is_to_blame(normalized):
    layer = normalized.get_layer("norm_1")
    dense = normalized.get_layer("f_1")
    for variable in (dense.kernel, dense.bias):  # its gradient is divided by what comes in
        variable.assign(1e-5 * variable)
    before = state_of(normalized)
    one_step(normalized)
    after = assert_skipped(normalized, before)
    assert [each.name for each in scaled_layers(normalized) if each.overflows] == ["norm_1"]
    assert after["r"].pop("norm_1") == before["r"].pop("norm_1") - 10
    assert after["r"] == before["r"] and after["S"] == before["S"]
    # 1e5 is more than one step lowers a scale by, and the layer before it gets that too.
    normalized.fit(X, Y, batch_size=32, epochs=3, verbose=0)
    assert normalized.optimizer.skipped_in_a_row == 0
    assert {each.name for each in scaled_layers(normalized) if each.overflows} <= {"norm_1", "f_1"}
    assert layer.loss_scaling.spectrum.underflow_share < 1e-2


def test_a_normalization_works_at_no_larger_scale_than_what_it_passes_from(normalized):
    for _ in range(5):
        one_step(normalized)
        r = state_of(normalized)["r"]
        assert all(r[f"norm_{i}"] <= r[name] for i, name in enumerate(["f_1", "f_2", "last"]))
    assert any(r.values())


@pytest.mark.parametrize("mode", [XLA], ids=["xla"])
def test_faults_inside_a_layer_under_xla(trained):
    before = state_of(trained)
    layer = trained.get_layer("faulty_1")
    for fault in (layer.input_fault, layer.weight_fault):
        fault.assign(np.inf)
        before = state_of(trained)
        one_step(trained)
        after = assert_skipped(trained, before)
        assert after["S"] == before["S"]
        assert after["r"].pop("faulty_1") < before["r"].pop("faulty_1")
        assert after["r"] == before["r"]
        fault.assign(0)
        one_step(trained)
        assert not trained.optimizer.last_step_skipped


def test_a_scale_that_is_too_large_is_lowered_alone(trained):
    trained.get_layer("faulty_1").loss_scaling.log2_scale = 40
    before = state_of(trained)
    one_step(trained)
    after = assert_skipped(trained, before)
    changed = {name for name in before["r"] if after["r"][name] != before["r"][name]}
    assert changed == {"faulty_1"}


def test_before_anything_was_measured_the_loss_scale_gives_way_alone(mixed_float16):
    """A deep model would otherwise skip one step, or more, for every layer."""
    x = inputs = keras.Input((16,))
    for _ in range(30):
        x = layers.Dense(16)(x)
    model = als.wrap_model(keras.Model(inputs, layers.Dense(1, dtype="float32")(x)))
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(1e-6), 2.0**30)
    model.compile(optimizer, loss="mse", **GRAPH)
    x, y = np.ones((8, 16), "float32"), np.ones((8, 1), "float32")
    seen = []
    for _ in range(20):
        seen.append((optimizer.loss_scale, {e.log2_scale for e in scaled_layers(model)}))
        model.train_on_batch(x, y)
    assert seen[1] == (2.0**20, {0})
    assert optimizer.skipped_steps == 2


def test_growing_gradients_are_lowered_before_they_overflow(trained):
    trained.optimizer.sample_every = 10**6
    for step in range(25):
        trained.loss_fault.assign(4.0**step)
        one_step(trained)
    assert trained.optimizer.skipped_steps == 0


@pytest.mark.parametrize("size", [2.0**8, 2.0**16])
def test_after_an_outlier_all_is_as_before_within_five_steps(trained, size):
    def scales():
        log2_scale = np.log2(trained.optimizer.loss_scale)
        return np.array([log2_scale + each.log2_scale for each in scaled_layers(trained)])

    trained.fit(X, Y, batch_size=32, epochs=30, verbose=0)
    before = scales()
    trained.loss_fault.assign(size)
    one_step(trained)
    trained.loss_fault.assign(1.0)
    trained.fit(X, Y, batch_size=32, epochs=5, verbose=0)
    assert trained.optimizer.skipped_steps <= 1
    for each in scaled_layers(trained):
        assert each.spectrum.subnormal_share < 1e-2
    if trained.optimizer.skipped_steps:
        assert np.max(np.abs(scales() - before)) <= 2


def test_the_loss_scale_returns_when_nothing_needs_it_low(mixed_float16):
    inputs = keras.Input((4,))
    outputs = layers.Dense(2, dtype="float32")(layers.Dense(8)(inputs))
    model = als.wrap_model(keras.Model(inputs, outputs))
    model.compile(als.AdaptiveLossScaleOptimizer("sgd", 2.0**8), loss="mse", **GRAPH)
    model.fit(X, Y, batch_size=32, verbose=0)
    for _ in range(10):
        one_step(model, np.full_like(X, np.nan))
    assert model.optimizer.loss_scale == 2.0**-60
    one_step(model)
    assert model.optimizer.loss_scale == 2.0**8
    one_step(model)
    assert model.optimizer.skipped_steps == 10


@pytest.mark.parametrize("fault", ["loss", "layer"])
def test_training_recovers_when_the_fault_stops(trained, fault):
    layer = trained.get_layer("faulty_1")
    variable, normal = (trained.loss_fault, 1.0) if fault == "loss" else (layer.weight_fault, 0.0)
    variable.assign(np.inf)
    trained.fit(X, Y, batch_size=32, epochs=25, verbose=0)
    assert trained.optimizer.skipped_steps == 25
    variable.assign(normal)
    history = trained.fit(X, Y, batch_size=32, epochs=25, verbose=0).history["loss"]
    assert trained.optimizer.skipped_steps == 25
    assert history[-1] < history[0]
    for each in scaled_layers(trained):
        assert each.spectrum.underflow_share < 1e-2


@pytest.mark.parametrize("fault", ["loss", "layer"])
def test_scales_stay_within_bounds_whatever_happens(trained, fault):
    layer = trained.get_layer("faulty_1")
    (trained.loss_fault if fault == "loss" else layer.weight_fault).assign(np.nan)
    trained.fit(X, Y, batch_size=32, epochs=150, verbose=0)
    for each in scaled_layers(trained):
        assert abs(each.log2_scale) <= 60
        np.testing.assert_array_equal(
            each.loss_scale.numpy(), np.float32([each.log2_scale * UNIT, UNIT])
        )
    assert all(np.isfinite(v.numpy()).all() for v in trained.optimizer.variables)
    assert 2.0**-60 <= trained.optimizer.loss_scale <= 2.0**60
    assert np.frexp(trained.optimizer.loss_scale)[0] == 0.5


def test_a_vanished_chain_recovers(mixed_float16):
    """17 layers of which each divides the gradient by 4, down to 1e-10."""

    def build(policy):
        x = inputs = keras.Input((32,))
        for i in range(17):
            # The bias keeps the signal up on the way forward.
            small = keras.initializers.VarianceScaling(1 / 16, seed=i)
            bias = keras.initializers.Constant(0.5)
            x = layers.Dense(32, "relu", True, small, bias, dtype=policy)(x)
        return keras.Model(inputs, x)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 32)).astype("float32")
    y = rng.normal(size=(64, 32)).astype("float32")
    reference = build("float32")
    model = als.wrap_model(build("mixed_float16"))
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(1e-6))
    model.compile(optimizer, loss="mse", jit_compile=JIT)
    model.fit(x, y, batch_size=64, epochs=20, verbose=0)

    kernels = [v for v in model.trainable_variables if v.name == "kernel"]
    reference.set_weights([v.numpy() for v in model.weights])

    def gradients(model, variables, scale):
        def loss():
            return ops.mean((ops.cast(model(x, training=True), "float32") - y) ** 2) * scale

        _, found = value_and_gradients(loss, variables)
        return [np.asarray(g, "float64") / scale for g in found]

    ours = gradients(model, kernels, optimizer.loss_scale)
    true = gradients(reference, [v for v in reference.weights if v.name == "kernel"], 1.0)
    assert np.max(np.abs(true[0])) < 1e-9
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, true, strict=True)]
    assert max(errors) < 5e-3


class Detour(layers.Layer):
    """Its gradient is small when it leaves, but larger than it came in between."""

    def call(self, x):
        @ops.custom_gradient
        def detour(x):
            def backward(gradient):
                large = ops.cast(gradient, "float16") * 2.0**10
                return ops.cast(large, gradient.dtype) * ops.cast(2.0**-20, gradient.dtype)

            return ops.convert_to_tensor(x), backward

        return detour(x)


class DenseAndDetour(layers.Dense):
    def build(self, input_shape):
        super().build(input_shape)
        self.detour = Detour(dtype="float16")

    def call(self, x):
        return self.detour(super().call(x))


@pytest.mark.parametrize("where", ["before S", "in a layer"])
def test_what_overflows_out_of_sight_is_remembered(where, mixed_float16):
    """Else the scale would be raised after every skipped step, to overflow on the next."""
    x = inputs = keras.Input((4,))
    x = layers.Dense(8, "tanh", name="first")(x)
    if where == "before S":
        x = Detour()(layers.Dense(2, name="last")(x))
    else:
        x = DenseAndDetour(2, name="last")(x)
    model = als.wrap_model(keras.Model(inputs, layers.Activation("linear", dtype="float32")(x)))
    model.compile(
        als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(1e-4)), loss="mse", jit_compile=JIT
    )
    model.fit(X, Y, batch_size=32, epochs=60, verbose=0)
    assert model.optimizer.steps == 60
    assert model.optimizer.skipped_steps <= 4


class Fragile(layers.Dense):
    """A Dense layer whose weight gradient overflows far earlier than that of others."""

    limit = 2.0**9

    def call(self, x):
        kernel = _overflowing(ops.convert_to_tensor(self.kernel), self.limit)
        return self.activation(ops.add(ops.matmul(x, ops.cast(kernel, x.dtype)), self.bias))


def _overflowing(x, limit):
    @ops.custom_gradient
    def identity(x):
        def backward(gradient):
            return ops.where(ops.max(ops.abs(gradient)) > limit, np.inf, gradient)

        return ops.convert_to_tensor(x), backward

    return identity(x)


def test_s_remembers_what_overflows_in_layers_without_a_scale(mixed_float16):
    """As in fine-tuning, where Keras's scale settles, too; a trial every few steps would not."""
    inputs = keras.Input((4,))
    x = Fragile(8, "relu", name="without")(inputs)
    outputs = layers.Dense(2, dtype="float32")(layers.Dense(8, "relu")(x))
    model = keras.Model(inputs, outputs)
    model = als.wrap_model(model, layer_filter=lambda layer: layer.name != "without")
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(1e-3))
    model.compile(optimizer, loss="mse", **GRAPH)
    model.fit(X, Y, batch_size=4, epochs=40, shuffle=False, verbose=0)
    assert optimizer.steps == 320
    assert 1 <= optimizer.skipped_steps <= 3


@pytest.mark.parametrize("first", ["neutral", "own"])
def test_an_overflow_in_neutral_scales_is_not_blamed_on_a_layer(first, mixed_float16):
    """Its scale does not act there."""
    inputs = keras.Input((4,))
    outputs = layers.Dense(2, dtype="float32")(layers.Dense(8, "relu")(inputs))
    model = als.wrap_model(keras.Model(inputs, outputs))
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(1e-9))
    variables = model.trainable_variables
    optimizer.build(variables)

    def own():
        return ops.mean(ops.square(model(X, training=True) - Y))

    def neutral():
        with als.neutral_scales():
            return 100 * ops.sum(ops.square(model(X, training=True)))

    parts = (neutral, own) if first == "neutral" else (own, neutral)
    for _ in range(30):
        _, gradients = value_and_gradients(
            lambda: optimizer.scale_loss(sum(part() for part in parts)), variables
        )
        optimizer.apply(gradients, variables)
    assert 1 <= optimizer.skipped_steps <= 5
    assert [layer.overflows for layer in scaled_layers(model)] == [0, 0]
    assert optimizer.loss_scale < 2.0**15


def test_what_overflows_outside_of_a_layer_is_not_stuck_on_it(mixed_float16):
    """A penalty on weights, of which no report knows, and whose overflow looks like the layer's."""
    inputs = keras.Input((4,))
    dense = layers.Dense(8, "relu")
    outputs = layers.Dense(2, dtype="float32")(dense(inputs))
    model = als.wrap_model(keras.Model(inputs, outputs))
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(1e-9))
    variables = model.trainable_variables
    optimizer.build(variables)

    def loss():
        penalty = ops.sum(ops.square(ops.cast(dense.kernel, "float16") * 100))
        loss = ops.mean(ops.square(model(X, training=True) - Y))
        return optimizer.scale_loss(loss + ops.cast(penalty, "float32"))

    for _ in range(30):
        _, gradients = value_and_gradients(loss, variables)
        optimizer.apply(gradients, variables)
    # Its gradient fits from a scale of 4 on: Keras halves its own thirteen times.
    assert optimizer.skipped_steps <= 13
    assert not optimizer.last_step_skipped
