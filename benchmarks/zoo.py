"""Models whose gradients are hard for float16, and easy ones, each with a task on images.

Models are built under the current dtype policy. Under `mixed_float16`, they end in float32, as
Keras recommends. A CPU can train them for some hundred steps.
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops

SIDE = 32
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and its task.

    Args:
        name: Short name for tables.
        build: `() -> keras.Model`.
        examples: `(images, labels) -> (x, y)`, NumPy arrays.
        loss: `(y, outputs) -> scalar`, float32.
        learning_rate: Of Adam.
        batch_size: For training, and for the batches on which gradients are compared.
    """

    name: str
    build: Callable
    examples: Callable
    loss: Callable
    learning_rate: float = 1e-3
    batch_size: int = 16


# Images, and tasks on them.


def normalized(images):
    return ((images - 0.5) / 0.25).astype("float32")


def gray(images, side):
    """Gray images `[n, side, side]` in [0, 1]: the middle, averaged for a small `side`."""
    x = images.mean(axis=-1)
    k = SIDE // side
    edge = (SIDE - k * side) // 2
    x = x[:, edge : SIDE - edge, edge : SIDE - edge]
    return x.reshape(len(x), side, k, side, k).mean(axis=(2, 4))


def classify(images, labels):
    return normalized(images), labels


def classify_vector(images, labels):
    return normalized(gray(images, 16)).reshape(len(images), -1), labels


def classify_sequence(side):
    def examples(images, labels):
        return normalized(gray(images, side)).reshape(len(images), side * side, 1), labels

    return examples


def reconstruct(images, labels):
    return normalized(images), images


def colorize(images, labels):
    return normalized(gray(images, SIDE))[..., None], images


def classify_and_reconstruct(images, labels):
    return normalized(images), (labels, images)


def measure_brightness(size):
    """Regression to the mean brightness of the middle of the image, times `size`."""

    def examples(images, labels):
        x, _ = classify_vector(images, labels)
        middle = images[:, 8:24, 8:24].mean(axis=(1, 2, 3))
        return x, (size * middle).astype("float32")[:, None]

    return examples


def detect(images, labels):
    """Finds a small image on a canvas: class and box for each cell of two grids.

    Class 0 is the background. A box is the object's offset from the center of the cell and its
    size, in cells.
    """
    n = len(images)
    rng = np.random.default_rng(int(labels.sum()))
    canvas = np.full_like(images, 0.5)
    targets = [np.zeros((n, cells, cells, 5), "float32") for cells in (8, 4)]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        grid = rng.integers(2)
        size = (8, 16)[grid]
        k = SIDE // size
        small = image.reshape(size, k, size, k, 3).mean(axis=(1, 3))
        top, left = rng.integers(SIDE - size + 1, size=2)
        canvas[i, top : top + size, left : left + size] = small
        center = (np.array([top, left]) + size / 2) * (8, 4)[grid] / SIDE
        row, column = center.astype(int)
        offset = center - (row + 0.5, column + 0.5)
        targets[grid][i, row, column] = [label + 1, *offset, np.log2(size / 8), 1.0]
    return normalized(canvas), tuple(targets)


# Losses.


def cross_entropy(labels, scores):
    return ops.mean(keras.losses.sparse_categorical_crossentropy(labels, scores, from_logits=True))


def mean_square(targets, outputs):
    return ops.mean(ops.square(outputs - targets))


def sum_square(targets, outputs):
    return ops.sum(ops.square(outputs - targets))


def unequal_pair(targets, outputs):
    labels, images = targets
    scores, reconstructed = outputs
    return cross_entropy(labels, scores) + 1e-6 * mean_square(images, reconstructed)


def detection(targets, outputs):
    """The loss of SSD: cross entropy of classes and smooth L1 of boxes, per object."""
    total = 0.0
    for target, scores, box in zip(targets, outputs[::2], outputs[1::2], strict=True):
        label, place, found = target[..., 0], target[..., 1:4], target[..., 4]
        classes = keras.losses.sparse_categorical_crossentropy(label, scores, from_logits=True)
        distance = ops.abs(box - place)
        smooth = ops.where(distance < 1, 0.5 * ops.square(distance), distance - 0.5)
        total += ops.mean(ops.sum(classes + found * ops.sum(smooth, axis=-1), axis=(1, 2)))
    return total


