"""HALP in `fit`: what it converges to, how it resumes, and what it refuses."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from sklearn.datasets import load_digits

import tf_adaptive_ls as als
from tests.backends import COMPILED, JIT, MODES, ON_JAX

PENALTY = 0.05


def digits():
    images, labels = load_digits(return_X_y=True)
    return ((images - images.mean(axis=0)) / 16).astype("float32")[:512], labels[:512]


def logistic_regression(optimizer, mode=COMPILED):
    penalty = keras.regularizers.L2(PENALTY)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(10, kernel_regularizer=penalty, bias_regularizer=penalty),
        ]
    )
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        run_eagerly=mode == "eager",
        jit_compile=mode == "xla",
    )
    return model


def recenter(data, every, **kwargs):
    return als.Recenter(data, every=every, verbose=False, **kwargs)


def fit(model, x, y, every=16, epochs=1, callbacks=(), **kwargs):
    callbacks = [recenter((x, y), every), *callbacks]
    return model.fit(
        x, y, batch_size=64, epochs=epochs, verbose=0, callbacks=callbacks, **kwargs
    ).history


# What it is for.


def gradient_norm(model, x, y):
    """By NumPy, in float64: of the loss with its penalty."""
    kernel, bias = (w.astype("float64") for w in model.get_weights())
    logits = x.astype("float64") @ kernel + bias
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    shares[np.arange(len(y)), y] -= 1
    by_kernel = x.T @ shares / len(y) + 2 * PENALTY * kernel
    by_bias = shares.mean(axis=0) + 2 * PENALTY * bias
    return np.sqrt((by_kernel**2).sum() + (by_bias**2).sum())


@pytest.mark.parametrize("bits", [8, 16, None])
def test_converges_linearly_to_the_optimum(bits):
    x, y = digits()
    model = logistic_regression(als.BitCentered(0.3, bits=bits, mu=0.3, seed=0))
    norms = fit(model, x, y, epochs=40)["full_gradient_norm"]
    # At every center it is smaller by a factor, which does not grow.
    assert norms[-1] < 1e-4 * norms[0]
    assert norms[-1] < 0.05 * norms[20]
    # As it is without this library.
    assert gradient_norm(model, x, y) < norms[-1] * 1.05


def test_sgd_with_that_learning_rate_does_not():
    x, y = digits()
    model = logistic_regression(keras.optimizers.SGD(0.3))
    model.fit(x, y, batch_size=64, epochs=40, verbose=0)
    assert gradient_norm(model, x, y) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_the_full_gradient_is_that_of_all_data(mode):
    x, y = digits()
    model = logistic_regression(als.BitCentered(0.1), mode)
    expected = gradient_norm(model, x, y)
    loss = model.evaluate(x, y, verbose=0)[0]
    # The last batch is smaller than others.
    data = recenter((x, y), 100, batch_size=100)
    found = model.fit(x, y, batch_size=64, verbose=0, callbacks=[data]).history
    np.testing.assert_allclose(found["full_gradient_norm"], [expected], rtol=1e-5)
    np.testing.assert_allclose(found["center_loss"], [loss], rtol=1e-5)


def test_metrics_are_those_of_training_alone():
    x, y = digits()
    histories = []
    for optimizer, callbacks in (
        (keras.optimizers.SGD(0.0), []),
        (als.BitCentered(0.0), [recenter((x, y), 3)]),
    ):
        keras.utils.set_random_seed(0)
        model = logistic_regression(optimizer)
        found = model.fit(x, y, batch_size=64, shuffle=False, verbose=0, callbacks=callbacks)
        histories.append({name: found.history[name] for name in ("loss", "accuracy")})
    assert histories[0] == histories[1]


# Any model.


def two_inputs():
    a, b = keras.Input((8,)), keras.Input((), dtype="int32")
    embedded = layers.Embedding(5, 8)(b)
    outputs = layers.Dense(3)(layers.concatenate([a, embedded]))
    return keras.Model([a, b], [outputs, layers.Dense(1)(outputs)])


def frozen_normalization():
    model = keras.Sequential(
        [keras.Input((8,)), layers.BatchNormalization(), layers.Dropout(0.0), layers.Dense(1)]
    )
    model.layers[0].trainable = False
    return model


def recurrent():
    return keras.Sequential([keras.Input((8, 1)), layers.LSTM(4), layers.Dense(1)])


def data_of(model, rng):
    def array(tensor):
        shape = (12, *tensor.shape[1:])
        if tensor.dtype == "int32":
            return rng.integers(0, 5, shape).astype("int32")
        return rng.normal(size=shape).astype("float32")

    x, y = (keras.tree.map_structure(array, each) for each in (model.inputs, model.outputs))
    return (x[0] if len(x) == 1 else x), (y[0] if len(y) == 1 else y)


@pytest.mark.filterwarnings("ignore:Model .* has LossScaled layers, but is compiled with")
@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")  # frozen ones
@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("build", [two_inputs, frozen_normalization, recurrent])
def test_without_rounding_and_noise_it_is_gradient_descent(build, wraps, rng):
    paths = []
    for optimizer, callbacks in (
        (keras.optimizers.SGD(0.1), ()),
        (als.BitCentered(0.1, bits=None), (1,)),
    ):
        keras.utils.set_random_seed(0)
        model = build()
        x, y = data_of(model, np.random.default_rng(0))
        first = model.get_weights()
        if wraps:
            als.wrap_model(model)
        model.compile(optimizer, loss="mse", jit_compile=JIT)
        callbacks = [recenter((x, y), every) for every in callbacks]
        model.fit(x, y, batch_size=12, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
        if wraps:
            als.strip_model(model)
        paths.append(model.get_weights())
    for own, plain in zip(*paths, strict=True):
        np.testing.assert_allclose(own, plain, rtol=1e-4, atol=1e-6)
    assert any((a != b).any() for a, b in zip(paths[1], first, strict=True))


class OwnStep(keras.Model):
    """Trains on twice the loss."""

    def __init__(self):
        super().__init__()
        self.factor = self.add_weight((1,), "zeros")

    def call(self, x):
        return x * self.factor

    def compute_loss(self, *args, **kwargs):
        raise AssertionError("not of this step")

    def loss_of(self, x, y):
        return 2 * ops.mean(ops.square(self(x, training=True) - y))

    def train_step(self, *arguments):
        return self._on_jax(*arguments) if ON_JAX else self._on_tensorflow(*arguments)

    def _on_tensorflow(self, data):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = self.loss_of(*data)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}

    def _on_jax(self, state, data):
        import jax

        trainable, non_trainable, optimizer, metrics = state

        def loss_of(values):
            pairs = zip(self.trainable_variables, values, strict=True)
            with keras.StatelessScope(pairs):
                return self.loss_of(*data)

        loss, gradients = jax.value_and_grad(loss_of)(trainable)
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        return {"loss": loss}, (trainable, non_trainable, optimizer, metrics)


def test_with_a_train_step_of_your_own():
    model = OwnStep()
    model(np.ones((4, 1), "float32"))
    model.compile(als.BitCentered(0.125, bits=None), jit_compile=JIT)
    x = np.ones((4, 1), "float32")
    model.fit(x, 3 * x, batch_size=4, verbose=0, callbacks=[recenter((x, 3 * x), 1)])
    # The gradient is 2 * 2 * (0 - 3).
    np.testing.assert_array_equal(model.get_weights(), [[1.5]])
    assert "train_step" not in vars(model)


# Resumed.


class SaveAndStop(keras.callbacks.Callback):
    def __init__(self, path, steps):
        super().__init__()
        self.path, self.steps = path, steps

    def on_train_batch_end(self, batch, logs=None):
        self.steps -= 1
        if not self.steps:
            self.model.save(self.path)
            self.model.stop_training = True


@pytest.mark.parametrize("bits", [4, 12, None])
def test_a_run_saved_within_an_epoch_resumes_bit_for_bit(bits, tmp_path):
    x, y = digits()
    optimizer = {"bits": bits, "mu": 0.3, "momentum": 0.5, "seed": 3}
    runs = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        runs.append(logistic_regression(als.BitCentered(0.1, **optimizer)))
    whole, stopped = runs
    fit(whole, x, y, every=6, epochs=3, shuffle=False)

    path = tmp_path / "model.keras"
    fit(stopped, x, y, 6, epochs=2, shuffle=False, callbacks=[SaveAndStop(path, 11)])
    resumed = keras.models.load_model(path)
    assert resumed.optimizer.get_config() == whole.optimizer.get_config()
    assert resumed.optimizer.steps_since_center == 5
    data = recenter((x, y), 6)
    # What is left of that epoch, and one more.
    rest = slice(3 * 64, None)
    resumed.fit(x[rest], y[rest], batch_size=64, shuffle=False, verbose=0, callbacks=[data])
    resumed.fit(x, y, batch_size=64, shuffle=False, verbose=0, callbacks=[data])
    for own, other in zip(whole.variables, resumed.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(own), ops.convert_to_numpy(other))
    for own, other in zip(whole.optimizer.variables, resumed.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(own), ops.convert_to_numpy(other))


def test_weights_that_were_replaced_are_a_new_center():
    x, y = digits()
    model = logistic_regression(als.BitCentered(0.1, mu=0.3))
    fit(model, x, y, every=100)
    weights = [w + 1 for w in model.get_weights()]
    model.set_weights(weights)
    fit(model, x, y, every=100)
    for center, weight in zip(model.optimizer.centers, weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(center), weight)


def test_a_center_lasts_from_one_fit_to_the_next():
    x, y = digits()
    model = logistic_regression(als.BitCentered(0.1, mu=0.3))
    found = [fit(model, x, y, every=16) for _ in range(3)]
    # 8 steps each.
    assert ["full_gradient_norm" in each for each in found] == [True, False, True]


@pytest.mark.skipif(ON_JAX, reason="one batch a call is the same there")
def test_several_steps_per_execution():
    x, y = digits()
    paths = []
    for at_once in (1, 4):
        keras.utils.set_random_seed(0)
        model = logistic_regression(als.BitCentered(0.1, mu=0.3, seed=1))
        model.compile(model.optimizer, loss=model.loss, steps_per_execution=at_once)
        fit(model, x, y, every=4, epochs=2, shuffle=False)
        paths.append(model.get_weights())
    for own, other in zip(*paths, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-7)


# Refused.


def refused(model, match, x=None, y=None, data=None, every=4):
    if x is None:
        x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
    before = model.get_weights()
    with pytest.raises(ValueError, match=match):
        callback = recenter((x, y) if data is None else data, every)
        model.fit(x, y, batch_size=2, verbose=0, callbacks=[callback])
    for own, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(own, other)


def small(*middle, optimizer=None):
    model = keras.Sequential([keras.Input((4,)), *middle, layers.Dense(1)])
    optimizer = als.BitCentered(0.1) if optimizer is None else optimizer
    model.compile(optimizer, loss="mse", jit_compile=JIT)
    return model


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Dropout(0.5),
        lambda: layers.GaussianNoise(0.1),
        lambda: layers.BatchNormalization(),
        lambda: layers.SpectralNormalization(layers.Dense(3)),
    ],
)
def test_a_step_that_changes_more_than_weights(layer):
    refused(small(layer()), "twice the same function.*Received: a training step that changes")


def test_after_an_error_the_model_trains_as_before():
    model = small(layers.Dropout(0.5))
    refused(model, "twice the same function")
    model.compile("sgd", loss="mse", jit_compile=JIT)
    model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)
    model.layers[0].rate = 0.0
    model.compile(als.BitCentered(0.1), loss="mse", jit_compile=JIT)
    fit(model, np.ones((8, 4), "float32"), np.ones((8, 1), "float32"))
    assert "train_step" not in vars(model)


def test_without_recenter():
    model = small()
    with pytest.raises(ValueError, match=r"gradient at the center.*als\.Recenter"):
        model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)


def test_other_optimizers():
    refused(small(optimizer="sgd"), "is a BitCentered. Received: .* with SGD")
    scaled = keras.optimizers.LossScaleOptimizer(als.BitCentered(0.1))
    refused(small(optimizer=scaled), "needs no loss scale")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_less_than_float32(policy):
    keras.config.set_dtype_policy(policy)
    refused(small(), "cancel in 16 bits")


def test_constraints():
    layer = layers.Dense(2, kernel_constraint="non_neg")
    refused(small(layer), r"without constraints.*dense.*kernel")


def test_weights_that_were_frozen_since():
    model = small(layers.Dense(3))
    fit(model, np.ones((8, 4), "float32"), np.ones((8, 1), "float32"))
    model.layers[0].trainable = False
    refused(model, "built for other weights|built for the trainable weights")


def test_steps_per_execution():
    model = small()
    model.compile(model.optimizer, loss="mse", steps_per_execution=3, jit_compile=JIT)
    refused(model, "multiple of `steps_per_execution`, 3")


class Augmented(keras.utils.PyDataset):
    """Other noise whenever it is iterated over."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return self.rng.normal(size=(4, 4)), np.ones((4, 1))


