"""Which scales does float8 training need? Fidelity of gradients, and training runs.

All matmuls except those of the first and the last layer have float8 operands; everything between
them is float16. Inputs and kernels are e4m3, scaled by their amax, in every way. Gradients are e5m2
or e4m3, rounded to nearest, with scales that each way finds as described in `float8_ways`:

    no scaling, best fixed scale, dynamic scale, rising minimum, LogMax    one loss scale
    per tensor, history / current   a scale per gradient, from its amax over 1,024 steps, or its
                                    current amax; a dynamic loss scale between the matmuls
    Keras's float8                  `quantize("float8")`, if all matmuls are of Dense layers
    ours                            a loss scale per layer
    ours, blocks of 32              a loss scale per layer, and in matmuls a power of two per 32
                                    numbers along the summed axes; in e4m3 `Float8.mx()`, MXFP8

*Fidelity*: at weights of float32 training, after steps that do not change weights so that scales
can adapt, the mean gradient of each weight over some batches is compared with that of float32:

    error      |g8 - g32| / |g32|, the median over weights, relative to the oracle: the smallest
               that any single loss scale 2^0 … 2^30 gives that weight in that format
    worst      the same for the worst weight
    flushed    share of elements that are zero in g8 and not in g32
    cosine     of the whole gradient

*Training*: mean loss and accuracy on the training batches of the last tenth, and skipped steps.

*Variations* (option): training with other settings of ours, with the share of gradients that
saturated on a step, and the share that is flushed in the worst layer at the end.

*Everywhere* (option): training with e5m2 also in the forward pass, and also in the first and the
last layer. This is the setting of Cambier et al. 2020 (S2FP8), in which unscaled gradients fail.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops

from benchmarks import convergence, data, report, zoo
from benchmarks.float8_ways import (
    BEST_FIXED,
    KERAS_FLOAT8,
    NO_SCALING,
    OURS,
    WIDE,
    everywhere,
    only_dense,
    variations,
    ways,
)

E4M3, E5M2 = FORMATS = ("float8_e4m3fn", "float8_e5m2")
ORACLE = tuple(range(0, 31, 3))
SETTLING_STEPS, COMPARED_BATCHES = 16, 4
TRAINED = ("training", "variations", "everywhere")
PARTS = ("fidelity", *TRAINED)
ORDER = list(dict.fromkeys(way.name for way in (*WIDE, *ways(E4M3), KERAS_FLOAT8, *everywhere())))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, data, and how it is trained.

    Args:
        name: Short name for tables.
        images: "digits" or "CIFAR-10".
        build: `() -> keras.Model`.
        examples: `(images, labels) -> (x, y)`.
        optimizer: `steps -> keras.optimizers.Optimizer`.
        steps: Number of steps.
        batch_size: Batch size.
        moments: Numbers of steps after which gradients are compared.
        loss: `(targets, outputs) -> scalar`.
    """

    name: str
    images: str
    build: Callable
    examples: Callable
    optimizer: Callable
    steps: int
    batch_size: int = 64
    moments: tuple = (0, 100)
    loss: Callable = zoo.cross_entropy


def depthwise_net():
    """MobileNet's separable blocks (Howard et al. 2017), small."""
    inputs = keras.Input((zoo.SIDE, zoo.SIDE, 3))
    x = layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(inputs)
    for filters, strides in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
        x = layers.DepthwiseConv2D(3, strides=strides, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
        x = layers.Conv2D(filters, 1, use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, dtype="float32")(x))


def exploding_mlp():
    return zoo.plain_mlp(40, 1.2)


