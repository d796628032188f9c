"""Trains an LSTM that reads handwritten digits pixel by pixel, in float16.

The gradient of the first of 64 time steps has passed through all the others, so the gradients of an
LSTM have a wide range. Prints the test accuracy, and the scales of all layers.
"""

import common
import keras
import numpy as np
from digits import load_data
from keras import layers

import tf_adaptive_ls as als


def build_model(units=48):
    """Sequences of pixels `[64, 1]` to scores of ten classes."""
    inputs = keras.Input((64, 1))
    x = layers.LSTM(units, name="lstm")(inputs)
    return keras.Model(inputs, layers.Dense(10, dtype="float32", name="scores")(x))


def main(argv=None):
    args = common.parser(__doc__, 30, 64, "lstm.keras").parse_args(argv)
    common.begin(args)
    x_train, x_test, y_train, y_test = load_data()
    x_train, y_train = common.whole_batches(args, x_train.reshape(-1, 64, 1), y_train)
    x_test = x_test.reshape(-1, 64, 1)

    model = als.wrap_model(build_model())
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(5e-3, clipnorm=1.0))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=True)
    print("Compiling; the first step takes a while.")
    model.fit(x_train, y_train, args.batch_size, epochs=args.epochs)

    accuracy = np.mean(np.argmax(model.predict(x_test, len(x_test), verbose=0), 1) == y_test)
    print(f"\nTest accuracy: {accuracy:.2%}")
    common.say(model, optimizer)
    common.save(model, args.output)


if __name__ == "__main__":
    main()
