"""`calibrate` finds scales without training, and leaves everything else as it was."""

import keras
import numpy as np
import pytest
from keras import layers

import tf_adaptive_ls as als
from tests.backends import JIT
from tests.graphs import floats
from tests.steps import scaled_layers

X, Y = floats(32, 8), floats(32, 4)


def shrinking(depth=10, compiled=True):
    """Layers of which each divides the gradient by about 8."""
    inputs = keras.Input((8,))
    x = layers.Dropout(0.1)(layers.BatchNormalization(scale=False, center=False)(inputs))
    for i in range(depth):
        small = keras.initializers.VarianceScaling(1 / 64, seed=i)
        # The bias keeps the signal up on the way forward.
        x = layers.Dense(8, None, True, small, "ones", name=f"dense_{i}")(x)
    model = als.wrap_model(keras.Model(inputs, layers.Dense(4, name="last")(x)))
    if compiled:
        optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(0.1))
        model.compile(optimizer, loss="mse", metrics=["mae"], jit_compile=JIT)
    return model


def test_the_range_of_each_layer_and_what_one_scale_would_lose(mixed_float16):
    model = shrinking()
    result = als.calibrate(model, [(X, Y)] * 30)
    assert result.settled and result.batches < 30
    assert [layer.name for layer in result.layers] == [*(f"dense_{i}" for i in range(10)), "last"]
    for row, layer in zip(result.layers, scaled_layers(model), strict=True):
        # The optimizer has its S of before, so that each r makes up for the difference.
        total = np.log2(model.optimizer.loss_scale) + layer.log2_scale
        assert abs(row.log2_total - total) <= 1
        low, high = row.binades
        assert low + row.log2_total >= -14 and high + row.log2_total <= 15 - 3
        assert row.fits and row.underflow <= 1e-3
    assert "Settled after" in str(result) and "dense_0" in str(result)

    tops = [layer.binades[1] for layer in result.layers]
    assert result.log2_one_scale == 15 - max(tops)
    for layer in result.layers:
        low, high = layer.binades
        below = range(low + result.log2_one_scale, min(-24, high + 1 + result.log2_one_scale))
        assert layer.lost_by_one_scale == len(below)
    lost = [layer.lost_by_one_scale for layer in result.layers]
    assert lost[0] > 0 and lost[-1] == 0


def test_a_layer_that_float16_cannot_hold_is_told(mixed_float16):
    inputs = keras.Input((64,))
    # Gradients that differ by 2^34 beside what they spread, in one tensor.
    model = als.wrap_model(keras.Model(inputs, layers.Dense(4, name="wide")(inputs)))
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse", jit_compile=JIT)
    x = floats(32, 64) * np.where(np.arange(64) % 8, 2.0**-22, 2.0**12).astype("float32")
    result = als.calibrate(model, [(x, 2.0**-6 * Y)] * 30)
    (layer,) = result.layers
    assert not layer.fits and layer.underflow > 1e-3
    assert "too small" in str(result)


def test_everything_but_scales_is_as_before(mixed_float16):
    model = shrinking(2)
    model.fit(X, Y, batch_size=16, verbose=0)
    kept = [v for v in model.variables if not v.overwrite_with_gradient]
    kept += [*model.metrics_variables, *model.optimizer.variables]
    before = [v.numpy() for v in kept]
    optimizer, overflows = model.optimizer, [each.overflows for each in scaled_layers(model)]
    als.calibrate(model, [(X, Y), (np.full_like(X, np.nan), Y), (X, Y)])
    for variable, value in zip(kept, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value, err_msg=variable.path)
    assert model.optimizer is optimizer
    assert [each.overflows for each in scaled_layers(model)] == overflows


def test_training_goes_on_as_if_it_had_not_been_called():
    """In float32, where no scale makes a difference."""

    def trained(calibrated):
        keras.utils.set_random_seed(3)
        model = shrinking(3)
        if calibrated:
            als.calibrate(model, [(X, Y)] * 3)
        model.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    keras.config.set_dtype_policy("float32")
    states = [v.overwrite_with_gradient for v in shrinking(3).weights]
    with pytest.warns(UserWarning, match="Loss scales do nothing"):
        pairs = zip(trained(True), trained(False), states, strict=True)
    for a, b, is_state in pairs:
        if not is_state:
            np.testing.assert_array_equal(a, b)


def test_batches_that_only_overflow_change_nothing(mixed_float16):
    model = shrinking(2)
    before = [v.numpy() for v in model.variables]
    result = als.calibrate(model, [(np.full_like(X, np.inf), Y)] * 4)
    assert not result.settled and result.batches == 4
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_an_error_in_the_middle_changes_nothing(mixed_float16):
    def batches():
        yield X, Y
        raise KeyError("no more")

    model = shrinking(2)
    before = [v.numpy() for v in model.variables]
    with pytest.raises(KeyError):
        als.calibrate(model, batches())
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    model.fit(X, Y, batch_size=16, verbose=0)


@pytest.mark.parametrize("case", ["layer", "optimizer", "layers", "batches"])
def test_what_it_cannot_use_is_refused(case):
    inputs = keras.Input((8,))
    plain = keras.Model(inputs, layers.Dense(4)(inputs))
    plain.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse")
    keras_compiled = shrinking(1, compiled=False)
    keras_compiled.compile("sgd", loss="mse")
    model, batches = {
        "layer": (layers.Dense(2), [(X, Y)]),
        "optimizer": (keras_compiled, [(X, Y)]),
        "layers": (plain, [(X, Y)]),
        "batches": (shrinking(1), []),
    }[case]
    with pytest.raises(ValueError, match=r"`calibrate` expected .* Received"):
        als.calibrate(model, batches)