adam, recipe = convergence.adam, convergence.paper_recipe
CASES = {
    case.name: case
    for case in (
        Case(
            "MLP 17, vanishing", "digits", zoo.vanishing_mlp, zoo.classify_vector, adam(), 2000, 32
        ),
        Case(
            "MLP 40, exploding", "digits", exploding_mlp, zoo.classify_vector, adam(1e-4), 1000, 32
        ),
        Case("10 sigmoid layers", "digits", zoo.sigmoid_mlp, zoo.classify_vector, adam(), 2000, 32),
        Case(
            "VGG, not normalized",
            "CIFAR-10",
            lambda: zoo.vgg((16, 16, 1)),
            convergence.small_images(16),
            adam(),
            500,
            32,
        ),
        Case("ResNet-20", "CIFAR-10", zoo.resnet, zoo.classify, recipe(64), 500),
        Case("Depthwise net", "CIFAR-10", depthwise_net, zoo.classify, recipe(64), 500),
        Case("Transformer", "CIFAR-10", zoo.transformer, zoo.classify, adam(), 400),
        Case("U-Net", "CIFAR-10", zoo.unet, zoo.colorize, adam(), 500, 16, loss=zoo.mean_square),
        Case("SSD", "CIFAR-10", zoo.ssd, zoo.detect, adam(), 500, 32, loss=zoo.detection),
        Case(
            "Autoencoder",
            "CIFAR-10",
            zoo.autoencoder,
            zoo.reconstruct,
            adam(),
            500,
            loss=zoo.mean_square,
        ),
    )
}


class Still(keras.optimizers.Optimizer):
    """An optimizer that leaves weights unchanged, and sums up their gradients."""

    def build(self, variables):
        super().build(variables)
        self.sums = [self.add_variable_from_reference(v, name="sum") for v in variables]
        self.number = self.add_variable((), dtype="float32", initializer="zeros", name="number")
        # Variables that are overwritten with their gradients are not passed to `update_step`.
        self.places = [place for place, v in enumerate(variables) if is_weight(v)]

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        self.assign_add(self.sums[index], ops.cast(gradient, "float32"))
        if index == self.places[0]:
            self.assign_add(self.number, ops.ones(()))


def is_weight(variable):
    return not variable.overwrite_with_gradient and keras.backend.is_float_dtype(variable.dtype)


class Trainee:
    """A model under one way, which can be trained from any weights."""

    def __init__(self, case, way, inner):
        keras.backend.clear_session()
        keras.config.set_dtype_policy(way.policy)
        self.way = way
        self.model = way.model(case.build())
        # One function of all outputs, because `compile` does not accept one.
        self.model.compute_loss = lambda x, y, y_pred, *args, **kwargs: case.loss(y, y_pred)
        self.model.compile(
            way.optimizer(inner),
            metrics=["accuracy"] if case.loss is zoo.cross_entropy else None,
            jit_compile=True,
            auto_scale_loss=False,
        )
        self.model.optimizer.build(self.model.trainable_variables)
        self._others = [
            v
            for v in [*self.model.variables, *self.model.optimizer.variables]
            if not (is_weight(v) and any(v is w for w in self.model.weights))
        ]
        self._first = [np.array(v.numpy()) for v in self._others]

    @property
    def weights(self):
        return [v.numpy() for v in self.model.weights if is_weight(v)]

    def reset(self, weights, log2_scale=None):
        """Starts again from other weights."""
        for variable, value in zip(self._others, self._first, strict=True):
            variable.assign(value)
        for variable, value in zip(filter(is_weight, self.model.weights), weights, strict=True):
            variable.assign(value)
        if log2_scale is not None:
            self.model.optimizer.dynamic_scale.assign(2.0**log2_scale)

    def fit(self, batches, *callbacks):
        """Trains on a list of batches. Returns the logs."""
        history = self.model.fit(
            (each for each in batches),
            steps_per_epoch=len(batches),
            shuffle=False,
            verbose=0,
            callbacks=list(callbacks),
        )
        return {name: values[0] for name, values in history.history.items()}

    def trained(self, batches):
        """Figures of training."""
        last = len(batches) // 10
        callbacks = [self.way.callback(len(batches))] if self.way.callback else []
        self.fit(batches[:-last], *callbacks)
        logs = self.fit(batches[-last:], *callbacks)
        inner = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        taken = int(inner.iterations.numpy())
        return {**logs, "skipped": len(batches) - taken, **self._rounding(len(batches))}

    def _rounding(self, steps):
        """Statistics of the gradients that our layers have quantized."""
        layers_of_ours = [x.loss_scaling for x in self.model.layers if hasattr(x, "loss_scaling")]
        shown = [layer.snapshot for layer in layers_of_ours if layer.float8]
        if not shown or shown[0].operands is None:
            return {}
        return {
            "saturated": sum(each.saturations for each in shown) / len(shown) / steps,
            "flushed": float(np.nanmax([each.flushed_share for each in shown])),
        }

    def gradients(self, weights, settling, compared, log2_scale=None):
        """Mean gradients at some weights. `None` if no step was finite."""
        self.reset(weights, log2_scale)
        if log2_scale is None:
            callbacks = [self.way.callback(len(settling))] if self.way.callback else []
            self.fit(settling, *callbacks)
        still = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        for variable in [*still.sums, still.number]:
            variable.assign(np.zeros(variable.shape, "float32"))
        # The statistics of normalization have moved meanwhile.
        for variable, value in zip(filter(is_weight, self.model.weights), weights, strict=True):
            variable.assign(value)
        self.fit(compared)
        number = float(still.number.numpy())
        return [still.sums[i].numpy() / number for i in still.places] if number else None


