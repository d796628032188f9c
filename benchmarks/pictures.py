"""Draws the pictures of README.md: gradients of a deep network during training.

Trains a network of 17 layers without normalization, each of which divides the gradient by five at
first, on handwritten digits. Writes the record of the run, and the pictures that
`python -m tf_adaptive_ls` draws of it, in light and dark; and those of a short run in float8.
"""

import argparse
import pathlib

import keras

import tf_adaptive_ls as als
from benchmarks import convergence, data, report, zoo
from tf_adaptive_ls import plots

BATCH_SIZE = 32
# A step at which all layers still learn.
EARLY = 10


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="DIR",
        default=pathlib.Path("runs/pictures"),
        help="where to write; default: %(default)s",
    )
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    record = args.output / "run.jsonl"
    record.unlink(missing_ok=True)
    run_in_float8 = train(als.Float8(backward="float8_e4m3fn"), EARLY)
    train(None, args.steps, als.LossScaleMonitor(record, every=10))
    for suffix, dark in (("", False), ("_dark", True)):
        report.save_plot(args.output, f"scales{suffix}", plots.plot_scales(record, dark=dark))
        spectra = plots.plot_spectra(record, step=EARLY, dark=dark)
        report.save_plot(args.output, f"spectra{suffix}", spectra)
        in_float8 = plots.plot_spectra(run_in_float8, dark=dark)
        report.save_plot(args.output, f"float8{suffix}", in_float8)
    print(f"Written to {args.output}.")


def train(float8, steps, *callbacks):
    """The `Run` of a model after some steps."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_float16")
    model = als.wrap_model(zoo.vanishing_mlp(), float8=float8)
    model.compile(
        als.AdaptiveLossScaleOptimizer(convergence.adam()(steps)),
        loss=zoo.cross_entropy,
        jit_compile=True,
    )
    batches = (zoo.classify_vector(*batch) for batch in data.digits().batches(BATCH_SIZE, seed=0))
    model.fit(
        batches,
        steps_per_epoch=steps,
        shuffle=False,
        callbacks=callbacks,
    )
    return als.snapshot_run(model)


if __name__ == "__main__":
    main()
