"""What does each layer's lost gradient cost? Loss Change Allocation under several loss scalings.

Each model is trained from the same weights on the same batches under each loss scaling, with a
`LossChangeMonitor`. It divides the change of the loss, on a part of the training data, among
layers: with float32 gradients, and with those used in training. The tables report

    change      of the loss from the first to the last step
    allocated   sum of the shares of all layers and statistics, in float32
    as trained  the same with the gradients used in training
    lost        difference between the layers' shares as trained and in float32, summed over
                layers, relative to the sum of their magnitudes; and that of the worst layer
    idle        layers with less than 1e-6 of that sum: without gradients, weights do not move, so
                their own path shows no loss
    hurt        layers whose changes raised the loss in total
    first layer, last layer    the shares of these
    helping     share of weights whose changes lowered the loss, along chords, and in single steps

then how exactly each quadrature rule conserves the sum, along paths of 1, 10 and 100 steps, and
how much time the callback adds to training.
"""

import argparse
import itertools
import pathlib
import tempfile
import time
import warnings

import keras
import numpy as np

import tf_adaptive_ls as als
from benchmarks import convergence, data, report
from benchmarks.strategies import KERAS, OURS, REFERENCE, STRATEGIES
from tf_adaptive_ls import plots

CASES = ("MLP 17, vanishing", "ResNet-20")
PARTS = ("runs", "conservation", "overhead")
COMPARED = [REFERENCE, *(s for s in STRATEGIES if s.name in ("no scaling", KERAS, OURS))]
RULES = {
    "first order": {"rule": "first order"},
    "trapezoid": {"rule": "trapezoid"},
    "Simpson, 2 intervals": {"max_intervals": 2},
    "Simpson, 8 intervals": {"max_intervals": 8},
}
LENGTHS = (1, 10, 100)
SIZES = (1, 4, 16)  # batches for the loss
# Settings for the runs, and for the timing.
EVALUATED = 4
RECORDS = 12


class Trainee:
    """A model under one strategy, from the weights of a seed."""

    def __init__(self, case, strategy, steps, images, seed):
        keras.backend.clear_session()
        keras.utils.set_random_seed(seed)
        keras.config.set_dtype_policy("float32")
        weights = case.build().get_weights()
        keras.config.set_dtype_policy(strategy.policy)
        plain = case.build()
        plain.set_weights(weights)
        self.model = als.wrap_model(plain) if strategy.wrapped else plain
        self.model.compile(
            strategy.optimizer(case.optimizer(steps)),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=True,
            auto_scale_loss=False,
        )
        self._batches = (case.examples(*b) for b in images.batches(case.batch_size, seed))

    def fit(self, steps, *callbacks):
        # Exactly as many as are used, because Keras prefetches some.
        taken = list(itertools.islice(self._batches, steps))
        self.model.fit(
            (each for each in taken),
            steps_per_epoch=steps,
            shuffle=False,
            verbose=0,
            callbacks=list(callbacks),
        )


def evaluated(case, images, number):
    """Batches of the training data for the loss, the same for each seed."""
    batches = itertools.islice(images.batches(case.batch_size, 12385), number)
    return [case.examples(*batch) for batch in batches]


