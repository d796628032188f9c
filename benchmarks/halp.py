"""How close to the optimum does HALP get, and does it help non-convex networks?

The logistic regression of `examples/halp.py`: the norm of the gradient over all data after each
epoch, for SGD, SGD with 8-bit weights, SVRG, and HALP with 2, 4, 8 and 16 bits. And LeNet, which is
not convex, on 10,000 images of CIFAR-10: training loss and test accuracy after 15 epochs, with
momentum, for SGD, for SGD with as many passes over the data as SVRG, for SVRG and for HALP. For
each seed, all start from the same weights and train on the same batches.

An epoch of SVRG or HALP computes more gradients than one of SGD: two per batch, and those of all
data at each center. The tables count them as passes over the data.

Prints Markdown tables and plots the norms; writes them, and all figures as JSON. Ways that an
earlier run has written to the same directory are not run again.
"""

import argparse
import pathlib

import keras
import numpy as np
from keras import layers

import tf_adaptive_ls as als
from benchmarks import data, report
from examples import halp as digits

CONVEX = "Logistic regression, digits"
LENET = "LeNet, CIFAR-10"
NAMES = (CONVEX, LENET)
EPOCHS = {CONVEX: 40, LENET: 15}
LENET_IMAGES = 10_000
LENET_BATCH = 128
LENET_RATE = 0.02
# As for the ResNet-18 of the authors.
LENET_MU = 20.0
# As many passes over the data as SVRG.
LONGER = "SGD, three times the epochs"
LENET_WAYS = (
    "SGD",
    LONGER,
    "SVRG",
    "HALP, 2 bits",
    "HALP, 4 bits",
    "HALP, 8 bits",
    "HALP, 16 bits",
)


def convex(way, images, epochs, seed):
    x, y = digits.load_data()
    norms, accuracy = digits.train(way, x, y, epochs, seed)
    return {"norms": norms, "accuracy": accuracy}


def lenet_model(shape):
    """LeCun et al. 1998, with ReLU and max pooling."""
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(6, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(120, activation="relu"),
            layers.Dense(84, activation="relu"),
            layers.Dense(10),
        ]
    )


def lenet(way, images, epochs, seed):
    chosen = np.random.default_rng(0).permutation(len(images.x_train))[:LENET_IMAGES]
    x, y = images.x_train[chosen], images.y_train[chosen]
    tested = np.random.default_rng(0).permutation(len(images.x_test))[:2000]
    keras.utils.set_random_seed(seed)
    model = lenet_model(x.shape[1:])
    callbacks = []
    if way.startswith("SGD"):
        optimizer = keras.optimizers.SGD(LENET_RATE, momentum=0.9)
    else:
        bits = None if way == "SVRG" else int(way.split()[1])
        optimizer = als.BitCentered(LENET_RATE, bits, LENET_MU, momentum=0.9, seed=seed)
        epoch = -(-len(x) // LENET_BATCH)
        callbacks = [als.Recenter((x, y), every=epoch, batch_size=500, verbose=False)]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, metrics=["accuracy"])
    epochs *= 3 if way == LONGER else 1
    history = model.fit(x, y, LENET_BATCH, epochs, callbacks=callbacks, verbose=0).history
    loss, _ = model.evaluate(x, y, batch_size=500, verbose=0)
    _, accuracy = model.evaluate(
        images.x_test[tested], images.y_test[tested], batch_size=500, verbose=0
    )
    return {"losses": history["loss"], "loss": loss, "accuracy": accuracy}


CASES = {CONVEX: (digits.WAYS, convex), LENET: (LENET_WAYS, lenet)}


def passes(name, way, epochs):
    """How often the gradient of each example is computed."""
    if way.startswith("SGD"):
        return 3 * epochs if way == LONGER else epochs
    centers = -(-epochs // 2) if name == CONVEX else epochs
    return 2 * epochs + centers


# Tables.


def middle(values, form):
    """The median, and the range."""
    return f"{np.median(values):{form}} ({min(values):{form}} … {max(values):{form}})"


def rows(result):
    for way, found in result["ways"].items():
        runs = [found[seed] for seed in sorted(found)]
        passed = passes(result["name"], way, result["epochs"])
        if result["name"] == CONVEX:
            half = result["epochs"] // 2 - 1
            yield (
                way,
                str(passed),
                middle([run["norms"][half] for run in runs], ".1e"),
                middle([run["norms"][-1] for run in runs], ".1e"),
            )
        else:
            yield (
                way,
                str(passed),
                middle([run["loss"] for run in runs], ".3f"),
                middle([run["accuracy"] for run in runs], ".1%"),
            )


def write_report(directory):
    results = report.load_results(directory, NAMES)
    parts = [
        "# HALP\n\nMedian over seeds, and the range. *Passes*: over the data, forward and back.\n"
    ]
    for result in results:
        epochs = result["epochs"]
        seeds = max(len(found) for found in result["ways"].values())
        of_seeds = f"{seeds} seeds" if seeds > 1 else "one seed"
        parts.append(f"## {result['name']}\n\n{epochs} epochs, {of_seeds}.\n")
        if result["name"] == CONVEX:
            header = [
                "",
                "passes",
                f"gradient after {epochs // 2} epochs",
                f"after {epochs} epochs",
            ]
            norms = {way: found["0"]["norms"] for way, found in result["ways"].items()}
            report.save_plot(directory, "halp", digits.draw(norms))
        else:
            header = ["", "passes", "training loss", "test accuracy"]
        parts.append(report.markdown(header, rows(result)) + "\n")
        if result["name"] == CONVEX:
            parts.append("Norms of the gradient over all data; `halp.png` shows seed 0.\n")
    parts.append(report.provenance_text(results) + "\n")
    report.save_text(directory, "\n".join(parts))


def run_case(name, args, progress):
    ways, train = CASES[name]
    images = data.digits() if args.quick else None
    if name == LENET and not args.quick:
        images = data.cifar10(args.data)
    epochs = 2 if args.quick else EPOCHS[name]
    (figures,) = report.load_results(args.output, [name]) or [{"name": name, "epochs": epochs}]
    if figures["epochs"] != epochs:
        raise SystemExit(
            f"Figures of {name} in {args.output} are of {figures['epochs']} epochs, not {epochs}. "
            "Choose another --output."
        )
    before = figures.setdefault("ways", {})
    found = figures["ways"] = {way: before.get(way, {}) for way in ways}
    seeds = range(1 if args.quick else args.seeds)
    task = progress.add_task(name, total=len(ways) * len(seeds))
    for seed in seeds:
        for way in ways:
            if str(seed) not in found[way]:
                found[way][str(seed)] = train(way, images, epochs, seed)
                report.save_result(args.output, figures)
            progress.advance(task)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "halp")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NETWORK")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(argv)
    args.output = pathlib.Path(args.output)
    with report.progress() as progress:
        for name in args.only or NAMES:
            run_case(name, args, progress)
    write_report(args.output)


if __name__ == "__main__":
    main()
