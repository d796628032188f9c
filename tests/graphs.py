"""Models of every shape of graph, with inputs: the zoo of the exactness tests.

Each builder returns a model and its inputs by position. `FORKS` names those in
which a tensor goes to several layers, so that plain Keras adds up gradients in
another order than with `LossScaled` layers in between.
"""

import keras
import numpy as np
from keras import layers, ops

RELU = {"activation": "relu"}


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def tokens(*shape, high=7, low=0, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype("int32")


def chain():
    x = inputs = keras.Input((4,))
    for _ in range(3):
        x = layers.Dense(5, **RELU)(x)
        x = layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(2)(x)), (floats(3, 4),)


def sequential():
    model = keras.Sequential(
        [keras.Input((6, 6, 1)), layers.Conv2D(3, 3, **RELU), layers.Flatten(), layers.Dense(2)]
    )
    return model, (floats(2, 6, 6, 1),)


def residual():
    x = inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, padding="same")(x)
    for _ in range(2):
        y = layers.BatchNormalization()(x)
        y = layers.Conv2D(4, 3, padding="same", **RELU)(y)
        y = layers.Conv2D(4, 3, padding="same")(y)
        x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(3)(x)), (floats(2, 6, 6, 2),)


def densenet():
    x = inputs = keras.Input((6, 6, 2))
    for _ in range(3):
        y = layers.Conv2D(2, 3, padding="same", **RELU)(x)
        x = layers.Concatenate()([x, y])
    x = layers.AveragePooling2D(2)(x)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))), (floats(2, 6, 6, 2),)


def multi_input():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    x = layers.Concatenate()([layers.Dense(4)(a), layers.Dense(2)(b)])
    x = x * 2.0 + ops.mean(x, axis=-1, keepdims=True)
    model = keras.Model({"a": a, "b": b}, layers.Dense(2)(x))
    return model, ({"a": floats(3, 4), "b": floats(3, 3)},)


def multi_output():
    x = inputs = keras.Input((4,))
    x = layers.Dense(6, **RELU)(x)
    first, second = layers.Dense(2, name="first")(x), layers.Dense(3, name="second")(x)
    return keras.Model(inputs, {"first": first, "second": second}), (floats(3, 4),)


def inner_output():
    """An output of the model goes on inside it."""
    x = inputs = keras.Input((4,))
    x = layers.Dense(4, **RELU)(x)
    y = layers.Dense(3)(x)
    return keras.Model(inputs, [x, y]), (floats(3, 4),)


def shared_layer():
    inputs = keras.Input((4,))
    shared = layers.Dense(4, **RELU)
    x = shared(layers.Dense(4)(inputs))
    return keras.Model(inputs, layers.Dense(2)(shared(x))), (floats(3, 4),)


def siamese():
    a, b = keras.Input((4,)), keras.Input((4,))
    branch = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, **RELU), layers.Dense(3)], name="branch"
    )
    distance = ops.abs(branch(a) - branch(b))
    return keras.Model([a, b], layers.Dense(1)(distance)), ([floats(3, 4), floats(3, 4, seed=1)],)


def nested():
    x = inner_input = keras.Input((4,))
    x = layers.ReLU()(layers.Dense(4)(x))
    inner = keras.Model(inner_input, layers.Dense(4)(x), name="inner")
    middle_input = keras.Input((4,))
    x = layers.ReLU()(inner(layers.Dense(4)(middle_input)))
    middle = keras.Model(middle_input, layers.Dense(3)(x), name="middle")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), middle, layers.Dense(2)])
    return model, (floats(3, 4),)


def attention():
    x = inputs = keras.Input((5, 4))
    context = layers.Dense(4)(inputs)
    x = layers.LayerNormalization()(x)
    y = layers.MultiHeadAttention(2, 3)(query=x, value=context, key=layers.Dense(4)(context))
    x = layers.Add()([x, y])
    return keras.Model(inputs, layers.Dense(2)(x)), (floats(2, 5, 4),)


def encoder_decoder():
    source, target = keras.Input((5,), dtype="int32"), keras.Input((4,), dtype="int32")
    encoded = layers.Embedding(7, 4, mask_zero=True)(source)
    encoded, *state = layers.LSTM(4, return_sequences=True, return_state=True)(encoded)
    decoded = layers.Embedding(7, 4, mask_zero=True)(target)
    decoded = layers.LSTM(4, return_sequences=True)(decoded, initial_state=state)
    decoded = layers.MultiHeadAttention(2, 3)(decoded, encoded)
    decoded = layers.GlobalAveragePooling1D()(decoded)
    return keras.Model([source, target], layers.Dense(3)(decoded)), ([tokens(2, 5), tokens(2, 4)],)


@keras.saving.register_keras_serializable("tests")
class Tokens(layers.Layer):
    """Makes a mask inside that goes out with its output."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.Embedding(7, 4, mask_zero=True)

    def build(self, input_shape):
        self.embedding.build(input_shape)

    def call(self, x):
        return self.embedding(x)


@keras.saving.register_keras_serializable("tests")
class Reader(layers.Layer):
    """Uses the mask of its input only inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lstm = layers.LSTM(4)
        self.supports_masking = True

    def build(self, input_shape):
        self.lstm.build(input_shape)

    def call(self, x):
        return self.lstm(x)


