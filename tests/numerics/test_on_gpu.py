"""What is computed otherwise on a GPU: the same numbers, bit for bit, on this machine."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import JIT
from tf_adaptive_ls.backend import devices
from tf_adaptive_ls.numerics import spectrum


@pytest.fixture
def as_on_gpu(monkeypatch):
    monkeypatch.setattr(devices, "on_gpu", lambda: True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_peaks_of_several_tensors(as_on_gpu, dtype, rng):
    shapes = [(3, 5, 7), (2048, 3), (1031,), (1,), (0, 4), ()]
    tensors = [ops.cast(rng.normal(size=shape).astype("float32"), dtype) for shape in shapes]
    expected = [np.max(np.abs(np.array(ops.cast(x, "float32"))), initial=0.0) for x in tensors]
    np.testing.assert_array_equal(spectrum.peaks(tensors), np.array(expected, "float32"))
    for bad in (np.nan, -np.inf):
        broken = np.array(ops.cast(tensors[1], "float32"))
        broken[1700, 2] = bad
        found = np.array(spectrum.peaks([tensors[0], ops.cast(broken, dtype), tensors[2]]))
        assert np.isinf(found[1]) and np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("value", [True, False])
def test_zeros_unless(as_on_gpu, value):
    found = devices.zeros_unless(ops.convert_to_tensor(value), lambda: ops.ones((2, 3)), (2, 3))
    np.testing.assert_array_equal(found, np.full((2, 3), float(value), "float32"))


def state_after_training(float8):
    """All numbers of a model and its optimizer; one batch is skipped, others are sampled."""
    keras.utils.set_random_seed(3)
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation="relu")(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.Dense(12, activation="relu")(layers.Flatten()(x))
    plain = keras.Model(inputs, layers.Dense(4, dtype="float32")(x))
    model = als.wrap_model(plain, float8=als.Float8() if float8 else None)
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(1e-2), sample_every=2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=JIT)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(48, 8, 8, 3)).astype("float32"), rng.integers(4, size=48)
    x[17, 2, 3, 1] = np.inf
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert optimizer.skipped_steps == 2 and optimizer.steps == 12
    return [np.array(v) for v in (*model.variables, *optimizer.variables)]


@pytest.mark.parametrize("float8", [False, True])
def test_training_is_the_same(float8, monkeypatch):
    expected = state_after_training(float8)
    monkeypatch.setattr(devices, "on_gpu", lambda: True)
    for ours, reference in zip(state_after_training(float8), expected, strict=True):
        np.testing.assert_array_equal(ours, reference)
