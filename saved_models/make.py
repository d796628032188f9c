"""Writes a reference model of this version, on the backend that is set, for later versions to load.

A small wrapped model, half trained: `VERSION/BACKEND/model.keras`, and beside it what it computes,
its scales, and the losses of the next three steps, as `expected.json`.
"""

import argparse
import json
import pathlib

import keras
import numpy as np
from keras import layers

import tf_adaptive_ls as als

HERE = pathlib.Path(__file__).parent
RNG = np.random.default_rng(2019)
X = RNG.normal(size=(32, 6, 4)).astype("float32")
Y = RNG.normal(size=(32, 2)).astype("float32")


def build():
    """Some of everything: a nested model, a recurrence, statistics, a frozen layer, two formats."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_float16")
    x = inner_inputs = keras.Input((6, 4))
    x = layers.Conv1D(8, 3, padding="same", activation="relu", name="conv")(x)
    x = layers.BatchNormalization(name="norm")(x)
    inner = keras.Model(inner_inputs, x, name="inner")
    x = inputs = keras.Input((6, 4), name="x")
    x = layers.LSTM(8, name="lstm")(inner(x))
    x = layers.Dense(8, "tanh", trainable=False, name="frozen")(x)
    x = layers.Dense(8, "relu", dtype="mixed_bfloat16", name="bfloat16")(x)
    x = layers.Dense(2, dtype="float32", name="scores")(x)
    model = als.wrap_model(keras.Model(inputs, x, name="reference"))
    rule = als.QuantileRule(headroom=4)
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(0.01), 2.0**12, rule=rule)
    model.compile(optimizer, loss="mse")
    return model


def losses(model, steps):
    """The losses of so many steps, each on all data."""
    found = []
    for _ in range(steps):
        model.reset_metrics()  # older Keras returns the mean since the last reset
        found.append(float(model.train_on_batch(X, Y)))
    return found


def state(model):
    """What a file has to bring back."""
    rows = als.scale_table(model)
    return {
        "outputs": np.array(model.predict(X, verbose=0), "float64").tolist(),
        "loss_scale": model.optimizer.loss_scale,
        "steps": model.optimizer.steps,
        "skipped_steps": model.optimizer.skipped_steps,
        "log2_scales": {row.name: row.log2_scale for row in rows},
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=HERE / als.__version__)
    directory = parser.parse_args(argv).output / keras.backend.backend()
    directory.mkdir(parents=True, exist_ok=True)
    model = build()
    losses(model, 20)
    model.save(directory / "model.keras")
    expected = state(model)
    expected["next_losses"] = losses(model, 3)
    (directory / "expected.json").write_text(json.dumps(expected, indent=1))
    print(f"Written to {directory}: {expected['log2_scales']}, losses {expected['next_losses']}")


if __name__ == "__main__":
    main()
