"""What do per-layer scales cost? Time of a step, of the first step, and memory.

On the same model, data and inner optimizer, it compares

    no scaling   plain float16
    Keras        `LossScaleOptimizer`
    adaptive     `wrap_model` and `AdaptiveLossScaleOptimizer`

With `--subclasses` it compares two ways to write the same model, both wrapped: a Functional
model, whose graph Keras knows, and a subclass of `keras.Model` with its own `call`, which is
traced.

Each model has its own process, in which all ways take turns, a step each, after a step of a small
model that starts the compiler. The first step is tracing and compiling. With `--memory`, it also
measures the peak memory: as the device reports it on a GPU, otherwise by how much a separate
process grew. This takes as long again.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers

import tf_adaptive_ls as als
from benchmarks import compute, report, zoo

PLAIN, KERAS, OURS = WAYS = ("no scaling", "Keras", "adaptive")
TWINS = OURS, SUBCLASS = OURS, "adaptive, as a subclass"
FIRST_STEPS = 4  # for `--subclasses`, each with a new model
MODES = (
    {"JAX": {"jit_compile": True}}
    if compute.ON_JAX
    else {"XLA": {"jit_compile": True}, "graph": {"jit_compile": False}}
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and one batch of data.

    Args:
        build: `() -> keras.Model`.
        batch: `batch_size -> (x, y)`.
        batch_size: Batch size on a CPU. A GPU gets eight times as many.
        steps: Number of timed steps of each way.
        subclass: Like `build`, with the same layers in a model with its own `call`.
    """

    build: Callable
    batch: Callable
    batch_size: int
    steps: int
    subclass: Callable | None = None


def resnet50():
    return keras.applications.ResNet50(
        weights=None, input_shape=(64, 64, 3), classes=10, classifier_activation=None
    )


def bert(blocks=4, width=512, heads=8, length=128, words=30_522):
    """Like BERT-small: post-norm blocks, here with ten classes at the end."""
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


class TinyLayers(keras.Model):
    """`tiny_layers` as a subclass."""

    def __init__(self, depth):
        super().__init__()
        self.hidden = [layers.Dense(16, "relu") for _ in range(depth - 1)]
        self.last = layers.Dense(10, dtype="float32")

    def call(self, x):
        for layer in self.hidden:
            x = layer(x)
        return self.last(x)


