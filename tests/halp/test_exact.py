"""HALP on problems whose every step is known exactly.

The loss of one example is `(h / 2) * (b - c)**2`, for a bias `b` and a target `c`: the optimum is
the mean of all targets. Numbers are such that float32 holds each result.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import MODES

CURVATURE = 4.0


def quadratic(y, y_pred):
    return CURVATURE / 2 * ops.sum(ops.square(y_pred - y), axis=-1)


def compile_arguments(mode):
    return {"run_eagerly": mode == "eager", "jit_compile": mode == "xla"}


class Bias(layers.Layer):
    """Gives its bias for every example, times the example's one number."""

    def __init__(self, units=1):
        super().__init__()
        self.bias = self.add_weight((units,), "zeros", name="bias")
        self.unused = self.add_weight((3,), "zeros", name="unused")

    def call(self, x):
        return x * self.bias + 0 * ops.sum(self.unused)


def fitted(optimizer, targets, start=0.0, *, x=None, epochs=1, mode="eager", every=1):
    """The bias after every epoch, that of one step for each target, and the optimizer."""
    layer = Bias(targets.shape[-1])
    layer.bias.assign(np.full(layer.bias.shape, start))
    inputs = keras.Input((1,))
    model = keras.Model(inputs, layer(inputs))
    model.compile(optimizer, loss=quadratic, **compile_arguments(mode))
    found = []

    class Note(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            # `self.model` brings the variables up to date, on JAX.
            assert self.model is model
            found.append(ops.convert_to_numpy(layer.bias))

    x = np.ones((len(targets), 1), "float32") if x is None else x
    recenter = als.Recenter((x, targets), every=every, batch_size=2, verbose=False)
    model.fit(
        x,
        targets,
        batch_size=1,
        epochs=epochs,
        shuffle=False,
        callbacks=[recenter, Note()],
        verbose=0,
    )
    assert not ops.convert_to_numpy(layer.unused).any()
    return found, optimizer


def bit_centered(mu, bits=8, **kwargs):
    return als.BitCentered(1 / CURVATURE, bits=bits, mu=mu, seed=7, **kwargs)


# Their mean is 0, and those of batches are not.
TARGETS = np.array([[-3.0], [1.0], [5.0], [-3.0]], "float32")


BITS_AND_MODES = [(8, mode) for mode in MODES] + [(bits, "eager") for bits in (2, 3, 16, None)]


@pytest.mark.parametrize(("bits", "mode"), BITS_AND_MODES)
@pytest.mark.parametrize("start", [1.0, -1.0])
def test_with_mu_of_the_curvature_one_step_is_enough(bits, start, mode):
    start *= 2.0 ** ((bits or 8) - 1) - 1
    # After the first step the full gradient stays, and the steps that follow change nothing.
    found, _ = fitted(bit_centered(CURVATURE, bits), TARGETS, start, mode=mode, every=4)
    np.testing.assert_array_equal(found, [[0.0]])


@pytest.mark.parametrize(("bits", "mode"), [b for b in BITS_AND_MODES if b[0] in (2, 3, 8)])
def test_with_half_of_it_the_error_shrinks_by_one_factor_for_every_center(bits, mode):
    centers = {2: 20, 3: 10, 8: 3}[bits]
    largest = 2.0 ** (bits - 1) - 1
    start = largest**centers
    zero = np.zeros((1, 1), "float32")
    found, _ = fitted(bit_centered(CURVATURE / 2, bits), zero, start, epochs=centers, mode=mode)
    expected = start / largest ** np.arange(1, centers + 1)
    np.testing.assert_array_equal(np.abs(found).ravel(), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", [127.0 * 4, -127.0 * 4])
def test_with_twice_of_it_the_offset_saturates(start, mode):
    found, optimizer = fitted(bit_centered(CURVATURE * 2), TARGETS, start, mode=mode, every=4)
    # Integers of 8 bits are -128 to 127.
    integer = -128 if start > 0 else 127
    assert [int(ops.convert_to_numpy(offset)[0]) for offset in optimizer.offsets[:1]] == [integer]
    scale = abs(start) / (2 * 127)
    np.testing.assert_array_equal(found, [[start + integer * scale]])


@pytest.mark.parametrize("mode", MODES)
def test_where_offsets_are_on_the_grid_it_is_svrg(mode):
    """All 127**2 gradients are equal: their norm is 127 of them, and the grid dyadic."""
    x = np.array([[1.0], [2.0], [1.0], [0.0]], "float32")
    targets = np.array([[1.0], [6.0], [-5.0], [3.0]], "float32") * np.ones(127**2, "float32")
    paths = []
    for bits in (8, None):
        optimizer = als.BitCentered(1 / 4 / CURVATURE, bits=bits, mu=16 * CURVATURE)
        found, _ = fitted(optimizer, targets, 2.0, x=x, epochs=2, mode=mode, every=2)
        paths.append(found)
    np.testing.assert_array_equal(*paths)
    assert len(np.unique(paths[0])) == 2  # it moves


@pytest.mark.parametrize("mode", MODES)
def test_at_the_optimum_nothing_moves(mode):
    found, optimizer = fitted(bit_centered(0.1), TARGETS, 0.0, mode=mode, every=4)
    np.testing.assert_array_equal(found, [[0.0]])
    for scale in optimizer.offset_scales:
        assert ops.convert_to_numpy(scale) == 0


@pytest.mark.parametrize("magnitude", [2.0**-100, 2.0**-70, 1.0, 2.0**70, 2.0**120])
def test_the_scale_is_right_where_squares_are_not(magnitude):
    optimizer, weight = bit_centered(2.0), keras.Variable(np.float32([0, 0]))
    optimizer.build([weight])
    optimizer.recenter([ops.convert_to_tensor(np.float32([3, -4]) * np.float32(magnitude))])
    assert float(optimizer.offset_scales[0]) == np.float32(5 * magnitude / 2) / np.float32(127)


def test_no_offset_is_scaled_by_a_number_that_devices_take_for_zero():
    optimizer, weight = bit_centered(2.0), keras.Variable(np.float32([1, 1]))
    optimizer.build([weight])
    optimizer.recenter([ops.convert_to_tensor(np.float32([2.0**-140, 0]))])
    with optimizer.given_gradients_at_center({0: ops.zeros(2)}):
        optimizer.apply([ops.convert_to_tensor(np.float32([5, 5]))])
    np.testing.assert_array_equal(ops.convert_to_numpy(weight), [1, 1])
    np.testing.assert_array_equal(ops.convert_to_numpy(optimizer.offsets[0]), [0, 0])


@pytest.mark.parametrize("mode", MODES)
def test_momentum(mode):
    rate, momentum, start = 1 / 8 / CURVATURE, 0.5, 3.0
    optimizer = als.BitCentered(rate, bits=None, momentum=momentum)
    found, _ = fitted(optimizer, TARGETS, start, epochs=2, mode=mode, every=3)
    weight, velocity, expected = start, 0.0, []
    for step in range(8):
        # All batches have one curvature: the direction is the full gradient.
        velocity = momentum * velocity + CURVATURE * weight
        weight -= rate * velocity
        if step % 4 == 3:
            expected.append([weight])
    np.testing.assert_array_equal(found, expected)


def test_rounding_depends_on_the_seed_alone():
    def path(seed):
        optimizer = als.BitCentered(0.3 / CURVATURE, bits=4, mu=1.0, seed=seed)
        found, _ = fitted(optimizer, TARGETS * np.ones(50, "float32"), 3.3, epochs=3, every=3)
        return np.stack(found)

    np.testing.assert_array_equal(path(1), path(1))
    assert (path(1) != path(2)).any()


@pytest.mark.parametrize("bits", [2, 5, 8, 11, 16])
def test_offsets_are_integers_of_so_many_bits(bits):
    dtype = "int8" if bits <= 8 else "int16"
    targets = TARGETS + np.linspace(-9, 9, 50, dtype="float32")
    optimizer = als.BitCentered(1.3 / CURVATURE, bits=bits, mu=9 * CURVATURE)
    fitted(optimizer, targets, 0.0, epochs=3, every=4)
    offset = ops.convert_to_numpy(optimizer.offsets[0])
    assert offset.dtype == dtype
    assert -(2 ** (bits - 1)) <= offset.min() < 0 < offset.max() < 2 ** (bits - 1)
