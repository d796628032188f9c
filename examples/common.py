"""What the examples share: options, the set-up, and the output at the end."""

import argparse
import math
import pathlib

import keras

import tf_adaptive_ls as als


def parser(description, epochs, batch_size, output):
    """An `ArgumentParser` with the options that all examples have."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--epochs", type=int, default=epochs, help="default: %(default)s")
    result.add_argument("--batch-size", type=int, default=batch_size, help="default: %(default)s")
    result.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    result.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="FILE",
        default=pathlib.Path("runs") / output,
        help="where to save the trained model, plain Keras again; default: %(default)s",
    )
    result.add_argument(
        "--tiny", action="store_true", help="one epoch on little data, to see that it runs"
    )
    return result


def begin(args, policy="mixed_float16"):
    """Sets the seed and the dtype policy. Call it before a model is created."""
    if args.tiny:
        args.epochs = 1
    keras.utils.set_random_seed(args.seed)
    keras.config.set_dtype_policy(policy)


def whole_batches(args, *arrays):
    """Arrays cut to whole batches, so that a step is compiled once."""
    batches = 2 if args.tiny else len(arrays[0]) // args.batch_size
    return [array[: batches * args.batch_size] for array in arrays]


def say(model, optimizer):
    """Prints the scales of all scaled layers."""
    print(f"Skipped steps: {optimizer.skipped_steps} of {optimizer.steps}")
    print(f"Loss scale S: 2^{math.log2(optimizer.loss_scale):g}\n")
    print(als.scale_table(model, optimizer).scaled)


def save(model, path):
    """Saves a wrapped model as a plain Keras model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    als.strip_model(model).save(path)
    print(f"\nSaved the model, plain Keras again, to {path}")