class Block(layers.Layer):
    """A block of `bert`."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention = layers.MultiHeadAttention(heads, width // heads)
        self.norms = [layers.LayerNormalization() for _ in range(2)]
        self.up, self.down = layers.Dense(4 * width, "gelu"), layers.Dense(width)

    def build(self, shape):
        self.attention.build(shape, shape)
        for layer in (*self.norms, self.up):
            layer.build(shape)
        self.down.build((*shape[:-1], self.up.units))

    def call(self, x):
        x = self.norms[0](x + self.attention(x, x))
        return self.norms[1](x + self.down(self.up(x)))


class Bert(keras.Model):
    """`bert` as a subclass. Its blocks are user-defined layers."""

    def __init__(self, blocks=4, width=512, heads=8, words=30_522):
        super().__init__()
        self.embed, self.norm = layers.Embedding(words, width), layers.LayerNormalization()
        self.blocks = [Block(width, heads) for _ in range(blocks)]
        self.pool, self.last = layers.GlobalAveragePooling1D(), layers.Dense(10, dtype="float32")

    def call(self, x):
        x = self.norm(self.embed(x))
        for block in self.blocks:
            x = block(x)
        return self.last(self.pool(x))


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
    "ResNet-20": Case(zoo.resnet, floats(32, 32, 3), 64, 60),
    "ResNet-50": Case(resnet50, floats(64, 64, 3), 8, 20),
    "transformer": Case(
        lambda: bert(4, 128, 4, 64, 1000),
        tokens(64, 1000),
        16,
        100,
        lambda: Bert(4, 128, 4, 1000),
    ),
    "BERT-small": Case(bert, tokens(128), 4, 20, Bert),
    "LSTM": Case(lstm, floats(64, 32), 32, 60),
    "50 tiny layers": Case(lambda: tiny_layers(50), floats(16), 32, 300, lambda: TinyLayers(50)),
}
QUICK_CASES = {
    "20 tiny layers": Case(lambda: tiny_layers(20), floats(16), 32, 50, lambda: TinyLayers(20))
}
# Models that show how the cost grows.
GROWTH_CASES = {
    f"{depth} tiny layers": Case(lambda depth=depth: tiny_layers(depth), floats(16), 32, 300)
    for depth in (10, 100, 200)
} | {f"ResNet-20, batch {n}": Case(zoo.resnet, floats(32, 32, 3), n, 20) for n in (8, 512)}
ALL_CASES = CASES | QUICK_CASES | GROWTH_CASES


# On a CPU without XLA, float16 convolutions take seconds.
ONLY_WITH_XLA = ("ResNet-20", "ResNet-50")
# On a CPU, JAX has no float16 attention.
WITH_ATTENTION = ("transformer", "BERT-small")
# And on a GPU, its LSTM from cuDNN has no float16.
LSTM = ("LSTM",)


class Trainee:
    """A model trained in one of `WAYS`, or as a `SUBCLASS`."""

    def __init__(self, case, way, mode):
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy("mixed_float16")
        optimizer = keras.optimizers.SGD(1e-4, momentum=0.9)
        batch = case.batch(batch_size(case))
        model = case.subclass() if way == SUBCLASS else case.build()
        if not model.built:
            # as `fit` does
            model(keras.Input(batch_shape=batch[0].shape, dtype=batch[0].dtype.name))
        if way in (OURS, SUBCLASS):
            model = als.wrap_model(model)
            optimizer = als.AdaptiveLossScaleOptimizer(optimizer)
        elif way == KERAS:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, auto_scale_loss=False, **MODES[mode])
        self._step, self._finish = compute.step_of(model, batch)
        self._optimizer = optimizer

    def seconds_of_a_step(self):
        """Seconds of the next step, until it has ended on the device."""
        start = time.perf_counter()
        self._step()
        return time.perf_counter() - start

    def skipped_steps(self):
        self._finish()
        return self._optimizer.skipped_steps


def batch_size(case):
    return case.batch_size * (8 if compute.gpu_names() else 1)


def times_of(name, mode):
    """Seconds of the first step and of later steps in every way, in this process."""
    case = ALL_CASES[name]
    Trainee(QUICK_CASES["20 tiny layers"], PLAIN, mode).seconds_of_a_step()
    trainees = {way: Trainee(case, way, mode) for way in WAYS}
    first = {way: [trainee.seconds_of_a_step()] for way, trainee in trainees.items()}
    return {
        "first_step_seconds": first,
        "step_seconds": seconds_of_steps(trainees, case.steps),
        "skipped": trainees[OURS].skipped_steps(),
        "batch_size": batch_size(case),
    }


def times_of_twins(name, mode):
    """Like `times_of`, for a Functional model and its subclass; building is included."""
    case = ALL_CASES[name]
    Trainee(QUICK_CASES["20 tiny layers"], PLAIN, mode).seconds_of_a_step()
    first, trainees = {way: [] for way in TWINS}, {}
    for number in range(FIRST_STEPS):
        for way in TWINS if number % 2 else reversed(TWINS):
            start = time.perf_counter()
            trainees[way] = Trainee(case, way, mode)
            trainees[way].seconds_of_a_step()
            first[way].append(time.perf_counter() - start)
    return {
        "first_step_seconds": first,
        "step_seconds": seconds_of_steps(trainees, case.steps),
        "batch_size": batch_size(case),
    }


def seconds_of_steps(trainees, steps):
    """Seconds of steps that are taken in turn: a dict of lists by way."""
    seconds = {way: [] for way in trainees}
    for number in range(-2, steps):
        # The order changes, so that no way is always first, or always after the same other way.
        for way in trainees if number % 2 else reversed(trainees):
            time_taken = trainees[way].seconds_of_a_step()
            if number >= 0:
                seconds[way].append(round(time_taken, 6))
    return seconds


def memory_of(name, mode, way):
    """Peak memory of one way, in this process, which does nothing else."""
    trainee = Trainee(ALL_CASES[name], way, mode)
    # The backend alone takes several hundred megabytes. (5 resets the peak; see man 5 proc.)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _memory_in_bytes("VmRSS")
    for _ in range(3):
        trainee.seconds_of_a_step()
    if compute.gpu_names():
        return {way: compute.peak_bytes_on_gpu()}
    return {way: _memory_in_bytes("VmHWM") - before}


def _memory_in_bytes(name):
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


ROOT = pathlib.Path(__file__).parents[1]


def in_own_process(function, *arguments):
    """Calls a function of this module in its own process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.overhead",
        "--child",
        function.__name__,
        *arguments,
    ]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    return json.loads(output.splitlines()[-1])


# Tables.


def ratios(figures, way, to=KERAS):
    """Ratios of paired times."""
    return [a / b for a, b in zip(figures[way], figures[to], strict=True)]


def spread_of(values):
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} … {high:.3f})"


def table(results):
    lines = []
    for result in results:
        steps, first = result["step_seconds"], result["first_step_seconds"]
        memory = result.get("peak_bytes")
        lines.append(
            [
                result["name"],
                str(result["batch_size"]),
                f"{1e3 * statistics.median(steps[KERAS]):.1f}",
                spread_of(ratios(steps, PLAIN)),
                spread_of(ratios(steps, OURS)),
                f"{statistics.fmean(steps[OURS]) / statistics.fmean(steps[KERAS]):.3f}",
                f"{first[KERAS][0]:.1f}",
                spread_of(ratios(first, OURS)),
                f"{memory[OURS] / memory[KERAS]:.2f}" if memory else "",
                str(result["skipped"]),
            ]
        )
    header = ["model, mode", "batch", "Keras's step, ms", "no scaling", "adaptive"]
    header += ["of means", "Keras's first step, s", "adaptive, first", "memory", "skipped"]
    return report.markdown(header, lines)


