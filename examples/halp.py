"""Trains logistic regression on handwritten digits until the gradient vanishes, in few bits.

The loss has an L2 penalty, so there is one optimum, where the gradient over all data is zero. The
example prints and draws how far each optimizer comes:

    SGD            in float32: the noise of batches keeps it away from the optimum
    SGD, 8 bits    weights are rounded to 8 bits after each step, stochastically
    SVRG           in float32: no noise is left at the optimum
    HALP           SVRG with offsets of 2, 4, 8 and 16 bits: `als.BitCentered` and `als.Recenter`
"""

import argparse
import pathlib

import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import tf_adaptive_ls as als

PENALTY = 0.02
LEARNING_RATE = 0.5
BATCH_SIZE = 64
# `mu` for HALP, by bits. With 2 bits, steps between offsets are coarse; a larger mu makes them
# finer.
MU = {2: 0.6, 4: 0.15, 8: 0.15, 16: 0.15}
# The largest weight. Those of the optimum are smaller.
LARGEST_WEIGHT = 1.0
WAYS = ("SGD", "SGD, 8 bits", "SVRG", *(f"HALP, {bits} bits" for bits in MU))


class RoundTo8Bits(keras.callbacks.Callback):
    """Rounds weights stochastically to 256 numbers, after every step."""

    def __init__(self, seed):
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def on_train_batch_end(self, batch, logs=None):
        scale = LARGEST_WEIGHT / 127
        for weight in self.model.trainable_variables:
            exact = weight.numpy() / scale
            rounded = np.floor(exact + self.rng.uniform(size=exact.shape))
            weight.assign(np.clip(rounded, -128, 127) * scale)


class NoteGradient(keras.callbacks.Callback):
    """Notes the norm of the gradient over all data after every epoch, computed in float64."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x.astype("float64"), y
        self.norms = []

    def on_epoch_end(self, epoch, logs=None):
        kernel, bias = (w.astype("float64") for w in self.model.get_weights())
        logits = self.x @ kernel + bias
        errors = np.exp(logits - logits.max(axis=-1, keepdims=True))
        errors /= errors.sum(axis=-1, keepdims=True)
        errors[np.arange(len(self.y)), self.y] -= 1
        by_kernel = self.x.T @ errors / len(self.y) + 2 * PENALTY * kernel
        by_bias = errors.mean(axis=0) + 2 * PENALTY * bias
        self.norms.append(float(np.sqrt((by_kernel**2).sum() + (by_bias**2).sum())))


def load_data():
    """Pixels around zero, and labels."""
    images, labels = load_digits(return_X_y=True)
    return ((images - images.mean(axis=0)) / 16).astype("float32"), labels


def train(way, x, y, epochs, seed):
    """The norm of the gradient after every epoch, and the accuracy at the end."""
    keras.utils.set_random_seed(seed)
    penalty = keras.regularizers.L2(PENALTY)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(10, kernel_regularizer=penalty, bias_regularizer=penalty),
        ]
    )
    note = NoteGradient(x, y)
    if way.startswith("SGD"):
        optimizer = keras.optimizers.SGD(LEARNING_RATE)
        callbacks = [note] if way == "SGD" else [RoundTo8Bits(seed), note]
    else:
        bits = None if way == "SVRG" else int(way.split()[1])
        optimizer = als.BitCentered(LEARNING_RATE, bits=bits, mu=MU.get(bits, 1.0), seed=seed)
        two_epochs = 2 * -(-len(x) // BATCH_SIZE)
        callbacks = [als.Recenter((x, y), every=two_epochs, verbose=False), note]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, metrics=["accuracy"])
    history = model.fit(x, y, BATCH_SIZE, epochs, callbacks=callbacks, verbose=0).history
    return note.norms, history["accuracy"][-1]


def draw(norms):
    """A figure of norms of gradients, by way."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for way, values in norms.items():
        style = "-" if way.startswith("HALP") else "--"
        axes.semilogy(np.arange(1, len(values) + 1), values, style, label=way)
    axes.set(xlabel="epochs", ylabel="norm of the gradient over all data")
    axes.legend()
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="FILE",
        default=pathlib.Path("runs/halp.png"),
        help="where to save the picture; default: %(default)s",
    )
    parser.add_argument("--tiny", action="store_true", help="two epochs, to see that it runs")
    args = parser.parse_args(argv)
    epochs = 2 if args.tiny else args.epochs
    x, y = load_data()
    norms = {}
    print(f"Norm of the gradient after {epochs} epochs, and accuracy on the training data:")
    for way in WAYS:
        norms[way], accuracy = train(way, x, y, epochs, args.seed)
        print(f"{way:15} {norms[way][-1]:.1e}  {accuracy:.2%}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(norms).savefig(args.output)
    print(f"\nSaved the picture to {args.output}")


if __name__ == "__main__":
    main()
