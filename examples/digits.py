"""Trains a small residual network on handwritten digits in float16.

The images are the 1,797 of scikit-learn, which come with that package. Prints the
test accuracy, how many steps were skipped, and what each layer's gradients do;
saves the trained model as plain Keras.
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
    """Two convolutions, normalised before each, around a short cut."""
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


def main(argv=None):
    args = common.parser(__doc__, 15, 64, "digits.keras").parse_args(argv)
    common.begin(args)
    x_train, x_test, y_train, y_test = load_data()
    x_train, y_train = common.whole_batches(args, x_train, y_train)

    model = als.wrap_model(build_model())
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(2e-3))
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=True,
    )
    print("Compiling; the first step takes a while.")
    model.fit(x_train, y_train, args.batch_size, epochs=args.epochs)

    accuracy = np.mean(np.argmax(model.predict(x_test, len(x_test), verbose=0), 1) == y_test)
    print(f"\nTest accuracy: {accuracy:.2%}")
    common.say(model, optimizer)
    common.save(model, args.output)


if __name__ == "__main__":
    main()
