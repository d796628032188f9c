"""Does training tolerate activations saved in 8 bits? Gradients, and training runs.

*Fidelity*: gradients against float32, at weights of float32 training, as in `float8`: the relative
error of each weight's gradient, at the start and after some steps. Rows marked with * use other
formats and roundings, which the library does not offer; they are emulated.

*Training*: mean loss over the last tenth of the batches, from the same weights on the same batches
for each way, once per seed.

Prints Markdown tables; writes them, and all figures as JSON. Cases from earlier runs into the same
directory stay in the tables, and so do training runs in other ways.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

import tf_adaptive_ls as als
from benchmarks import data, float8, report
from benchmarks.float8_ways import WIDE, Way
from tf_adaptive_ls.numerics import packing
from tf_adaptive_ls.training import functional_call, kept_results

SAVED = packing.FORMAT
FLOAT8 = als.Float8()
ADAPTIVE = als.AdaptiveLossScaleOptimizer


def way(name, **settings):
    return Way(name, lambda plain: als.wrap_model(plain, **settings), ADAPTIVE)


FLOAT32, FLOAT16 = (each.name for each in WIDE)
WAYS = (
    *WIDE,
    way("saved in 8 bits", saved_activations=SAVED),
    way("products in float8", float8=FLOAT8),
    way("products in float8, saved in 8 bits", float8=FLOAT8, saved_activations=SAVED),
)
PARTS = ("fidelity", "training")
TRAINED = ("ResNet-20", "Transformer", "VGG, not normalized")


@dataclasses.dataclass(frozen=True)
class Emulated:
    """Rounds saved activations to another format, without saving memory.

    Args:
        name: Short name for tables.
        rounded: Function from a tensor to a tensor of the same dtype.
    """

    name: str
    rounded: Callable

    @contextlib.contextmanager
    def everywhere(self):
        """Context manager in which models that save this format are built and compiled."""
        modules = (functional_call, kept_results)
        before = [(each.packed, each.unpacked) for each in modules]
        for each in modules:
            each.packed, each.unpacked = self.rounded, lambda kept, dtype: kept
        try:
            yield
        finally:
            for each, (packed, unpacked) in zip(modules, before, strict=True):
                each.packed, each.unpacked = packed, unpacked


def scaled(x, axes=None):
    """Rounds to e4m3, scaled by the power of two that brings the amax, over axes, into range."""
    wide = ops.cast(x, "float32")
    largest = ops.max(ops.abs(wide), axis=axes, keepdims=True)
    exponent = ops.floor(ops.log2(448.0 / ops.maximum(largest, 1e-30)))
    factor = ops.power(2.0, ops.clip(exponent, -100, 100))
    return ops.cast(ops.cast(ops.cast(wide * factor, "float8_e4m3fn"), "float32") / factor, x.dtype)


def by_channel(x):
    return scaled(x, tuple(range(len(x.shape) - 1)))


def stochastic(x):
    """Rounds to e5m2 stochastically."""
    wide = ops.cast(x, "float32")
    exponent = ops.floor(ops.log2(ops.maximum(ops.abs(wide), 2.0**-14)))
    unit = ops.power(2.0, exponent - 2)
    # The backward pass starts again from these, so both may differ from the originals.
    return ops.cast(ops.floor(wide / unit + keras.random.uniform(ops.shape(x))) * unit, x.dtype)


EMULATED = (
    Emulated("*e4m3, a scale for each tensor", scaled),
    Emulated("*e4m3, a scale for each channel", by_channel),
    Emulated("*e5m2, rounded stochastically", stochastic),
)
ORDER = [each.name for each in (*WAYS, *EMULATED)]


def fidelity(case, images):
    """Figures of each way by moment: first the library's, then emulated ones."""

    def figures(ways):
        found = float8.fidelity(case, [("", each) for each in ways], images)
        return {moment: of_moment[""] for moment, of_moment in found.items()}

    yield figures(WAYS[1:])
    for emulated in EMULATED:
        with emulated.everywhere():
            yield figures([way(emulated.name, saved_activations=SAVED)])


