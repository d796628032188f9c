"""Several threads: two models that train, a model that is called while it trains.

Training has to end as it does alone, bit for bit, and calls have to give what the model gave
at some moment of it.
"""

import concurrent.futures
import sys
import threading

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tf_adaptive_ls as als
from benchmarks.faults import Outcome

X = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
Y = np.sin(X[:, :2])
EPOCHS = 3
MODES = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}}


class Subclass(keras.Model):
    """Wrapped before it is built, so that it is traced while others train."""

    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(8, activation="relu"), layers.LayerNormalization()]
        self.extra, self.last = layers.Dense(8), layers.Dense(2, dtype="float32")

    def call(self, x):
        for each in self.blocks:
            x = each(x)
        return self.last(x + self.extra(x))


def subclass(seed, mode):
    keras.utils.set_random_seed(seed)
    model = als.wrap_model(Subclass())
    model.compile(als.AdaptiveLossScaleOptimizer("adam"), loss="mse", **MODES[mode])
    return model


def network(seed, mode):
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((6,))
    x = layers.LayerNormalization()(layers.Dense(8, activation="relu")(x))
    x = layers.Add()([x, layers.Dense(8)(x)])
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2, dtype="float32")(x)))
    model.compile(als.AdaptiveLossScaleOptimizer("adam"), loss="mse", **MODES[mode])
    return model


def train(model):
    model.fit(X, Y, batch_size=4, epochs=EPOCHS, shuffle=False, verbose=0)
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def same(a, b):
    return all(map(np.array_equal, a, b))


def two_that_train(mode, build=network):
    """Two models train, each in a thread of its own."""
    expected = [train(build(seed, mode)) for seed in (0, 1)]
    models = [build(seed, mode) for seed in (0, 1)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(train, models))
    return None if all(map(same, found, expected)) else "one did not end as it does alone"


def two_subclasses_that_train(mode):
    """Two subclassed models are built, traced and trained at once."""
    return two_that_train(mode, subclass)


def called_while_it_trains(mode):
    """A model is called in one thread, with and without a gradient, while another trains it."""
    expected = train(network(0, mode))
    model = network(0, mode)
    done, problems = threading.Event(), []

    def call():
        calls = 0
        while not done.is_set() or not calls:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(model(X[:4], training=False))
            weights = [v for v in model.trainable_variables if not v.overwrite_with_gradient]
            gradients = tape.gradient(loss, weights)
            if not all(np.all(np.isfinite(g)) for g in (loss, *gradients)):
                problems.append("a call gave what is not finite")
            calls += 1

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        caller = pool.submit(call)
        found = pool.submit(train, model)
        found.result()
        done.set()
        caller.result()
    if not same(found.result(), expected):
        problems.append("training did not end as it does alone")
    return "; ".join(problems) or None


def neutral_in_another(mode):
    """A model trains while another thread is inside `neutral_scales`."""
    expected = train(network(0, mode))
    model = network(0, mode)
    inside, done = threading.Event(), threading.Event()

    def be_neutral():
        with als.neutral_scales():
            inside.set()
            done.wait()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        pool.submit(be_neutral)
        inside.wait()
        found = train(model)
        done.set()
    return None if same(found, expected) else "training did not end as it does alone"


def float8_in_several(mode):
    """A model that computes in float8 is called in four threads at once."""
    x = inputs = keras.Input((64,))
    for _ in range(4):
        x = layers.Dense(64, "relu")(x)
    model = als.wrap_model(keras.Model(inputs, layers.Dense(4)(x)), float8=als.Float8())
    call = tf.function(model) if mode == "graph" else model
    data = np.random.default_rng(0).normal(size=(32, 64)).astype("float32")
    expected = np.array(model(data))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads take turns in the middle of a call
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: np.array(call(data)), range(100)))
    finally:
        sys.setswitchinterval(interval)
    wrong = sum(not np.allclose(each, expected, rtol=1e-3, atol=1e-5) for each in found)
    return f"{wrong} of {len(found)} calls gave something else" if wrong else None


FAULTS = {
    "two models train in two threads": two_that_train,
    "two subclassed models train in two threads": two_subclasses_that_train,
    "a model is called while it trains": called_while_it_trains,
    "neutral_scales in another thread": neutral_in_another,
    "float8 in four threads": float8_in_several,
}


def outcomes(directory, quick, advance):
    keras.config.set_dtype_policy("mixed_float16")
    for name, fault in FAULTS.items():
        for mode in MODES:
            outcome = Outcome(f"{name}, {mode}")
            for _ in range(1 if quick else 5):
                try:
                    outcome.count(fault(mode))
                except Exception as error:  # a fault of its own kind
                    outcome.count(repr(error))
            advance()
            yield outcome
