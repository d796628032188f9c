"""Invariants 2 and 4 for every layer of Keras that has weights.

Scales are powers of two, so that in float32 any setting of them gives, bit for
bit, the gradients of the plain layer, and leaves outputs and updates alone.
"""

import dataclasses
import inspect

import keras
import numpy as np
import pytest
from keras import layers

import tf_adaptive_ls as als
from tests.steps import assert_equal, assert_gradients_within, layer_stepper, randomize_scales

EXCEPTIONS = {
    "FlaxLayer": "wraps a module of another framework",
    "JaxLayer": "wraps a function of another framework",
    "TFSMLayer": "wraps a SavedModel, whose weights Keras does not replace",
    "Wrapper": "abstract: has no call of its own",
}


@dataclasses.dataclass
class Case:
    make: callable
    inputs: dict


def floats(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype("float32")


def tokens(*shape):
    return np.random.default_rng(0).integers(0, 7, shape).astype("int32")


def one(*shape):
    return {"args": (floats(*shape),)}


image, volume, series, vector = one(2, 6, 6, 4), one(2, 5, 5, 5, 2), one(2, 6, 4), one(3, 4)
frames = one(2, 3, 6, 6, 2)
# TensorFlow may add up three or more gradients of one weight in any order, also of a
# plain layer; two have but one sum.
two_frames, two_steps = one(2, 2, 6, 6, 2), one(2, 2, 4)
query, key, value = floats(2, 3, 4), floats(2, 5, 4), floats(2, 5, 4) + 1

CASES = {
    "AdditiveAttention": Case(layers.AdditiveAttention, {"args": ([query, value, key],)}),
    "Attention": Case(
        lambda: layers.Attention(use_scale=True, score_mode="concat"),
        {"args": ([query, value, key],)},
    ),
    "BatchNormalization": Case(layers.BatchNormalization, image),
    "Bidirectional": Case(lambda: layers.Bidirectional(layers.GRU(3)), series),
    "Conv1D": Case(lambda: layers.Conv1D(3, 2), series),
    "Conv1DTranspose": Case(lambda: layers.Conv1DTranspose(3, 2), series),
    "Conv2D": Case(lambda: layers.Conv2D(3, 2, activation="relu"), image),
    "Conv2DTranspose": Case(lambda: layers.Conv2DTranspose(3, 2, strides=2), image),
    "Conv3D": Case(lambda: layers.Conv3D(3, 2), volume),
    "Conv3DTranspose": Case(lambda: layers.Conv3DTranspose(3, 2), volume),
    "ConvLSTM1D": Case(lambda: layers.ConvLSTM1D(2, 2), one(2, 3, 6, 2)),
    "ConvLSTM2D": Case(lambda: layers.ConvLSTM2D(2, 2), frames),
    "ConvLSTM3D": Case(lambda: layers.ConvLSTM3D(2, 2), one(1, 2, 4, 4, 4, 2)),
    "Dense": Case(lambda: layers.Dense(5, activation="gelu"), vector),
    "DepthwiseConv1D": Case(lambda: layers.DepthwiseConv1D(2), series),
    "DepthwiseConv2D": Case(lambda: layers.DepthwiseConv2D(2), image),
    "EinsumDense": Case(
        lambda: layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d"), series
    ),
    "Embedding": Case(lambda: layers.Embedding(7, 3, mask_zero=True), {"args": (tokens(2, 5),)}),
    "GRU": Case(lambda: layers.GRU(3, return_sequences=True, return_state=True), series),
    "GRUCell": Case(lambda: layers.GRUCell(3), {"args": (floats(2, 4), [floats(2, 3)])}),
    "GroupNormalization": Case(lambda: layers.GroupNormalization(2), image),
    "GroupQueryAttention": Case(
        lambda: layers.GroupQueryAttention(4, 4, 2, dropout=0.3),
        {"query": query, "value": value, "key": key},
    ),
    "LSTM": Case(lambda: layers.LSTM(3, dropout=0.2, recurrent_dropout=0.2), series),
    "LSTMCell": Case(
        lambda: layers.LSTMCell(3), {"args": (floats(2, 4), [floats(2, 3), floats(2, 3) + 1])}
    ),
    "LayerNormalization": Case(layers.LayerNormalization, series),
    "MultiHeadAttention": Case(
        lambda: layers.MultiHeadAttention(2, 4, dropout=0.3),
        {"query": query, "value": value, "key": key},
    ),
    "Normalization": Case(lambda: layers.Normalization(mean=1.0, variance=2.0), vector),
    "PReLU": Case(lambda: layers.PReLU(keras.initializers.Constant(0.3)), image),
    "RMSNormalization": Case(layers.RMSNormalization, series),
    "RNN": Case(lambda: layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)]), series),
    "ReversibleEmbedding": Case(
        lambda: layers.ReversibleEmbedding(7, 3), {"args": (tokens(2, 5),)}
    ),
    "STFTSpectrogram": Case(
        lambda: layers.STFTSpectrogram(frame_length=16, frame_step=8, fft_length=16),
        one(2, 64, 1),
    ),
    "SeparableConv1D": Case(lambda: layers.SeparableConv1D(3, 2), series),
    "SeparableConv2D": Case(lambda: layers.SeparableConv2D(3, 2), image),
    "SimpleRNN": Case(lambda: layers.SimpleRNN(3, unroll=True), two_steps),
    "SimpleRNNCell": Case(
        lambda: layers.SimpleRNNCell(3), {"args": (floats(2, 4), [floats(2, 3)])}
    ),
    "SpectralNormalization": Case(lambda: layers.SpectralNormalization(layers.Dense(5)), vector),
    "StackedRNNCells": Case(
        lambda: layers.StackedRNNCells([layers.GRUCell(3), layers.GRUCell(2)]),
        {"args": (floats(2, 4), [floats(2, 3), floats(2, 2)])},
    ),
    "TimeDistributed": Case(lambda: layers.TimeDistributed(layers.Conv2D(2, 2)), two_frames),
}
if hasattr(layers, "TernaryDense"):  # since Keras 3.16
    CASES["TernaryDense"] = Case(lambda: layers.TernaryDense(5), vector)
