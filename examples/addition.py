"""Trains a small transformer to add three-digit numbers, symbol by symbol, in float16.

A sum is a line of text such as "347+85=234". The result is written backwards, so that each digit
follows from those before it. The transformer predicts each symbol from the symbols to its left.
Prints the share of correct results for sums that it was not trained on, and the scales of all
layers. (On a CPU, JAX has no float16 attention: use TensorFlow there, or a GPU.)
"""

import common
import keras
import numpy as np
from keras import layers, ops

import tf_adaptive_ls as als

DIGITS = 3
SYMBOLS = "0123456789+= "
LENGTH = 3 * DIGITS + 3
STEPS = 600  # per epoch


def lines_of(pairs):
    """Lines "a+b=c" with c backwards, as symbol codes `[n, LENGTH]`."""
    lines = [f"{a}+{b}={str(a + b)[::-1]}".ljust(LENGTH) for a, b in pairs]
    return np.array([[SYMBOLS.index(symbol) for symbol in line] for line in lines], "int32")


def build_model(blocks=2, width=64, heads=4):
    """A decoder with pre-norm blocks: symbols `[LENGTH - 1]` to scores of the next symbols."""
    inputs = keras.Input((LENGTH - 1,), dtype="int32")
    positions = layers.Embedding(LENGTH - 1, width, name="positions")(ops.arange(LENGTH - 1)[None])
    x = layers.Embedding(len(SYMBOLS), width, name="symbols")(inputs) + positions
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=True)
        x = layers.Add()([x, y])
        y = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(width)(y)])
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(len(SYMBOLS), dtype="float32", name="scores")(x))


def results(model, lines):
    """The lines, with the results that the model writes after "="."""
    lines = lines.copy()
    equals = (lines == SYMBOLS.index("=")).argmax(axis=1)
    for place in range(1, LENGTH):
        scores = model.predict(lines[:, :-1], len(lines), verbose=0)[:, place - 1]
        lines[:, place] = np.where(place > equals, scores.argmax(axis=-1), lines[:, place])
    return lines


def main(argv=None):
    args = common.parser(__doc__, 6, 128, "addition.keras").parse_args(argv)
    common.begin(args)
    rng = np.random.default_rng(args.seed)
    pairs = rng.integers(0, 10**DIGITS, (2000 + args.batch_size * STEPS, 2)).tolist()
    tested = set(map(tuple, pairs[:1000]))
    new = [pair for pair in pairs[1000:] if tuple(pair) not in tested]
    test, lines = lines_of(pairs[:1000]), lines_of(new[: args.batch_size * STEPS])
    (lines,) = common.whole_batches(args, lines)
    answers = lines[:, 1:]
    # The model should learn the results only.
    weights = np.cumsum(lines == SYMBOLS.index("="), axis=1)[:, :-1].astype("float32")

    model = als.wrap_model(build_model())
    steps = args.epochs * len(lines) // args.batch_size
    rate = keras.optimizers.schedules.CosineDecay(3e-3, steps)
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(rate))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, weighted_metrics=["accuracy"], jit_compile=True)
    print("Compiling; the first step takes a while.")
    model.fit(
        lines[:, :-1], answers, args.batch_size, args.epochs, sample_weight=weights, verbose=2
    )

    found = results(model, test)
    right = (found == test).all(axis=1)
    print(f"\nRight sums, of {len(test)} new ones: {right.mean():.1%}")
    for line, is_right in zip(found[:5], right, strict=False):
        numbers, result = "".join(SYMBOLS[i] for i in line).split("=")
        print(f"  {numbers} = {result.strip()[::-1]}{'' if is_right else '  (wrong)'}")
    common.say(model, optimizer)
    common.save(model, args.output)


if __name__ == "__main__":
    main()
