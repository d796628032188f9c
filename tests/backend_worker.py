"""Loads a model, tells its state, trains it on, and saves it: on whatever backend is set.

`test_across_backends.py` starts it.
"""

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import tf_adaptive_ls as als

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 2)).astype("float32")


def fit(model, record, epochs):
    """Trains up to and with an epoch, going on with a record; returns the losses."""
    monitor = als.LossScaleMonitor(every=2, path=record)
    begun = int(model.optimizer.iterations) // 4
    history = model.fit(
        X,
        Y,
        batch_size=8,
        initial_epoch=begun,
        epochs=epochs,
        shuffle=False,
        callbacks=[monitor],
        verbose=0,
    )
    return history.history["loss"]


def state_of(model):
    """All variables of a model and its optimizer, and all of the table, by name."""
    variables = {f"model/{v.path}": v.numpy() for v in model.weights}
    for i, v in enumerate(model.optimizer.variables):
        variables[f"optimizer/{i}/{v.name}"] = v.numpy()
    for row in als.scale_table(model):
        for name, value in vars(row).items():
            if isinstance(value, (int, float, tuple)):
                variables[f"table/{row.name}/{name}"] = np.array(value, "float64")
    return variables


def allocated_by(model):
    """What a move towards zero is allocated to, by tensor; the model stays as it is."""
    before = model.get_weights()
    after = [w * np.float32(0.75) if w.dtype == "float32" else w for w in before]
    return als.loss_change(model, before, after, [(X, Y)], max_intervals=2).weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    model = keras.models.load_model(folder / "model.keras")
    np.savez(folder / "loaded.npz", **state_of(model))
    np.savez(folder / "allocated.npz", **allocated_by(model))
    losses = fit(model, folder / "run.jsonl", 5)
    np.savez(folder / "trained.npz", losses=losses, **state_of(model))
    model.save(folder / "again.keras")
