"""Invariants 2 and 3 for graphs that nobody thought of: up to 30 layers, forked, merged, shared.

A graph of some size begins like a larger one with the same seed, so that the smallest that
fails is found.
"""

import random

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers

import tf_adaptive_ls as als
from tests.backends import ON_JAX, float64_enabled
from tests.graphs import PenalizedDense, Penalty, floats
from tests.steps import assert_equal, randomize_scales, scaled_layers, stepper

LENGTH, SIZE = 3, 4  # of every tensor, so that any two fit together

# JAX computes the weights of attention in float32, whatever it is asked for.
RTOL, ATOL = (1e-4, 1e-6) if ON_JAX else (1e-6, 1e-9)

UNARY = {
    "dense": lambda: layers.Dense(SIZE),
    "dense_relu": lambda: layers.Dense(SIZE, "relu"),
    "dense_regularized": lambda: layers.Dense(
        SIZE, kernel_regularizer="l2", activity_regularizer="l1"
    ),
    "frozen": lambda: layers.Dense(SIZE, trainable=False),
    "einsum": lambda: layers.EinsumDense("abc,cd->abd", (LENGTH, SIZE), bias_axes="d"),
    "conv": lambda: layers.Conv1D(SIZE, 2, padding="same"),
    "separable": lambda: layers.SeparableConv1D(SIZE, 2, padding="same"),
    "lstm": lambda: layers.LSTM(SIZE, return_sequences=True),
    "gru": lambda: layers.Bidirectional(layers.GRU(SIZE // 2, return_sequences=True)),
    "distributed": lambda: layers.TimeDistributed(layers.Dense(SIZE)),
    "batch_norm": lambda: layers.BatchNormalization(),
    "layer_norm": lambda: layers.LayerNormalization(),
    "rms_norm": lambda: layers.RMSNormalization(),
    "group_norm": lambda: layers.GroupNormalization(2),
    "prelu": lambda: layers.PReLU(shared_axes=[1]),
    "penalized": lambda: PenalizedDense(),
    "scaled": lambda: als.LossScaled(layers.Dense(SIZE)),
    "penalty": lambda: Penalty(),
    "relu": lambda: layers.ReLU(),
    "softmax": lambda: layers.Softmax(),
    "dropout": lambda: layers.Dropout(0.3, seed=1),
    "pooling": lambda: layers.AveragePooling1D(2, 1, padding="same"),
    "permute": lambda: layers.Lambda(lambda x: keras.ops.flip(x, axis=1)),
    "times": lambda: lambda x: 2 * keras.ops.tanh(x) - 1,
}
BINARY = {
    "add": lambda: layers.Add(),
    "subtract": lambda: layers.Subtract(),
    "multiply": lambda: layers.Multiply(),
    "maximum": lambda: layers.Maximum(),
    "concatenate": lambda: lambda pair: layers.Concatenate(axis=1)(pair)[:, :LENGTH],
    "attention": lambda: lambda pair: layers.MultiHeadAttention(2, 2)(*pair),
    "plus": lambda: lambda pair: pair[0] + pair[1] / 2,
}


def random_model(rng, size, depth=2):
    """A model of `size` calls, most of them on what has just been computed."""
    dtype = keras.config.dtype_policy().compute_dtype
    inputs = [keras.Input((LENGTH, SIZE), dtype=dtype) for _ in range(rng.randint(1, 2))]
    tensors, used, called = list(inputs), set(), []
    for _ in range(size):
        kind = rng.choice(["unary"] * 5 + ["binary"] + ["again"] * bool(called) + ["model"] * depth)
        if kind == "unary":
            function, arity = UNARY[rng.choice(sorted(UNARY))](), 1
        elif kind == "binary":
            function, arity = BINARY[rng.choice(sorted(BINARY))](), 2
        elif kind == "model":
            function = random_model(rng, rng.randint(1, 4), depth - 1)
            arity = len(function.inputs)
        else:
            function, arity = rng.choice(called)
        called.append((function, arity))
        back = [rng.choice([0, 0, 0, 0, 1, 2, 4, 8]) for _ in range(arity)]
        arguments = [tensors[-1 - steps % len(tensors)] for steps in back]
        used.update(map(id, arguments))
        results = function(arguments if arity > 1 else arguments[0])
        tensors.extend(results if isinstance(results, list) else [results])
    for tensor in inputs:
        if id(tensor) not in used:  # no model of Keras hands an input through as it is
            used.update((id(tensor), id(tensors[-1])))
            tensors.append(layers.Add()([tensors[-1], tensor]))
    outputs = [tensor for tensor in tensors if id(tensor) not in used]
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], outputs)


def assert_any_scales_give_the_plain_model(size, seed):
    def steppers(dtype):
        """Of the plain model, and of the wrapped one at scales of 1."""
        keras.config.set_dtype_policy(dtype)
        keras.utils.set_random_seed(0)
        model = random_model(random.Random(seed), size)
        inputs = [floats(2, LENGTH, SIZE, seed=i).astype(dtype) for i in range(len(model.inputs))]
        inputs = (inputs if len(inputs) > 1 else inputs[0],)
        weights = [v for v in model.trainable_variables if not v.overwrite_with_gradient]
        others = model.non_trainable_variables
        wrapped = als.wrap_model(model)
        for layer in scaled_layers(wrapped):
            layer.log2_scale = 0

        def stepper_of(each):
            return stepper(each, {"args": inputs}, weights, others, lambda: each.losses)

        return stepper_of(model), stepper_of(wrapped), wrapped

    _, run, wrapped = steppers("float32")
    neutral = run()
    randomize_scales(wrapped, np.random.default_rng(0))
    assert_equal(run(), neutral)

    # Sums in another order, which may cancel, hardly differ in float64.
    with float64_enabled():
        plain, run, _ = steppers("float64")
        plain, neutral = plain(), run()
    for y, expected in zip(neutral.outputs, plain.outputs, strict=True):
        np.testing.assert_array_equal(y, expected)
    found = [g for g in plain.gradients.values() if g is not None]
    largest = max((np.max(np.abs(g), initial=0) for g in found), default=0)
    for name, expected in plain.gradients.items():
        if expected is None:
            assert neutral.gradients[name] is None
        else:
            np.testing.assert_allclose(
                neutral.gradients[name], expected, RTOL, ATOL * largest, err_msg=name
            )
    keras.backend.clear_session()


def graphs(number, sizes):
    def decorate(test):
        options = {"deadline": None, "suppress_health_check": list(HealthCheck)}
        drawn = given(size=sizes, seed=st.integers(0, 2**32 - 1))(test)
        return settings(max_examples=number, derandomize=True, **options)(drawn)

    return decorate


@pytest.mark.long
@graphs(30, st.integers(1, 9))
def test_small_graphs(size, seed):
    assert_any_scales_give_the_plain_model(size, seed)


@pytest.mark.long
@graphs(500, st.integers(10, 30))
def test_graphs_of_thirty_layers(size, seed):
    assert_any_scales_give_the_plain_model(size, seed)
