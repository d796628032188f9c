"""Inf and NaN in data, targets, sample weights, and in a weight of the model.

A network learns handwritten digits; in some batches one number is not finite. Those steps are to
be skipped, no others, and the accuracy is to be that of a run which never sees those batches,
within twice the standard deviation over seeds.
"""

import keras
import numpy as np
from keras import layers

import tf_adaptive_ls as als
from benchmarks import data, zoo
from benchmarks.faults import Outcome

STEPS, BATCH = 1000, 32
SEEDS = 3
PLACES = ("data", "targets", "sample weights")


def build():
    keras.config.set_dtype_policy("mixed_float16")
    x = inputs = keras.Input((256,))
    for i in range(3):
        x = layers.Dense(64, activation="relu", name=f"hidden_{i}")(x)
    scores = layers.Dense(10, dtype="float32", name="scores")(x)
    model = als.wrap_model(keras.Model(inputs, scores))
    model.compile(
        als.AdaptiveLossScaleOptimizer("adam"),
        # Of probabilities it clips them, and with them the gradient of an infinite target.
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    return model


def batches(images, seed, share, steps):
    """Batches `(x, y, sample_weight)`, each with whether it is bad, and why."""
    rng = np.random.default_rng(seed)
    for _, batch in zip(range(steps), images.batches(BATCH, seed), strict=False):
        x, labels = zoo.classify_vector(*batch)
        arrays = x, np.eye(10, dtype="float32")[labels], np.ones(len(x), "float32")
        place = None
        if rng.random() < share:
            i = rng.integers(len(PLACES))
            place = PLACES[i]
            arrays[i].flat[rng.integers(arrays[i].size)] = rng.choice([np.nan, np.inf, -np.inf])
        yield arrays, place


def train(images, seed, share, steps, *, leave_out=False):
    """Accuracy after training, how many batches were bad, and steps not treated as they should."""
    keras.utils.set_random_seed(seed)
    model = build()
    bad, wrong = 0, []
    for step, (batch, place) in enumerate(batches(images, seed, share, steps)):
        bad += place is not None
        if leave_out and place is not None:
            continue
        model.train_on_batch(*batch)
        if model.optimizer.last_step_skipped != (place is not None):
            wrong.append(f"step {step}, bad {place}")
    x, labels = zoo.classify_vector(images.x_test, images.y_test)
    accuracy = np.mean(model.predict(x, verbose=0).argmax(-1) == labels)
    return float(accuracy), bad, wrong


def outcomes(directory, quick, advance):
    images = data.digits()
    steps, seeds, shares = (60, 1, [0.3]) if quick else (STEPS, SEEDS, [0.01, 0.3])
    for share in shares:
        with_faults, without = [], []
        outcome = Outcome(f"Inf or NaN in {share:.0%} of batches, {steps} steps")
        for seed in range(seeds):
            accuracy, bad, wrong = train(images, seed, share, steps)
            with_faults.append(accuracy)
            without.append(train(images, seed, share, steps, leave_out=True)[0])
            outcome.injected += bad
            outcome.survived += bad - len(wrong)
            outcome.failures += [f"seed {seed}, {each}" for each in wrong]
            advance()
        spread = np.std(without, ddof=1) if seeds > 1 else 0.2
        difference = np.mean(with_faults) - np.mean(without)
        outcome.lost = (
            f"those steps; accuracy {np.mean(with_faults):.1%}, "
            f"{np.mean(without):.1%} ± {spread:.1%} without those batches"
        )
        if difference < -2 * spread:
            outcome.failures.append("accuracy is not that of the run without those batches")
        yield outcome
    yield _nan_weight(images)
    advance()


def _nan_weight(images):
    """A weight that is set to NaN from outside."""
    outcome = Outcome("a weight set to NaN from outside", lost="the run, which ends and names it")
    keras.utils.set_random_seed(0)
    model = build()
    x, labels = zoo.classify_vector(images.x_train, images.y_train)
    y = np.eye(10, dtype="float32")[labels]
    kernel = model.get_layer("hidden_1").kernel
    spoil = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: kernel.assign(kernel.numpy() * np.nan)
    )
    monitor = als.LossScaleMonitor(stuck_after=20)
    try:
        model.fit(x, y, epochs=3, verbose=0, callbacks=[monitor, spoil])
        outcome.count("training goes on")
    except als.StuckTrainingError as error:
        named = "hidden_1" in str(error.explanation.first)
        outcome.count(None if named else f"the error names {error.explanation.first}")
    return outcome
