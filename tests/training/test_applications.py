"""The models of `keras.applications`, one of each family."""

import keras
import numpy as np
import pytest
from keras import applications

import tf_adaptive_ls as als
from tests.backends import JIT
from tests.graphs import floats
from tests.steps import assert_equal, assert_gradients_within, layer_stepper, randomize_scales

# The smallest of each family, at the smallest size that it takes.
FAMILIES = {
    "ConvNeXtTiny": 32,
    "DenseNet121": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "InceptionResNetV2": 75,
    "InceptionV3": 75,
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "NASNetMobile": 32,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "VGG16": 32,
    "Xception": 71,
}


def built(name):
    size = FAMILIES[name]
    model = getattr(applications, name)(weights=None, input_shape=(size, size, 3), classes=10)
    return model, floats(2, size, size, 3)


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_a_family(name, rng):
    model, x = built(name)
    # Statistics of two examples, of one pixel each in the end, would turn how a sum at a
    # fork is rounded into whole gradients.
    plain = layer_stepper(model, model, {"args": (x,)}, training=False)()
    wrapped = als.wrap_model(model)
    inference = layer_stepper(wrapped, model, {"args": (x,)}, training=False)
    training = layer_stepper(wrapped, model, {"args": (x,)})
    neutral, neutral_training = inference(), training()
    assert_gradients_within(neutral, plain, ulps=4096)
    for y, expected in zip(neutral.outputs, plain.outputs, strict=True):
        np.testing.assert_array_equal(y, expected)
    randomize_scales(wrapped, rng)
    assert_equal(inference(), neutral)
    assert_equal(training(), neutral_training)


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_and_is_saved(name, tmp_path, mixed_float16):
    model, x = built(name)
    y = np.arange(2)
    wrapped = als.wrap_model(model)
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(1e-3))
    wrapped.compile(optimizer, loss="sparse_categorical_crossentropy", jit_compile=JIT)
    for _ in range(10):  # such statistics overflow at first
        wrapped.train_on_batch(x, y)
        if optimizer.steps - optimizer.skipped_steps == 3:
            break
    table = als.scale_table(wrapped)
    assert len(str(table).splitlines()) >= len(table) + 2
    assert any(row.log2_scale for row in table)

    wrapped.save(tmp_path / "wrapped.keras")
    loaded = keras.saving.load_model(tmp_path / "wrapped.keras")
    assert [row.log2_scale for row in als.scale_table(loaded)] == [row.log2_scale for row in table]
    expected = wrapped(x, training=False)
    np.testing.assert_array_equal(loaded(x, training=False), expected)

    stripped = als.strip_model(wrapped)
    stripped.save(tmp_path / "stripped.keras")
    stripped.export(tmp_path / "exported", verbose=False)
    plain = keras.saving.load_model(tmp_path / "stripped.keras")
    np.testing.assert_array_equal(plain(x, training=False), expected)
