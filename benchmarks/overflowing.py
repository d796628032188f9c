"""Models whose forward pass overflows in float16, each for a reason that occurs in practice.

`MODELS` are trained. `PLANTS` are single causes to plant into healthy `HOSTS`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops

LARGEST = 65504.0
WIDTH = 48


def normal(deviation):
    return keras.initializers.RandomNormal(stddev=deviation)


def classifier(inputs, x, classes=10):
    logits = layers.Dense(classes, dtype="float32", name="logits")(x)
    return keras.Model(inputs, logits)


def patches(width=WIDTH):
    """Inputs of images, and their 16 patches as tokens."""
    inputs = keras.Input((32, 32, 3))
    return inputs, layers.Reshape((16, width))(layers.Conv2D(width, 8, strides=8)(inputs))


def pooled(x, norm=layers.LayerNormalization):
    return layers.GlobalAveragePooling1D()(norm()(x))


def attend(x, heads=4, **kwargs):
    return layers.MultiHeadAttention(heads, x.shape[-1] // heads, **kwargs)(x, x)


class Clip(layers.Layer):
    """Clips activations by hand, as people do."""

    def call(self, x):
        return ops.clip(x, -LARGEST, LARGEST)

    def compute_output_shape(self, shape):
        # Keras cannot trace it after a product with a number, whose result it takes for sparse.
        return shape


def clipped(x, clip):
    return Clip()(x) if clip else x


class HandwrittenRMSNorm(layers.Layer):
    """Computes in the dtype of its inputs, as in many repositories."""

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], initializer="ones", name="scale")

    def call(self, x):
        mean_square = ops.mean(ops.square(x), axis=-1, keepdims=True)
        return x * ops.rsqrt(mean_square + 1e-3) * self.scale


# Models to train: functions of whether to clip large activations by hand.


def residual_stream(size, clip=False):
    """A pre-norm transformer whose branches add up to `size`."""
    inputs, x = patches()
    for _ in range(4):
        x = clipped(layers.Add()([x, attend(layers.LayerNormalization()(x))]), clip)
        y = layers.Dense(2 * WIDTH, "gelu")(layers.LayerNormalization()(x))
        y = layers.Dense(WIDTH, kernel_initializer=normal(size / 30))(y)
        x = clipped(layers.Add()([x, clipped(y, clip)]), clip)
    return classifier(inputs, pooled(x))


def gated_unscaled(clip=False):
    """Like T5 1.1: gated, with RMS normalization, and weights not scaled by width."""
    inputs, x = patches(64)
    dense = functools.partial(layers.Dense, use_bias=False, kernel_initializer=normal(2.5))
    for _ in range(4):
        x = clipped(layers.Add()([x, attend(layers.RMSNormalization()(x))]), clip)
        y = layers.RMSNormalization()(x)
        y = layers.Multiply()([dense(256, activation="gelu")(y), dense(256)(y)])
        x = clipped(layers.Add()([x, clipped(dense(64)(clipped(y, clip)), clip)]), clip)
    return classifier(inputs, pooled(x, layers.RMSNormalization))


def large_scores(clip=False):
    """Products of queries and keys exceed 65504 before they are divided by the width."""
    inputs, x = patches()
    for block in range(3):
        y = layers.LayerNormalization()(x)
        if block == 1:
            y = layers.LayerNormalization()(attend(y, kernel_initializer=normal(14.0)))
        else:
            y = attend(y)
        x = layers.Add()([x, y])
        y = layers.Dense(2 * WIDTH, "gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(WIDTH)(y)])
    return classifier(inputs, pooled(x))


def handwritten_norm(clip=False):
    """Squares of some hundreds overflow: the norm returns zeros, and nothing is learned."""
    inputs, x = patches()
    for _ in range(3):
        x = clipped(layers.Add()([x, attend(HandwrittenRMSNorm()(x))]), clip)
        y = layers.Dense(2 * WIDTH, "gelu")(HandwrittenRMSNorm()(x))
        x = clipped(
            layers.Add()([x, layers.Dense(WIDTH, kernel_initializer=normal(40.0))(y)]), clip
        )
    return classifier(inputs, pooled(x, HandwrittenRMSNorm))


def scaled_embedding(clip=False, words=64, width=128):
    """Like Gemma: an embedding times the root of its width, with RMS normalization."""
    inputs = keras.Input((32,), dtype="int32")
    x = layers.Embedding(words, width, embeddings_initializer=normal(2200.0))(inputs)
    x = clipped(x * math.sqrt(width), clip)
    for _ in range(2):
        y = layers.RMSNormalization()(x)
        y = layers.MultiHeadAttention(4, 32)(y, y, use_causal_mask=True)
        x = clipped(layers.Add()([x, y]), clip)
        y = layers.Dense(2 * width, "gelu")(layers.RMSNormalization()(x))
        x = clipped(layers.Add()([x, layers.Dense(width)(y)]), clip)
    return classifier(inputs, layers.RMSNormalization()(x), words)


def product_of_features(clip=False):
    """Like CLIP: two feature vectors, not normalized, are multiplied and then scaled."""
    inputs = x = keras.Input((32, 32, 3))
    for filters in (16, 32, 64):
        x = layers.Conv2D(filters, 3, strides=2, padding="same")(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    a = layers.Dense(64, kernel_initializer=normal(40.0))(layers.GlobalAveragePooling2D()(x))
    b = layers.Dense(64, kernel_initializer=normal(320.0))(layers.GlobalMaxPooling2D()(x))
    x = clipped(ops.multiply(a, b), clip) / 65536.0
    return classifier(inputs, layers.LayerNormalization()(x))


def two_places_in_a_resnet(clip=False):
    """A convolution with too large outputs, and a product between layers."""
    inputs = keras.Input((32, 32, 3))
    conv = functools.partial(layers.Conv2D, padding="same", use_bias=False)
    x = conv(16, 3, strides=4)(inputs)
    for block, (filters, strides) in enumerate([(16, 1), (16, 1), (32, 2), (32, 1), (64, 2)]):
        large = {"kernel_initializer": normal(6000.0)} if block == 2 else {}
        y = layers.ReLU()(layers.BatchNormalization()(x))
        y = clipped(conv(filters, 3, strides=strides, **large)(y), clip)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        if block == 3:
            y = clipped(y * 30_000.0, clip) / 30_000.0
        y = conv(filters, 3)(y)
        if strides > 1:
            x = conv(filters, 1, strides=strides)(x)
        x = layers.Add()([x, y])
    x = layers.ReLU()(layers.BatchNormalization()(x))
    return classifier(inputs, layers.GlobalAveragePooling2D()(x))


@dataclasses.dataclass(frozen=True)
class Overflowing:
    """A model to train.

    Args:
        build: Function of whether to clip large activations by hand.
        steps: Number of steps.
        of_tokens: Whether it trains on tokens; otherwise on images.
    """

    build: Callable
    steps: int = 100
    of_tokens: bool = False


MODELS = {
    "residual stream of 1e5": Overflowing(functools.partial(residual_stream, 1e5)),
    "residual stream of 1e6": Overflowing(functools.partial(residual_stream, 1e6)),
    "gated, unscaled weights (T5)": Overflowing(gated_unscaled),
    "attention scores": Overflowing(large_scores),
    "RMSNorm written by hand": Overflowing(handwritten_norm),
    "embedding times √width (Gemma)": Overflowing(scaled_embedding, of_tokens=True),
    "product of features (CLIP)": Overflowing(product_of_features),
    "ResNet, two places": Overflowing(two_places_in_a_resnet),
}


def tokens(number, seed=0, words=64, length=32):
    """Sequences in which 9 of 10 tokens follow from the one before; targets are the next tokens."""
    rng = np.random.default_rng(seed)
    follows = np.random.default_rng(0).permutation(words)
    sequences = np.zeros((number, length + 1), "int32")
    sequences[:, 0] = rng.integers(0, words, number)
    for place in range(length):
        random = rng.integers(0, words, number)
        known = rng.uniform(size=number) < 0.9
        sequences[:, place + 1] = np.where(known, follows[sequences[:, place]], random)
    return sequences[:, :-1], sequences[:, 1:]


# Plants: functions from a tensor `[batch, 16, WIDTH]` to one, and the names of the parts to find.


class Variance(layers.Layer):
    def call(self, x):
        deviation = ops.sqrt(ops.var(3000.0 * x, axis=-1, keepdims=True) + 1.0)
        return 3000.0 * x / deviation


class MeanOfSquares(layers.Layer):
    def call(self, x):
        size = ops.sqrt(ops.mean(ops.square(400.0 * x), axis=-1, keepdims=True))
        return x + 1e-3 * size


class HarmlessInfinity(layers.Layer):
    """A mask of minus infinity, as it should be."""

    def call(self, x):
        return x + ops.softmax(ops.where(x > 0, x, -math.inf), axis=-1)


class AdditiveMask(layers.Layer):
    """0 times minus infinity, because -1e9 overflows in the mask."""

    def call(self, x):
        mask = ops.cast(x > 0, x.dtype)
        return x + ops.softmax(x + (1 - mask) * -1e9, axis=-1)


class ProductInside(layers.Layer):
    """No inner layer overflows, but the product of two of them does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (layers.Dense(16, kernel_initializer=normal(100.0)) for _ in range(2))
        self.norm, self.out = layers.LayerNormalization(), layers.Dense(WIDTH)

    def call(self, x):
        return x + self.out(self.norm(self.a(x) * self.b(x)))


