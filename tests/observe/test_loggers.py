"""Figures of the monitor reach the loggers of others, which see what comes after it."""

import csv
import glob
import pathlib

import keras
import numpy as np
import pytest

import tf_adaptive_ls as als
from tests.backends import JIT

X, Y = np.ones((32, 4), "float32"), np.ones((32, 2), "float32")
FIGURES = {"loss_scale", "skipped_steps", "underflow"}


@pytest.fixture
def fit(mixed_float16):
    model = als.wrap_model(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
    model.compile(als.AdaptiveLossScaleOptimizer("adam"), loss="mse", jit_compile=JIT)

    def run(*callbacks):
        model.fit(X, Y, verbose=0, callbacks=[als.LossScaleMonitor(every=1), *callbacks])
        return model.optimizer.loss_scale

    return run


def test_csv(fit, tmp_path):
    scale = fit(keras.callbacks.CSVLogger(tmp_path / "log.csv"))
    (row,) = csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    assert row.keys() >= FIGURES
    assert float(row["loss_scale"]) == scale


def test_tensorboard(fit, tmp_path):
    fit(keras.callbacks.TensorBoard(tmp_path))
    (path,) = glob.glob(str(tmp_path / "train" / "events*.v2"))
    written = pathlib.Path(path).read_bytes()
    assert all(f"epoch_{name}".encode() in written for name in FIGURES)


@pytest.mark.enable_socket  # of its own process
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases(fit, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    logger = pytest.importorskip("wandb.integration.keras").WandbMetricsLogger
    monkeypatch.setenv("WANDB_MODE", "offline")
    with wandb.init(project="test", dir=tmp_path) as run:
        scale = fit(logger())
        found = dict(run.summary)
    assert found.keys() >= {f"epoch/{name}" for name in FIGURES}
    assert found["epoch/loss_scale"] == scale


@pytest.mark.filterwarnings("ignore")
def test_mlflow(fit, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    callback = pytest.importorskip("mlflow.keras").MlflowCallback
    monkeypatch.chdir(tmp_path)  # for artifacts
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    with mlflow.start_run() as run:
        scale = fit(callback())
    found = mlflow.get_run(run.info.run_id).data.metrics
    assert found.keys() >= FIGURES
    assert found["loss_scale"] == scale
