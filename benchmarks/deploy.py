"""What accuracy do few bits cost? CIFAR-10 networks at 8, 4, 3 and 2 bits per weight.

Networks are trained in float32, with random shifts and mirroring. They are then quantized by
every method of `als.quantize_weights` at the same sizes: with a budget of 0, 5, 10 and 20 % more
bytes. Each result is measured on the same test images, for calibration data of several seeds.
Activations stay in float32; the first and the last layer have 8 bits.

    nearest, mse    use no calibration data and no budget
    multipoint      spends the budget on more points for some channels (Liu et al., AAAI 2021)
    mixed           spends it on 8 bits for some channels
    adaround        learns the rounding; spends the budget as "mixed"

The comparison of the paper is "multipoint" with "mse", which has one point per channel.

Prints Markdown tables; writes them, and all figures as JSON. Networks and rows that an earlier run
has written to the same directory are reused.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable

import keras
import numpy as np
from keras import layers

import tf_adaptive_ls as als
from benchmarks import compute, data, report, zoo

BITS = (8, 4, 3, 2)
BUDGETS = (0.0, 0.05, 0.1, 0.2)
WITHOUT_CALIBRATION = ("nearest", "mse")
SPENDING = ("multipoint", "mixed", "adaround")
CALIBRATION_SIZES = (32, 128, 512)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to train and quantize.

    Attributes:
        name: For tables.
        build: Function that creates the model.
        examples: Function from images and labels to inputs and targets.
        loss: Function of targets and outputs.
        measure: Function of model, inputs and targets: the share of correct images.
        steps: Number of Adam steps on batches of 128.
    """

    name: str
    build: Callable
    examples: Callable = zoo.classify
    loss: Callable = zoo.cross_entropy
    measure: Callable = None
    steps: int = 1500


def mobilenet_v2():
    """A small network of inverted residuals (Sandler et al. 2018) for 32 x 32 images."""

    def normalized(x, activation=True):
        x = layers.BatchNormalization(momentum=0.9)(x)
        return layers.ReLU(max_value=6)(x) if activation else x

    def pointwise(x, filters):
        return layers.Conv2D(filters, 1, use_bias=False)(x)

    x = inputs = keras.Input((zoo.SIDE, zoo.SIDE, 3))
    x = normalized(layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(x))
    for filters, strides, number in ((16, 1, 1), (24, 1, 2), (40, 2, 2), (80, 2, 2)):
        for i in range(number):
            y = normalized(pointwise(x, 4 * x.shape[-1]))
            y = layers.DepthwiseConv2D(
                3, strides=strides if i == 0 else 1, padding="same", use_bias=False
            )(y)
            y = normalized(pointwise(normalized(y), filters), activation=False)
            x = x + y if x.shape == y.shape else y
    x = layers.GlobalAveragePooling2D()(normalized(pointwise(x, 160)))
    return keras.Model(inputs, layers.Dense(10)(x))


def top_1(model, x, y):
    return float(np.mean(model.predict(x, batch_size=256, verbose=0).argmax(axis=-1) == y))


def objects_found(model, x, y):
    """The share of images whose most confident cell is the object's, with the right class."""
    outputs = model.predict(x, batch_size=256, verbose=0)
    scores = [each.reshape(len(x), -1, each.shape[-1]) for each in outputs[::2]]
    scores = np.concatenate(scores, axis=1)
    targets = [each.reshape(len(x), -1, 5) for each in y]
    targets = np.concatenate(targets, axis=1)
    background = scores[..., 0] - np.logaddexp.reduce(scores, axis=-1)
    cell = background.argmin(axis=1)
    images = np.arange(len(x))
    found = targets[images, cell, 4] == 1
    return float(np.mean(found & (scores[images, cell].argmax(-1) == targets[images, cell, 0])))


