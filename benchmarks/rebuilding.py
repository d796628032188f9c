"""How much memory remains when a program builds and trains one model after another?

A hyperparameter search does that, or a notebook. Each case has its own process. It builds a small
convolutional network in mixed_float16, trains it for two steps, deletes it, calls
`keras.backend.clear_session()`, and repeats. The table reports how much the memory of the process
grows from one build to the next, without the first five builds, and how many custom gradients
TensorFlow still holds.
"""

import argparse
import concurrent.futures
import gc
import multiprocessing

import keras
import numpy as np
import psutil
from keras import layers

import tf_adaptive_ls as als
from benchmarks import report

CASES = {
    f"{name}, {'XLA' if xla else 'graph'}": (adaptive, xla)
    for xla in (False, True)
    for name, adaptive in (("Keras, LossScaleOptimizer", False), ("adaptive (ours)", True))
}
WARM_UP = 5


def build_and_train(adaptive, xla):
    keras.config.set_dtype_policy("mixed_float16")  # clear_session resets it
    x = inputs = keras.Input((8, 8, 3))
    for _ in range(4):
        x = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same")(x))
        x = layers.ReLU()(x)
    model = keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))
    if adaptive:
        model, optimizer = als.wrap_model(model), als.AdaptiveLossScaleOptimizer("adam")
    else:
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
    model.compile(optimizer, loss="mse", jit_compile=xla)
    model.fit(np.zeros((32, 8, 8, 3)), np.zeros((32, 10)), batch_size=16, verbose=0)


def run_case(name, builds):
    """Megabytes and number of registered gradients after each build."""
    from tensorflow.python.framework.ops import gradient_registry

    megabytes, gradients = [], []
    for _ in range(builds):
        build_and_train(*CASES[name])
        keras.backend.clear_session()
        gc.collect()
        megabytes.append(psutil.Process().memory_info().rss / 1e6)
        gradients.append(len(gradient_registry.list()))
    return {"name": name, "megabytes": megabytes, "gradients": gradients}


def growth(values):
    """The growth of a figure per build after the first few: the slope of a line."""
    values = values[WARM_UP:]
    return np.polyfit(np.arange(len(values)), values, 1)[0]


def row(result):
    megabytes = result["megabytes"]
    return (
        result["name"],
        str(len(megabytes)),
        f"{megabytes[WARM_UP]:.0f} MB",
        f"{megabytes[-1]:.0f} MB",
        f"{growth(megabytes):.1f} MB",
        f"{growth(result['gradients']):.0f}",
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "rebuilding")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE")
    parser.add_argument("--builds", type=int, help="default: 50, with --quick 10")
    args = parser.parse_args(argv)
    names = args.only or list(CASES)[: 2 if args.quick else None]
    builds = args.builds or (10 if args.quick else 50)
    with report.progress() as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            with concurrent.futures.ProcessPoolExecutor(
                1, mp_context=multiprocessing.get_context("spawn")
            ) as process:
                report.save_result(args.output, process.submit(run_case, name, builds).result())
            progress.advance(task)
    results = report.load_results(args.output, CASES)
    header = ["case", "builds", f"after {WARM_UP + 1}", "after all", "per build", "gradients"]
    text = (
        "# Building many models\n\n"
        "Memory of a process that builds, trains and drops one small model after another: after "
        f"{WARM_UP + 1} builds and after all, how much it grows per build, and how many custom "
        "gradients more TensorFlow holds on to after each.\n\n"
        f"{report.markdown(header, map(row, results))}\n\n{report.provenance_text(results)}\n"
    )
    report.save_text(args.output, text)


if __name__ == "__main__":
    main()
