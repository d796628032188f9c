"""A training run that others kill: `python -m faults.worker DIRECTORY [DATASETS]`.

It says every step, goes on from where it was killed, and leaves the values of all its variables
in `final.npz`. With a number of datasets it kills itself as soon as it has written so many of
its next checkpoint's.
"""

import os
import pathlib
import signal
import sys

import h5py
import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tf_adaptive_ls as als

EPOCHS, STEPS, BATCH = 50, 10, 8
EVERY = 5  # steps from record to record


def build():
    x = inputs = keras.Input((16,))
    for _ in range(3):
        x = layers.BatchNormalization()(layers.Dense(32, activation="relu")(x))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(4, dtype="float32")(x)))
    model.compile(als.AdaptiveLossScaleOptimizer("adam"), loss="mse", jit_compile=False)
    return model


class Tell(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        print("step", flush=True)


def die_after(num_datasets):
    """From the next dataset on."""
    create = h5py.Group.create_dataset
    written = 0

    def create_or_die(self, *args, **kwargs):
        nonlocal written
        written += 1
        if written > num_datasets:
            os.kill(os.getpid(), signal.SIGKILL)
        return create(self, *args, **kwargs)

    h5py.Group.create_dataset = create_or_die


def main(directory, num_datasets=None):
    directory = pathlib.Path(directory)
    # Sums in the order of one thread, always.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(0)
    model = build()
    if num_datasets is not None:
        die_after(int(num_datasets))
    x = np.random.default_rng(0).normal(size=(STEPS * BATCH, 16)).astype("float32")
    callbacks = [
        keras.callbacks.BackupAndRestore(directory / "backup", double_checkpoint=True),
        als.LossScaleMonitor(directory / "run.jsonl", every=EVERY),
        Tell(),
    ]
    model.fit(x, np.sin(3 * x[:, :4]), BATCH, EPOCHS, shuffle=False, verbose=0, callbacks=callbacks)
    values = [v.numpy() for v in [*model.variables, *model.optimizer.variables]]
    np.savez(directory / "final.npz", *values)


if __name__ == "__main__":
    main(*sys.argv[1:])