def errors(gradients, reference):
    """The relative error of each weight's gradient. Infinite for all if there are no gradients."""
    if gradients is None:
        return np.full(len(reference), np.inf)
    with np.errstate(all="ignore"):
        found = [
            np.linalg.norm(g.astype("float64") - r) / np.linalg.norm(r)
            for g, r in zip(gradients, reference, strict=True)
        ]
    return np.nan_to_num(np.array(found), nan=np.inf)


def fidelity(case, all_ways, images, seed=0):
    """Figures of each way, by moment."""
    keras.utils.set_random_seed(seed)
    batches = _batches(case, images, seed, max(case.moments) + SETTLING_STEPS + COMPARED_BATCHES)
    training, rest = batches[: max(case.moments)], batches[max(case.moments) :]
    settling, compared = rest[:SETTLING_STEPS], rest[SETTLING_STEPS:]
    float32 = Trainee(case, WIDE[0], case.optimizer(case.steps))
    weights = {}
    for moment in case.moments:
        done = max(weights, default=0)
        if moment > done:
            float32.fit(training[done:moment])
        weights[moment] = float32.weights
    reference = Trainee(case, WIDE[0], Still(0.0))
    expected = {m: reference.gradients(w, settling, compared) for m, w in weights.items()}
    figures = {str(moment): {} for moment in case.moments}
    for backward, way in all_ways:
        trainee = Trainee(case, way, Still(0.0))
        for moment, at in weights.items():
            wanted = expected[moment]
            kept = [np.linalg.norm(each) > 0 for each in wanted]
            scales = ORACLE if way.name == BEST_FIXED else way.log2_scales or (None,)
            found = [trainee.gradients(at, settling, compared, scale) for scale in scales]
            by_scale = np.array([errors(g, wanted) for g in found])[:, kept]
            best = int(np.argmin(np.median(by_scale, axis=1)))
            figures[str(moment)].setdefault(backward, {})[way.name] = {
                "error": by_scale[best].tolist(),
                **_whole(found[best], wanted),
            }
            if way.name == BEST_FIXED:
                figures[str(moment)][backward]["oracle"] = {"error": by_scale.min(axis=0).tolist()}
    return figures


def _whole(gradients, reference):
    if gradients is None:
        return {"flushed": 1.0, "cosine": 0.0}
    g, r = (
        np.concatenate([np.ravel(each).astype("float64") for each in x])
        for x in (gradients, reference)
    )
    flushed = np.sum((g == 0) & (r != 0)) / max(np.sum(r != 0), 1)
    with np.errstate(all="ignore"):
        cosine = g @ r / (np.linalg.norm(g) * np.linalg.norm(r))
    return {"flushed": float(flushed), "cosine": float(np.nan_to_num(cosine))}


def _batches(case, images, seed, number):
    taken = itertools.islice(images.batches(case.batch_size, seed), number)
    return [case.examples(*batch) for batch in taken]


def training(case, all_ways, images, seeds):
    """Figures of each way by format: a list over seeds, of dicts by log2 of a fixed scale."""
    weights = {}
    for seed in seeds:
        keras.utils.set_random_seed(seed)
        weights[seed] = Trainee(case, WIDE[0], "sgd").weights
    for backward, way in all_ways:
        trainee = Trainee(case, way, case.optimizer(case.steps))
        runs = []
        for seed in seeds:
            batches = _batches(case, images, seed, case.steps)
            of_seed = {}
            for scale in way.log2_scales or (None,):
                trainee.reset(weights[seed], scale)
                of_seed[str(scale)] = trainee.trained(batches)
            runs.append(of_seed)
        yield {backward: {way.name: runs}}


