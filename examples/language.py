"""Trains a small Transformer to go on with Python source code, letter by letter, in float16.

The text is the source of some packages of Python's standard library. Prints how many bits it
needs for a letter of a package that it has not seen, what it writes by itself, and what each
layer's gradients do. (On a CPU, JAX has no attention in float16: use TensorFlow there, or a GPU.)
"""

import pathlib
import sysconfig

import common
import keras
import numpy as np
from keras import layers, ops

import tf_adaptive_ls as als

LENGTH = 64
LETTERS = 128  # ASCII
TRAINED_ON, TESTED_ON = ("asyncio", "email", "http", "unittest", "xml"), ("urllib",)


def build_model(blocks=2, width=128, heads=4):
    """A decoder of pre-norm blocks: codes of letters `[LENGTH]` to scores of the next ones."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    positions = layers.Embedding(LENGTH, width, name="positions")(ops.arange(LENGTH)[None])
    x = layers.Embedding(LETTERS, width, name="letters")(inputs) + positions
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=True)
        x = layers.Add()([x, y])
        y = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(width)(y)])
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(LETTERS, dtype="float32", name="scores")(x))


def load_data(packages):
    """Pieces of source code as codes of letters, and the same moved on by one: `[n, LENGTH]`."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = [path for name in packages for path in sorted((library / name).rglob("*.py"))]
    text = "".join(path.read_text("utf-8") for path in paths).encode("ascii", "replace")
    codes = np.frombuffer(text, "uint8").astype("int32")
    number = (len(codes) - 1) // LENGTH
    return [codes[start:][: number * LENGTH].reshape(number, LENGTH) for start in (0, 1)]


def write(model, begin, number, rng):
    """The text that a model writes after `begin`, drawing each letter by its probability."""
    text = begin
    for _ in range(number):
        seen = np.frombuffer(text[-LENGTH:].encode(), "uint8").astype("int32")
        padded = np.pad(seen, (0, LENGTH - len(seen)))[None]
        scores = np.array(model.predict_on_batch(padded)[0, len(seen) - 1], "float64")
        chances = np.exp(scores - scores.max())
        text += chr(rng.choice(LETTERS, p=chances / chances.sum()))
    return text


def main(argv=None):
    args = common.parser(__doc__, 3, 64, "language.keras").parse_args(argv)
    common.begin(args)
    rng = np.random.default_rng(args.seed)
    x, y = load_data(TRAINED_ON)
    order = rng.permutation(len(x))
    x, y = common.whole_batches(args, x[order], y[order])

    model = als.wrap_model(build_model())
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(2e-3))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=True)
    print("Compiling; the first step takes a while.")
    model.fit(x, y, args.batch_size, epochs=args.epochs)

    x, y = common.whole_batches(args, *load_data(TESTED_ON))
    bits = model.evaluate(x, y, args.batch_size, verbose=0) / np.log(2)
    print(f"\nBits per letter of a package not seen: {bits:.3f}")
    print("It writes:\n")
    print(write(model, "def ", 20 if args.tiny else 200, rng), "\n")
    common.say(model, optimizer)
    common.save(model, args.output)


if __name__ == "__main__":
    main()
