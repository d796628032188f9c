"""Whatever trains in plain Keras trains wrapped.

In float32 loss scales change nothing, so that each loop ends, bit for bit, where it
ends with plain layers and the inner optimizer alone. In float16 it skips no step, but
those that find the first scales, and learns.
"""

import inspect
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops, optimizers

import tf_adaptive_ls as als
from tests.backends import JIT, ON_JAX, compiled, value_and_gradients
from tests.graphs import RELU, floats
from tests.steps import randomize_scales, scaled_layers

pytestmark = pytest.mark.filterwarnings("ignore:Loss scales do nothing")

X, Y = floats(18, 4), floats(18, 2, seed=1)  # the last of batches of 4 has two examples
MSE = keras.losses.MeanSquaredError()


def network(size=4, outputs=2):
    x = inputs = keras.Input((size,))
    for _ in range(2):
        x = layers.Dense(6, **RELU)(x)
    return keras.Model(inputs, layers.Dense(outputs)(x))


def sgd():
    return optimizers.SGD(0.1, momentum=0.9)


def values(*models):
    return [v.numpy() for m in models for v in m.weights if not v.overwrite_with_gradient]


def variables_of(*owners):
    return [v for owner in owners for v in owner.variables]


def minimize(loss, optimizer, model):
    """One step of the model's weights along the gradient of `loss()`."""
    variables = model.trainable_variables
    _, gradients = value_and_gradients(loss, variables)
    optimizer.apply(gradients, variables)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_ends_as_plain(loop, *builds, inner=sgd, assert_same=assert_same):
    """`loop(*models, make_optimizer)` ends at the same weights wrapped and plain."""
    models = [build() for build in builds]
    start = [model.get_weights() for model in models]

    def end_of(models, make_optimizer):
        keras.utils.set_random_seed(5)
        loop(*models, make_optimizer)
        return values(*models)

    plain = end_of(models, inner)
    assert any((a != b).any() for a, b in zip(plain, itertools.chain(*start), strict=True))
    for model, weights in zip(models, start, strict=True):
        model.set_weights(weights)
    wrapped = [als.wrap_model(model) for model in models]
    for i, model in enumerate(wrapped):
        randomize_scales(model, np.random.default_rng(i))
    ours = end_of(wrapped, lambda: als.AdaptiveLossScaleOptimizer(inner()))
    assert_same(ours, plain)


# Loops of Keras

FITS = {
    "ragged batches": {},
    "run_eagerly": {"run_eagerly": True, "jit_compile": False},
    "steps_per_execution": {"steps_per_execution": 2},
}


@pytest.mark.parametrize("name", FITS)
def test_fit(name):
    def loop(model, make_optimizer):
        model.compile(make_optimizer(), loss="mse", **({"jit_compile": JIT} | FITS[name]))
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
        model.fit(data, epochs=2, shuffle=False, verbose=0)

    assert_ends_as_plain(loop, network)


def test_train_on_batch():
    def loop(model, make_optimizer):
        model.compile(make_optimizer(), loss="mse", jit_compile=JIT)
        for i in range(4):
            model.train_on_batch(X[i:], Y[i:])

    assert_ends_as_plain(loop, network)


class Lookahead(optimizers.SGD):
    """Every few steps weights go back half of the way (Zhang et al. 2019)."""

    def build(self, variables):
        super().build(variables)
        self.slow = [self.add_variable_from_reference(v, "slow") for v in variables]
        for slow, fast in zip(self.slow, variables, strict=True):
            slow.assign(fast)

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        back = ops.cast(ops.equal(self.iterations % 3, 0), "float32") / 2
        for slow, fast in zip(self.slow, self._trainable_variables, strict=True):
            fast.assign(fast + back * (slow - fast))
            slow.assign(slow + 2 * back * (fast - slow))


ABSTRACT = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer", "OptimizerMap"}
OPTIMIZERS = {
    name: kind
    for name, kind in [*vars(optimizers).items(), ("Lookahead", Lookahead)]
    if inspect.isclass(kind) and name not in ABSTRACT
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name):
    if name == "Muon" and keras.__version__.startswith("3.12."):
        pytest.skip("Muon reads the path of what has none, in plain Keras, too")

    def loop(model, make_optimizer):
        model.compile(make_optimizer(), loss="mse", jit_compile=JIT)
        if name in ("Lookahead", "ScheduleFreeAdamW"):
            # What they assign when `fit` builds them is lost in plain Keras on TensorFlow.
            model.optimizer.build(model.trainable_variables)
        model.fit(X, Y, batch_size=6, epochs=2, verbose=0)

    assert_ends_as_plain(loop, network, inner=lambda: OPTIMIZERS[name](0.05))


