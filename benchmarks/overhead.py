"""What do layer-wise scales cost? Step time, compile time and memory of training.

Compared are, on the same model, data and inner optimizer,

    no scaling   plain float16
    Keras        `LossScaleOptimizer`
    adaptive     `wrap_model` and `AdaptiveLossScaleOptimizer`
    monitored    the same with a `LossScaleMonitor` at its default interval, recording

Every model is trained by all of them in turn, in one process, block of steps after block
of steps; the figures are medians over blocks of the ratio to Keras's, with quartiles.
Compile time is that of the first step in a process of its own: tracing and compiling. Memory
is the peak that the device reports on a GPU, and else by how much that process grew.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import keras
import numpy as np
import report
import tensorflow as tf
import zoo
from keras import layers

import tf_adaptive_ls as als

PLAIN, KERAS, OURS, MONITORED = "no scaling", "Keras", "adaptive", "monitored"
WAYS = (PLAIN, KERAS, OURS, MONITORED)
MODES = {"XLA": {"jit_compile": True}, "graph": {"jit_compile": False}}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and one batch of data.

    Args:
        build: `() -> keras.Model`.
        batch: `batch_size -> (x, y)`.
        batch_size: On a CPU; a GPU gets eight times that.
        steps: In a block.
    """

    build: Callable
    batch: Callable
    batch_size: int
    steps: int


def resnet50():
    return keras.applications.ResNet50(
        weights=None, input_shape=(64, 64, 3), classes=10, classifier_activation=None
    )


def bert(blocks=4, width=512, heads=8, length=128, words=30_522):
    """As BERT-small: post-norm blocks, here with ten classes at the end."""
    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(words, width)(inputs)
    x = layers.LayerNormalization()(x)
    for _ in range(blocks):
        y = layers.MultiHeadAttention(heads, width // heads)(x, x)
        x = layers.LayerNormalization()(layers.Add()([x, y]))
        y = layers.Dense(width)(layers.Dense(4 * width, "gelu")(x))
        x = layers.LayerNormalization()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(10, dtype="float32")(x))


def lstm(units=256, length=64):
    inputs = keras.Input((length, 32))
    return keras.Model(inputs, layers.Dense(10, dtype="float32")(layers.LSTM(units)(inputs)))


def tiny_layers(depth):
    x = inputs = keras.Input((16,))
    for _ in range(depth - 1):
        x = layers.Dense(16, "relu")(x)
    return keras.Model(inputs, layers.Dense(10, dtype="float32")(x))


def floats(*shape):
    return lambda batch_size: (
        np.random.default_rng(0).normal(size=(batch_size, *shape)).astype("float32"),
        np.arange(batch_size) % 10,
    )


def tokens(length, words=30_522):
    return lambda batch_size: (
        np.random.default_rng(0).integers(0, words, (batch_size, length)).astype("int32"),
        np.arange(batch_size) % 10,
    )


CASES = {
    "ResNet-20": Case(zoo.resnet, floats(32, 32, 3), 32, 5),
    "ResNet-50": Case(resnet50, floats(64, 64, 3), 8, 2),
    "BERT-small": Case(bert, tokens(128), 4, 2),
    "LSTM": Case(lstm, floats(64, 32), 32, 5),
    "200 tiny layers": Case(lambda: tiny_layers(200), floats(16), 32, 50),
}
QUICK_CASES = {"20 tiny layers": Case(lambda: tiny_layers(20), floats(16), 32, 20)}
# How the cost grows.
GROWTH_CASES = {
    f"{depth} tiny layers": Case(lambda depth=depth: tiny_layers(depth), floats(16), 32, 50)
    for depth in (10, 50, 200, 800)
} | {f"ResNet-20, batch {n}": Case(zoo.resnet, floats(32, 32, 3), n, 2) for n in (8, 64, 512)}
ALL_CASES = CASES | QUICK_CASES | GROWTH_CASES


class Trainee:
    """A model trained in one of `WAYS`."""

    def __init__(self, case, way, mode, batch_size):
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy("mixed_float16")
        optimizer = keras.optimizers.SGD(1e-4, momentum=0.9)
        model = case.build()
        if way in (OURS, MONITORED):
            model = als.wrap_model(model)
            optimizer = als.AdaptiveLossScaleOptimizer(optimizer)
        elif way == KERAS:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, auto_scale_loss=False, **MODES[mode])
        self._model = model
        self._callbacks = []
        if way == MONITORED:
            record = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
            self._callbacks.append(als.LossScaleMonitor(record))
        data = tf.data.Dataset.from_tensors(case.batch(batch_size)).cache().repeat()
        self._data = data.prefetch(2)

    def seconds(self, steps):
        """How long so many steps take, at last on the device, too."""
        start = time.perf_counter()
        self._model.fit(
            self._data, steps_per_epoch=steps, verbose=0, callbacks=list(self._callbacks)
        )
        return time.perf_counter() - start


