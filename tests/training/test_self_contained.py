"""Invariants 1 and 3: a scaled layer is right in any surroundings.

Gradients are compared in float32 between all scales at 1 and random scales, which
differ as soon as one gradient crosses a border without being shifted; and with the
same computation on plain layers.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import COMPILED, JIT, ON_JAX, compiled, value_and_gradients
from tests.graphs import RELU, Penalty, chain, floats
from tests.steps import (
    assert_equal,
    assert_gradients_equal,
    layer_stepper,
    plans_of,
    randomize_scales,
    scaled_layers,
    stepper,
)
from tf_adaptive_ls.observe.named_layers import scaled_layers as named_scaled_layers
from tf_adaptive_ls.training import scale_plan
from tf_adaptive_ls.training.layer_scaling import LayerScaling, is_of_scaling

if ON_JAX:
    import jax

MODES = ["eager", COMPILED]


def assert_right_at_any_scale(model, inputs, rng, plain=None, **options):
    """`model` gives what it gives at scale 1, and what `plain` gives."""
    weights = [v for v in model.trainable_variables if not v.overwrite_with_gradient]
    others = [v for v in model.non_trainable_variables if not v.overwrite_with_gradient]

    def runner(model):
        return stepper(model, {"args": inputs}, weights, others, lambda: model.losses, **options)

    for layer in scaled_layers(model):
        layer.log2_scale = 0
    run = runner(model)
    neutral = run()
    if plain is not None:
        assert_equal(neutral, runner(plain)())
    for _ in range(3):
        randomize_scales(model, rng)
        assert_equal(run(), neutral)


class Subclassed(keras.Model):
    def __init__(self, wrap):
        super().__init__()
        self.first = wrap(layers.Dense(4, activity_regularizer="l2", **RELU))
        self.norm = layers.LayerNormalization()  # not wrapped
        self.penalty = Penalty()
        self.last = wrap(layers.Dense(2))

    def call(self, x, training=None):
        x = self.first(x)
        return self.last(self.penalty(self.norm(x)) + x)

    def train_step(self, *args):
        return train_step_on_jax(self, *args) if ON_JAX else train_step_on_tensorflow(self, *args)


def train_step_on_tensorflow(model, data):
    x, y = data
    with tf.GradientTape() as tape:
        loss = ops.mean((model(x, training=True) - y) ** 2) + sum(model.losses)
        scaled = model.optimizer.scale_loss(loss)
    variables = model.trainable_variables
    model.optimizer.apply(tape.gradient(scaled, variables), variables)
    return {"loss": loss}


def train_step_on_jax(model, state, data):
    """As Keras documents it for JAX, with scales."""
    x, y = data
    weights, others, optimizer_variables, metrics = state

    def loss_of(weights, others, optimizer_variables):
        y_pred, others, losses = model.stateless_call(
            weights, others, x, training=True, return_losses=True
        )
        loss = ops.mean((y_pred - y) ** 2) + sum(losses)
        mapping = zip(model.optimizer.variables, optimizer_variables, strict=True)
        with keras.StatelessScope(list(mapping)):
            return model.optimizer.scale_loss(loss), (loss, others)

    differentiated = jax.value_and_grad(loss_of, has_aux=True)
    (_, (loss, others)), gradients = differentiated(weights, others, optimizer_variables)
    weights, optimizer_variables = model.optimizer.stateless_apply(
        optimizer_variables, gradients, weights
    )
    return {"loss": loss}, (weights, others, optimizer_variables, metrics)


@pytest.mark.parametrize("mode", MODES)
def test_hand_wrapped_layers_in_a_subclassed_model(mode, rng):
    model = Subclassed(als.LossScaled)
    model(floats(3, 4))
    assert_right_at_any_scale(model, (floats(3, 4),), rng, mode=mode)


@pytest.mark.parametrize(
    "options", [{"run_eagerly": True}, {"jit_compile": JIT}, {"jit_compile": True}]
)
def test_a_train_step_of_ones_own_trains_like_the_plain_model(options):
    def trained(wrap, optimizer):
        keras.utils.set_random_seed(0)
        model = Subclassed(wrap)
        model.compile(optimizer, **options)
        model.fit(floats(8, 4), floats(8, 2), batch_size=4, epochs=3, shuffle=False, verbose=0)
        return [v.numpy() for v in model.trainable_variables if not v.overwrite_with_gradient]

    with pytest.warns(UserWarning, match="less range than float32"):
        ours = trained(als.LossScaled, als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(0.1)))
    plain = trained(lambda layer: layer, keras.optimizers.SGD(0.1))
    for a, b in zip(ours, plain, strict=True):
        # XLA and the fork at `first` may sum in another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_only_some_layers_wrapped(mode, rng):
    model, inputs = chain()
    wrapped = als.wrap_model(model, layer_filter=lambda layer: layer.name != "dense_1")
    assert len(scaled_layers(wrapped)) == 3
    assert_right_at_any_scale(wrapped, inputs, rng, plain=model, mode=mode)


class Block(layers.Layer):
    """A layer that uses scaled layers inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inside = als.LossScaled(layers.Dense(4, activity_regularizer="l1"))
        self.outside = layers.Dense(4)

    def call(self, x):
        return self.outside(ops.relu(self.inside(x))) + x