# Models.


def _wide():
    """The dtype in which models end: float32, or float64 for a float64 model."""
    return keras.config.dtype_policy().variable_dtype


def _scores(x):
    return layers.Dense(CLASSES, dtype=_wide(), name="scores")(x)


def _conv(x, filters, kernel=3, strides=1, **kwargs):
    return layers.Conv2D(filters, kernel, strides, padding="same", **kwargs)(x)


def resnet(depth=20):
    """He et al. (2016) for CIFAR: `depth` = 6n + 2, identity shortcuts padded with zeros."""
    blocks = (depth - 2) // 6
    init = {"kernel_initializer": "he_normal", "use_bias": False}

    def normalized_relu(x):
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))

    inputs = keras.Input((SIDE, SIDE, 3))
    x = normalized_relu(_conv(inputs, 16, **init))
    for filters in (16, 32, 64):
        for block in range(blocks):
            strides = 2 if filters > 16 and block == 0 else 1
            y = normalized_relu(_conv(x, filters, strides=strides, **init))
            y = layers.BatchNormalization(momentum=0.9)(_conv(y, filters, **init))
            if strides == 2:
                x = ops.pad(x[:, ::2, ::2], [[0, 0], [0, 0], [0, 0], [0, filters // 2]])
            x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, _scores(layers.GlobalAveragePooling2D()(x)))


def vgg(shape=(SIDE, SIDE, 3)):
    """Ten convolutions and two dense layers, without normalization."""
    inputs = x = keras.Input(shape)
    for filters in (16, 32, 64, 64, 64):
        for _ in range(2):
            x = _conv(x, filters, activation="relu", kernel_initializer="he_normal")
        x = layers.MaxPooling2D(padding="same")(x)
    x = layers.Dense(64, activation="relu", kernel_initializer="he_normal")(layers.Flatten()(x))
    return keras.Model(inputs, _scores(x))


def plain_mlp(depth, gain, activation="relu", bias=0.0, units=64):
    """Dense layers whose weights make signals grow by `gain` per layer, in both directions.

    A `bias` keeps the signal up in the forward pass if `gain` is small.
    """
    inputs = x = keras.Input((256,))
    scale = gain**2 * (2.0 if activation == "relu" else 1.0)
    for _ in range(depth - 1):
        x = layers.Dense(
            units,
            activation,
            kernel_initializer=keras.initializers.VarianceScaling(scale),
            bias_initializer=keras.initializers.Constant(bias),
        )(x)
    return keras.Model(inputs, _scores(x))


def vanishing_mlp():
    """Divides gradients by five in each of 16 layers."""
    return plain_mlp(17, 0.2, bias=0.5)


def sigmoid_mlp():
    return plain_mlp(11, 1.0, "sigmoid")


def lstm(steps, units=32):
    inputs = keras.Input((steps, 1))
    return keras.Model(inputs, _scores(layers.LSTM(units)(inputs)))


def transformer(blocks=3, width=64, heads=4, patch=4):
    """Pre-norm encoder over patches (Dosovitskiy et al. 2021)."""
    inputs = keras.Input((SIDE, SIDE, 3))
    x = layers.Reshape((-1, width))(_conv(inputs, width, patch, patch))
    x = PositionEmbedding()(x)
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(heads, width // heads)(y, y)])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(y))
        x = layers.Add()([x, y])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, _scores(x))


@keras.saving.register_keras_serializable("tf_adaptive_ls_benchmarks")
class PositionEmbedding(layers.Layer):
    def build(self, shape):
        self.positions = self.add_weight(
            shape=shape[1:], initializer=keras.initializers.RandomNormal(stddev=0.02)
        )

    def call(self, x):
        return x + self.positions


def unet():
    """Three levels; colors a gray image."""
    inputs = x = keras.Input((SIDE, SIDE, 1))
    skips = []
    for filters in (16, 32):
        x = _conv(_conv(x, filters, activation="relu"), filters, activation="relu")
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = _conv(_conv(x, 64, activation="relu"), 64, activation="relu")
    for filters in (32, 16):
        x = layers.Conv2DTranspose(filters, 2, 2, padding="same")(x)
        x = layers.Concatenate()([x, skips.pop()])
        x = _conv(_conv(x, filters, activation="relu"), filters, activation="relu")
    return keras.Model(inputs, _conv(x, 3, 1, dtype=_wide()))


def ssd():
    """Classes and boxes from two feature maps, as in Liu et al. (2016)."""
    inputs = x = keras.Input((SIDE, SIDE, 3))
    outputs = []
    for filters in (16, 32, 64, 64):
        x = _conv(x, filters, strides=1 if filters == 16 else 2, activation="relu")
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(_conv(x, filters)))
        if x.shape[1] <= 8:
            outputs += [_conv(x, CLASSES + 1, dtype=_wide()), _conv(x, 3, dtype=_wide())]
    return keras.Model(inputs, outputs)


def two_losses():
    """A shared body with a classifier and a decoder."""
    inputs = keras.Input((SIDE, SIDE, 3))
    body = _conv(_conv(inputs, 16, strides=2, activation="relu"), 32, strides=2, activation="relu")
    y = layers.Conv2DTranspose(16, 4, 2, padding="same", activation="relu")(body)
    y = layers.Conv2DTranspose(3, 4, 2, padding="same", dtype=_wide())(y)
    x = _conv(body, 64, strides=2, activation="relu")
    return keras.Model(inputs, [_scores(layers.GlobalAveragePooling2D()(x)), y])


def regression(size):
    """An MLP whose outputs start as small as its targets of size `size`."""
    inputs = x = keras.Input((256,))
    for _ in range(3):
        x = layers.Dense(64, activation="relu", kernel_initializer="he_normal")(x)
    init = keras.initializers.VarianceScaling(min(size, 1.0) ** 2)
    return keras.Model(inputs, layers.Dense(1, dtype=_wide(), kernel_initializer=init)(x))


def autoencoder():
    inputs = x = keras.Input((SIDE, SIDE, 3))
    for filters in (16, 32, 64):
        x = _conv(x, filters, strides=2, activation="relu")
    x = layers.Dense(32)(layers.Flatten()(x))
    x = layers.Reshape((4, 4, 64))(layers.Dense(4 * 4 * 64, activation="relu")(x))
    for filters in (32, 16):
        x = layers.Conv2DTranspose(filters, 4, 2, padding="same", activation="relu")(x)
    x = layers.Conv2DTranspose(3, 4, 2, padding="same", dtype=_wide())(x)
    return keras.Model(inputs, x)


TASKS = {
    task.name: task
    for task in (
        Task("ResNet-20", resnet, classify, cross_entropy),
        Task("VGG, not normalized", vgg, classify, cross_entropy),
        Task("MLP 17, vanishing", vanishing_mlp, classify_vector, cross_entropy),
        Task("MLP 40, exploding", lambda: plain_mlp(40, 1.2), classify_vector, cross_entropy, 1e-5),
        Task(
            "10 sigmoid layers",
            lambda: plain_mlp(11, 1.0, "sigmoid"),
            classify_vector,
            cross_entropy,
        ),
        Task("LSTM, 256 steps", lambda: lstm(256), classify_sequence(16), cross_entropy),
        Task("LSTM, 784 steps", lambda: lstm(784), classify_sequence(28), cross_entropy),
        Task("Transformer", transformer, classify, cross_entropy),
        Task("U-Net", unet, colorize, mean_square),
        Task("SSD", ssd, detect, detection),
        Task("Losses 1 and 1e-6", two_losses, classify_and_reconstruct, unequal_pair),
        Task("Targets 1e-6", lambda: regression(1e-6), measure_brightness(1e-6), mean_square, 1e-7),
        Task("Targets 1e6", lambda: regression(1e6), measure_brightness(1e6), mean_square),
        Task("Autoencoder, sum", autoencoder, reconstruct, sum_square),
    )
}
