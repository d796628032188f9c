"""Loops of one's own on JAX, written as Keras documents them.

What is in `test_loops.py` runs on JAX, too, by way of `backends.py`. Here nothing is in between.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import ON_JAX
from tests.graphs import RELU, floats
from tests.steps import randomize_scales, scaled_layers
from tf_adaptive_ls.numerics.report import Report

if not ON_JAX:
    pytest.skip("JAX's alone", allow_module_level=True)

import jax

pytestmark = pytest.mark.filterwarnings("ignore:Loss scales do nothing")

X, Y = floats(18, 4), floats(18, 2, seed=1)
LOSS = keras.losses.MeanSquaredError()


def network():
    x = inputs = keras.Input((4,))
    x = layers.Dense(6, **RELU)(x)
    x = layers.Dropout(0.5)(layers.BatchNormalization()(x))
    return keras.Model(inputs, layers.Dense(2)(x))


def make_step(model, optimizer, transform=lambda function: function):
    """A step of pure functions: `(state, x, y) -> (loss, state)`, of lists of arrays."""

    def loss_of(weights, others, optimizer_variables, x, y):
        y_pred, others = model.stateless_call(weights, others, x, training=True)
        loss = LOSS(y, y_pred)
        # The scale is a variable of the optimizer.
        own = zip(optimizer.variables, optimizer_variables, strict=True)
        with keras.StatelessScope(list(own)):
            return optimizer.scale_loss(loss), (loss, others)

    gradient_of = jax.value_and_grad(transform(loss_of), has_aux=True)

    def step(state, x, y):
        weights, others, optimizer_variables = state
        (_, (loss, others)), gradients = gradient_of(weights, others, optimizer_variables, x, y)
        weights, optimizer_variables = optimizer.stateless_apply(
            optimizer_variables, gradients, weights
        )
        return loss, (weights, others, optimizer_variables)

    return step


def state_of(model, optimizer):
    """Copies, since steps may be given the memory."""
    variables = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    return tuple([ops.copy(v.value) for v in kind] for kind in variables)


def load_state(model, optimizer, state):
    variables = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    for kind, values in zip(variables, state, strict=True):
        for variable, value in zip(kind, values, strict=True):
            variable.assign(value)


def trained(model, optimizer, num_steps=4, **options):
    """Losses, and the model's variables after some steps, which are undone."""
    variables = [v for v in model.variables if not v.overwrite_with_gradient]
    start = [v.numpy() for v in variables]
    optimizer.build(model.trainable_variables)
    step = jax.jit(make_step(model, optimizer, **options), donate_argnums=0)
    state, losses = state_of(model, optimizer), []
    for _ in range(num_steps):
        loss, state = step(state, X, Y)
        losses.append(float(loss))
    load_state(model, optimizer, state)
    end = [v.numpy() for v in variables]
    for variable, value in zip(variables, start, strict=True):
        variable.assign(value)
    return losses, end


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("transform", [lambda function: function, jax.checkpoint])
def test_as_keras_documents_it(transform):
    plain = network()
    expected = trained(plain, keras.optimizers.Adam(0.1), transform=transform)
    assert expected[0][-1] < expected[0][0]
    wrapped = als.wrap_model(plain)
    randomize_scales(wrapped, np.random.default_rng(0))
    ours = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(0.1))
    losses, weights = trained(wrapped, ours, transform=transform)
    assert losses == expected[0]
    assert_same(weights, expected[1])
    assert ours.steps == 4 and ours.skipped_steps == 0


def test_a_step_that_is_skipped(mixed_float16):
    model = als.wrap_model(network())
    optimizer = als.AdaptiveLossScaleOptimizer("sgd", 2.0**10)
    optimizer.build(model.trainable_variables)
    step = jax.jit(make_step(model, optimizer))
    _, state = step(state_of(model, optimizer), X, Y)
    _, after = step(state, np.full_like(X, np.nan), Y)
    for before_, after_, variable in zip(
        state[0], after[0], model.trainable_variables, strict=True
    ):
        if variable.name != "loss_scale_report":
            np.testing.assert_array_equal(before_, after_)
    load_state(model, optimizer, after)
    assert optimizer.last_step_skipped and (optimizer.steps, optimizer.skipped_steps) == (2, 1)


def test_several_steps_in_one_call():
    """As with `steps_per_execution`, by `jax.lax.scan`: state keeps its shapes and dtypes."""
    model = als.wrap_model(network())
    losses, end = trained(model, als.AdaptiveLossScaleOptimizer("sgd"))
    for layer in scaled_layers(model):
        layer.log2_scale = 0
    optimizer = als.AdaptiveLossScaleOptimizer("sgd")
    optimizer.build(model.trainable_variables)
    step = make_step(model, optimizer)

    @jax.jit
    def all_steps(state):
        def body(state, _):
            loss, state = step(state, X, Y)
            return state, loss

        return jax.lax.scan(body, state, length=4)

    state, scanned = all_steps(state_of(model, optimizer))
    load_state(model, optimizer, state)
    np.testing.assert_array_equal(np.array(scanned), np.float32(losses))
    assert_same([v.numpy() for v in model.variables if not v.overwrite_with_gradient], end)


