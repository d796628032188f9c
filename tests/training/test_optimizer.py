"""`AdaptiveLossScaleOptimizer` trains like its inner optimizer alone.

In float32 scaling and unscaling are exact, so that a wrapped model ends, bit for
bit, where the plain one ends under the inner optimizer: whatever that one does
with gradients, it does it to unscaled ones, and to those of weights alone.
"""

import copy
import itertools
import pickle
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops, optimizers

import tf_adaptive_ls as als
from tests.backends import JIT, ON_JAX, compiled, value_and_gradients
from tests.graphs import chain, floats
from tests.steps import scaled_layers

pytestmark = pytest.mark.filterwarnings("ignore:Loss scales do nothing")

X, Y = floats(16, 4), floats(16, 2, seed=1)

INNER = {
    "sgd": lambda: optimizers.SGD(0.1, momentum=0.9),
    "name": lambda: "rmsprop",
    "clipvalue": lambda: optimizers.Adam(0.1, clipvalue=1e-3),
    "clipnorm": lambda: optimizers.SGD(0.1, clipnorm=1e-2),
    "global_clipnorm": lambda: optimizers.SGD(0.1, global_clipnorm=1e-2),
    "weight_decay": lambda: optimizers.AdamW(0.1, weight_decay=0.1),
    "ema": lambda: optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3),
    "accumulation": lambda: optimizers.Adam(0.1, gradient_accumulation_steps=3),
    "schedule": lambda: optimizers.SGD(optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
}


def fitted(model, optimizer, **options):
    keras.utils.set_random_seed(7)
    options.setdefault("jit_compile", JIT and not options.get("run_eagerly"))
    model.compile(optimizer, loss="mse", **options)
    model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    return model


def weights_of(model):
    return [v.numpy() for v in model.weights if not v.overwrite_with_gradient]


def times(message, caught):
    """How often a warning was given; pytest records all others too."""
    return sum(message in str(warning.message) for warning in caught)


def assert_all_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_all_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def twin(plain):
    """A wrapped model with the weights of a plain one."""
    wrapped = als.wrap_model(keras.models.clone_model(plain))
    wrapped.set_weights(plain.get_weights())
    return wrapped


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("inner", INNER)
def test_inner_optimizer_features_act_as_on_a_plain_model(inner, eager):
    plain, _ = chain()
    start = plain.get_weights()
    fitted(plain, INNER[inner](), run_eagerly=eager)
    end = weights_of(plain)
    plain.set_weights(start)
    wrapped = twin(plain)
    for i, layer in enumerate(scaled_layers(wrapped)):
        layer.log2_scale = i - 5
    optimizer = als.AdaptiveLossScaleOptimizer(INNER[inner](), sample_every=2)
    fitted(wrapped, optimizer, run_eagerly=eager)
    assert any(end[i].any() for i in range(len(end)))
    # JAX compiles our conditional also in eager code: a product and a sum are then rounded once.
    assert_same = assert_all_close if ON_JAX and eager else assert_all_equal
    assert_same(weights_of(wrapped), end)
    assert int(optimizer.iterations) == int(plain.optimizer.iterations)
    if inner == "schedule":
        assert float(optimizer.learning_rate) == float(plain.optimizer.learning_rate)
    # One slot per weight and none for scales.
    assert_same(
        [v.numpy() for v in optimizer.inner_optimizer.variables],
        [v.numpy() for v in plain.optimizer.variables],
    )


def test_a_custom_loop_as_keras_documents_it():
    plain, _ = chain()
    start = plain.get_weights()
    wrapped = als.wrap_model(plain)

    def loop(model, optimizer):
        variables = model.trainable_variables
        optimizer.build(variables)

        def train_step(x, y):
            def loss_of():
                loss = keras.losses.MeanSquaredError()(y, model(x, training=True))
                return optimizer.scale_loss(loss)

            _, gradients = value_and_gradients(loss_of, variables)
            optimizer.apply(gradients, variables)

        train_step = compiled(train_step, [*model.variables, *optimizer.variables])
        for _ in range(5):
            train_step(X, Y)
        result = weights_of(model)
        plain.set_weights(start)
        return result

    expected = loop(plain, optimizers.Adam(0.1))
    ours = als.AdaptiveLossScaleOptimizer(optimizers.Adam(0.1))
    assert_all_equal(loop(wrapped, ours), expected)
    # Variables may be left out once built, and the optimizer may build itself.
    gradients = [ops.zeros(v.shape) for v in wrapped.trainable_variables]
    ours.apply(gradients)
    fresh = als.AdaptiveLossScaleOptimizer("sgd")
    fresh.scale_loss(0.0)
    fresh.apply_gradients(zip(gradients, wrapped.trainable_variables, strict=True))
    assert fresh.built and not fresh.last_step_skipped


