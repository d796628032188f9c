"""What each weight is given of a change of the loss: known answers, and nothing touched."""

import math

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_adaptive_ls as als
from tests.graphs import floats
from tests.steps import randomize_scales

X, Y = floats(8, 4), floats(8, 2)


class Curve(layers.Layer):
    """Whatever its input, its output is a function of its weights."""

    def __init__(self, function, size=1, **kwargs):
        super().__init__(**kwargs)
        self.function, self.size = function, size

    def build(self, input_shape):
        self.theta = self.add_weight(shape=(self.size,), name="theta")

    def call(self, x):
        return ops.zeros_like(x[:, :1]) + self.function(self.theta)


def mean_of_outputs(y, y_pred):
    return y_pred


def change_of(function, before, after, **settings):
    """An `Allocation` of a loss that is a function of one vector of weights."""
    model = keras.Sequential([keras.Input((1,)), Curve(function, len(before), name="curve")])
    model.compile("sgd", loss=mean_of_outputs)
    data = [(np.zeros((1, 1), "float32"), np.zeros((1, 1), "float32"))]
    ends = [[np.array(w, "float32")] for w in (before, after)]
    return als.loss_change(model, *ends, data, **settings)


def dense_model(**settings):
    x = inputs = keras.Input((4,))
    x = layers.Dense(6, "tanh", name="first", **settings)(x)
    return keras.Model(inputs, layers.Dense(2, name="last")(x), name="small")


def normalized_model():
    x = inputs = keras.Input((4,))
    x = layers.Dense(6, name="first")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dropout(0.5)(ops.tanh(x))
    return keras.Model(inputs, layers.Dense(2, name="last")(x))


def trained(model, steps=3):
    """The model, compiled, and its weights before and after some steps; wrapped for float16."""
    optimizer = keras.optimizers.Adam(0.05)
    if keras.config.dtype_policy().compute_dtype == "float16":
        model, optimizer = als.wrap_model(model), als.AdaptiveLossScaleOptimizer(optimizer)
    model.compile(optimizer, loss="mse", metrics=["mae"])
    before = model.get_weights()
    model.fit(X, Y, batch_size=8, epochs=steps, verbose=0)
    return model, before, model.get_weights()


def loss_of(model, weights):
    """The loss with other weights, for inference."""
    now = model.get_weights()
    model.set_weights(weights)
    loss = float(ops.mean(ops.square(ops.cast(model(X), "float32") - Y)))
    model.set_weights(now)
    return loss


# Known answers.


def test_a_quadratic_is_exact_by_the_trapezoid_and_off_by_half_its_curvature_to_first_order():
    h = np.array([[2.0, 0.5], [0.5, 4.0]], "float32")
    before, after = np.array([1.0, -0.5]), np.array([0.25, 0.5])

    def loss(theta):
        return ops.sum(theta * ops.matmul(h, theta)) / 2

    exact = [change_of(loss, before, after, rule=rule) for rule in ("simpson", "trapezoid")]
    assert exact[0].error == exact[1].error == 0
    (by_simpson,), (by_trapezoid,) = (found.weights.values() for found in exact)
    np.testing.assert_array_equal(by_simpson, by_trapezoid)
    first = change_of(loss, before, after, rule="first order")
    move = after - before
    missing = first.layers["curve"] - (first.loss_after - first.loss_before)
    assert missing == -move @ h @ move / 2


@pytest.mark.parametrize("rate", [0.125, 0.25, 0.5, 1.0, 2.0])
def test_a_step_of_gradient_descent_hurts_if_and_only_if_it_is_too_long(rate):
    h, theta = 2.0, 1.0
    found = change_of(lambda t: h * t[0] ** 2 / 2, [theta], [theta - rate * h * theta])
    assert (found.layers["curve"] > 0) == (rate * h > 2)
    assert found.layers["curve"] == found.loss_after - found.loss_before


def test_a_quartic_is_exact_by_simpson():
    found = change_of(lambda t: t[0] ** 4 / 4, [0.0], [1.0])
    assert (found.layers["curve"], found.error, found.intervals) == (0.25, 0, 2)


def test_halved_intervals_divide_the_error_by_sixteen():
    def change(max_intervals):
        found = change_of(lambda t: t[0] ** 6, [0.0], [1.0], max_intervals=max_intervals)
        assert found.intervals == max_intervals
        return found.layers["curve"] / 6

    assert (change(2), change(4)) == (0.1875, 0.16796875)
    assert (6 * change(2) - 1) / (6 * change(4) - 1) == 16


def test_the_path_is_divided_until_the_sum_is_good_enough():
    def change(tolerance):
        return change_of(lambda t: ops.sin(5 * t[0]), [0.0], [1.0], tolerance=tolerance)

    loose, fine = change(1e-2), change(1e-4)
    assert 2 < loose.intervals < fine.intervals < 32
    assert loose.error <= 1e-2
    assert fine.error <= 1e-4


