"""What was trained on one backend goes on on another: weights, scales, optimizer, record."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

import tf_adaptive_ls as als
from tests.backend_worker import allocated_by, fit, state_of
from tests.backends import ON_JAX

pytestmark = pytest.mark.filterwarnings("ignore:Loss scales do nothing")
pytest.importorskip("jax")
WORKER = pathlib.Path(__file__).with_name("backend_worker.py")
OTHER = "tensorflow" if ON_JAX else "jax"


def assert_same(actual, expected, close=False):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if close:
            np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.parametrize(
    "policy", ["mixed_float16", pytest.param("float32", marks=pytest.mark.long)]
)
def test_there_and_back(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    x = inputs = keras.Input((4,))
    x = layers.BatchNormalization(name="norm")(layers.Dense(8, "relu", name="hidden")(x))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2, name="scores")(x)))
    rule = als.QuantileRule(headroom=4)
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(0.01), 2.0**10, rule=rule)
    model.compile(optimizer, loss="mse")
    fit(model, tmp_path / "run.jsonl", 3)
    if policy == "float32":  # whose scales stay at 1
        model.get_layer("hidden").loss_scaling.log2_scale = 5
    model.save(tmp_path / "model.keras")
    saved = state_of(model)
    assert any(saved[f"table/{name}/log2_scale"] for name in ("hidden", "scores"))

    environment = {**os.environ, "KERAS_BACKEND": OTHER, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, WORKER, tmp_path], check=True, env=environment)
    with np.load(tmp_path / "loaded.npz") as loaded:
        assert_same(dict(loaded), saved)
    with np.load(tmp_path / "allocated.npz") as allocated:
        assert_same(dict(allocated), allocated_by(model), close=True)
    losses = fit(model, None, 5)
    with np.load(tmp_path / "trained.npz") as trained:
        there = dict(trained)
    # What is summed in another order differs by an ulp or two of its precision.
    tolerance = 1e-5 if policy == "float32" else 1e-2
    np.testing.assert_allclose(there.pop("losses"), losses, rtol=tolerance)
    if policy == "float32":
        assert_same(there, state_of(model), close=True)

    again = keras.models.load_model(tmp_path / "again.keras")
    assert_same(state_of(again), there)
    np.testing.assert_array_equal(als.load_run(tmp_path / "run.jsonl").steps, range(2, 21, 2))