NETWORKS = {
    each.name: each
    for each in (
        Network("ResNet-20", zoo.resnet, measure=top_1),
        Network("MobileNetV2, small", mobilenet_v2, measure=top_1),
        Network("VGG, not normalized", zoo.vgg, measure=top_1),
        Network("SSD", zoo.ssd, zoo.detect, zoo.detection, objects_found, steps=1000),
    )
}


def augmented(images, rng):
    """Random mirroring and shifts, as for CIFAR-10 in He et al. (2016)."""
    images = np.where(rng.integers(0, 2, (len(images), 1, 1, 1)), images, images[:, :, ::-1])
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    top, left = rng.integers(0, 9, (2, len(images)))
    return np.stack([p[a : a + 32, b : b + 32] for p, a, b in zip(padded, top, left, strict=True)])


def trained(network, images, steps, file, progress):
    """The trained network, from a file if there is one."""
    keras.utils.set_random_seed(0)
    model = network.build()
    if file.exists():
        model.load_weights(file)
        return model
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps * 4 // 5, warmup_target=3e-3, warmup_steps=steps // 5
    )
    single = not isinstance(model.output, list)
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=1e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True) if single else None,
        # XLA's gradients of depthwise convolutions are very slow on a CPU
        jit_compile=bool(compute.gpu_names()),
    )
    if not single:
        model.compute_loss = lambda x, y, y_pred, sample_weight=None, training=True: network.loss(
            y, y_pred
        )
    rng, batches = np.random.default_rng(0), images.batches(128, 0)
    task = progress.add_task(f"training {network.name}", total=steps)
    for _ in range(steps):
        x, labels = next(batches)
        model.train_on_batch(*network.examples(augmented(x, rng), labels))
        progress.advance(task)
    file.parent.mkdir(parents=True, exist_ok=True)
    model.save_weights(file)
    return model


def ways():
    """Bits, method and budget of each row."""
    for bits in BITS:
        for method in (*WITHOUT_CALIBRATION, *SPENDING):
            for budget in BUDGETS if method in SPENDING and bits < 8 else (0.0,):
                if method in ("multipoint", "mixed") and not budget:
                    continue  # that would be "mse"
                yield bits, method, budget


def row_of(network, model, images, test, way, seed, number):
    """Accuracy, bytes and seconds of one row."""
    bits, method, budget = way
    chosen = np.random.default_rng(seed).choice(len(images.x_train), number, replace=False)
    x, _ = network.examples(images.x_train[chosen], images.y_train[chosen])
    start = time.perf_counter()
    quantized, found = als.quantize_weights(
        model, x, bits, method=method, budget=budget, verbose=False
    )
    seconds = time.perf_counter() - start
    return {
        "accuracy": network.measure(quantized, *test),
        "bytes": found.bytes,
        "float32_bytes": found.float32_bytes,
        "seconds": seconds,
    }


def measure(network, figures, images, args, save, progress):
    """Adds missing rows."""
    file = args.output / "networks" / f"{network.name}.weights.h5"
    model = trained(network, images, figures["steps"], file, progress)
    # In random order, because files may be sorted by class.
    chosen = np.random.default_rng(0).permutation(len(images.x_test))[: args.images]
    test = network.examples(images.x_test[chosen], images.y_test[chosen])
    figures.setdefault("float32", network.measure(model, *test))
    rows = figures.setdefault("rows", {})
    left = [
        (way, seed, 128)
        for way in ways()
        for seed in range(1 if way[1] in WITHOUT_CALIBRATION else args.seeds)
    ]
    learnt = (4, "adaround", 0.0)
    left += [(learnt, seed, n) for n in CALIBRATION_SIZES for seed in range(args.seeds)]
    if args.quick:
        left = [each for each in left if each[0][0] == 4 and each[0][2] in (0.0, 0.1)][:6]
    task = progress.add_task(network.name, total=len(left))
    for way, seed, number in left:
        name = " ".join(map(str, (*way, number, seed)))
        if name not in rows:
            rows[name] = row_of(network, model, images, test, way, seed, number)
            save()
        progress.advance(task)