def test_figures_are_readable_before_and_after_the_first_step():
    optimizer = als.AdaptiveLossScaleOptimizer("sgd", initial_scale=2.0**10)
    figures = optimizer.loss_scale, optimizer.skipped_steps, optimizer.last_step_skipped
    assert figures == (1024.0, 0, False)
    assert [type(figure) for figure in figures] == [float, int, bool]
    fitted(als.wrap_model(chain()[0]), optimizer)
    figures = optimizer.loss_scale, optimizer.skipped_steps, optimizer.last_step_skipped
    assert [type(figure) for figure in figures] == [float, int, bool]


def test_scales_are_sampled_again_every_so_many_steps(mixed_float16, rng):
    model = als.wrap_model(chain()[0])
    optimizer = als.AdaptiveLossScaleOptimizer("sgd", sample_every=4)
    model.compile(optimizer, loss="mse", jit_compile=JIT)
    asked = []

    def spectra():
        layer = scaled_layers(model)[0]
        return np.append(layer.spectrum.counts, layer.snapshot.log2_sampled_at)

    for _ in range(24):
        before = spectra()
        model.train_on_batch(rng.normal(size=X.shape), Y)
        asked.append(int((spectra() != before).any()))
    assert asked[0] == 1
    settled = asked[12:]
    assert sum(settled) == 3
    first = settled.index(1)
    assert settled[first::4] == [1, 1, 1]


def test_a_layer_not_in_the_loss_keeps_its_scale_and_spectrum(mixed_float16):
    inputs = keras.Input((4,))
    used, unused = als.LossScaled(layers.Dense(2)), als.LossScaled(layers.Dense(3))
    model = keras.Model(inputs, [used(inputs), unused(inputs)])
    optimizer = als.AdaptiveLossScaleOptimizer("sgd", initial_scale=2.0**5)
    unused.log2_scale = 3
    variables = model.trainable_variables
    _, gradients = value_and_gradients(
        lambda: optimizer.scale_loss(ops.sum(model(X)[0])), variables
    )
    with warnings.catch_warnings() if ON_JAX else pytest.warns(UserWarning, match="do not exist"):
        optimizer.apply(gradients, variables)
    # S * 2**r, that is, though S has moved.
    assert np.log2(optimizer.loss_scale) != 5
    assert np.log2(optimizer.loss_scale) + unused.log2_scale == 5 + 3
    assert unused.spectrum.nonzero == 0
    assert used.spectrum.nonzero > 0


def test_only_scales_to_train():
    model = als.wrap_model(chain()[0])
    for layer in scaled_layers(model):
        layer.layer.trainable = False
    optimizer = als.AdaptiveLossScaleOptimizer("sgd")
    variables = model.trainable_variables
    assert [v.name for v in variables] == ["loss_scale", "loss_scale_report"] * 4
    optimizer.scale_loss(0.0)
    optimizer.apply([ops.zeros(v.shape) for v in variables], variables)
    assert optimizer.skipped_steps == 0