WITH_XLA = ["BatchNormalization", "Conv2D", "Dense", "Embedding", "LSTM", "MultiHeadAttention"]
# Composed of layers with weights rather than creating weights.
COMPOSED = ["Bidirectional", "GroupQueryAttention", "MultiHeadAttention"]


def layer_classes_with_weights():
    """One public name for each layer class of this Keras that creates weights."""
    containers = (layers.Wrapper, layers.RNN, layers.StackedRNNCells)
    names = {}
    for name, kind in sorted(vars(layers).items()):
        if not inspect.isclass(kind) or not issubclass(kind, layers.Layer) or name == "Layer":
            continue
        bases = [base for base in kind.__mro__ if issubclass(base, layers.Layer)]
        sources = "".join(inspect.getsource(b) for b in bases if b is not layers.Layer)
        if "add_weight(" in sources or issubclass(kind, containers) or name in COMPOSED:
            names.setdefault(kind, name)
    return set(names.values())


def test_every_layer_class_with_weights_is_covered():
    missing = layer_classes_with_weights() - CASES.keys() - EXCEPTIONS.keys()
    assert not missing


def built(case):
    layer = case.make()
    inputs = dict(case.inputs)
    layer(*inputs.pop("args", ()), **inputs)
    return layer


def training_of(layer):
    return True if "training" in inspect.signature(layer.call).parameters else None


@pytest.mark.parametrize(
    "name, mode",
    [
        *((name, "eager") for name in CASES),
        *(
            pytest.param(name, "graph", marks=[] if name in WITH_XLA else pytest.mark.long)
            for name in CASES
        ),
    ],
)
def test_any_scale_gives_the_plain_layer(name, mode, rng):
    layer, inputs = built(CASES[name]), CASES[name].inputs
    options = {"mode": mode, "training": training_of(layer)}
    plain = layer_stepper(layer, layer, inputs, **options)()
    scaled = als.LossScaled(layer)
    run = layer_stepper(scaled, layer, inputs, **options)
    assert_equal(run(), plain)
    for _ in range(3):
        randomize_scales(scaled, rng)
        assert_equal(run(), plain)


@pytest.mark.parametrize("name", WITH_XLA)
def test_any_scale_gives_the_same_under_xla(name, rng):
    layer, inputs = built(CASES[name]), CASES[name].inputs
    options = {"mode": "xla", "training": training_of(layer)}
    plain = layer_stepper(layer, layer, inputs, **options)()
    scaled = als.LossScaled(layer)
    run = layer_stepper(scaled, layer, inputs, **options)
    neutral = run()
    # XLA may tile a reduction otherwise in the larger graph; each of the sums here
    # has fewer than 256 terms of which each partial sum rounds once.
    assert_gradients_within(neutral, plain, ulps=8)
    for _ in range(3):
        randomize_scales(scaled, rng)
        assert_equal(run(), neutral)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_forward_is_untouched_in_float16(name, training, rng, mixed_float16):
    layer, inputs = built(CASES[name]), CASES[name].inputs
    options = {"training": training_of(layer) and training}
    plain = layer_stepper(layer, layer, inputs, **options)()
    scaled = als.LossScaled(layer)
    randomize_scales(scaled, rng)
    result = layer_stepper(scaled, layer, inputs, **options)()
    result.gradients = plain.gradients
    assert_equal(result, plain)
    assert [y.dtype for y in result.outputs] == [y.dtype for y in plain.outputs]


@pytest.mark.parametrize("name", ["Embedding", "MultiHeadAttention", "GRU"])
def test_an_unbuilt_layer_is_built_with_the_names_it_has_alone(name):
    case = CASES[name]
    paths = [v.path for v in built(case).variables]
    keras.backend.clear_session()
    scaled = als.LossScaled(case.make())
    inputs = dict(case.inputs)
    scaled(*inputs.pop("args", ()), **inputs)
    assert [v.path for v in scaled.layer.variables] == paths