def run_strategy(case, strategy, steps, images, seed, directory):
    """Figures of one run."""
    trainee = Trainee(case, strategy, steps, images, seed)
    batches = evaluated(case, images, EVALUATED)
    paths = [directory / f"{kind}.jsonl" for kind in ("chords", "single")]
    every = steps // RECORDS
    # When Keras has just raised its scale, gradients overflow. It would skip such a step.
    monitors = [
        als.LossChangeMonitor(batches, paths[0], every=every, as_trained=True),
        als.LossChangeMonitor(batches, paths[1], every=every, single_steps=True),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainee.fit(steps, *monitors)
    chords, single = (als.load_run(path).loss_changes for path in paths)
    figures = {name: getattr(chords, name).tolist() for name in ("since", "steps", "error")}
    return figures | {
        "seed": seed,
        "layers": chords.layers,
        "loss_before": chords.loss_before.tolist(),
        "loss_after": chords.loss_after.tolist(),
        "statistics": chords.statistics.tolist(),
        "allocated": chords.allocated.tolist(),
        "as_trained": chords.as_trained.tolist(),
        "helping": chords.helping.tolist(),
        "helping_single": single.helping.tolist(),
        "left_out": sum("leaves out" in str(each.message) for each in caught),
    }


def conservation(case, images, steps):
    """Errors relative to the change of the loss, by rule and length; standard errors by size."""
    trainee = Trainee(case, REFERENCE, steps, images, 0)
    batches = evaluated(case, images, max(SIZES))
    errors = {length: {rule: [] for rule in RULES} for length in LENGTHS if length <= steps // 2}
    deviations = {size: [] for size in SIZES}
    trainee.fit(steps // 2)
    for length, by_rule in errors.items():
        for _ in range(3 if length < 100 else 1):
            before = trainee.model.get_weights()
            trainee.fit(length)
            after = trainee.model.get_weights()
            for rule, settings in RULES.items():
                found = als.loss_change(
                    trainee.model, before, after, batches[:EVALUATED], tolerance=1e-12, **settings
                )
                change = abs(found.loss_after - found.loss_before)
                by_rule[rule].append(found.error / change)
            if length == 10:
                for size in SIZES:
                    found = als.loss_change(
                        trainee.model, before, after, batches[:size], max_intervals=2
                    )
                    ratios = [
                        found.standard_errors[name] / abs(value)
                        for name, value in found.layers.items()
                    ]
                    deviations[size].append(float(np.median(ratios)))
    return {"errors": errors, "standard_errors": deviations}


def overhead(case, images, rounds, steps=100):
    """Seconds of 100 steps with and without the callback, in turn."""
    trainee = Trainee(case, COMPARED[-1], steps, images, 0)
    batches = evaluated(case, images, EVALUATED)
    monitor = als.LossChangeMonitor(batches, every=steps)
    trainee.fit(2, monitor)
    seconds = {"without": [], "with": []}
    for _ in range(rounds):
        for name, callbacks in (("without", []), ("with", [monitor])):
            start = time.perf_counter()
            trainee.fit(steps, *callbacks)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def rows(result):
    """A row of the table per strategy: medians over seeds, with the range of what is lost."""
    for name, runs in compared(result).items():
        lost, worst = zip(*map(_lost, runs), strict=True)
        change = [np.sum(run["loss_after"] - run["loss_before"]) for run in runs]
        allocated = [np.sum(run["allocated"]) + np.sum(run["statistics"]) for run in runs]
        trained = [np.sum(run["as_trained"]) + np.sum(run["statistics"]) for run in runs]
        helping = [
            [np.nanmean(run[kind]) for run in runs] for kind in ("helping", "helping_single")
        ]
        yield (
            name,
            *(f"{np.median(values):+.3f}" for values in (change, allocated, trained)),
            f"{np.median(lost):.1%} ({min(lost):.1%} … {max(lost):.1%})",
            worst[int(np.argsort(lost)[len(lost) // 2])],
            *(f"{np.median([count(run) for run in runs]):g}" for count in (_idle, _hurting)),
            _layer(runs, 0),
            _layer(runs, -1),
            *(f"{np.median(values):.1%}" for values in helping),
            str(sum(run["left_out"] for run in runs)),
        )


def compared(result):
    """The runs by strategy, from the first step at which all have paths.

    Before the statistics of normalization have adapted, the loss can be so large that its gradient
    is not finite at the scale of training. Such paths are left out.
    """
    start = max(run["since"][0] for runs in result["runs"].values() for run in runs)
    return {name: [_from(run, start) for run in runs] for name, runs in result["runs"].items()}


def _from(run, start):
    """The figures of a run, as arrays, of the paths from a step on."""
    run = {
        name: np.array(value) if isinstance(value, list) else value for name, value in run.items()
    }
    # Skipped steps are not counted, because two runs differ by a few.
    kept = run["since"] >= 0.9 * start
    paths = ("since", "steps", "error", "loss_before", "loss_after", "statistics", "helping")
    return run | {name: run[name][kept] for name in (*paths, "allocated", "as_trained")}


def _lost(run):
    """The share of what layers are allocated that is missing as trained; and the worst layer's."""
    given, trained = run["allocated"].sum(axis=0), run["as_trained"].sum(axis=0)
    gaps = np.abs(given - trained)
    worst = int(np.argmax(gaps))
    share = gaps[worst] / max(abs(given[worst]), 1e-30)
    return gaps.sum() / np.abs(given).sum(), f"{run['layers'][worst]}: {share:.0%}"


def _idle(run):
    given = np.abs(run["allocated"].sum(axis=0))
    return int(np.sum(given < 1e-6 * given.sum()))


def _hurting(run):
    given = run["allocated"].sum(axis=0)
    return int(np.sum(given > 1e-6 * np.abs(given).sum()))


def _layer(runs, place):
    return f"{np.median([run['allocated'][:, place].sum() for run in runs]):+.3f}"


HEADER = (
    "",
    "change",
    "allocated",
    "as trained",
    "lost",
    "worst layer",
    "idle layers",
    "layers that hurt",
    "first layer",
    "last layer",
    "helping, chords",
    "helping, single steps",
    "paths left out",
)


INTRODUCTION = """# What each layer's lost gradients cost

Loss Change Allocation (Lan et al. 2019) divides the change of the loss on a part of the training
data among layers. *lost* is the difference between shares from float32 gradients and shares from
the gradients of training. A layer without gradients does not move and has no share in either: it
counts as *idle*, and the loss falls less.
"""


def write_report(directory):
    results = report.load_results(directory, CASES)
    parts = [INTRODUCTION]
    for result in results:
        seeds = len(next(iter(result["runs"].values())))
        first = next(iter(compared(result).values()))[0]
        parts.append(
            f"## {result['name']}\n\n{result['images']}, {result['steps']} steps, {seeds} seeds "
            f"(medians; range over seeds), loss of {EVALUATED} batches of training data, "
            f"{len(first['steps'])} chords, from step {first['since'][0]} on, "
            f"{len(first['layers'])} layers.\n\n{report.markdown(HEADER, rows(result))}\n"
        )
        if "conservation" in result:
            errors = result["conservation"]["errors"]
            table = [
                (f"{length} steps", *(f"{np.median(errors[length][rule]):.1g}" for rule in RULES))
                for length in errors
            ]
            deviations = ", ".join(
                f"{np.median(values):.0%} of it by {size} batches"
                for size, values in result["conservation"]["standard_errors"].items()
                if int(size) > 1
            )
            parts.append(
                "What is not allocated, relative to the change of the loss, in float32 in the "
                f"middle of training:\n\n{report.markdown(['path', *RULES], table)}\n\n"
                f"A layer's share of ten steps has a standard error (median layer) of {deviations}."
                "\n"
            )
        if "overhead" in result:
            seconds = result["overhead"]
            added = np.array(seconds["with"]) - seconds["without"]
            parts.append(
                f"`LossChangeMonitor(batches)` with {EVALUATED} batches of the size trained with "
                f"adds {np.median(added):.2g} s ({added.min():.2g} … {added.max():.2g}) to "
                f"{np.median(seconds['without']):.2g} s for 100 steps ({len(added)} pairs).\n"
            )
    parts.append(report.provenance_text(results) + "\n")
    report.save_text(directory, "\n".join(parts))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "loss_change")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="MODEL")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="what to measure; the rest stays as in DIR; default: all",
    )
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="default: those of `convergence`")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.only or (CASES[:1] if args.quick else CASES):
        run_case(convergence.CASES[name], args)
    write_report(args.output)


def run_case(case, args):
    """Adds the requested parts to the figures of one case."""
    images = data.digits() if case.images == "digits" else data.cifar10(args.data)
    steps = args.steps or (60 if args.quick else case.steps)
    seeds = range(1 if args.quick else args.seeds)
    before = report.load_results(args.output, [case.name])
    result = before[0] if before else {"runs": {}}
    result |= {"name": case.name, "images": images.name, "steps": steps}
    with report.progress() as progress:
        task = progress.add_task(case.name, total=None)
        for strategy in COMPARED if "runs" in args.parts else ():
            progress.update(task, description=f"{case.name}: {strategy.name}")
            runs = result["runs"][strategy.name] = []
            for seed in seeds:
                with tempfile.TemporaryDirectory() as directory:
                    records = pathlib.Path(directory)
                    runs.append(run_strategy(case, strategy, steps, images, seed, records))
                    figure = plots.plot_loss_change_layers(records / "chords.jsonl")
            if case.images == "digits" and strategy.name in ("no scaling", OURS):
                name_of_plot = strategy.name.partition(" (")[0].replace(" ", "_")
                report.save_plot(args.output, name_of_plot, figure)
            report.save_result(args.output, result)
        if "conservation" in args.parts:
            progress.update(task, description=f"{case.name}: conservation")
            result["conservation"] = conservation(case, images, steps)
            report.save_result(args.output, result)
        if "overhead" in args.parts:
            progress.update(task, description=f"{case.name}: overhead")
            result["overhead"] = overhead(case, images, 2 if args.quick else 5)
            report.save_result(args.output, result)


if __name__ == "__main__":
    main()