@pytest.mark.filterwarnings("ignore:.*without trainable LossScaled")
@pytest.mark.parametrize("kind", ["no layers", "all of them frozen"])
def test_where_no_report_comes_the_loss_scale_moves_as_in_keras_but_within_bounds(
    kind, mixed_float16
):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2, name="head")])
    if kind == "all of them frozen":
        model.layers[0].trainable = False
        model = als.wrap_model(model, layer_filter=lambda layer: layer.name != "head")
    ours = als.AdaptiveLossScaleOptimizer(optimizers.SGD(0.0))
    keras_own = optimizers.LossScaleOptimizer(optimizers.SGD(0.0))
    variables = model.trainable_variables
    weights = [v for v in variables if not v.overwrite_with_gradient]
    for optimizer in (ours, keras_own):
        optimizer.build(variables if optimizer is ours else weights)
    ours.scale_loss(0.0)

    def apply_of_keras(gradients):
        if not ON_JAX:
            return keras_own.apply(gradients, weights)
        # There, Keras's own `apply` works in compiled code only.
        own = keras_own.variables
        values = keras_own.stateless_apply(
            [v.value for v in own], gradients, [v.value for v in weights]
        )
        for v, value in zip([*weights, *own], itertools.chain(*values), strict=True):
            v.assign(value)

    def step(value):
        gradients = [
            None if v.overwrite_with_gradient else value * ops.ones(v.shape) for v in variables
        ]
        ours.apply(gradients, variables)
        apply_of_keras([g for g in gradients if g is not None])
        return ours.loss_scale, float(keras_own.dynamic_scale)

    for _ in range(2):
        scales = step(np.inf)
        assert scales[0] == scales[1]
    for optimizer in (ours, keras_own):
        optimizer.step_counter.assign(1999)
    assert step(1.0) == (2.0**14, 2.0**14)
    for _ in range(80):
        step(np.inf)
    assert ours.loss_scale == 2.0**-60
    assert ours.skipped_steps == 82


@pytest.mark.parametrize("wrap", [als.wrap_model, lambda model: model], ids=["wrapped", "plain"])
@pytest.mark.filterwarnings("ignore:.*without trainable LossScaled")
def test_gradients_of_a_loss_that_was_not_scaled_are_told_of_once(wrap):
    model = wrap(chain()[0])
    optimizer, variables = als.AdaptiveLossScaleOptimizer("sgd"), model.trainable_variables

    def step(scaled):
        _, gradients = value_and_gradients(
            lambda: scaled(ops.mean(model(X, training=True) ** 2)), variables
        )
        optimizer.apply(gradients, variables)

    with pytest.warns(UserWarning, match=r"of `optimizer\.scale_loss\(loss\)`") as caught:
        step(lambda loss: loss)
        step(lambda loss: loss)
    assert times("`scale_loss` was never called", caught) == 1
    optimizer = als.AdaptiveLossScaleOptimizer("sgd")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*`scale_loss` was never called")
        step(optimizer.scale_loss)


@pytest.mark.skipif(ON_JAX, reason="JAX refuses a loss scale that would be a constant")
@pytest.mark.parametrize("fit_before", [False, True])
def test_a_loss_traced_before_the_optimizer_is_built_follows_its_scale(fit_before, mixed_float16):
    model = als.wrap_model(chain()[0])
    optimizer = als.AdaptiveLossScaleOptimizer("sgd", 2.0**10)

    @tf.function
    def scaled():
        return optimizer.scale_loss(tf.constant(1.0))

    assert scaled() == 2.0**10
    if fit_before:
        fitted(model, optimizer)
    else:
        optimizer.build(model.trainable_variables)
    optimizer.dynamic_scale.assign(2.0**7)
    assert scaled() == optimizer.loss_scale == 2.0**7
    # The files of both are alike.
    other = als.AdaptiveLossScaleOptimizer("sgd", 2.0**10)
    other.build(model.trainable_variables)
    assert [v.name for v in other.variables] == [v.name for v in optimizer.variables]


def test_without_scaled_layers_it_is_keras_own(mixed_float16):
    def trained(make):
        keras.utils.set_random_seed(3)
        return weights_of(fitted(chain()[0], make(optimizers.Adam(0.1))))

    with pytest.warns(UserWarning, match="without trainable LossScaled") as caught:
        ours = trained(als.AdaptiveLossScaleOptimizer)
    assert times("without trainable LossScaled", caught) == 1
    assert_all_equal(ours, trained(optimizers.LossScaleOptimizer))


def test_a_wrapped_model_under_another_optimizer_trains_and_warns_once():
    plain, _ = chain()
    start = plain.get_weights()
    expected = weights_of(fitted(plain, optimizers.Adam(0.1)))
    plain.set_weights(start)
    wrapped = twin(plain)
    scaled_layers(wrapped)[1].log2_scale = 5
    with pytest.warns(UserWarning, match="compiled with Adam") as caught:
        fitted(wrapped, optimizers.Adam(0.1))
        wrapped.fit(X, Y, verbose=0, epochs=0)
    assert times("compiled with Adam", caught) == 1
    assert_all_equal(weights_of(wrapped), expected)
    assert [layer.log2_scale for layer in scaled_layers(wrapped)] == [0, 0, 0, 0]


