"""Does training tolerate 16-bit weights?

Mean loss and accuracy over the last tenth of the batches, from the same weights on the same batches
for each way, once per seed, with SGD (momentum) and AdamW and a cosine schedule:

    32 bits                 float32 weights: Keras's policies mixed_float16, mixed_bfloat16
    16 bits, nearest        Keras's policies float16, bfloat16; the optimizer's variables have 16
                            bits, too
    16 bits, stochastic     the same policies with `stochastic_rounding=True`: the optimizer
                            computes in float32, and weights are rounded stochastically, with an
                            exact mean
    * computed in float32   the optimizer computes in float32, and weights are rounded to nearest,
                            which the library does not offer: the cost of rounding alone
    Mellempudi et al.       everything in their paper: float16 weights, stochastic rounding, e5m2
                            operands in all matmuls but those of the first and the last layer,
                            float32 between them, and a loss scale with a rising minimum

All models are wrapped, with a scale per layer. The last layer is float32. The ResNet computes in
float32 in all ways, so that only weights differ.

*Bytes*: of weights and of the optimizer's variables, per trained number.

Prints Markdown tables; writes them, and all figures as JSON. Ways from earlier runs into the same
directory stay in the tables.
"""

import argparse
import dataclasses

import keras
import numpy as np
from keras import ops, optimizers

import tf_adaptive_ls as als
from benchmarks import data, float8, report
from benchmarks.float8_ways import Way, rising_minimums

DTYPES = ("float16", "bfloat16")
CASES = {
    "VGG, not normalized": float8.CASES["VGG, not normalized"],
    "Transformer": float8.CASES["Transformer"],
    "ResNet-20": dataclasses.replace(float8.CASES["ResNet-20"], steps=250, batch_size=32),
}
COMPUTED_WIDE = ("ResNet-20",)
OPTIMIZERS = {
    "SGD": lambda steps: optimizers.SGD(
        optimizers.schedules.CosineDecay(0.05, steps), momentum=0.9, weight_decay=1e-4
    ),
    "AdamW": lambda steps: optimizers.AdamW(
        optimizers.schedules.CosineDecay(1e-3, steps), weight_decay=1e-2
    ),
}


@keras.saving.register_keras_serializable("benchmarks")
class WeightsOf(keras.DTypePolicy):
    """Weights of one dtype, computations in float32."""

    def _parse_name(self, name):
        return "float32", name


def stochastically(inner):
    return als.AdaptiveLossScaleOptimizer(inner, stochastic_rounding=True)


class Nearest(als.AdaptiveLossScaleOptimizer):
    """Like stochastic rounding, but weights are rounded to nearest."""

    def __init__(self, inner):
        super().__init__(inner, stochastic_rounding=True)

    def _rounded(self, x, dtype, place, step):
        return ops.cast(x, dtype)


def mellempudi(steps):
    def optimizer(inner):
        rule = als.RisingMinimumRule(rising_minimums(steps))
        return als.AdaptiveLossScaleOptimizer(inner, rule=rule, stochastic_rounding=True)

    def wrapped(plain):
        return als.wrap_model(plain, float8=als.Float8.mellempudi())

    return Way("Mellempudi et al.", wrapped, optimizer, WeightsOf("float16"))


def ways(steps, computed_wide):
    """All ways, by name, of training for `steps` steps."""
    found = []
    for dtype in DTYPES:
        narrow = WeightsOf(dtype) if computed_wide else dtype
        wide = "float32" if computed_wide else f"mixed_{dtype}"
        found += [
            (f"{wide}, weights of 32 bits", wide, als.AdaptiveLossScaleOptimizer),
            (f"{dtype}, nearest", narrow, als.AdaptiveLossScaleOptimizer),
            (f"{dtype}, stochastic", narrow, stochastically),
        ]
    # Where the last bit is largest.
    found.append((f"*{dtype}, computed in float32, nearest", narrow, Nearest))
    own = [Way(name, als.wrap_model, make, policy) for name, policy, make in found]
    return {way.name: way for way in (*own, mellempudi(steps))}


