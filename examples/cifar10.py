"""Trains ResNet-20 on CIFAR-10 in float16, with the recipe of the paper on adaptive loss scaling.

Batches of 128, SGD with momentum 0.9, a learning rate of 0.1 that is divided by ten at epochs 81
and 122 of 164, and weight decay 1e-4 (Zhao et al. 2019; network and recipe: He et al. 2016). Images
are randomly shifted and mirrored. Prints the test accuracy, and the scales of all layers.
"""

import pathlib

import common
import keras
import numpy as np
from keras import layers, ops

import tf_adaptive_ls as als

# The gradient of 5e-5 * w**2 is 1e-4 * w.
DECAY = keras.regularizers.L2(5e-5)


def build_model(blocks=3):
    """ResNet-20 for images `[32, 32, 3]`; shortcuts are padded with zeros."""
    inputs = keras.Input((32, 32, 3))
    x = normalized(convolution(inputs, 16))
    for filters in (16, 32, 64):
        for block in range(blocks):
            strides = 2 if filters > 16 and block == 0 else 1
            y = normalized(convolution(x, filters, strides))
            y = layers.BatchNormalization()(convolution(y, filters))
            if strides == 2:
                x = ops.pad(x[:, ::2, ::2], [[0, 0], [0, 0], [0, 0], [0, filters // 2]])
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, dtype="float32", kernel_regularizer=DECAY)(x))


def convolution(x, filters, strides=1):
    return layers.Conv2D(
        filters,
        3,
        strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        kernel_regularizer=DECAY,
    )(x)


def normalized(x):
    return layers.ReLU()(layers.BatchNormalization()(x))


class Shifted(keras.utils.PyDataset):
    """Batches of images, randomly shifted by up to four pixels and mirrored."""

    def __init__(self, x, y, batch_size, seed):
        super().__init__()
        self._padded = np.pad(x, [(0, 0), (4, 4), (4, 4), (0, 0)])
        self._y, self._batch_size = y, batch_size
        self._rng = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        return len(self._y) // self._batch_size

    def __getitem__(self, index):
        chosen = self._order[index * self._batch_size :][: self._batch_size]
        images = np.empty((len(chosen), 32, 32, 3), "float32")
        draws = self._rng.integers(0, [9, 9, 2], (len(chosen), 3))
        for image, padded, (top, left, mirrored) in zip(
            images, self._padded[chosen], draws, strict=True
        ):
            shifted = padded[top : top + 32, left : left + 32]
            image[:] = shifted[:, ::-1] if mirrored else shifted
        return images, self._y[chosen]

    def on_epoch_end(self):
        self._order = self._rng.permutation(len(self._y))


def load_data(path):
    """CIFAR-10, normalized: `x_train, y_train, x_test, y_test`."""
    if path is None:
        (x_train, y_train), (x_test, y_test) = keras.datasets.cifar10.load_data()
    else:
        with np.load(path) as arrays:
            names = ("x_train", "y_train", "x_test", "y_test")
            x_train, y_train, x_test, y_test = (arrays[name] for name in names)
    mean, deviation = [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]
    x_train, x_test = (((x - mean) / deviation).astype("float32") for x in (x_train, x_test))
    return x_train, y_train.reshape(-1), x_test, y_test.reshape(-1)


def main(argv=None):
    parser = common.parser(__doc__, 164, 128, "cifar10.keras")
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        metavar="FILE",
        help="CIFAR-10 as an .npz of x_train, y_train, x_test, y_test; downloaded if left out",
    )
    parser.add_argument(
        "--record",
        type=pathlib.Path,
        metavar="FILE",
        help="where to record the scales, for `python -m tf_adaptive_ls FILE`; default: nowhere",
    )
    args = parser.parse_args(argv)
    common.begin(args)
    x_train, y_train, x_test, y_test = load_data(args.data)
    x_train, y_train = common.whole_batches(args, x_train, y_train)
    batches = Shifted(x_train, y_train, args.batch_size, args.seed)

    model = als.wrap_model(build_model())
    # A shorter run decays at the same fractions of its length.
    falls = [round(args.epochs * epoch / 164) * len(batches) for epoch in (81, 122)]
    rate = keras.optimizers.schedules.PiecewiseConstantDecay(falls, [0.1, 0.01, 0.001])
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(rate, momentum=0.9))
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=True,
    )
    print("Compiling; the first step takes a while.")
    model.fit(batches, epochs=args.epochs, callbacks=[als.LossScaleMonitor(args.record)])

    _, accuracy = model.evaluate(x_test, y_test, 500, verbose=0)
    print(f"\nTest accuracy: {accuracy:.2%}")
    common.say(model, optimizer)
    common.save(model, args.output)


if __name__ == "__main__":
    main()