def name_of(tensor):
    return tensor._keras_history.operation.name


def product_between(x):
    product = ops.multiply(x, 1e5)
    return product / 1e5, {name_of(product)}


def exponential(x):
    exponential = ops.exp(0.0 * ops.abs(x) + 12.5)
    return x + 0.01 * ops.log(exponential), {name_of(exponential)}


def sum_of_magnitudes(x):
    total = ops.sum(3000.0 * ops.abs(x), axis=1, keepdims=True)
    return x + total * 2.0**-23, {name_of(total)}


def one_layer(kind):
    def plant(x):
        layer = kind()
        return layer(x), {layer.name}

    return plant


def handwritten(x):
    norm = HandwrittenRMSNorm()
    return norm(layers.Rescaling(300.0)(x)), {norm.name}


def dense_before(norm, is_flagged):
    def plant(x):
        dense, normalize = layers.Dense(WIDTH, kernel_initializer=normal(2e4)), norm()
        return normalize(dense(x)), {dense.name} | ({normalize.name} if is_flagged else set())

    return plant


def attention(x, **kwargs):
    layer = layers.MultiHeadAttention(4, WIDTH // 4, kernel_initializer=normal(60.0), **kwargs)
    return x + layers.LayerNormalization()(layer(x, x)), {layer.name}


def nothing(x):
    return x + layers.Dense(WIDTH)(layers.LayerNormalization()(x)), set()


PLANTS = {
    "product between layers": product_between,
    "exponential": exponential,
    "sum": sum_of_magnitudes,
    "RMSNorm by hand": handwritten,
    "variance": one_layer(Variance),
    "mean of squares": one_layer(MeanOfSquares),
    "additive mask of -1e9": one_layer(AdditiveMask),
    "product inside a layer": one_layer(ProductInside),
    "Dense before RMSNormalization": dense_before(layers.RMSNormalization, True),
    "Dense before LayerNormalization": dense_before(layers.LayerNormalization, False),
    "Dense before BatchNormalization": dense_before(layers.BatchNormalization, True),
    "attention": attention,
    "attention with dropout": functools.partial(attention, dropout=0.1),
    "harmless: a mask of -Inf": lambda x: (HarmlessInfinity()(x), set()),
    "harmless: a sound block": nothing,
}


def planted_transformer(plant, site):
    inputs, x = patches()
    names = set()
    for block in range(3):
        if block == site:
            x, names = plant(x)
        y = layers.MultiHeadAttention(4, WIDTH // 4, dropout=0.1)
        z = layers.LayerNormalization()(x)
        x = layers.Add()([x, y(z, z, use_causal_mask=block == 1)])
        z = layers.Dense(2 * WIDTH, "gelu")(layers.RMSNormalization()(x))
        x = layers.Add()([x, layers.Dropout(0.1)(layers.Dense(WIDTH)(z))])
    return classifier(inputs, pooled(x)), names


def planted_convnet(plant, site):
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(WIDTH, 3, strides=8, padding="same")(inputs)
    conv = functools.partial(layers.Conv2D, WIDTH, 3, padding="same")
    names = set()
    for block in range(3):
        if block == site:
            x, names = plant(layers.Reshape((16, WIDTH))(x))
            x = layers.Reshape((4, 4, WIDTH))(x)
        y = conv()(layers.ReLU()(layers.BatchNormalization()(x)))
        y = conv()(layers.ReLU()(layers.GroupNormalization(4)(y)))
        x = layers.Add()([x, y])
    return classifier(inputs, layers.GlobalAveragePooling2D()(x)), names


HOSTS = {"transformer": planted_transformer, "convnet": planted_convnet}
