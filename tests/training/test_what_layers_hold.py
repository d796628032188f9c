"""What layers hold besides weights is theirs, wrapped or not."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_adaptive_ls as als
from tests.backends import ON_JAX
from tests.graphs import floats
from tf_adaptive_ls.backend.keras_internals import is_all_config

WORDS = np.array([["oak"], ["ash"], ["fir"]])


def with_table(lookup, dtype):
    """A model whose table was filled after it was made."""
    inputs = keras.Input((1,), dtype=dtype)
    x = layers.Flatten()(layers.Embedding(8, 4)(lookup(inputs)))
    return keras.Model(inputs, layers.Dense(1)(x))


def adapted_words():
    lookup = layers.StringLookup()
    lookup.adapt(tf.constant(["oak", "elm", "ash", "oak"]))
    return with_table(lookup, "string"), tf.constant(WORDS)


def replaced_words():
    lookup = layers.StringLookup(vocabulary=["elm"])
    lookup.set_vocabulary(["ash", "oak"])
    return with_table(lookup, "string"), tf.constant(WORDS)


def adapted_numbers():
    lookup = layers.IntegerLookup()
    lookup.adapt(np.array([[7], [9], [7]]))
    return with_table(lookup, "int64"), np.array([[7], [9], [3]])


def adapted_text():
    vectorize = layers.TextVectorization(output_sequence_length=2)
    vectorize.adapt(tf.constant(["oak elm", "ash oak"]))
    inputs = keras.Input((1,), dtype="string")
    x = layers.Flatten()(layers.Embedding(8, 4)(vectorize(inputs)))
    return keras.Model(inputs, layers.Dense(1)(x)), tf.constant([["oak fir"], ["ash elm"]])


def feature_space():
    space = keras.utils.FeatureSpace(
        {
            "kind": keras.utils.FeatureSpace.string_categorical(num_oov_indices=1),
            "size": keras.utils.FeatureSpace.float_normalized(),
        },
        output_mode="concat",
    )
    data = {"kind": tf.constant(WORDS[:, 0]), "size": tf.constant([1.0, 2.0, 4.0])}
    space.adapt(tf.data.Dataset.from_tensor_slices(data))
    encoded = space.get_encoded_features()
    model = keras.Model(space.get_inputs(), layers.Dense(1)(encoded))
    return model, {name: value[:, None] for name, value in data.items()}


def patched():
    """A layer of Keras with a `call` of its own."""
    relu = layers.ReLU()
    relu.call = lambda x: x * 3
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(1)(relu(inputs))), floats(3, 4)


def with_statistics():
    normalize = layers.Normalization()
    normalize.adapt(floats(9, 4) * 5)
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(1)(normalize(inputs))), floats(3, 4)


def with_own_activation():
    factor = np.float32([2, 3, 4, 5])
    inputs = keras.Input((4,))
    x = layers.Activation(lambda x: x * factor)(inputs)
    return keras.Model(inputs, layers.Dense(1)(x)), floats(3, 4)


OF_STRINGS = (adapted_words, replaced_words, adapted_text, feature_space)
MODELS = (*OF_STRINGS, adapted_numbers, patched, with_statistics, with_own_activation)


# Keras compares the names of such inputs with themselves.
@pytest.mark.filterwarnings("ignore:(?s).*Explicitly requested dtype int64")
@pytest.mark.filterwarnings("ignore:(?s).*The structure of `inputs` doesn't match")
@pytest.mark.parametrize("make", MODELS)
def test_what_layers_hold_besides_weights_is_kept(make):
    if ON_JAX and make in OF_STRINGS:
        pytest.skip("JAX has no strings")
    model, x = make()
    expected = np.array(model(x))
    wrapped = als.wrap_model(model)
    np.testing.assert_array_equal(wrapped(x), expected)
    np.testing.assert_array_equal(als.strip_model(wrapped)(x), expected)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (layers.ReLU, True),
        (layers.Add, True),
        (layers.GlobalAveragePooling1D, True),
        (layers.Flatten, True),
        (lambda: layers.Activation("tanh"), True),
        (lambda: layers.Activation(abs), False),
        (lambda: layers.Dropout(0.5), False),  # it has a seed
        (layers.StringLookup, False),
        (lambda: layers.Hashing(3), False),
        (lambda: layers.Lambda(abs), False),
        (lambda: type("Own", (layers.ReLU,), {})(), False),
    ],
)
def test_what_is_known_to_be_all_config(make, expected):
    assert is_all_config(make()) == expected
