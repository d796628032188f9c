"""Code that walks over all weights and gradients computes what it does with the plain model.

Scales and reports are among them. In float32 the weights end, bit for bit, where those of the plain
model end; in float16 layers find the scales that they find without such code.
"""

import contextlib
import io
import zlib

import keras
import numpy as np
import pytest
from keras import layers, ops, optimizers

import tf_adaptive_ls as als
from tests.backends import value_and_gradients
from tests.graphs import RELU, floats
from tests.steps import randomize_scales, scaled_layers

pytestmark = pytest.mark.filterwarnings("ignore:Loss scales do nothing")

X, Y = floats(18, 4), floats(18, 2, seed=1)
S = 2.0**10


def network(wrap=lambda layer: layer):
    x = inputs = keras.Input((4,))
    for i in range(2):
        x = wrap(layers.Dense(6, name=f"hidden_{i}", **RELU))(x)
    return keras.Model(inputs, wrap(layers.Dense(2, name="head", dtype="float32"))(x))


def pair(by_hand=False):
    """A plain model, and one with the same weights that is wrapped."""
    plain = network()
    wrapped = network(als.LossScaled) if by_hand else als.wrap_model(network())
    for source, target in zip(plain.layers[1:], scaled_layers(wrapped), strict=True):
        target.layer.set_weights(source.get_weights())
    return plain, wrapped


def adaptive(inner):
    return als.AdaptiveLossScaleOptimizer(inner, S)


def dynamic(inner):
    return optimizers.LossScaleOptimizer(inner, S)


def norm(tensors):
    return ops.sqrt(sum(ops.sum(x * x) for x in tensors))


def noise_for(variable, size):
    rng = np.random.default_rng(zlib.crc32(variable.path.split("/", 1)[-1].encode()))
    return ops.convert_to_tensor(size * rng.normal(size=variable.shape).astype("float32"))


# What becomes of gradients of the scaled loss


def clipped_by_value(gradients, _):
    return [ops.clip(g, -0.05 * S, 0.05 * S) for g in gradients]


def clipped_by_norm(gradients, _):
    return [g * ops.minimum(1.0, 0.1 * S / ops.maximum(norm([g]), 1e-12)) for g in gradients]


def clipped_by_global_norm(gradients, _):
    factor = ops.minimum(1.0, 0.1 * S / norm(gradients))
    return [g * factor for g in gradients]


def clipped_adaptively(gradients, variables):
    """Brock et al. 2021."""
    limits = [0.02 * ops.maximum(norm([v.value]), 1e-3) * S for v in variables]
    return [
        g * ops.minimum(1.0, limit / ops.maximum(norm([g]), 1e-6))
        for g, limit in zip(gradients, limits, strict=True)
    ]


def with_noise(gradients, variables):
    return [g + noise_for(v, 0.01 * S) for g, v in zip(gradients, variables, strict=True)]


def with_decay(gradients, variables):
    return [g + 0.1 * S * v.value for g, v in zip(gradients, variables, strict=True)]


def of_one_length(gradients, _):
    return [g * (S / ops.maximum(norm([g]), 1e-30)) for g in gradients]


OF_GRADIENTS = [
    clipped_by_value,
    clipped_by_norm,
    clipped_by_global_norm,
    clipped_adaptively,
    with_decay,
    of_one_length,
]


def gradients_of(model, optimizer, penalty=lambda variables: 0.0):
    variables = model.trainable_variables

    def loss():
        loss = ops.mean(ops.square(model(X, training=True) - Y)) + penalty(variables)
        return optimizer.scale_loss(loss)

    return value_and_gradients(loss, variables)[1]


def steps(model, optimizer, change=lambda gradients, variables: gradients, number=3, **options):
    optimizer.build(model.trainable_variables)
    for _ in range(number):
        variables = model.trainable_variables
        optimizer.apply(change(gradients_of(model, optimizer, **options), variables), variables)


def weights_of(model):
    return [v.numpy() for v in model.weights if not v.overwrite_with_gradient]


def assert_ends_as_plain(train, by_hand=False):
    plain, wrapped = pair(by_hand)
    randomize_scales(wrapped, np.random.default_rng(0))
    before = [layer.log2_scale for layer in scaled_layers(wrapped)]
    start = weights_of(plain)
    train(plain, dynamic)
    train(wrapped, adaptive)
    assert any((a != b).any() for a, b in zip(weights_of(plain), start, strict=True))
    for a, b in zip(weights_of(wrapped), weights_of(plain), strict=True):
        np.testing.assert_array_equal(a, b)
    return before, [layer.log2_scale for layer in scaled_layers(wrapped)]


@pytest.mark.parametrize("change", [*OF_GRADIENTS, with_noise])
def test_gradients_that_are_changed_before_they_are_applied(change):
    def train(model, make):
        steps(model, make(optimizers.SGD(0.1, momentum=0.9)), change)

    before, after = assert_ends_as_plain(train)
    assert after == before


@pytest.mark.parametrize("change", [*OF_GRADIENTS, with_noise])
def test_layers_find_scales_that_no_step_is_lost_at(change, mixed_float16):
    """They see what becomes of the gradients of weights, so not those that they find without."""
    model = als.wrap_model(network())
    optimizer = adaptive(optimizers.SGD(0.0))
    steps(model, optimizer, change, number=25)
    assert optimizer.skipped_steps == 0
    assert all(abs(layer.log2_scale) < 12 for layer in scaled_layers(model))
    if change is not with_noise:
        assert all(layer.spectrum.nonzero for layer in scaled_layers(model))


