"""Trains a small ResNet on handwritten digits, with and without float16.

It trains in three ways: in float32, in float16 with one loss scale, and in float16 with a loss
scale per layer. Prints the three accuracies, whether one loss scale would have been enough, the
number of skipped steps, and the scales of all layers. Saves the last model as a plain Keras model.
The 1,797 images come with scikit-learn.
"""

import common
import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tf_adaptive_ls as als


def build_model():
    """A ResNet with three blocks for images `[8, 8, 1]` and ten classes."""
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, padding="same", use_bias=False, name="stem")(inputs)
    for i, filters in enumerate((16, 32, 64)):
        x = residual_block(x, filters, stride=1 if i == 0 else 2, name=f"block{i + 1}")
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(10, dtype="float32", name="scores")(x)
    return keras.Model(inputs, outputs, name="digits")


def residual_block(x, filters, stride, name):
    """Two convolutions, each after a normalization, with a shortcut around them."""
    y = layers.ReLU()(layers.BatchNormalization(momentum=0.9, name=f"{name}_norm1")(x))
    if stride > 1:
        x = layers.Conv2D(filters, 1, stride, use_bias=False, name=f"{name}_shortcut")(y)
    conv = {"padding": "same", "use_bias": False}
    y = layers.Conv2D(filters, 3, stride, name=f"{name}_conv1", **conv)(y)
    y = layers.ReLU()(layers.BatchNormalization(momentum=0.9, name=f"{name}_norm2")(y))
    y = layers.Conv2D(filters, 3, name=f"{name}_conv2", **conv)(y)
    return layers.Add()([x, y])


def load_data():
    """Digits as `(x_train, x_test, y_train, y_test)`, images in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    return train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)


def train(model, optimizer, args, data):
    """Trains a model, and returns its accuracy on the test images."""
    x_train, x_test, y_train, y_test = data
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=True,
    )
    model.fit(x_train, y_train, args.batch_size, args.epochs, verbose=args.verbose)
    scores = model.predict(x_test, len(x_test), verbose=0)
    return np.mean(np.argmax(scores, axis=-1) == y_test)


def verdict(calibration):
    """Whether one loss scale would have been enough for every layer."""
    losing = [layer.name for layer in calibration.layers if layer.lost_by_one_scale]
    if not losing:
        return "One loss scale is enough for this model: no layer would lose gradients under it."
    return f"This model needs a scale per layer: one scale would lose gradients of {losing}."


def main(argv=None):
    parser = common.parser(__doc__, 8, 64, "digits.keras")
    parser.add_argument("--verbose", type=int, default=2, help="of `fit`; default: %(default)s")
    args = parser.parse_args(argv)
    x_train, x_test, y_train, y_test = load_data()
    x_train, y_train = common.whole_batches(args, x_train, y_train)
    data = x_train, x_test, y_train, y_test

    accuracies = {}
    print("1. float32. The first epoch includes compiling.")
    common.begin(args, policy="float32")
    accuracies["float32"] = train(build_model(), keras.optimizers.Adam(2e-3), args, data)

    print("2. float16, with the loss scale of Keras")
    common.begin(args)
    one_scale = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(2e-3))
    accuracies["float16, one loss scale (Keras)"] = train(build_model(), one_scale, args, data)

    print("3. float16, with a loss scale for each layer")
    common.begin(args)
    model = als.wrap_model(build_model())
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(2e-3))
    accuracies["float16, a scale per layer"] = train(model, optimizer, args, data)

    print("\nTest accuracy:")
    for name, accuracy in accuracies.items():
        print(f"  {name:32} {accuracy:.2%}")
    print(verdict(als.calibrate(model, (x_train, y_train), batch_size=args.batch_size)))
    common.say(model, optimizer)
    common.save(model, args.output)


if __name__ == "__main__":
    main()