def test_tensors_units_and_layers_are_sums_of_weights():
    found = als.loss_change(*trained(dense_model()), [(X, Y)])
    assert list(found.layers) == ["first", "last"]
    for path, values in found.weights.items():
        assert found.tensors[path] == pytest.approx(values.sum())
    kernel, bias = (found.weights[p] for p in found.weights if "/last/" in f"/{p}")
    (last,) = (units for path, units in found.units.items() if path.endswith("last"))
    np.testing.assert_allclose(last, kernel.sum(axis=0) + bias)
    assert found.layers["last"] == pytest.approx(last.sum())
    assert sum(found.layers.values()) == pytest.approx(
        found.loss_after - found.loss_before, abs=1e-3
    )
    assert 0.5 < found.helping <= 1


# Conservation.


def test_two_chords_add_up_to_the_whole_change():
    model, before, middle = trained(dense_model(), steps=2)
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0)
    after = model.get_weights()
    halves = [
        als.loss_change(model, *ends, [(X, Y)], tolerance=1e-6)
        for ends in ((before, middle), (middle, after))
    ]
    total = sum(sum(half.layers.values()) for half in halves)
    assert total == pytest.approx(loss_of(model, after) - loss_of(model, before), abs=3e-6)
    assert halves[0].loss_after == halves[1].loss_before


@pytest.mark.parametrize("sizes", [(4, 4), (2, 6)])
def test_the_mean_over_a_partition_is_that_of_the_whole(sizes):
    model, before, after = trained(dense_model())
    whole = als.loss_change(model, before, after, [(X, Y)], max_intervals=2)
    parts = [(X[: sizes[0]], Y[: sizes[0]]), (X[sizes[0] :], Y[sizes[0] :])]
    divided = als.loss_change(model, before, after, parts, max_intervals=2)
    assert divided.batches == 2
    assert divided.loss_after == pytest.approx(whole.loss_after)
    for path, values in whole.weights.items():
        np.testing.assert_allclose(divided.weights[path], values, atol=1e-7)


def test_standard_errors_are_those_of_means_over_batches():
    model, before, after = trained(dense_model())
    batches = [(X[i : i + 2], Y[i : i + 2]) for i in range(0, 8, 2)]
    alone = [als.loss_change(model, before, after, [batch], max_intervals=2) for batch in batches]
    together = als.loss_change(model, before, after, batches, max_intervals=2)
    for name, error in together.standard_errors.items():
        values = [each.layers[name] for each in alone]
        assert error == pytest.approx(np.std(values, ddof=1) / 2)
        assert math.isnan(alone[0].standard_errors[name])


def test_moving_statistics_are_part_of_the_path():
    model, before, after = trained(normalized_model(), steps=20)
    found = als.loss_change(model, before, after, [(X, Y)], tolerance=1e-4)
    assert found.error < 1e-3
    assert list(found.layers) == ["first", "norm", "last"]
    assert abs(found.statistics) > 10 * found.error
    assert found.loss_after == pytest.approx(loss_of(model, after), abs=1e-6)


def test_what_does_not_move_is_given_nothing():
    model, before, after = trained(dense_model(trainable=False))
    found = als.loss_change(model, before, after, [(X, Y)])
    assert list(found.layers) == ["last"]
    assert found.statistics == 0
    still = als.loss_change(model, after, after, [(X, Y)])
    assert set(still.layers.values()) == {0.0}
    assert still.loss_before == still.loss_after
    assert math.isnan(still.helping)


def test_a_skipped_step_buys_nothing(mixed_float16):
    model, _, before = trained(dense_model())
    model.train_on_batch(np.full_like(X, np.inf), Y)
    assert model.optimizer.last_step_skipped
    found = als.loss_change(model, before, model.get_weights(), [(X, Y)])
    assert set(found.layers.values()) == {0.0}


def test_regularizers_are_part_of_the_loss():
    regularizer = keras.regularizers.L2(0.1)
    model, before, after = trained(dense_model(kernel_regularizer=regularizer))
    found = als.loss_change(model, before, after, [(X, Y)])
    assert found.loss_before > loss_of(model, before) + 0.01
    assert found.error < 1e-3


# Precision and scales.


