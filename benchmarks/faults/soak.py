"""Twenty thousand steps: does anything grow, retrace or drift?

Memory is that of the process after each thousand steps, from the eleventh thousand on: the slope of
a line through it. Each way runs in a process of its own, as does Keras's own optimizer on the
plain model, which is told for comparison.
"""

import concurrent.futures
import gc
import multiprocessing
import pathlib
import tempfile

import keras
import numpy as np
import psutil
import tensorflow as tf
from keras import layers

import tf_adaptive_ls as als
from benchmarks.faults import Outcome

THOUSANDS, WARM_UP = 20, 10
MOST_KB = 1.0  # per thousand steps
BYTES_PER_LAYER = 200  # of each record; `LossScaleMonitor` says about 150
MOST_LOG2_SCALE = 50  # of 60
WAYS = {"XLA": True, "graph": False}


class Watch(keras.callbacks.Callback):
    """Memory of the process at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.kilobytes = []

    def on_epoch_end(self, epoch, logs=None):
        gc.collect()
        self.kilobytes.append(psutil.Process().memory_info().rss / 1e3)


def soak(adaptive, xla, thousands):
    """Trains a small network on noise; returns what there is to be told."""
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((16,))
    for _ in range(3):
        x = layers.BatchNormalization()(layers.Dense(32, activation="relu")(x))
    model = keras.Model(inputs, layers.Dense(4, dtype="float32")(x))
    if adaptive:
        model, optimizer = als.wrap_model(model), als.AdaptiveLossScaleOptimizer("adam")
    else:
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
    traces = 0

    def loss(y, outputs):
        nonlocal traces
        traces += 1
        return keras.losses.mean_squared_error(y, outputs)

    model.compile(optimizer, loss=loss, jit_compile=xla)
    noise = np.random.default_rng(0).normal(size=(32_000, 20)).astype("float32")
    batches = tf.data.Dataset.from_tensor_slices((noise[:, :16], noise[:, 16:]))
    batches = batches.repeat().batch(32, drop_remainder=True)
    watch = Watch()
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "run.jsonl"
        monitor = [als.LossScaleMonitor(path)] if adaptive else []
        model.fit(
            batches,
            steps_per_epoch=1000,
            epochs=thousands,
            shuffle=False,
            verbose=0,
            callbacks=[*monitor, watch],
        )
        result = {"kilobytes": watch.kilobytes, "traces": traces}
        if adaptive:
            run = als.load_run(path)
            log2_scales = np.abs(run.log2_scales + run.log2_loss_scale[:, None])
            result |= {
                "skipped": int(run.skipped_steps[-1]),
                "log2_scale": float(np.max(log2_scales)),
                "bytes": path.stat().st_size / len(run.steps) / len(run.layers),
            }
    return result


def slope(kilobytes):
    """Growth per thousand steps, after warming up."""
    kilobytes = kilobytes[min(WARM_UP, len(kilobytes) - 2) :]
    return float(np.polyfit(np.arange(len(kilobytes)), kilobytes, 1)[0])


def outcomes(directory, quick, advance):
    thousands = 2 if quick else THOUSANDS
    for way, xla in WAYS.items():
        found, of_keras = (_in_a_process(adaptive, xla, thousands) for adaptive in (True, False))
        growth, keras_growth = slope(found["kilobytes"]), slope(of_keras["kilobytes"])
        outcome = Outcome(f"{thousands},000 steps, {way}")
        outcome.lost = (
            f"{found['skipped']} steps; {growth:+.1f} KB per 1,000 (Keras {keras_growth:+.1f}), "
            f"scales up to 2^{found['log2_scale']:.0f}, "
            f"{found['bytes']:.0f} bytes per layer and record"
        )
        problems = [
            growth > max(MOST_KB, keras_growth) and not quick and "memory grows",
            found["traces"] > of_keras["traces"] and f"traced {found['traces']} times",
            found["log2_scale"] > MOST_LOG2_SCALE and "a scale is near its bound",
            found["bytes"] > BYTES_PER_LAYER and "records are larger than stated",
        ]
        outcome.count("; ".join(filter(None, problems)) or None)
        advance()
        yield outcome


def _in_a_process(*args):
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as process:
        return process.submit(soak, *args).result()
