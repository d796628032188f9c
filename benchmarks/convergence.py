"""Does per-layer loss scaling train better? Whole training runs under each loss scaling.

Each case is a model, data and a number of steps. Each strategy trains the model from the same
weights on the same batches, once per seed. The tables compare

    accuracy   on the test images after the last step
    reached    number of steps to a given accuracy, tested every 100 steps
    skipped    number of steps skipped because of an overflow, and how many after step 20
    settled    first step from which no scale moves by more than two binades up to
               step 100

Prints Markdown tables; writes them, plots, and all figures as JSON. Cases from earlier runs
into the same directory stay in the tables.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import optimizers

import tf_adaptive_ls as als
from benchmarks import data, report, zoo
from benchmarks.strategies import FLOAT32, KERAS, OURS, REFERENCE, STRATEGIES, VARIATIONS, fixed
from tf_adaptive_ls.backend import trainer

TEST_EVERY = 100
START = 20
SETTLING = 100
# Added to the other strategies: a coarser version of the paper's grid of scales.
GRID = (2**4, 2**14)
QUICK_CASES = ("Loss shrinks by 2^20",)
PAPER_CASES = ("ResNet-20",)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Args:
        name: Short name for tables.
        images: "digits" or "CIFAR-10".
        build: `() -> keras.Model`.
        examples: `(images, labels) -> (x, y)`.
        optimizer: `steps -> keras.optimizers.Optimizer`.
        steps: Number of steps.
        batch_size: Batch size.
        target: The accuracy for the column "reached".
        loss_factor: `(step, steps) -> float`, a factor of the loss.
    """

    name: str
    images: str
    build: Callable
    examples: Callable
    optimizer: Callable
    target: float
    steps: int = 2000
    batch_size: int = 32
    loss_factor: Callable = lambda step, steps: 1.0


def adam(learning_rate=1e-3, **kwargs):
    # Adam adds epsilon to the root mean square of gradients. An epsilon far below all gradients
    # makes their size irrelevant.
    return lambda steps: optimizers.Adam(learning_rate, epsilon=1e-20, **kwargs)


