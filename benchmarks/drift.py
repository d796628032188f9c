"""Does `LossScaleMonitor` warn of overflow in the forward pass in time, and without false alarms?

Models are trained under a `LossScaleMonitor` with a batch. In some of them, activations grow until
they overflow; others are trained in the usual way.
"""

import dataclasses
import functools
import re
import time
import warnings
from collections.abc import Callable

import keras
import numpy as np
from keras import layers

import tf_adaptive_ls as als
from benchmarks import zoo
from benchmarks.overflowing import WIDTH, attend, classifier, patches, pooled
from tf_adaptive_ls.observe.forward_range.room_watch import RoomWatch

EVERY, LOOKED_AT, STEPS, BATCH_SIZE = 10, 16, 300, 32
# Number of steps to continue after a non-finite one.
AFTER = 20
SOUND = ("Transformer", "ResNet-20", "U-Net", "Autoencoder, sum")


def transformer(norm=layers.RMSNormalization, attends=False):
    """Three pre-norm blocks with an unbounded residual stream."""
    inputs, x = patches()
    for _ in range(3):
        if attends:
            x = layers.Add()([x, attend(norm()(x))])
        y = layers.Dense(2 * WIDTH, "relu")(norm()(x))
        x = layers.Add()([x, layers.Dense(WIDTH)(y)])
    return classifier(inputs, pooled(x, norm))


def convnet(norm=None):
    """Five convolutions, with or without normalization."""
    inputs = x = keras.Input((32, 32, 3))
    for filters, strides in ((16, 2), (32, 1), (32, 2), (64, 1), (64, 2)):
        x = layers.Conv2D(filters, 3, strides=strides, padding="same")(x)
        x = layers.ReLU()(norm()(x) if norm else x)
    return classifier(inputs, layers.GlobalAveragePooling2D()(x))


def doubling(rate, steps):
    """A learning rate that doubles at regular intervals."""
    return keras.optimizers.schedules.ExponentialDecay(rate, steps, 2.0)


@dataclasses.dataclass(frozen=True)
class Drift:
    """Functions that make a model and an optimizer under which activations grow."""

    build: Callable
    optimizer: Callable


DRIFTS = {
    "transformer, Adam, rate doubles in 25 steps": Drift(
        transformer, lambda: keras.optimizers.Adam(doubling(1e-2, 25))
    ),
    "with attention, Adam, rate doubles in 30 steps": Drift(
        functools.partial(transformer, layers.LayerNormalization, attends=True),
        lambda: keras.optimizers.Adam(doubling(1e-2, 30)),
    ),
    "transformer, Adam, rate 0.3": Drift(transformer, lambda: keras.optimizers.Adam(0.3)),
    "convnet, Adam, rate doubles in 20 steps": Drift(
        convnet, lambda: keras.optimizers.Adam(doubling(1e-3, 20))
    ),
    "with BatchNormalization, SGD, rate doubles in 10 steps": Drift(
        functools.partial(convnet, layers.BatchNormalization),
        lambda: keras.optimizers.SGD(doubling(1.0, 10), momentum=0.9),
    ),
}


class FirstBad(keras.callbacks.Callback):
    """Records the first step whose loss is not finite."""

    def on_train_begin(self, logs=None):
        self.step, self._done = None, 0

    def on_train_batch_end(self, batch, logs=None):
        if self.step is None and not np.isfinite(logs["loss"]):
            self.step = self._done
        self._done += 1
        if self.step is not None and self._done > self.step + AFTER:
            self.model.stop_training = True


def task_of(name, images):
    """`(model, x, y, loss, optimizer)` of a run, drifting or not."""
    if name in DRIFTS:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        drift = DRIFTS[name]
        return drift.build(), 2 * images.x_train - 1, images.y_train, loss, drift.optimizer()
    task = zoo.TASKS[name]
    x, y = task.examples(images.x_train, images.y_train)
    return task.build(), x, y, task.loss, keras.optimizers.Adam(task.learning_rate)


def drifted(name, seed, images):
    """The step of the first warning, and the step of the first non-finite loss."""
    model, x, y, loss, optimizer = task_of(name, images)
    order = np.random.default_rng(seed).permutation(len(x))
    chosen = np.resize(order, STEPS * BATCH_SIZE)
    x, y = x[chosen], y[chosen]
    model = als.wrap_model(model)
    model.compile(als.AdaptiveLossScaleOptimizer(optimizer), loss, jit_compile=True)
    monitor = als.LossScaleMonitor(every=EVERY, batch=x[:LOOKED_AT], stuck_after=None)
    first_bad = FirstBad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y, BATCH_SIZE, verbose=0, shuffle=False, callbacks=[monitor, first_bad])
    steps = [re.match(r"At step (\d+) the forward pass", str(each.message)) for each in caught]
    warned = [int(match[1]) for match in steps if match]
    return {
        "run": name,
        "seed": seed,
        "warned": warned[0] if warned else None,
        "first_bad": first_bad.step,
        **seconds_of_records(model, x[:LOOKED_AT]),
    }


def seconds_of_records(model, x):
    """Seconds of the first record, which runs each part by itself, and of a later one."""
    start = time.perf_counter()
    watch = RoomWatch(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            watch.look(0)
        except ValueError:  # a model that diverged is not finite in float32 either
            return {"first_record": None, "record": None}
        first = time.perf_counter() - start
        times = []
        for step in range(1, 6):
            start = time.perf_counter()
            watch.look(step)
            times.append(time.perf_counter() - start)
    return {"first_record": first, "record": min(times)}