@pytest.mark.parametrize(
    "jit_compile",
    [
        pytest.param(False, marks=[pytest.mark.long] if ON_JAX else []),
        pytest.param(True, marks=pytest.mark.long),
    ],
)
def test_sequences_of_any_length(jit_compile, mixed_float16):
    inputs = keras.Input((None, 3))
    x = layers.Conv1D(4, 3, padding="same", **RELU)(inputs)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(x)
    x = layers.GlobalAveragePooling1D()(layers.Dense(4)(x))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(1, dtype="float32")(x)))
    optimizer = als.AdaptiveLossScaleOptimizer("adam", 2.0**10)
    model.compile(optimizer, loss="mse", jit_compile=jit_compile)

    def batches():
        for i in range(6):
            x = floats(4, 3 + i % 3, 3, seed=i)
            yield x, x.sum(axis=(1, 2)).reshape(-1, 1)

    signature = tf.TensorSpec((None, None, 3)), tf.TensorSpec((None, 1))
    data = tf.data.Dataset.from_generator(batches, output_signature=signature)
    data = data.apply(tf.data.experimental.assert_cardinality(6))
    history = model.fit(data, epochs=4, shuffle=False, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert optimizer.skipped_steps == 0


# Loops of one's own


def test_gradients_accumulated_by_hand():
    def loop(model, make_optimizer):
        optimizer, variables = make_optimizer(), model.trainable_variables

        optimizer.build(variables)

        def gradients_of(x, y):
            def loss():
                return optimizer.scale_loss(MSE(y, model(x, training=True)) / 2)

            return value_and_gradients(loss, variables)[1]

        step = compiled(gradients_of, variables_of(model, optimizer))
        for _ in range(3):
            parts = [step(X[:9], Y[:9]), step(X[9:], Y[9:])]
            optimizer.apply([a + b for a, b in zip(*parts, strict=True)], variables)

    assert_ends_as_plain(loop, network)


def test_accumulated_by_hand_scales_are_those_of_one_batch(mixed_float16):
    def trained(parts):
        keras.utils.set_random_seed(5)
        model = als.wrap_model(network())
        variables = model.trainable_variables
        optimizer = als.AdaptiveLossScaleOptimizer(sgd(), 2.0**10)
        for _ in range(12):
            total = [0.0] * len(variables)
            for x, y in zip(np.split(X, parts), np.split(Y, parts), strict=True):
                _, gradients = value_and_gradients(
                    lambda x, y: optimizer.scale_loss(MSE(y, model(x)) / parts), variables, [x, y]
                )
                gradients = gradients[: len(variables)]
                total = [a + b for a, b in zip(total, gradients, strict=True)]
            optimizer.apply(total, variables)
        assert optimizer.skipped_steps == 0
        rows = als.scale_table(model, optimizer)
        return [row.log2_total for row in rows if row.log2_total is not None]

    # What layers report adds up, too, which makes magnitudes up to three times as large;
    # two binades more for rounding them to powers of two.
    np.testing.assert_allclose(trained(1), trained(3), atol=np.log2(3) + 2)


@pytest.mark.parametrize("persistent", [False, True])
def test_two_losses_with_a_gradient_each(persistent):
    if persistent and ON_JAX:
        pytest.skip("persistent tapes are TensorFlow's")

    def loop(model, make_optimizer):
        optimizer, variables = make_optimizer(), model.trainable_variables
        optimizer.build(variables)

        def losses():
            y = model(X, training=True)
            return optimizer.scale_loss(MSE(Y, y)), optimizer.scale_loss(ops.mean(y**4))

        def step():
            if persistent:
                with tf.GradientTape(persistent=True) as tape:
                    both = losses()
                both = [tape.gradient(loss, variables) for loss in both]
            else:
                both = [value_and_gradients(lambda: losses()[0], variables)[1]]
                both += [value_and_gradients(lambda: losses()[1], variables)[1]]
            optimizer.apply([a + b for a, b in zip(*both, strict=True)], variables)

        step = compiled(step, variables_of(model, optimizer))
        for _ in range(3):
            step()

    assert_ends_as_plain(loop, network)


def noise(step):
    return ops.array(floats(18, 3, seed=step))


def test_a_gan():
    """The discriminator is trained, and then the generator through it."""

    def loop(generator, discriminator, make_optimizer):
        bce = keras.losses.BinaryCrossentropy(from_logits=True)
        of_both = [(model, make_optimizer()) for model in (generator, discriminator)]
        (_, for_generator), (_, for_discriminator) = of_both
        for model, optimizer in of_both:
            optimizer.build(model.trainable_variables)

        def step(noise):
            fake = generator(noise, training=True)

            def loss_of_discriminator():
                scores = discriminator(ops.concatenate([X, fake]), training=True)
                truth = ops.concatenate([ops.ones((18, 1)), ops.zeros((18, 1))])
                return for_discriminator.scale_loss(bce(truth, scores))

            def loss_of_generator():
                scores = discriminator(generator(noise, training=True), training=True)
                return for_generator.scale_loss(bce(ops.ones((18, 1)), scores))

            minimize(loss_of_discriminator, for_discriminator, discriminator)
            minimize(loss_of_generator, for_generator, generator)

        step = compiled(step, variables_of(*itertools.chain(*of_both)))
        for i in range(4):
            step(noise(i))

    assert_ends_as_plain(loop, lambda: network(3, 4), lambda: network(4, 1))


def test_two_optimizers_share_a_body():
    def loop(model, make_optimizer):
        heads = [keras.Model(model.input, output) for output in model.outputs]
        optimizers_ = [make_optimizer() for _ in heads]

        def step_of(model, optimizer):
            def loss():
                return optimizer.scale_loss(ops.mean(model(X, training=True) ** 2))

            optimizer.build(model.trainable_variables)
            variables = variables_of(model, optimizer)
            return compiled(lambda: minimize(loss, optimizer, model), variables)

        steps = [step_of(*each) for each in zip(heads, optimizers_, strict=True)]
        for _ in range(3):
            for step in steps:
                step()

    def build():
        inputs = keras.Input((4,))
        body = layers.Dense(5, **RELU)(inputs)
        return keras.Model(inputs, [layers.Dense(2)(body), layers.Dense(3)(body)])

    assert_ends_as_plain(loop, build)


def test_wgan_gp():
    """Its penalty is on a gradient, which is taken at neutral scales."""

    def loop(generator, critic, make_optimizer):
        of_both = [(model, make_optimizer()) for model in (generator, critic)]
        (_, for_generator), (_, for_critic) = of_both
        for model, optimizer in of_both:
            optimizer.build(model.trainable_variables)

        def step(noise):
            fake = generator(noise, training=True)

            def loss_of_critic():
                with als.neutral_scales():
                    _, (gradient,) = value_and_gradients(
                        lambda x: ops.sum(critic(x, training=True)), [], [(X + fake) / 2]
                    )
                slopes = ops.sqrt(ops.sum(gradient**2, axis=1) + 1e-12)
                loss = ops.mean(critic(fake, training=True)) - ops.mean(critic(X, training=True))
                return for_critic.scale_loss(loss + 10 * ops.mean((slopes - 1) ** 2))

            def loss_of_generator():
                loss = -ops.mean(critic(generator(noise, training=True), training=True))
                return for_generator.scale_loss(loss)

            minimize(loss_of_critic, for_critic, critic)
            minimize(loss_of_generator, for_generator, generator)

        step = compiled(step, variables_of(*itertools.chain(*of_both)))
        for i in range(4):
            step(noise(i))

    def assert_close(actual, expected):
        # The gradients of three calls of the critic are summed in another order.
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    assert_ends_as_plain(
        loop, lambda: network(3, 4), lambda: network(4, 1), assert_same=assert_close
    )


# Models that change


def test_layers_frozen_and_unfrozen_between_fits():
    def loop(model, make_optimizer):
        for trainable in (False, True, False):
            model.layers[1].trainable = trainable
            model.compile(make_optimizer(), loss="mse", jit_compile=JIT)
            model.fit(X, Y, batch_size=6, verbose=0)

    assert_ends_as_plain(loop, network)


def fine_tuned(make_optimizer, wrap, unfreeze):
    """A head is trained on a frozen base, then all: how it ends, and by which optimizer."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    x = inputs
    for i in range(3):
        x = layers.Dense(6, name=f"base_{i}", **RELU)(x)
    base = keras.Model(inputs, layers.BatchNormalization()(x), name="base")
    base.trainable = False
    model = wrap(keras.Model(inputs, layers.Dense(2, dtype="float32", name="head")(base(inputs))))
    for trainable in (False, True):
        if trainable:
            unfreeze(base, model)
        optimizer = make_optimizer()
        model.compile(optimizer, loss="mse", jit_compile=JIT)
        model.fit(X, Y, batch_size=6, epochs=2, shuffle=False, verbose=0)
    return model, optimizer


UNFREEZE = {
    "the base that was wrapped": lambda base, model: setattr(base, "trainable", True),
    "the base in the wrapped model": lambda base, model: setattr(
        model.get_layer("base"), "trainable", True
    ),
    "all": lambda base, model: setattr(model, "trainable", True),
}


@pytest.mark.parametrize("how", UNFREEZE)
def test_fine_tuning_is_that_of_the_plain_model(how):
    if how == "all" and not ON_JAX:
        how = "the base in the wrapped model"  # Keras on TensorFlow passes over what is True
    ends = []
    for wrap, make in (
        (lambda model: model, lambda: keras.optimizers.LossScaleOptimizer(sgd())),
        (als.wrap_model, lambda: als.AdaptiveLossScaleOptimizer(sgd())),
    ):
        model, _ = fine_tuned(make, wrap, UNFREEZE[how])
        ends.append([v.numpy() for v in model.weights if not v.overwrite_with_gradient])
    assert_same(*ends)


@pytest.mark.parametrize("how", ["the base that was wrapped", "the base in the wrapped model"])
def test_layers_that_were_frozen_when_wrapped_find_scales_once_they_are_not(how, mixed_float16):
    model, optimizer = fine_tuned(
        lambda: als.AdaptiveLossScaleOptimizer(sgd()), als.wrap_model, UNFREEZE[how]
    )
    assert optimizer.skipped_steps <= 1
    assert all(layer.spectrum.nonzero for layer in scaled_layers(model))


def test_frozen_layers_cost_nothing_in_the_backward_pass(mixed_float16):
    """Nothing asks for gradients that only they would see; gradients that pass them are seen."""

    def reports(trainable):
        inputs = keras.Input((4,))
        x = inputs
        for i, each in enumerate(trainable):
            x = layers.Dense(4, trainable=each, name=f"layer_{i}")(x)
        model = als.wrap_model(keras.Model(inputs, x))
        places = [layer.loss_scale_report for layer in scaled_layers(model)]
        _, found = value_and_gradients(lambda: ops.sum(model(X[:6], training=True)), places)
        return [report is not None and bool(np.any(np.array(report))) for report in found]

    assert reports([False, False, True]) == [False, False, True]
    assert reports([True, False, True]) == [True, True, True]


@pytest.mark.parametrize("how", ["layer_filter", "loaded"])
def test_layers_left_out_on_purpose_are_not_named(how, tmp_path, mixed_float16):
    model = als.wrap_model(network(), layer_filter=lambda layer: layer.units != 2)
    if how == "loaded":
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
    model.compile(als.AdaptiveLossScaleOptimizer(sgd()), loss="mse", jit_compile=JIT)
    model.fit(X, Y, verbose=0)


def test_layers_that_are_added_later_find_scales_too(mixed_float16):
    inputs = keras.Input((4,))
    model = als.wrap_model(keras.Sequential([inputs, layers.Dense(3)]))
    model.add(layers.Dense(2))
    model.compile(als.AdaptiveLossScaleOptimizer(sgd()), loss="mse", jit_compile=JIT)
    model.fit(X, Y, verbose=0)
    assert len(scaled_layers(model)) == 2
    assert all(each.spectrum.nonzero for each in scaled_layers(model))


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when):
    def build():
        inputs = keras.Input((5,), dtype="int32")
        x = layers.Embedding(7, 4, name="embedding")(inputs)
        x = layers.EinsumDense("abc,cd->abd", (None, 6), activation="relu", name="einsum")(x)
        return keras.Model(inputs, layers.Dense(2, name="dense")(x))

    def enable_lora(model):
        keras.utils.set_random_seed(2)
        for name in ("embedding", "einsum", "dense"):
            layer = model.get_layer(name)
            getattr(layer, "layer", layer).enable_lora(2)

    def trained(model, optimizer):
        x, y = np.arange(10).reshape(2, 5) % 7, floats(2, 5, 2)
        # XLA reassociates products of three matrices.
        model.compile(optimizer, loss="mse", jit_compile=False)
        model.fit(x, y, epochs=3, verbose=0)
        return [
            v.numpy()
            for name in ("embedding", "einsum", "dense")
            for v in model.get_layer(name).weights
            if not v.overwrite_with_gradient
        ]

    plain, wrapped = build(), build()
    wrapped.set_weights(plain.get_weights())
    enable_lora(plain)
    if when == "before":
        enable_lora(wrapped)
    wrapped = als.wrap_model(wrapped)
    if when == "after":
        enable_lora(wrapped)
    randomize_scales(wrapped, np.random.default_rng(0))
    ours = trained(wrapped, als.AdaptiveLossScaleOptimizer(sgd()))
    assert_same(ours, trained(plain, sgd()))


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize(
    "mode, policy",
    [pytest.param("int8", "float32", marks=pytest.mark.long), ("int4", "mixed_float16")],
)
def test_a_trained_model_is_quantized_like_a_plain_one(mode, policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    x, y = floats(8, 16), floats(8, 8)
    model = als.wrap_model(network(16, 8))
    model.compile(als.AdaptiveLossScaleOptimizer(sgd()), loss="mse", jit_compile=JIT)
    model.fit(x, y, verbose=0)
    plain = network(16, 8)
    plain.set_weights(values(model))
    plain.quantize(mode)
    model.quantize(mode)
    expected = plain.predict(x, verbose=0)
    assert_same([model.predict(x, verbose=0)], [expected])
    assert_same([als.strip_model(model).predict(x, verbose=0)], [expected])
    model.save(tmp_path / "quantized.keras")
    loaded = keras.saving.load_model(tmp_path / "quantized.keras", compile=False)
    assert_same([loaded.predict(x, verbose=0)], [expected])


def test_float8_layers_of_keras():
    """Their factors and histories come as gradients, too, and bear no scale."""

    def end_of(wrap, optimizer):
        keras.utils.set_random_seed(5)
        inputs = keras.Input((4,))
        x = layers.Dense(6, name="first", **RELU)(inputs)
        model = wrap(keras.Model(inputs, layers.Dense(2, name="last")(x)))
        for name in ("first", "last"):
            model.get_layer(name).quantize("float8")
        model.compile(optimizer, loss="mse", jit_compile=JIT)
        model.fit(X, Y, batch_size=6, epochs=2, verbose=0)
        return [v.numpy() for v in model.weights if not v.name.startswith("loss_scale")]

    plain = end_of(lambda model: model, keras.optimizers.LossScaleOptimizer(sgd(), 2.0**10))
    # The factors for gradients are found at the scale that the layer works at.
    ours = als.AdaptiveLossScaleOptimizer(sgd(), 2.0**10, rule=als.FixedRule())
    assert_same(end_of(als.wrap_model, ours), plain)
    assert len(plain) == 2 * 8


def test_layers_of_several_dtypes(mixed_float16):
    inputs = keras.Input((4,))
    x = layers.Dense(6, **RELU)(inputs)
    x = layers.Dense(6, dtype="mixed_bfloat16", name="bfloat16", **RELU)(x)
    x = layers.Dense(6, **RELU)(x)
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2, dtype="float32", name="head")(x)))
    optimizer = als.AdaptiveLossScaleOptimizer(sgd(), 2.0**10)
    model.compile(optimizer, loss="mse", jit_compile=JIT)
    history = model.fit(X, Y, batch_size=6, epochs=20, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert optimizer.skipped_steps == 0
    formats = [layer.float_format.name for layer in scaled_layers(model)]
    assert formats == ["float16", "float16", "float16", "float16"]