def test_scales_and_precision_make_no_difference(mixed_float16, rng):
    """In float32 it is the allocation of the plain float32 model, bit for bit."""
    model, before, after = trained(normalized_model())
    found = als.loss_change(model, before, after, [(X, Y)])
    randomize_scales(model, rng)
    again = als.loss_change(model, before, after, [(X, Y)])
    keras.config.set_dtype_policy("float32")
    plain = normalized_model()
    plain.compile("adam", loss="mse")
    scales = {id(v) for v in model.weights if "loss_scale" in v.name}
    ends = [
        [w for v, w in zip(model.weights, end, strict=True) if id(v) not in scales]
        for end in (before, after)
    ]
    of_plain = als.loss_change(plain, *ends, [(X, Y)])
    for other in (again, of_plain):
        assert other.layers == found.layers
        assert other.statistics == found.statistics
        assert (other.loss_before, other.loss_after) == (found.loss_before, found.loss_after)


def test_what_underflow_took_is_missing_as_trained(mixed_float16):
    x = inputs = keras.Input((4,))
    x = layers.Dense(6, "tanh", name="first")(x)
    x = layers.Dense(2, name="last")(x)
    model = als.wrap_model(keras.Model(inputs, layers.Rescaling(2.0**-12, dtype="float32")(x)))
    model.compile(als.AdaptiveLossScaleOptimizer("adam", initial_scale=1.0), loss="mse")
    before = model.get_weights()
    moved = [w + 0.5 if w.ndim == 2 else w for w in before]
    data = [(X, np.zeros_like(Y))]
    settings = {"tolerance": 1e-11, "dtype": "as trained"}
    truth = als.loss_change(model, before, moved, data, tolerance=1e-11)
    lost = als.loss_change(model, before, moved, data, **settings)
    assert truth.error < 1e-3 * abs(truth.layers["last"])
    assert lost.error > 0.9 * abs(truth.loss_after - truth.loss_before)
    model.compile(als.AdaptiveLossScaleOptimizer("adam", initial_scale=2.0**20), loss="mse")
    kept = als.loss_change(model, before, moved, data, **settings)
    for name, value in truth.layers.items():
        assert kept.layers[name] == pytest.approx(value, rel=0.02)


# Nothing is touched.


def test_nothing_of_the_model_changes(mixed_float16):
    model, before, after = trained(normalized_model())

    def state():
        variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
        return [np.array(v.value) for v in variables]

    policies = [layer.dtype_policy for layer in model.layers]
    state_before, report = state(), model.get_metrics_result()
    for dtype in ("float32", "as trained"):
        als.loss_change(model, before, after, [(X, Y)], dtype=dtype)
    for one, other in zip(state_before, state(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [layer.dtype_policy for layer in model.layers] == policies
    assert str(model.get_metrics_result()) == str(report)


def test_any_optimizer_and_form_of_data_will_do():
    model, before, after = trained(dense_model())
    whole = als.loss_change(model, before, after, [(X, Y, np.ones(8, "float32"))])
    assert whole.layers == als.loss_change(model, before, after, ((X, Y) for _ in "a")).layers
    assert "first" in str(whole)
    assert "helped" in str(whole)


# Bad input.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0}, "tolerance"),
        ({"tolerance": True}, "tolerance"),
        ({"max_intervals": 1}, "power of two"),
        ({"max_intervals": 6}, "power of two"),
        ({"dtype": "float16"}, "dtype"),
        ({"rule": "euler"}, "simpson"),
        ({"data": []}, "at least one batch"),
        ({"before": [X]}, "list of the 4 weights.*Received: 1"),
        ({"after": 3}, "type int"),
    ],
)
def test_bad_arguments(settings, message):
    model, before, after = trained(dense_model())
    arguments = {"before": before, "after": after, "data": [(X, Y)], **settings}
    with pytest.raises(ValueError, match=f"(?s)Expected.*{message}"):
        als.loss_change(model, **arguments)


def test_weights_of_other_shapes_are_named():
    model, before, after = trained(dense_model())
    after[0] = after[0].T
    with pytest.raises(ValueError, match=r"\(6, 4\) for '.*kernel', which has \(4, 6\)"):
        als.loss_change(model, before, after, [(X, Y)])


def test_models_that_cannot_be_evaluated():
    model = dense_model()
    with pytest.raises(ValueError, match="not compiled"):
        als.loss_change(model, [], [], [(X, Y)])
    unbuilt = keras.Sequential([layers.Dense(2)])
    unbuilt.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match="not built"):
        als.loss_change(unbuilt, [], [], [(X, Y)])
    with pytest.raises(ValueError, match="not a model"):
        als.loss_change(layers.Dense(2), [], [], [(X, Y)])


def test_a_loss_that_is_not_finite_is_placed():
    with pytest.raises(ValueError, match=r"nan 0\.5 of the way, for batch 0"):
        change_of(lambda t: ops.sqrt((t[0] - 0.5) ** 2 - 0.01), [0.0], [1.0])
    with pytest.raises(ValueError, match=r"gradients that are not, 0 of the way"):
        change_of(lambda t: ops.sqrt(t[0]), [0.0], [1.0])