def test_a_penalty_on_all_weights():
    def squares(variables):
        return 1e-2 * sum(ops.sum(ops.square(v.value)) for v in variables)

    def magnitudes(variables):
        return 1e-2 * sum(ops.sum(ops.absolute(v.value)) for v in variables)

    for penalty in (squares, magnitudes):
        before, after = assert_ends_as_plain(
            lambda model, make, penalty=penalty: steps(
                model, make(optimizers.SGD(0.1)), penalty=penalty
            )
        )
        assert after == before


def test_sharpness_aware_minimization():
    """Foret et al. 2021: the gradient is taken where the loss is largest nearby."""

    def train(model, make):
        optimizer, variables = make(optimizers.SGD(0.1)), model.trainable_variables
        optimizer.build(variables)
        for _ in range(2):
            gradients = gradients_of(model, optimizer)
            before = [ops.copy(v.value) for v in variables]
            length = norm(gradients)
            for v, g in zip(variables, gradients, strict=True):
                v.assign_add(g * (0.05 / length))
            gradients = gradients_of(model, optimizer)
            for v, value in zip(variables, before, strict=True):
                v.assign(value)
            optimizer.apply(gradients, variables)

    before, after = assert_ends_as_plain(train)
    assert after == before


def test_weights_that_are_clipped():
    """Arjovsky et al. 2017."""

    def train(model, make):
        optimizer = make(optimizers.SGD(0.1))
        for _ in range(3):
            steps(model, optimizer, number=1)
            for v in model.trainable_variables:
                v.assign(ops.clip(v.value, -0.3, 0.3))

    before, after = assert_ends_as_plain(train)
    assert after == before


def test_noise_on_weights():
    def train(model, make):
        optimizer = make(optimizers.SGD(0.1))
        for _ in range(2):
            before = [ops.copy(v.value) for v in model.trainable_variables]
            for v in model.trainable_variables:
                v.assign_add(noise_for(v, 0.01))
            gradients = gradients_of(model, optimizer)
            for v, value in zip(model.trainable_variables, before, strict=True):
                v.assign(value)
            optimizer.build(model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)

    before, after = assert_ends_as_plain(train)
    assert after == before


def trained_from(model, make, seed):
    """A copy of a model, trained on."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    steps(copy, make(optimizers.SGD(0.05 * seed)), number=2)
    return copy


def exponential(model, copies):
    """EMA, soft targets (Polyak)."""
    for copy in copies:
        for mean, v in zip(model.weights, copy.weights, strict=True):
            mean.assign(0.9 * mean + 0.1 * v)


def equal_shares(model, copies):
    """SWA (Izmailov et al. 2018), FedAvg (McMahan et al. 2017)."""
    means = [np.mean(each, axis=0) for each in zip(*(c.get_weights() for c in copies), strict=True)]
    model.set_weights(means)


def part_of_the_way(model, copies):
    """Reptile (Nichol et al. 2018)."""
    for v, *ends in zip(model.weights, *(copy.weights for copy in copies), strict=True):
        v.assign(v + 0.3 * (sum(ends) / len(ends) - v))


@pytest.mark.parametrize("average", [exponential, equal_shares, part_of_the_way])
def test_averages_of_weights(average, tmp_path):
    def train(model, make):
        for _ in range(2):
            copies = [trained_from(model, make, seed) for seed in (1, 2, 3)]
            for i, layer in enumerate(scaled_layers(copies[0])):
                layer.log2_scale += 4 * (i + 1)  # as if they had not found the same
            average(model, copies)
        model.save(tmp_path / f"{make.__name__}.keras")

    # Wrapped by hand: what `wrap_model` adds is among variables, but not among weights.
    before, after = assert_ends_as_plain(train, by_hand=True)
    moved = [b - a for a, b in zip(before, after, strict=True)]
    assert all(0 <= each <= 8 * (i + 1) for i, each in enumerate(moved)) and any(moved)
    loaded = keras.models.load_model(tmp_path / "adaptive.keras")
    assert [layer.log2_scale for layer in scaled_layers(loaded)] == after


def test_parameters_are_counted_as_of_the_plain_model():
    def told(model):
        with contextlib.redirect_stdout(io.StringIO()) as text:
            model.summary()
        return [line for line in text.getvalue().splitlines() if "params" in line]

    plain, wrapped = pair()
    assert wrapped.count_params() == plain.count_params()
    assert told(wrapped) == told(plain)
    nested = als.wrap_model(keras.Sequential([keras.Input((4,)), network(), layers.Dense(3)]))
    assert nested.count_params() == plain.count_params() + 3 * 2 + 3
    counts = [each.count_params() for each in nested.layers]
    assert sum(counts) == nested.count_params()


def test_what_is_stored_is_nothing_beside_weights_and_gradients(mixed_float16):
    model = als.wrap_model(network())
    for layer in scaled_layers(model):
        layer.log2_scale = 60
    optimizer = adaptive("sgd")
    gradients = gradients_of(model, optimizer)
    for v, g in zip(model.trainable_variables, gradients, strict=True):
        if v.overwrite_with_gradient:
            assert np.max(np.abs(v.numpy())) < 1e-20
            assert np.max(np.abs(np.array(g))) < 1e-19