# Tables.


def seeds_of(rows, way, number=128):
    prefix = " ".join(map(str, (*way, number))) + " "
    return [row for name, row in rows.items() if name.startswith(prefix)]


def cell(rows, way, number=128):
    found = seeds_of(rows, way, number)
    if not found:
        return ""
    accuracies = [row["accuracy"] for row in found]
    text = f"{np.mean(accuracies):.1%}"
    return text if len(found) == 1 else f"{text} ± {np.ptp(accuracies) / 2:.1%}"


def table(figures):
    rows = figures["rows"]
    for bits in BITS:
        for method in (*WITHOUT_CALIBRATION, *SPENDING):
            cells = [cell(rows, (bits, method, budget)) for budget in BUDGETS]
            if any(cells):
                yield (str(bits), method, *cells)


INTRODUCTION = """# Weights in few bits

Accuracy on test images: top-1, or for the SSD the share of images with the right cell and class.
Columns *0 %* … *20 %*: budget of additional bytes. Mean over seeds of 128 calibration images ± half
the range. "multipoint" and "mixed" without a budget are the same as "mse".
"""


def write_report(directory):
    parts = [INTRODUCTION]
    results = report.load_results(directory, NETWORKS)
    for result in results:
        rows = result["rows"]
        parts.append(
            f"## {result['name']}, {result['images']}\n\nFloat32: {result['float32']:.1%} of "
            f"{result['test_images']:,} images, after {result['steps']:,} steps.\n"
        )
        header = ["bits", "method", *(f"{budget:.0%}" for budget in BUDGETS)]
        parts.append(report.markdown(header, table(result)) + "\n")
        sizes = {n: cell(rows, (4, "adaround", 0.0), n) for n in CALIBRATION_SIZES}
        sizes = "; ".join(f"{n} images {text}" for n, text in sizes.items() if text)
        seconds = {
            method: np.median([r["seconds"] for r in seeds_of(rows, (4, method, budget))] or [0])
            for method, budget in (("mse", 0.0), ("multipoint", 0.2), ("adaround", 0.0))
        }
        took = ", ".join(f"{method} {s:.0f} s" for method, s in seconds.items())
        weights = {bits: seeds_of(rows, (bits, "mse", 0.0)) for bits in BITS}
        of_bits = ", ".join(
            f"{bits} bits {found[0]['bytes'] / found[0]['float32_bytes']:.1%}"
            for bits, found in weights.items()
            if found
        )
        parts.append(f"AdaRound, 4 bits, by calibration data: {sizes}. Quantizing took: {took}.\n")
        parts.append(f"Bytes of all weights, as a share of float32: {of_bits}.\n")
    parts.append(report.provenance_text(results) + "\n")
    report.save_text(directory, "\n".join(parts))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "deploy")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, metavar="NETWORK")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=2000, help="to test on; default: %(default)s")
    args = parser.parse_args(argv)
    args.output = pathlib.Path(args.output)
    with report.progress() as progress:
        for name in args.only or (["VGG, not normalized"] if args.quick else NETWORKS):
            run_network(NETWORKS[name], args, progress)
    write_report(args.output)


def run_network(network, args, progress):
    """Adds to the figures of one network."""
    images = data.digits() if args.quick else data.cifar10(args.data)
    if args.quick:
        args.seeds, args.images = 1, 200
    (figures,) = report.load_results(args.output, [network.name]) or [{}]
    known = {
        "name": network.name,
        "images": images.name,
        "steps": 30 if args.quick else network.steps,
        "test_images": args.images,
    }
    differing = [key for key in known if figures.get(key, known[key]) != known[key]]
    if differing:
        raise SystemExit(
            f"Figures of {network.name} in {args.output} are of another "
            f"{' and '.join(differing)}. Choose another --output, or the same."
        )
    figures |= known

    def save():
        report.save_result(args.output, figures)

    measure(network, figures, images, args, save, progress)
    save()


if __name__ == "__main__":
    main()