def training(case, images, seeds, known):
    """Losses of each way over seeds, except those already known."""
    ways = [("", each) for each in WAYS if len(known.get(each.name, ())) != len(seeds)]
    found = float8.training(case, ways, images, seeds)
    for of_way in found:
        ((name, runs),) = of_way[""].items()
        yield name, [run["None"] for run in runs]


# Tables.


def percent(error):
    return f"{error:.2%}" if np.isfinite(error) else "infinite"


def fidelity_rows(figures):
    for name in (name for name in ORDER if all(name in found for found in figures.values())):
        errors = [
            np.array(of_moment[name]["error"])[np.array(of_moment[FLOAT16]["error"]) < 1]
            for of_moment in figures.values()
        ]
        cosines = " / ".join(f"{of_moment[name]['cosine']:.5f}" for of_moment in figures.values())
        found = (f"{percent(np.median(each))} / {percent(each.max())}" for each in errors)
        yield (name, *found, cosines)


def training_rows(figures):
    for name in (name for name in ORDER if name in figures):
        losses = [run["loss"] for run in figures[name]]
        accuracies = [run["accuracy"] for run in figures[name]]
        yield (
            name,
            f"{np.median(losses):#.4g} ({min(losses):#.4g} … {max(losses):#.4g})",
            f"{np.median(accuracies):.1%}",
        )


INTRODUCTION = f"""# What saved in 8 bits for the backward pass change

`saved in 8 bits`: `saved_activations="{SAVED}"`.

*Fidelity*: relative errors of gradients against float32, median / worst over weights, at the
weights of float32 training after the number of steps in the column; and cosine of the whole
gradient. Weights for which float16 has an error above 100 % are left out (biases of attention keys,
whose true gradient is zero). Rows with a * are emulated: the library does not have these formats
and roundings.

*Training*: mean loss (range over seeds) and accuracy on the last tenth of the training batches.
"""


def write_report(directory):
    parts = [INTRODUCTION]
    results = report.load_results(directory, float8.CASES)
    for result in results:
        parts.append(f"## {result['name']}, {result['images']}\n")
        if "fidelity" in result:
            header = [f"error at {moment}" for moment in result["fidelity"]]
            rows = fidelity_rows(result["fidelity"])
            parts.append(report.markdown(["", *header, "cosine"], rows) + "\n")
        if "training" in result:
            seeds = len(result["training"][FLOAT32])
            parts.append(f"{result['steps']} steps, {seeds} seeds.\n")
            rows = training_rows(result["training"])
            parts.append(report.markdown(["", "loss", "accuracy"], rows) + "\n")
    parts.append(report.provenance_text(results) + "\n")
    report.save_text(directory, "\n".join(parts))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "saved")
    parser.add_argument("--only", nargs="+", choices=float8.CASES, metavar="MODEL")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="of training; default: by model")
    args = parser.parse_args(argv)
    with report.progress() as progress:
        for name in args.only or (list(float8.CASES)[:1] if args.quick else float8.CASES):
            progress.add_task(name, total=None)
            run_case(float8.CASES[name], args)
    write_report(args.output)


def run_case(case, args):
    """Adds the requested parts to the figures of one case."""
    seeds = args.seeds
    if args.quick:
        case, seeds = dataclasses.replace(case, steps=20, moments=(0,)), 1
    if args.steps:
        case = dataclasses.replace(case, steps=args.steps)
    images = data.digits() if case.images == "digits" else data.cifar10(args.data)
    found = report.load_results(args.output, [case.name])
    figures = {**(found[0] if found else {}), "name": case.name, "images": images.name}
    if figures.setdefault("steps", case.steps) != case.steps:
        raise SystemExit(
            f"Figures of {case.name} in {args.output} are of {figures['steps']} steps. Choose "
            "another --output, or as many."
        )
    save = functools.partial(report.save_result, args.output, figures)
    if "fidelity" in args.parts:
        known = figures["fidelity"] = {}
        for found in fidelity(case, images):
            for moment, of_moment in found.items():
                known.setdefault(moment, {}).update(of_moment)
            save()
    if "training" in args.parts and (args.quick or case.name in TRAINED):
        known = figures.setdefault("training", {})
        for way_name, runs in training(case, images, range(seeds), dict(known)):
            known[way_name] = runs
            save()


if __name__ == "__main__":
    main()