def section_of_twins(results):
    lines = []
    for result in results:
        steps, first = result["step_seconds"], result["first_step_seconds"]
        lines.append(
            [
                result["name"],
                str(result["batch_size"]),
                f"{1e3 * statistics.median(steps[OURS]):.1f}",
                spread_of(ratios(steps, SUBCLASS, OURS)),
                f"{statistics.median(first[OURS]):.1f}",
                spread_of(ratios(first, SUBCLASS, OURS)),
            ]
        )
    header = ["model, mode", "batch", "Functional step, ms", "subclass"]
    header += ["Functional, made and first step, s", "subclass, made and first step"]
    return f"""
## A subclass beside its Functional twin

The same layers, wrapped, in a Functional model and in a `keras.Model` with a `call` of its own.
Medians of ratios of the subclass to its twin, with quartiles; {FIRST_STEPS} models are made of
each.

{report.markdown(header, lines)}
"""


def plot_cost(results):
    """The ratio to Keras over the time of Keras's step, by device and mode."""
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    by_place = {}
    for result in results:
        by_place.setdefault(result["name"].split(", ", 1)[1], []).append(result)
    for place, color in zip(by_place, plt.colormaps["Dark2"].colors, strict=False):
        points = []
        for result in by_place[place]:
            steps = result["step_seconds"]
            quartiles = statistics.quantiles(ratios(steps, OURS), n=4, method="inclusive")
            points.append((1e3 * statistics.median(steps[KERAS]), *quartiles))
        x, low, middle, high = np.array(sorted(points)).T
        spread = [middle - low, high - middle]
        label = place if place.startswith("JAX") else f"TensorFlow, {place}"
        label = label if "on a GPU" in place else f"{label} on a CPU"
        axes.errorbar(x, middle, spread, label=label, color=color, marker="o", linewidth=1)
    axes.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="Keras's step, ms", ylabel="time of a step, relative to Keras's")
    axes.legend(fontsize="small")
    return figure


def write_report(directory):
    """Writes tables and plot of all cases with figures in `directory`."""
    places = ("XLA", "graph", "JAX", "XLA on a GPU", "graph on a GPU", "JAX on a GPU")
    order = [f"{name}, {place}" for place in places for name in ALL_CASES]
    results = report.load_results(directory, order)
    twins = report.load_results(directory, [f"{name}, twins" for name in order])
    if results:
        report.save_plot(directory, "cost", plot_cost(results))
    text = f"""# What layer-wise scales cost

Time of a step relative to Keras's `LossScaleOptimizer`, in alternating steps of the same model on
one batch of random data: median of the ratios, with quartiles. "of means": ratio of the mean times,
which include the sample on every tenth step.

{table(results)}
{section_of_twins(twins) if twins else ""}
{report.provenance_text([*results, *twins])}
"""
    report.save_text(directory, text)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "overhead")
    parser.add_argument("--only", nargs="+", metavar="MODEL", choices=ALL_CASES, help="names")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--growth", action="store_true", help="how cost grows with size instead")
    parser.add_argument("--subclasses", action="store_true", help="subclasses beside Functional")
    parser.add_argument("--memory", action="store_true", help="memory, too")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        function, *arguments = args.child
        functions = {"times_of": times_of, "memory_of": memory_of, "times_of_twins": times_of_twins}
        print(json.dumps(functions[function](*arguments)))
        return
    cases = QUICK_CASES if args.quick else GROWTH_CASES if args.growth else CASES
    if args.subclasses:
        cases = [name for name in cases if ALL_CASES[name].subclass]
    cases = args.only or cases
    modes = args.modes[:1] if args.quick else args.modes
    runs = [(name, mode) for mode in modes for name in cases]
    on_gpu = bool(compute.gpu_names())
    if not args.only:
        left_out = {"JAX": LSTM} if on_gpu else {"graph": ONLY_WITH_XLA, "JAX": WITH_ATTENTION}
        runs = [(name, mode) for name, mode in runs if name not in left_out.get(mode, ())]

    with report.progress() as progress:
        task = progress.add_task("", total=len(runs))
        for name, mode in runs:
            progress.update(task, description=f"{name}, {mode}")
            place = f"{mode} on a GPU" if on_gpu else mode
            times = times_of_twins if args.subclasses else times_of
            twin = ", twins" if args.subclasses else ""
            result = {"name": f"{name}, {place}{twin}", **in_own_process(times, name, mode)}
            if args.memory and not args.subclasses:
                peaks = [in_own_process(memory_of, name, mode, way) for way in WAYS]
                result["peak_bytes"] = {way: n for peak in peaks for way, n in peak.items()}
            report.save_result(args.output, result)
            progress.advance(task)

    write_report(args.output)


if __name__ == "__main__":
    main()