def test_second_order_gradients_through_pure_functions():
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(3, "tanh")])
    own = list(plain.trainable_variables)  # without those of scaling

    def gradients(model):
        def penalty(weights):
            def score(x):
                return ops.sum(model.stateless_call(weights, [], x)[0])

            return ops.sum(jax.grad(score)(X) ** 2)

        weights = [v.value for v in model.trainable_variables]
        found = jax.jit(jax.grad(penalty))(weights)
        of_variables = {id(v): g for v, g in zip(model.trainable_variables, found, strict=True)}
        return [of_variables[id(v)] for v in own]

    expected = gradients(plain)
    wrapped = als.wrap_model(plain)
    scaled_layers(wrapped)[0].log2_scale = 7
    with pytest.raises(NotImplementedError, match="neutral_scales"):
        gradients(wrapped)
    with als.neutral_scales():
        assert_same(gradients(wrapped), expected)


def test_gradients_per_example():
    """By `jax.vmap`."""
    model = als.wrap_model(keras.Sequential([keras.Input((4,)), layers.Dense(3, "tanh")]))
    weights = [v.value for v in model.trainable_variables]
    scaled_layers(model)[0].log2_scale = 7

    def loss(weights, x):
        return ops.sum(model.stateless_call(weights, [], x[None])[0])

    each = jax.vmap(jax.grad(loss), (None, 0))(weights, X)
    for i, x in enumerate(X[:3]):
        for a, b in zip(each, jax.grad(loss)(weights, x), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)


def test_a_loss_scale_that_would_be_a_constant_is_refused():
    model, optimizer = network(), als.AdaptiveLossScaleOptimizer("sgd", 2.0**10)
    gradient = jax.grad(lambda x: optimizer.scale_loss(ops.sum(x)))
    for built in (False, True):
        if built:
            optimizer.build(als.wrap_model(model).trainable_variables)
        with pytest.raises(ValueError, match="Expected the loss scale to be among"):
            jax.jit(gradient)(X)
        # Where nothing is compiled it is read anew every time.
        np.testing.assert_array_equal(gradient(X), np.full_like(X, 2.0**10))
    optimizer.dynamic_scale.assign(4.0)
    np.testing.assert_array_equal(gradient(X), np.full_like(X, 4.0))
    np.testing.assert_array_equal(jax.vmap(optimizer.scale_loss)(X[0]), 4 * X[0])

    @jax.jit
    def right(x, values):
        with keras.StatelessScope(zip(optimizer.variables, values, strict=True)):
            return gradient(x)

    for scale in (2.0, 8.0):
        optimizer.dynamic_scale.assign(scale)
        values = [v.value for v in optimizer.variables]
        np.testing.assert_array_equal(right(X, values), np.full_like(X, scale))


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_shards_of_a_batch_as_jax_checks_them(policy):
    """In `jax.shard_map` with its default checks; what is reported is that of the whole batch."""
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((4,))
    plain = keras.Model(inputs, layers.Dense(2)(layers.Dense(6, **RELU)(inputs)))
    wrapped = als.wrap_model(plain)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("shards",))
    whole, divided = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("shards")

    def gradients_of(model):
        def loss(weights, x):
            outputs, _ = model.stateless_call(weights, [], x, training=True)
            return jax.lax.pmean(ops.mean(ops.cast(outputs, "float32") ** 2), "shards")

        over_mesh = jax.shard_map(
            jax.grad(loss), mesh=mesh, in_specs=(whole, divided), out_specs=whole
        )
        values = [v.value for v in model.trainable_variables]
        found = jax.jit(over_mesh)(values, 2.0**10 * X)
        return dict(zip((v.path for v in model.trainable_variables), found, strict=True))

    found, expected = gradients_of(wrapped), gradients_of(plain)
    for path, gradient in expected.items():
        np.testing.assert_array_equal(found[path], gradient)
    last = scaled_layers(wrapped)[-1]
    report = Report.unpacked(np.array(found[last.loss_scale_report.path]))
    assert float(report.arrived.broken) == 0
    if policy == "mixed_float16":
        outputs = np.array(plain(2.0**10 * X), "float32")
        peak = np.max(np.abs(2 * outputs / outputs.size))
        np.testing.assert_allclose(report.arrived.at_s, peak, rtol=2e-3)
        assert report.arrived.number == outputs.size / len(jax.devices())


def test_forward_mode_is_refused_by_name():
    model = als.wrap_model(network())
    with pytest.raises(NotImplementedError, match=r"(?s)reverse mode.*neutral_scales"):
        jax.jacfwd(model)(X)

    def neutral(x):
        with als.neutral_scales():
            return model(x)

    np.testing.assert_allclose(jax.jacfwd(neutral)(X), jax.jacrev(model)(X), rtol=1e-5, atol=1e-6)