def paper_recipe(batch_size):
    """SGD whose rate is divided by ten after half and after three quarters (He et al. 2016).

    The rate is 0.1 for batches of 128, as in the paper, and proportional for other sizes.
    """
    rate = 0.1 * batch_size / 128

    def optimizer(steps):
        schedule = optimizers.schedules.PiecewiseConstantDecay(
            [steps // 2, steps * 3 // 4], [rate, rate / 10, rate / 100]
        )
        return optimizers.SGD(schedule, momentum=0.9, weight_decay=1e-4)

    return optimizer


def shrinking(step, steps):
    return 2.0 ** -round(20 * step / steps)


def with_outliers(step, steps):
    return 2.0**8 if step % 500 == 499 else 1.0


def small_images(side):
    def examples(images, labels):
        return zoo.normalized(zoo.gray(images, side))[..., None], labels

    return examples


CASES = {
    case.name: case
    for case in (
        Case(
            "ResNet-20",
            "CIFAR-10",
            zoo.resnet,
            zoo.classify,
            paper_recipe(32),
            0.35,
            steps=300,
        ),
        Case(
            "VGG, not normalized",
            "CIFAR-10",
            lambda: zoo.vgg((16, 16, 1)),
            small_images(16),
            adam(),
            0.4,
        ),
        Case(
            "LSTM, 256 steps",
            "digits",
            lambda: zoo.lstm(256),
            zoo.classify_sequence(16),
            adam(3e-3, global_clipnorm=1.0),
            0.6,
        ),
        Case(
            "MLP 17, vanishing",
            "digits",
            zoo.vanishing_mlp,
            zoo.classify_vector,
            adam(),
            0.8,
        ),
        Case(
            "Loss shrinks by 2^20",
            "digits",
            lambda: zoo.plain_mlp(4, 1.0),
            zoo.classify_vector,
            adam(),
            0.9,
            loss_factor=shrinking,
        ),
        Case(
            "Outliers of 2^8",
            "digits",
            lambda: zoo.plain_mlp(4, 1.0),
            zoo.classify_vector,
            adam(global_clipnorm=1.0),
            0.9,
            loss_factor=with_outliers,
        ),
    )
}


class Trainee:
    """A model under one strategy, which can be trained from any weights."""

    def __init__(self, case, strategy, steps):
        keras.config.set_dtype_policy(strategy.policy)
        self._case, self._steps = case, steps
        self._plain = case.build()
        self._model = als.wrap_model(self._plain) if strategy.wrapped else self._plain
        self._model.compile(
            strategy.optimizer(case.optimizer(steps)),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
            jit_compile=True,
            auto_scale_loss=False,
        )
        self._model.optimizer.build(self._model.trainable_variables)
        self._states = [v for v in self._model.variables if v.overwrite_with_gradient]
        self._to_reset = [*self._states, *self._model.optimizer.variables]
        self._initial = [np.array(v.numpy()) for v in self._to_reset]

    def train(self, seed, weights, images, advance):
        """Trains from `weights`. Returns the figures of the run for JSON."""
        case, model = self._case, self._model
        for variable, value in zip(self._to_reset, self._initial, strict=True):
            variable.assign(value)
        self._plain.set_weights(weights)
        test = case.examples(images.x_test[:1000], images.y_test[:1000])
        batches = (case.examples(*batch) for batch in images.batches(case.batch_size, seed))
        scales = [v for v in self._states if v.name == "loss_scale"]
        recorder = Recorder(scales, advance)
        accuracies = {}
        while recorder.step < self._steps:
            chunk = min(TEST_EVERY, self._steps - recorder.step)
            # Exactly as many as are used, because Keras prefetches some.
            taken = [
                (x, y, np.full(len(y), case.loss_factor(recorder.step + i, self._steps), "float32"))
                for i, (x, y) in enumerate(itertools.islice(batches, chunk))
            ]
            model.fit(
                (each for each in taken),
                steps_per_epoch=chunk,
                shuffle=False,
                verbose=0,
                callbacks=[recorder],
            )
            result = model.evaluate(*test, batch_size=len(test[1]), verbose=0, return_dict=True)
            accuracies[recorder.step] = result["accuracy"]
        reached = [step for step, accuracy in accuracies.items() if accuracy >= case.target]
        return {
            "accuracy": accuracies[self._steps],
            "accuracies": accuracies,
            "reached": reached[0] if reached else None,
            "skipped": recorder.skipped,
            "settled": recorder.settled(),
            "loss_scales": recorder.loss_scales,
        }


class Recorder(keras.callbacks.Callback):
    """Records the scales."""

    def __init__(self, scales, advance):
        super().__init__()
        self.step = 0
        self.skipped = []
        self.loss_scales = {}
        self._scales = scales
        self._before = None
        self._log2_scales = []
        self._advance = advance

    def on_train_batch_end(self, batch, logs=None):
        trainer.sync_state(self.model)
        scale = self._loss_scale()
        if self._scales:
            skipped = self.model.optimizer.last_step_skipped
        else:
            skipped = scale is not None and scale < (self._before or 2.0**15)
        self._before = scale
        if skipped:
            self.skipped.append(self.step)
        if scale is not None and self.step % 10 == 0:
            self.loss_scales[self.step] = scale
        if scale is not None and self.step < SETTLING:
            rs = [float(variable.numpy()[0]) for variable in self._scales]
            self._log2_scales.append(np.log2(scale) + np.array([0.0, *rs]))
        self.step += 1
        self._advance()

    def _loss_scale(self):
        scale = getattr(self.model.optimizer, "dynamic_scale", None)
        return None if scale is None else float(scale.numpy())

    def settled(self):
        if not self._log2_scales:
            return None
        scales = np.stack(self._log2_scales)
        if self._scales:
            scales = scales[:, 1:]
        away = np.flatnonzero(np.abs(scales - scales[-1]).max(axis=1) > 2)
        return int(away[-1]) + 2 if away.size else 1


def run_case(case, strategies, images, steps, seeds, progress, runs):
    """The figures of one case for JSON: yields all so far, after each strategy.

    `runs` are those of other strategies from earlier runs.
    """
    weights = {}
    result = {
        "name": case.name,
        "images": images.name,
        "target": case.target,
        "steps": steps,
        "seeds": seeds,
        "runs": runs,
    }
    bar = progress.add_task(case.name, total=len(strategies) * len(seeds) * steps)
    for strategy in strategies:
        keras.backend.clear_session()
        trainee = None
        new_runs = []
        for seed in seeds:
            if seed not in weights:
                keras.utils.set_random_seed(seed)
                keras.config.set_dtype_policy("float32")
                weights[seed] = case.build().get_weights()
            trainee = trainee or Trainee(case, strategy, steps)
            progress.update(bar, description=f"{case.name}: {strategy.name}")
            run = trainee.train(seed, weights[seed], images, lambda: progress.advance(bar))
            new_runs.append(run)
        runs[strategy.name] = new_runs
        yield result


# Tables and plots.


def accuracies(result, name):
    return 100 * np.array([run["accuracy"] for run in result["runs"][name]])


def spread(values):
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def fixed_scales(result):
    """Names of the strategies with a fixed scale, by scale."""
    scales = {1.0: "no scaling"} if "no scaling" in result["runs"] else {}
    for name in result["runs"]:
        if name.startswith("fixed "):
            scales[float(name.removeprefix("fixed "))] = name
    return dict(sorted(scales.items()))


def table(result):
    lines = []
    scales = fixed_scales(result).values()
    others = [name for name in result["runs"] if name not in {FLOAT32, *scales}]
    for name in [FLOAT32, *scales, *others]:
        if name not in result["runs"]:
            continue
        runs = result["runs"][name]
        values = accuracies(result, name)
        reached = [run["reached"] for run in runs]
        skipped = [len(run["skipped"]) for run in runs]
        late = [sum(step >= START for step in run["skipped"]) for run in runs]
        settled = [run["settled"] for run in runs]
        tells = name == OURS or all(s is not None for s in settled)
        lines.append(
            [
                name,
                f"{np.mean(values):.1f} ± {spread(values):.1f}",
                "never" if None in reached else f"{np.mean(reached):.0f}",
                f"{np.mean(skipped):.1f}" if tells else "",
                f"{np.mean(late):.1f}" if tells else "",
                f"{np.mean(settled):.0f}" if tells else "",
            ]
        )
    header = ["strategy", "accuracy, %", "reached", "skipped", f"after step {START}", "settled"]
    return report.markdown(header, lines)


def verdict(result):
    """How ours compares with float32 and with the best fixed scale."""
    if not {OURS, FLOAT32} <= result["runs"].keys():
        return ""
    ours = accuracies(result, OURS)

    def against(name):
        other = accuracies(result, name)
        error = np.sqrt((spread(ours) ** 2 + spread(other) ** 2) / len(ours))
        return f"{np.mean(ours) - np.mean(other):+.1f} ± {error:.1f}"

    best = max(fixed_scales(result).values(), key=lambda name: np.mean(accuracies(result, name)))
    return (
        f"Ours against float32: {against(FLOAT32)}; "
        f"against the best fixed scale ({best}): {against(best)}."
    )


def summary(results):
    """One row per case, with the strategies that a user would choose from."""

    def cell(result, name):
        runs = result["runs"][name]
        values = accuracies(result, name)
        text = f"{np.mean(values):.1f} ± {spread(values):.1f}"
        if all(run["settled"] is not None for run in runs):
            text += f" ({np.mean([len(run['skipped']) for run in runs]):.1f})"
        return text

    lines = []
    for result in results:
        if not {FLOAT32, KERAS, OURS} <= result["runs"].keys():
            continue
        scales = fixed_scales(result)
        best = max(scales, key=lambda scale: np.mean(accuracies(result, scales[scale])))
        lines.append(
            [
                f"{result['name']}, {result['images']}",
                cell(result, FLOAT32),
                cell(result, "no scaling"),
                f"{cell(result, scales[best])} at {best:g}",
                cell(result, KERAS),
                cell(result, OURS),
            ]
        )
    header = ["case", FLOAT32, "no scaling", "best fixed scale", KERAS, OURS]
    return report.markdown(header, lines)


def plot_scales(results):
    """Accuracy over fixed scales; automatic scales are horizontal lines."""
    columns = min(len(results), 4)
    rows = -(-len(results) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 2.8 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(results) :]:
        axes.set_visible(False)
    for axes, result in zip(grid.flat, results, strict=False):
        scales = fixed_scales(result)
        values = [accuracies(result, name) for name in scales.values()]
        axes.errorbar(
            list(scales),
            [np.mean(v) for v in values],
            [spread(v) for v in values],
            marker="o",
            markersize=4,
            capsize=2,
            color="0.5",
            label="fixed scale",
        )
        colors = {FLOAT32: "black", KERAS: "tab:orange", OURS: "tab:blue"}
        for name, color in colors.items():
            if name in result["runs"]:
                mean, sd = np.mean(accuracies(result, name)), spread(accuracies(result, name))
                axes.axhline(mean, color=color, linewidth=1.2, label=name)
                axes.axhspan(mean - sd, mean + sd, color=color, alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_title(f"{result['name']}\n{result['images']}", fontsize="small")
    grid[0, 0].set_ylabel("test accuracy, %")
    grid[0, 0].legend(fontsize="x-small")
    figure.supxlabel("loss scale")
    return figure


def write_report(directory, variations=False):
    """Writes tables and plots of all cases with figures in `directory`."""
    results = report.load_results(directory, order=list(CASES))
    if not variations:
        report.save_plot(directory, "scales", plot_scales(results))
    sections = [
        f"""## {result["name"]}, {result["images"]}

{result["steps"]} steps, {len(result["seeds"])} seeds; "reached" is {result["target"]:.0%}.
{verdict(result)}

{table(result)}
"""
        for result in results
    ]
    text = f"""# Convergence

Test accuracy in %, mean ± standard deviation over seeds. In brackets: mean number of skipped
steps. "never": at least one seed did not reach the accuracy. With a fixed scale no step is skipped;
an overflow makes the weights NaN.

{"" if variations else summary(results)}

{chr(10).join(sections)}
{report.provenance_text(results)}
"""
    report.save_text(directory, text)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "convergence")
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=CASES, help="names")
    parser.add_argument(
        "--strategies",
        nargs="+",
        metavar="NAME",
        help="run these alone, and keep what the output directory has of others",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many; default: %(default)s")
    parser.add_argument("--steps", type=int, help="instead of each case's own")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="ResNet-20 for the paper's 64,000 steps of batch 128 (164 epochs)",
    )
    parser.add_argument(
        "--variations", action="store_true", help="compare settings of the default rule instead"
    )
    args = parser.parse_args(argv)
    grid = tuple(fixed(scale) for scale in GRID)
    strategies = VARIATIONS if args.variations else (REFERENCE, *STRATEGIES, *grid)
    if args.strategies:
        unknown = set(args.strategies) - {strategy.name for strategy in strategies}
        if unknown:
            parser.error(f"no such strategies: {', '.join(sorted(unknown))}")
        strategies = [s for s in strategies if s.name in args.strategies]
    if args.quick:
        args.steps, args.seeds = args.steps or 50, 1
    names = args.only or (QUICK_CASES if args.quick else PAPER_CASES if args.paper else list(CASES))
    cases = [CASES[name] for name in names]
    if args.paper:
        paper = {"optimizer": paper_recipe(128), "steps": 64_000, "batch_size": 128}
        cases = [dataclasses.replace(case, **paper) for case in cases]
    images = {"digits": data.digits()}
    if any(case.images == "CIFAR-10" for case in cases):
        images["CIFAR-10"] = data.cifar10(args.data)

    with report.progress() as progress:
        for case in cases:
            steps = args.steps or case.steps
            seeds = list(range(args.seeds))
            before = report.load_results(args.output, [case.name]) if args.strategies else []
            for kept in before:
                if (kept["steps"], kept["seeds"]) != (steps, seeds):
                    parser.error(f"{case.name} was run for other steps or seeds before")
            runs = before[0]["runs"] if before else {}
            of_case = images[case.images]
            for result in run_case(case, strategies, of_case, steps, seeds, progress, runs):
                report.save_result(args.output, result)

    write_report(args.output, args.variations)


if __name__ == "__main__":
    main()