# Tables.


def fidelity_rows(figures):
    """Rows of the fidelity table: each way in each format."""
    for backward in FORMATS:
        by_moment = [figures[moment].get(backward, {}) for moment in figures]
        for name in (name for name in ORDER if name in by_moment[0]):
            ratios, found = [], []
            for ways_of_moment in by_moment:
                oracle = np.maximum(ways_of_moment["oracle"]["error"], 1e-5)
                ratios.append(np.maximum(ways_of_moment[name]["error"], 1e-5) / oracle)
                found.append(ways_of_moment[name])
            yield (
                f"{_short(backward)}, {name}",
                *(f"{np.median(each):.2f} / {each.max():.3g}" for each in ratios),
                " / ".join(f"{each['flushed']:.1%}" for each in found),
                " / ".join(f"{each['cosine']:.4f}" for each in found),
            )


def training_rows(figures):
    """Rows of the training table: medians over seeds, ranges of losses."""
    for backward in ("wide", *FORMATS):
        by_way = figures.get(backward, {})
        for name in (name for name in ORDER if name in by_way):
            runs = by_way[name]
            scale = _best_scale(runs)
            of_scale = [run[scale] for run in runs]
            losses = [np.nan_to_num(run["loss"], nan=np.inf) for run in of_scale]
            title = name if backward == "wide" else f"{_short(backward)}, {name}"
            if name == BEST_FIXED:
                title += f", 2^{scale}"
            yield (
                title,
                f"{np.median(losses):#.3g} ({min(losses):#.3g} … {max(losses):#.3g})",
                _accuracy(of_scale),
                " / ".join(str(run["skipped"]) for run in of_scale),
            )


def variations_rows(figures):
    """Rows of the table of variations in each format: medians over seeds, ranges of losses."""
    for backward, by_way in figures.items():
        for name, runs in by_way.items():
            of_seeds = [run["None"] for run in runs]
            losses = [np.nan_to_num(run["loss"], nan=np.inf) for run in of_seeds]
            yield (
                f"{_short(backward)}, {name}",
                f"{np.median(losses):#.3g} ({min(losses):#.3g} … {max(losses):#.3g})",
                f"{np.mean([run['saturated'] for run in of_seeds]):.3%}",
                f"{np.mean([run['flushed'] for run in of_seeds]):.1%}",
                " / ".join(str(run["skipped"]) for run in of_seeds),
            )


def _accuracy(runs):
    found = [run["accuracy"] for run in runs if "accuracy" in run]
    return f"{np.median(found):.1%}" if found else ""


def _best_scale(runs):
    """The scale with the smallest median loss."""

    def loss(scale):
        return np.median([np.nan_to_num(run[scale]["loss"], nan=np.inf) for run in runs])

    return min(runs[0], key=loss)


def _short(backward):
    return backward.removeprefix("float8_").removesuffix("fn")


INTRODUCTION = """# Which scales float8 needs

Matmuls and convolutions of all layers except the first and the last one have float8 operands; other
operations are float16. Inputs and kernels are e4m3, gradients have the format of the row, rounded
to nearest.

*Fidelity*: gradients compared with float32, at the weights of float32 training after the number of
steps in the column. Errors are relative to the error of the best single scale for each weight,
found afterwards: median / worst over weights. *flushed*: elements that became zero. (In a
transformer, the worst weights are biases of attention keys, whose true gradient is zero. In the
U-Net after 100 steps, the float8 forward pass changes the gradient so much that a zero gradient
would be closer.)

*Training*: mean loss (range over seeds) and accuracy on the last tenth of the training batches.
(For the ResNet, the U-Net and the autoencoder, some e5m2 rows, among them ours, were measured on a
CPU with TensorFlow and start from other weights. The other rows were measured on a GPU with JAX.)

*Other settings of ours*: `saturated` is the share of gradient tensors with a saturated element,
over all layers and steps; `flushed` is the share that the worst layer lost at the end.

*e5m2 everywhere*: also in the forward pass and in the first and the last layer, with float32
between matmuls, as in Cambier et al. 2020 (S2FP8).
"""