def test_data_that_change():
    model = small()
    x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
    callback = recenter(Augmented(), 4)
    with pytest.raises(ValueError, match="the same examples at every center"):
        model.fit(x, y, batch_size=2, epochs=2, verbose=0, callbacks=[callback])


def test_data_may_be_in_another_order(rng):
    model = small()
    x, y = rng.normal(size=(8, 4)), np.ones((8, 1))

    class Shuffled(Augmented):
        def __getitem__(self, number):
            if not number:
                self.order = rng.permutation(8)
            chosen = self.order[4 * number : 4 * number + 4]
            return x[chosen], y[chosen]

    callback = recenter(Shuffled(), 2)
    model.fit(x, y, batch_size=2, epochs=2, verbose=0, callbacks=[callback])


def test_losses_that_are_not_finite():
    x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
    for value in (np.nan, np.inf, 3e38):
        y[5] = value
        refused(small(), "finite loss at the center. Received: (inf|nan) for batch 0", x, y)


def test_a_gradient_that_is_not_finite():
    """The root of 0 is finite; its slope is not."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, kernel_initializer="zeros")])
    loss = lambda y, y_pred: ops.sqrt(ops.abs(y_pred)[:, 0])  # noqa: E731
    model.compile(als.BitCentered(0.1), loss=loss, jit_compile=JIT)
    refused(model, "full gradient that is finite. Received: .*kernel")


def test_divergence_shows_as_nan():
    model = small()
    x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
    bad = np.where(np.arange(8)[:, None] == 5, np.nan, y)
    model.fit(x, bad, batch_size=2, verbose=0, callbacks=[recenter((x, y), 4)])
    assert np.isnan(model.get_weights()[0]).all()


@pytest.mark.parametrize("data", [iter([(1, 1)]), "text", 3, None])
def test_what_cannot_be_data(data):
    with pytest.raises(ValueError, match=r"Expected .*data"):
        als.Recenter(data, every=1)


def test_no_data():
    refused(small(), "at least one example", data=[])