@pytest.mark.parametrize("mode", MODES)
def test_wrappers_inside_wrappers(mode, rng):
    x = inputs = keras.Input((4,))
    x = als.LossScaled(Block())(layers.Dense(4)(x))
    x = Block()(x)
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2)(x)))
    assert len(scaled_layers(model)) == 6
    assert_right_at_any_scale(model, (floats(3, 4),), rng, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_wrapper_around_a_wrapped_model(mode, rng):
    model, inputs = chain()
    outer = als.LossScaled(als.wrap_model(model))
    assert_right_at_any_scale(outer, inputs, rng, plain=model, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_models_cut_out_of_a_wrapped_model(mode, rng):
    model, inputs = chain()
    wrapped = als.wrap_model(model)
    head = keras.Model(wrapped.input, wrapped.get_layer("dense_1").output)
    tail = keras.Model(wrapped.get_layer("dense_1").output, wrapped.output)
    plain_head = keras.Model(model.input, model.get_layer("dense_1").output)
    plain_tail = keras.Model(model.get_layer("dense_1").output, model.output)
    assert_right_at_any_scale(head, inputs, rng, plain=plain_head, mode=mode)
    assert_right_at_any_scale(tail, (floats(3, 5),), rng, plain=plain_tail, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_feature_extractor_and_its_model_in_one_loss(mode, rng):
    model, inputs = chain()
    wrapped = als.wrap_model(model)
    features = keras.Model(wrapped.input, [layer.output for layer in wrapped.layers[1:4]])

    def both(x, training):
        return [wrapped(x, training=training), features(x, training=training)]

    weights = [v for v in model.trainable_variables if not is_of_scaling(v)]

    run = stepper(both, {"args": inputs}, weights, [], mode=mode)
    neutral = run()
    for _ in range(3):
        randomize_scales(wrapped, rng)
        assert_equal(run(), neutral)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_called_on_its_own_and_in_the_model(mode, rng):
    model, inputs = chain()
    wrapped = als.wrap_model(model)
    layer = wrapped.get_layer("dense_1")

    def both(x, training):
        return [wrapped(x, training=training), layer(ops.tile(x, (1, 2))[:, :5])]

    weights = [v for v in model.trainable_variables if not is_of_scaling(v)]
    run = stepper(both, {"args": inputs}, weights, [], mode=mode)
    neutral = run()
    randomize_scales(wrapped, rng)
    assert_equal(run(), neutral)


class Borrower(layers.Layer):
    """Calls a layer that the graph calls too."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.borrowed = layer

    def call(self, x):
        return ops.relu(self.borrowed(x))


@pytest.mark.parametrize("borrower_wrapped", [False, True])
def test_a_scaled_layer_that_another_layer_calls_as_well(borrower_wrapped, rng):
    x = inputs = keras.Input((4,))
    shared = als.LossScaled(layers.Dense(4))
    borrower = Borrower(shared)
    if borrower_wrapped:
        borrower = als.LossScaled(borrower)
    x = layers.Dense(4)(borrower(shared(layers.Dense(4)(x))))
    wrapped = als.wrap_model(keras.Model(inputs, x))
    assert len(scaled_layers(wrapped)) == 3 + borrower_wrapped
    assert_right_at_any_scale(wrapped, (floats(3, 4),), rng)


def test_a_backbone_run_in_inference_mode_inside_a_trained_model(rng):
    x = inputs = keras.Input((4,))
    for _ in range(2):
        x = layers.ReLU()(layers.BatchNormalization()(layers.Dense(4)(x)))
    backbone = keras.Model(inputs, x, name="backbone")
    inputs = keras.Input((4,))
    x = backbone(layers.Dense(4)(inputs), training=False)
    model = keras.Model(inputs, layers.Dense(2)(x))
    wrapped = als.wrap_model(model)
    assert len(scaled_layers(wrapped)) == 6
    assert_right_at_any_scale(wrapped, (floats(8, 4),), rng, plain=model)


def test_a_weight_that_the_layer_does_not_track_is_refused():
    foreign = layers.Dense(3)
    foreign.build((None, 3))
    kernels = {"kernel": lambda: foreign.kernel}

    class Thief(layers.Layer):
        def call(self, x):
            return ops.matmul(x, kernels["kernel"]())

    scaled = als.LossScaled(Thief())
    with pytest.raises(ValueError, match=r"reading 'dense/kernel'.*attribute of 'thief'"):
        scaled(floats(2, 3))


def test_outside_of_its_model_a_plan_does_not_hold(rng):
    """The plan is worth testing only if it makes a difference inside the model."""
    model, inputs = chain()
    wrapped = als.wrap_model(model)
    seen = []
    original = LayerScaling._scaled_call

    def spy(self, *args, **kwargs):
        route = scale_plan.route_of(self)
        groups = route and (*route.args, *route.outputs)
        seen.append(groups and tuple(g.layers[0] if g.layers else "S" for g in groups))
        return original(self, *args, **kwargs)

    LayerScaling._scaled_call = spy
    try:
        wrapped(inputs[0])
        keras.Model(wrapped.input, wrapped.layers[2].output)(inputs[0])
    finally:
        LayerScaling._scaled_call = original
    _, second, third, last = scaled_layers_in_order(wrapped)
    assert seen[:4] == [
        ("S", second),
        (second, third),
        (third, last),
        (last, "S"),
    ]
    assert seen[4:] == [None]


class Breakable(layers.Layer):
    broken = False

    def build(self, shape):
        self.factor = self.add_weight(shape=shape[-1:], initializer="ones")

    def call(self, x):
        if self.broken:
            raise RuntimeError("broken")
        return x * self.factor


def test_a_call_that_fails_leaves_nothing_behind(rng):
    breakable = Breakable()
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(breakable(layers.Dense(3)(inputs))))
    x = floats(3, 4)
    wrapped = als.wrap_model(model)
    randomize_scales(wrapped, rng)
    run = layer_stepper(wrapped, model, {"args": (x,)})
    expected = run()
    breakable.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        wrapped(x)
    with pytest.raises(RuntimeError, match="broken"), als.neutral_scales():
        wrapped(x)
    breakable.broken = False
    assert all(scale_plan.route_of(layer) is None for layer in scaled_layers(wrapped))
    assert_equal(run(), expected)
    # Outside of any scope weights are themselves again.
    assert_gradients_equal(layer_stepper(model, model, {"args": (x,)})(), expected)


def routes_of(model):
    wrapped = als.wrap_model(model)
    wrapped(floats(2, 4))
    (plan,) = plans_of(wrapped)
    names = {id(layer): layer.name for layer in scaled_layers(wrapped)}

    def named(groups):
        return [
            "+".join(sorted(names[id(layer)] for layer in group.layers)) or "S" for group in groups
        ]

    return {
        names[key]: (
            *named(route.args),
            *named(route.outputs),
            [names[id(layer)] for layer in route.passes_from],
        )
        for key, route in plan.routes.items()
    }


def test_a_layer_that_normalizes_passes_gradients_on_at_one_scale():
    x = inputs = keras.Input((4,))
    x = layers.BatchNormalization(name="n")(layers.Dense(4, name="a")(x))
    x = layers.Dense(4, name="b")(layers.ReLU()(x))
    # Another takes the same, so that only what leaves it is passed on.
    y = layers.LayerNormalization(name="m")(x)
    x = layers.Add()([layers.Dense(4, name="c")(y), layers.Dense(4, name="d")(x)])
    # At the end all is at S.
    outputs = layers.RMSNormalization(name="e")(x)
    assert routes_of(keras.Model(inputs, outputs)) == {
        "a": ("S", "n", []),
        "n": ("n", "n", ["b"]),
        "b": ("n", "d+m", []),
        "m": ("d+m", "m", ["c"]),
        "c": ("m", "e", []),
        "d": ("d+m", "e", []),
        "e": ("e", "S", []),
    }


def test_layers_whose_normalized_outputs_meet_pass_gradients_on_together():
    inputs = keras.Input((4,))
    branches = [layers.Dense(4, name=name)(inputs) for name in "ab"]
    x = layers.Add()(
        [layers.BatchNormalization(name=f"{i}")(b) for i, b in zip("nm", branches, strict=True)]
    )
    x = layers.Dense(2, name="c")(layers.GroupNormalization(2, name="o")(x))
    routes = routes_of(keras.Model(inputs, x))
    assert {routes[name][-2] for name in "abnmo"} == {"m+n+o"}
    assert [set(routes[name][-1]) for name in "nmo"] == [
        {"m", "o", "c"},
        {"n", "o", "c"},
        set("nmc"),
    ]


def scaled_layers_in_order(model):
    return [layer.loss_scaling for layer in model.layers if layer.weights]


def test_neutral_scales_make_layers_transparent(rng):
    model, inputs = chain()
    plain = layer_stepper(model, model, {"args": inputs})()
    wrapped = als.wrap_model(model)
    randomize_scales(wrapped, rng)
    with als.neutral_scales():
        neutral = stepper(wrapped, {"args": inputs}, wrapped.trainable_variables, [])()
    for layer in scaled_layers(wrapped):
        for variable in (layer.loss_scale, layer.loss_scale_report):
            assert not np.any(neutral.gradients.pop(variable.path))
    assert_gradients_equal(neutral, plain)


def gradient_penalty(critic, x, weights):
    """The penalty of WGAN-GP and its gradients (Gulrajani et al. 2017, equation 3)."""

    def penalty():
        _, (gradient,) = value_and_gradients(lambda x: ops.sum(critic(x)), [], [x])
        return ops.mean((ops.norm(gradient, axis=1) - 1) ** 2)

    return value_and_gradients(penalty, weights)


@pytest.mark.parametrize("mode", MODES)
def test_second_order_gradients_are_refused(mode):
    model, (x,) = chain()
    wrapped = als.wrap_model(model)

    def compute(x):
        return gradient_penalty(wrapped, x, model.trainable_variables)

    with pytest.raises(NotImplementedError, match="neutral_scales"):
        compiled(compute, wrapped.variables, mode)(ops.array(x))


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_penalty_is_exact_inside_neutral_scales(mode, rng):
    model, (x,) = chain()
    weights = [v for v in model.trainable_variables if not is_of_scaling(v)]

    def result_of(model):
        def compute(x):
            with als.neutral_scales():
                return gradient_penalty(model, x, weights)

        return keras.tree.flatten(compiled(compute, model.variables, mode)(ops.array(x)))

    plain = result_of(model)
    wrapped = als.wrap_model(model)
    randomize_scales(wrapped, rng)
    for a, b in zip(result_of(wrapped), plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b)


def test_two_gradients_of_a_persistent_tape(rng):
    model, (x,) = chain()
    wrapped = als.wrap_model(model)
    weights = [v.value for v in model.trainable_variables]

    @tf.function
    def forward(model, x):
        return model(x)

    def two(model):
        with tf.GradientTape(persistent=True) as tape:
            y = forward(model, x)
            first, second = tf.reduce_sum(y), tf.reduce_sum(y**2)
        return tape.gradient(first, weights) + tape.gradient(second, weights)

    plain = two(model)
    randomize_scales(wrapped, rng)
    for a, b in zip(two(wrapped), plain, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("r", [-40, -20, 0, 20, 40])
def test_a_float32_layer_rounds_the_gradient_of_a_float16_input_once_and_after_shifting(r, mode):
    """As plain layers do, whatever the scale: not where r has sent it out of range."""
    plain = layers.Dense(3, dtype="float32")
    plain.build((8, 4))
    x = ops.array(floats(8, 4), "float16")

    def gradients(layer):
        def run(x):
            return value_and_gradients(
                lambda x: ops.sum(layer(x) ** 2) * 2.0**-12, [plain.kernel], [x]
            )

        _, found = compiled(run, layer.variables, mode)(x)
        return list(map(np.array, found))

    expected = gradients(plain)
    wrapped = als.LossScaled(plain)
    wrapped.log2_scale = r
    found = gradients(wrapped)
    assert found[1].dtype == np.float16
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_filter_may_ask_for_the_path_of_a_layer():
    inputs = keras.Input((4,))
    blocks = [
        keras.Sequential([keras.Input((4,)), layers.Dense(4, name="d")], name=name)
        for name in ("a", "b")
    ]
    x = layers.Dense(4, name="d")(blocks[1](blocks[0](inputs)))
    asked = []

    def in_a(layer, path):
        asked.append((layer.name, path))
        return path.startswith("a/")

    wrapped = als.wrap_model(keras.Model(inputs, x), layer_filter=in_a)
    assert asked == [("d", "a/d"), ("d", "b/d"), ("d", "d")]
    assert [name for name, _ in named_scaled_layers(wrapped)] == ["a/d"]


def test_attributes_of_the_layer():
    scaled = als.LossScaled(layers.Embedding(5, 3))
    assert scaled.input_dim == 5
    scaled(np.zeros((2, 2), "int32"))
    assert scaled.embeddings is scaled.layer.embeddings
    with pytest.raises(AttributeError, match="no attribute '_nothing'"):
        _ = scaled._nothing
    with pytest.raises(AttributeError, match="nothing"):
        _ = scaled.nothing