def training(case, way, images, seeds):
    """Figures of each seed, and bytes per trained number."""
    (found,) = float8.training(case, [("", way)], images, seeds)
    runs = [run["None"] for run in found[""][way.name]]
    return {"runs": runs, **bytes_of(float8.Trainee(case, way, case.optimizer(1)).model)}


def bytes_of(model):
    """Bytes of weights and of the optimizer's variables per trained number."""
    trained = [v for v in model.trainable_variables if not hasattr(v, "loss_scaled")]
    kept = model.optimizer.inner_optimizer.variables
    number = sum(int(np.prod(v.shape)) for v in trained)
    return {
        "weights": sum(map(size, trained)) / number,
        "optimizer": sum(map(size, kept)) / number,
    }


def size(variable):
    width = 2 if keras.backend.standardize_dtype(variable.dtype) in DTYPES else 4
    return width * int(np.prod(variable.shape))


# Tables.


def rows(figures):
    for optimizer in OPTIMIZERS:
        for name, found in figures.get(optimizer, {}).items():
            losses = [np.nan_to_num(run["loss"], nan=np.inf) for run in found["runs"]]
            accuracies = [run["accuracy"] for run in found["runs"]]
            yield (
                optimizer,
                name,
                f"{np.median(losses):#.4g} ({min(losses):#.4g} … {max(losses):#.4g})",
                f"{np.median(accuracies):.1%}",
                " / ".join(str(run["skipped"]) for run in found["runs"]),
                f"{found['weights']:.1f} + {found['optimizer']:.1f}",
            )


INTRODUCTION = """# Weights of 16 bits

Mean loss (range over seeds) and accuracy on the last tenth of the training batches. *nearest*: the
policy of Keras. *stochastic*: the same policy with `stochastic_rounding=True`. *bytes*: of weights
and of optimizer state, per trained parameter.
"""


def write_report(directory):
    results = report.load_results(directory, CASES)
    parts = [INTRODUCTION]
    header = ["", "", "loss", "accuracy", "skipped", "bytes"]
    for result in results:
        computed = ", computed in float32" if result["name"] in COMPUTED_WIDE else ""
        parts.append(f"## {result['name']}, {result['images']}{computed}\n")
        parts.append(
            f"{result['steps']} steps in batches of {result['batch_size']}, "
            f"{result['seeds']} seeds.\n"
        )
        parts.append(report.markdown(header, rows(result["training"])) + "\n")
    parts.append(report.provenance_text(results) + "\n")
    report.save_text(directory, "\n".join(parts))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "weights")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="MODEL")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(argv)
    for name in args.only or (list(CASES)[:1] if args.quick else CASES):
        run_case(CASES[name], args)
    write_report(args.output)


def run_case(case, args):
    """Adds missing ways to the figures of one case."""
    steps, seeds = (20, 1) if args.quick else (case.steps, args.seeds)
    case = dataclasses.replace(case, steps=steps)
    images = data.digits() if args.quick else data.cifar10(args.data)
    setting = {"images": images.name, "steps": steps, "batch_size": case.batch_size, "seeds": seeds}
    found = report.load_results(args.output, [case.name])
    figures = found[0] if found else {"name": case.name, **setting, "training": {}}
    differing = [name for name, value in setting.items() if figures[name] != value]
    if differing:
        raise SystemExit(
            f"Figures of {case.name} in {args.output} are of another {' and '.join(differing)}. "
            "Choose another --output, or the same."
        )
    all_ways = ways(steps, case.name in COMPUTED_WIDE)
    left = [
        (optimizer, name)
        for optimizer in OPTIMIZERS
        for name in all_ways
        if name not in figures["training"].get(optimizer, {})
    ]
    with report.progress() as progress:
        task = progress.add_task(case.name, total=len(left))
        for optimizer, name in left:
            with_it = dataclasses.replace(case, optimizer=OPTIMIZERS[optimizer])
            runs = training(with_it, all_ways[name], images, range(seeds))
            figures["training"].setdefault(optimizer, {})[name] = runs
            report.save_result(args.output, figures)
            progress.advance(task)


if __name__ == "__main__":
    main()