class OwnCompile(keras.Model):
    """With an optimizer under a name of its own; `self.optimizer` is Keras's default."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def compile(self, own_optimizer):
        super().compile()
        self.own_optimizer = own_optimizer

    def train_step(self, data):
        return {}


@pytest.mark.skipif(ON_JAX, reason="a train_step of JAX returns states")
def test_a_compile_of_its_own_is_asked_for_its_optimizers(mixed_float16):
    model = als.wrap_model(OwnCompile(chain()[0]))
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"))
    model.make_train_function()
    model.compile(keras.optimizers.SGD())
    with pytest.warns(UserWarning, match="compiled with LossScaleOptimizer"):
        model.make_train_function(force=True)


FOREIGN = {
    "sgd": lambda: "sgd",
    "accumulation": lambda: optimizers.SGD(gradient_accumulation_steps=2),
    "scaling": lambda: optimizers.LossScaleOptimizer(optimizers.SGD()),
}


@pytest.mark.filterwarnings("ignore:Model 'functional")
@pytest.mark.parametrize("foreign", ["sgd", "accumulation", "scaling"])
def test_nothing_is_made_up_under_another_optimizer_and_ours_starts_afresh(foreign, mixed_float16):
    def ours(model):
        fitted(als.wrap_model(model), als.AdaptiveLossScaleOptimizer("sgd"))
        return [layer.snapshot.log2_scale for layer in scaled_layers(model)], model.optimizer

    model, _ = chain()
    start = model.get_weights()
    expected, optimizer = ours(model)
    als.strip_model(model).set_weights(start)
    als.wrap_model(model).compile(
        FOREIGN[foreign](), loss="mse", jit_compile=JIT, auto_scale_loss=False
    )
    for x in (X, X, np.full_like(X, np.inf), X):
        model.fit(x, Y, batch_size=4, verbose=0)
        for layer in scaled_layers(model):
            assert (layer.log2_scale, layer.overflows) == (0, 0)
            assert not layer.spectrum.counts.any()
        assert all(row.binades is None for row in als.scale_table(model))
    als.strip_model(model).set_weights(start)
    scales, again = ours(model)
    assert scales == expected
    assert again.loss_scale == optimizer.loss_scale
    assert again.skipped_steps == optimizer.skipped_steps


@pytest.mark.filterwarnings("default:Loss scales do nothing")
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_policy_without_float16_works_and_warns_once(policy):
    keras.config.set_dtype_policy(policy)
    with pytest.warns(UserWarning, match="none of its LossScaled layers") as caught:
        fitted(als.wrap_model(chain()[0]), als.AdaptiveLossScaleOptimizer("sgd"))
    assert times("none of its LossScaled layers", caught) == 1


@pytest.mark.parametrize("name", ["keras", "plain"])
def test_wrapping_and_stripping_a_compiled_and_trained_model(name):
    def go_on(change):
        """How a model ends that is changed after some steps."""
        keras.utils.set_random_seed(0)
        model, _ = chain()
        inner = optimizers.Adam(0.1)
        fitted(model, optimizers.LossScaleOptimizer(inner, 2.0**9) if name == "keras" else inner)
        change(model, inner)
        model.jit_compile = JIT
        model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
        return weights_of(model)

    def assert_copied(optimizer, inner):
        assert type(optimizer) is optimizers.Adam and optimizer is not inner
        values = [[v.numpy() for v in each.variables] for each in (optimizer, inner)]
        assert_all_equal(*values)

    def wrap(model, inner):
        als.wrap_model(model)
        assert model.compiled and model.loss == "mse"
        assert isinstance(model.optimizer, als.AdaptiveLossScaleOptimizer)
        assert model.optimizer.loss_scale == (2.0**9 if name == "keras" else 2.0**15)
        assert_copied(model.optimizer.inner_optimizer, inner)

    def wrap_and_strip(model, inner):
        wrap(model, inner)
        als.strip_model(model)
        assert_copied(model.optimizer, inner)

    expected = go_on(lambda model, inner: None)
    for change in (wrap, wrap_and_strip):
        assert_all_equal(go_on(change), expected)


@pytest.mark.parametrize("make", [optimizers.Adam, lambda rate: optimizers.SGD(rate, 0.9)])
def test_state_is_carried_over_weight_by_weight_when_layers_are_unfrozen(make):
    """Transfer learning: a head first, then all of it."""
    inputs = keras.Input((4,))
    base = keras.Sequential([inputs, layers.Dense(5, "relu"), layers.Dense(3, "relu")], name="base")
    base.trainable = False
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2, name="head")(base(inputs))))
    fitted(model, als.AdaptiveLossScaleOptimizer(make(0.1)))

    def name_of(variable):
        return variable.path.rpartition("/")[-1]

    before = {name_of(v): v.numpy() for v in model.optimizer.inner_optimizer.variables}
    base = model.get_layer("base")
    base.trainable = True
    unfrozen = als.wrap_model(als.strip_model(model))
    optimizer = unfrozen.optimizer.inner_optimizer
    assert len(optimizer.variables) > len(before)
    assert int(optimizer.iterations) == 8
    for variable in optimizer.variables:
        if name_of(variable) in before:
            np.testing.assert_array_equal(variable.numpy(), before[name_of(variable)])
        else:
            assert "dense" in name_of(variable) and not variable.numpy().any()
    unfrozen.fit(X, Y, verbose=0)
    # And back again.
    unfrozen.get_layer("base").trainable = False
    before = {name_of(v): v.numpy() for v in optimizer.variables}
    optimizer = als.wrap_model(als.strip_model(unfrozen)).optimizer.inner_optimizer
    assert len(optimizer.variables) < len(before)
    for variable in optimizer.variables:
        np.testing.assert_array_equal(variable.numpy(), before[name_of(variable)])


class TwoHeads(layers.Layer):
    """Has two layers, and calls one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.used, self.unused = layers.Dense(2), layers.Dense(2)

    def build(self, shape):
        self.used.build(shape)
        self.unused.build(shape)

    def call(self, x):
        return self.used(x)