def run_case(name, mode, pairs, advance):
    """Figures of one model in one mode, ready for JSON."""
    case = ALL_CASES[name]
    gpu = bool(tf.config.list_physical_devices("GPU"))
    batch_size = case.batch_size * (8 if gpu else 1)
    trainees = {way: Trainee(case, way, mode, batch_size) for way in WAYS}
    for trainee in trainees.values():
        trainee.seconds(2)
        advance()
    stepping = {way: [] for way in WAYS}
    for number in range(pairs):
        # No way is always the first, or always after the same.
        for way in WAYS if number % 2 else reversed(WAYS):
            stepping[way].append(trainees[way].seconds(case.steps) / case.steps)
        advance()
    return {
        "name": f"{name}, {mode}",
        "case": name,
        "mode": mode,
        "batch_size": batch_size,
        "steps_per_block": case.steps,
        "step_seconds": stepping,
    }


def in_process(name, mode, way):
    """First step and peak memory of one way, in this process, which does nothing else."""
    case = ALL_CASES[name]
    gpu = bool(tf.config.list_physical_devices("GPU"))
    trainee = Trainee(case, way, mode, case.batch_size * (8 if gpu else 1))
    # TensorFlow itself takes several hundred megabytes. (5 resets the peak; see man 5 proc.)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _memory_in_bytes("VmRSS")
    compiling = trainee.seconds(1)
    trainee.seconds(case.steps)
    if gpu:
        peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    else:
        peak = _memory_in_bytes("VmHWM") - before
    return {"compile_seconds": compiling, "peak_bytes": peak}


def _memory_in_bytes(name):
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def of_own_processes(name, mode, repeats, advance):
    """`in_process` of every way in turn, each in a process of its own."""
    figures = {}
    for _ in range(repeats):
        for way in (PLAIN, KERAS, OURS):
            command = [sys.executable, __file__, "--child", name, mode, way]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for figure, value in json.loads(output.splitlines()[-1]).items():
                figures.setdefault(figure, {}).setdefault(way, []).append(value)
            advance()
    return figures


# Tables.


def ratios(figures, way, to=KERAS):
    """Ratios, pair by pair."""
    return [a / b for a, b in zip(figures[way], figures[to], strict=True)]


def spread_of(values):
    if len(values) < 2:
        return f"{values[0]:.3f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} … {high:.3f})"


def table(results):
    lines = []
    for result in results:
        steps = result["step_seconds"]
        lines.append(
            [
                result["name"],
                str(result["batch_size"]),
                f"{1e3 * statistics.median(steps[KERAS]):.1f}",
                spread_of(ratios(steps, PLAIN)),
                spread_of(ratios(steps, OURS)),
                spread_of(ratios(steps, MONITORED, to=OURS)),
                spread_of(ratios(result["compile_seconds"], OURS)),
                spread_of(ratios(result["peak_bytes"], OURS)),
            ]
        )
    header = ["model, mode", "batch", "step, ms", "no scaling", "adaptive"]
    header += ["monitor", "compile", "memory"]
    return report.markdown(header, lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "overhead")
    parser.add_argument("--only", nargs="+", metavar="MODEL", choices=ALL_CASES, help="names")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--growth", action="store_true", help="how cost grows with size instead")
    parser.add_argument("--pairs", type=int, default=15, help="blocks; default: %(default)s")
    parser.add_argument(
        "--repeats", type=int, default=3, help="processes, for compile time and memory"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(in_process(*args.child)))
        return
    cases = args.only or (QUICK_CASES if args.quick else GROWTH_CASES if args.growth else CASES)
    if args.quick:
        args.pairs, args.repeats, args.modes = 3, 1, args.modes[:1]

    with report.progress() as progress:
        for mode in args.modes:
            for name in cases:
                total = len(WAYS) + args.pairs + 3 * args.repeats
                bar = progress.add_task(f"{name}, {mode}", total=total)

                def advance(bar=bar):
                    progress.advance(bar)

                result = run_case(name, mode, args.pairs, advance)
                result |= of_own_processes(name, mode, args.repeats, advance)
                keras.backend.clear_session()
                report.save_result(args.output, result)

    order = [f"{name}, {mode}" for mode in MODES for name in ALL_CASES]
    results = report.load_results(args.output, order)
    text = f"""# What layer-wise scales cost

Medians of ratios to Keras's `LossScaleOptimizer` on the same model, with quartiles; "monitor" is
the ratio of training with a `LossScaleMonitor` to training without one. One batch of random data.

{table(results)}

{report.provenance_text(results)}
"""
    report.save_text(args.output, text)


if __name__ == "__main__":
    main()