# For each part: its title, the titles of its columns, its rows.
TABLES = {
    "fidelity": ("Fidelity", ["flushed", "cosine"], fidelity_rows),
    "training": ("Training", ["loss", "accuracy", "skipped"], training_rows),
    "variations": (
        "Other settings of ours",
        ["loss", "saturated", "flushed", "skipped"],
        variations_rows,
    ),
    "everywhere": ("e5m2 everywhere", ["loss", "accuracy", "skipped"], training_rows),
}


def write_report(directory):
    results = report.load_results(directory, CASES)
    parts = [INTRODUCTION]
    for result in results:
        parts.append(f"## {result['name']}\n\nBatches of {result['batch_size']}.\n")
        for part in (part for part in PARTS if part in result):
            title, header, rows = TABLES[part]
            setting = result["settings"][part]
            about = [setting["images"]]
            if part in TRAINED:
                seeds = "one seed" if setting["seeds"] == 1 else f"{setting['seeds']} seeds"
                about += [f"{setting['steps']} steps", seeds]
            else:
                header = [f"error at {moment}" for moment in result[part]] + header
            parts.append(f"{title}: {', '.join(about)}.\n")
            parts.append(report.markdown(["", *header], rows(result[part])) + "\n")
    parts.append(report.provenance_text(results) + "\n")
    report.save_text(directory, "\n".join(parts))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "float8")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="MODEL")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:2])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="names; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="of training; default: by model")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.only or (list(CASES)[:1] if args.quick else CASES):
        run_case(CASES[name], args)
    write_report(args.output)


def run_case(case, args):
    """Adds the requested parts to the figures of one case."""
    if args.quick:
        case = dataclasses.replace(case, steps=60, moments=(0, 10))
    if args.steps:
        case = dataclasses.replace(case, steps=args.steps)
    images = data.digits() if case.images == "digits" else data.cifar10(args.data)
    keras.config.set_dtype_policy("float32")
    dense = only_dense(case.build())
    of_formats = [(backward, way) for backward in args.formats for way in ways(backward)]
    if dense and E5M2 in args.formats:
        of_formats.append((E5M2, KERAS_FLOAT8))
    trained = {
        "training": [*(("wide", way) for way in WIDE), *of_formats],
        "variations": [(b, way) for b in args.formats for way in variations(b)],
        "everywhere": [(E5M2, way) for way in everywhere()],
    }
    chosen = args.ways or ((NO_SCALING, BEST_FIXED, OURS) if args.quick else None)
    seeds = 1 if args.quick else args.seeds
    results = Results(case, images, seeds, args)
    with report.progress() as progress:
        progress.add_task(case.name, total=None)
        if "fidelity" in args.parts:
            results.add("fidelity", fidelity(case, _named(chosen, of_formats), images))
        for part in (part for part in TRAINED if part in args.parts):
            for found in training(case, _named(chosen, trained[part]), images, range(seeds)):
                results.add(part, found)


def _named(names, all_ways):
    return [(backward, way) for backward, way in all_ways if not names or way.name in names]


class Results:
    """The figures of one case, including comparable ones of earlier runs."""

    def __init__(self, case, images, seeds, args):
        self._directory = args.output
        found = report.load_results(args.output, [case.name])
        before = found[0] if found else {}
        earlier = [before["provenance"]] if before else []
        self._figures = {"name": case.name, "batch_size": case.batch_size, "settings": {}, **before}
        self._figures["earlier"] = before.get("earlier", []) + earlier
        self._settings = {part: self._setting(part, case, images, seeds) for part in args.parts}
        for part in (part for part in args.parts if part in before):
            known = before["settings"][part]
            differing = [
                name for name, value in self._settings[part].items() if known[name] != value
            ]
            if differing:
                raise SystemExit(
                    f"Figures of {part} of {case.name} in {args.output} are of another "
                    f"{' and '.join(differing)}. Choose another --output, or the same."
                )

    @staticmethod
    def _setting(part, case, images, seeds):
        on = {"images": images.name}
        return on | {"steps": case.steps, "seeds": seeds} if part in TRAINED else on

    def add(self, part, figures):
        """Adds figures, or replaces those of the same way."""
        self._figures["settings"][part] = self._settings[part]
        _merge(self._figures.setdefault(part, {}), figures)
        report.save_result(self._directory, self._figures)


def _merge(into, figures):
    for key, value in figures.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict) and "error" not in value:
            _merge(into[key], value)
        else:
            into[key] = value


if __name__ == "__main__":
    main()