@pytest.mark.skipif(ON_JAX, reason="JAX has gradients of zeros, in plain Keras, too")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_weight_that_no_call_used_has_no_gradient(jit_compile):
    """And so no decay, no momentum, and Keras's warning."""
    ends = []
    for wrap in (False, True):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), TwoHeads()])
        plain, inner = model, optimizers.AdamW(0.1, weight_decay=0.1)
        if wrap:
            model, optimizer = als.wrap_model(model), als.AdaptiveLossScaleOptimizer(inner)
        else:
            optimizer = optimizers.LossScaleOptimizer(inner)
        before = plain.layers[0].unused.kernel.numpy()
        model.compile(optimizer, loss="mse", jit_compile=jit_compile)
        with pytest.warns(
            UserWarning, match="Gradients do not exist for variables .*unused|kernel"
        ):
            model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
        np.testing.assert_array_equal(plain.layers[0].unused.kernel.numpy(), before)
        ends.append(weights_of(plain))
    assert_all_equal(*ends)


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_optimizers_are_as_those_of_keras(copied):
    """With their settings, and without variables, which Keras makes anew."""
    ours = als.AdaptiveLossScaleOptimizer(optimizers.Adam(0.25), 2.0**9, sample_every=7)
    fresh = copied(ours)
    fitted(als.wrap_model(chain()[0]), ours)
    for each in (fresh, copied(ours)):
        assert not each.built and each.get_config() == fresh.get_config()
        assert (each.loss_scale, each.sample_every) == (2.0**9, 7)
        assert float(each.inner_optimizer.learning_rate) == 0.25


@pytest.mark.skipif(not hasattr(optimizers, "MultiOptimizer"), reason="Keras 3.12 has none")
def test_an_optimizer_of_several():
    def several():
        rest, of_some = optimizers.SGD(0.1, momentum=0.9), optimizers.Adam(0.01)
        by_path = {path: of_some for path in paths}
        return optimizers.MultiOptimizer(optimizers.OptimizerMap(rest, by_path))

    plain, _ = chain()
    paths = [v.path for v in plain.trainable_variables[:2]]
    start = plain.get_weights()
    wrapped = twin(plain)
    expected = weights_of(fitted(plain, several()))
    plain.set_weights(start)
    fitted(wrapped, als.AdaptiveLossScaleOptimizer(several()))
    assert_all_equal(weights_of(wrapped), expected)
    assert any((a != b).any() for a, b in zip(expected, start, strict=True))