def masks_inside():
    inputs = keras.Input((5,), dtype="int32")
    return keras.Model(inputs, Reader()(Tokens()(inputs))), (tokens(3, 5, high=3),)


def regularized():
    x = inputs = keras.Input((4,))
    l2 = keras.regularizers.L2(0.1)
    x = layers.Dense(5, kernel_regularizer=l2, bias_regularizer="l1", **RELU)(x)
    x = layers.Dense(5, activity_regularizer="l2")(x)
    x = layers.ReLU()(x)
    x = layers.ActivityRegularization(l1=0.1)(x)
    x = layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(2)(x)), (floats(3, 4),)


@keras.saving.register_keras_serializable("tests")
class Penalty(layers.Layer):
    """Without weights, but with a loss of its own."""

    def call(self, x):
        self.add_loss(ops.mean(x**2))
        return x


@keras.saving.register_keras_serializable("tests")
class PenalizedDense(layers.Layer):
    """With weights, layers inside, and losses at both levels."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4, activity_regularizer="l2")

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.scale = self.add_weight(shape=(4,), initializer="ones", name="scale")

    def call(self, x):
        x = self.dense(x) * self.scale
        self.add_loss(ops.sum(x**3))
        return x


def added_losses():
    x = inputs = keras.Input((4,))
    x = PenalizedDense()(layers.Dense(4)(x))
    x = Penalty()(layers.ReLU()(x))
    return keras.Model(inputs, layers.Dense(2)(x)), (floats(3, 4),)


@keras.saving.register_keras_serializable("tests")
class TiedHead(layers.Layer):
    """Scores tokens with the weights of an embedding that the graph uses too."""

    def __init__(self, embedding, **kwargs):
        super().__init__(**kwargs)
        self.embedding = embedding

    def call(self, x):
        return ops.matmul(x, ops.transpose(ops.cast(self.embedding.embeddings, x.dtype)))

    def get_config(self):
        embedding = keras.saving.serialize_keras_object(self.embedding)
        return {**super().get_config(), "embedding": embedding}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("embedding")), **config)


def tied():
    inputs = keras.Input((5,), dtype="int32")
    embedding = layers.Embedding(7, 4)
    x = layers.Dense(4, **RELU)(embedding(inputs))
    return keras.Model(inputs, TiedHead(embedding)(x)), (tokens(2, 5),)


def reversible():
    inputs = keras.Input((5,), dtype="int32")
    embedding = layers.ReversibleEmbedding(7, 4)
    x = layers.Dense(4, **RELU)(embedding(inputs))
    return keras.Model(inputs, embedding(x, reverse=True)), (tokens(2, 5),)


def frozen():
    x = inputs = keras.Input((4,))
    x = layers.Dense(4, **RELU)(x)
    x = layers.Dense(4, trainable=False)(x)
    x = layers.BatchNormalization(trainable=False)(x)
    return keras.Model(inputs, layers.Dense(2)(x)), (floats(3, 4),)


def stateful():
    x = inputs = keras.Input(batch_shape=(3, 4, 2))
    x = layers.GRU(4, stateful=True, return_sequences=True)(x)
    return keras.Model(inputs, layers.LSTM(2, stateful=True)(x)), (floats(3, 4, 2),)


def dropout():
    x = inputs = keras.Input((8,))
    x = layers.Dropout(0.5, seed=3)(layers.Dense(8)(x))
    x = layers.GaussianNoise(0.1, seed=4)(x)
    x = keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.Dropout(0.3, seed=5)])(x)
    return keras.Model(inputs, layers.Dense(2)(x)), (floats(4, 8),)


def batch_norm():
    x = inputs = keras.Input((6, 6, 2))
    for _ in range(2):
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.5)(layers.Conv2D(3, 2)(x)))
    return keras.Model(inputs, layers.GlobalMaxPooling2D()(x)), (floats(3, 6, 6, 2),)


def normalized():
    def conv(x):  # a bias would cancel, but for rounding
        return layers.Conv2D(4, 3, padding="same", use_bias=False)(x)

    inputs = [keras.Input((6, 6, 2), name=name) for name in "ab"]
    x = layers.Add()([layers.BatchNormalization()(conv(x)) for x in inputs])
    x = layers.LayerNormalization()(layers.GroupNormalization(2)(conv(layers.ReLU()(x))))
    x = layers.GlobalAveragePooling2D()(layers.RMSNormalization()(conv(x)))
    outputs = layers.BatchNormalization()(layers.Dense(3, use_bias=False)(x))
    return keras.Model(inputs, outputs), ([floats(4, 6, 6, 2), floats(4, 6, 6, 2, seed=1)],)


GRAPHS = {
    build.__name__: build
    for build in (
        chain,
        sequential,
        residual,
        densenet,
        multi_input,
        multi_output,
        inner_output,
        shared_layer,
        siamese,
        nested,
        attention,
        encoder_decoder,
        masks_inside,
        regularized,
        added_losses,
        tied,
        reversible,
        frozen,
        stateful,
        dropout,
        batch_norm,
        normalized,
    )
}
FORKS = {"residual", "densenet", "multi_output", "attention", "encoder_decoder"}
