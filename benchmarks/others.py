"""Models as others write them: do they train in float16 as in float32?

Each case is a model and real data, as in the guides of Keras and KerasHub, with Adam's defaults.
Each strategy trains it for 200 steps from the same weights on the same batches, once per seed. The
table reports

    loss      the mean training loss over the last 20 steps
    skipped   steps skipped because of an overflow
    lost      after the last step: the share of elements of all weight gradients of four batches
              that are zero but would not be in float32; and that of the worst tensor

Cases with "KerasHub" in their name need `pip install keras-hub`, and are left out without it.
Prints a Markdown table; writes it, and all figures as JSON. Cases from earlier runs into the same
directory stay in the table.
"""

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops

from benchmarks import data, report, zoo
from benchmarks.fidelity import Comparison, Gradients
from benchmarks.strategies import KERAS, OURS, REFERENCE, STRATEGIES

STEPS, LAST = 200, 20
QUICK_STEPS = 40
COMPARED_BATCHES = 4
COMPARED = [REFERENCE, *(s for s in STRATEGIES if s.name in ("no scaling", KERAS, OURS))]
QUICK_CASES = ("Forecast, LSTM",)
VOCABULARY = 128  # ASCII
SMALL_TRANSFORMER = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 4,
    "hidden_dim": 64,
    "intermediate_dim": 256,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its data.

    Args:
        name: Short name for tables.
        build: `() -> keras.Model`.
        source: `images -> data` for `batch`. Images are given by `--data`.
        batch: `(data, rng) -> (x, y)`, NumPy arrays or dicts of them.
        loss: `(y, outputs) -> scalar`, float32.
        learning_rate: Of Adam.
    """

    name: str
    build: Callable
    source: Callable
    batch: Callable
    loss: Callable
    learning_rate: float = 1e-3


# Data.


def some_images(images, rng, n=16):
    chosen = rng.integers(len(images.x_train), size=n)
    return images.x_train[chosen], images.y_train[chosen]


def classified(images, rng):
    return zoo.classify(*some_images(images, rng))


def noisy(images, rng):
    """Images with noise, and the noise, by the cosine schedule (Nichol & Dhariwal 2021)."""
    x, _ = some_images(images, rng)
    time = rng.uniform(size=(len(x), 1)).astype("float32")
    angle = (time * np.pi / 2)[..., None, None]
    noise = rng.normal(size=x.shape).astype("float32")
    return {"image": np.cos(angle) * (2 * x - 1) + np.sin(angle) * noise, "time": time}, noise


def pieces(text, rng, n, length):
    starts = rng.integers(len(text) - length, size=n)
    return text[starts[:, None] + np.arange(length)]


def package_of_text(texts, rng, n=32, length=64):
    labels = rng.integers(len(texts), size=n)
    tokens = np.concatenate([pieces(texts[label], rng, 1, length) for label in labels])
    segments, mask = np.zeros_like(tokens), np.ones_like(tokens)
    return {"token_ids": tokens, "segment_ids": segments, "padding_mask": mask}, labels


def next_characters(texts, rng, n=16, length=64):
    text = texts[rng.integers(len(texts))]
    tokens = pieces(text, rng, n, length + 1)
    x = tokens[:, :-1]
    return {"token_ids": x, "padding_mask": np.ones_like(x)}, tokens[:, 1:]


def next_day(prices, rng, n=64, length=30):
    days = pieces(prices, rng, n, length + 1)
    return days[:, :-1], days[:, -1]


# Models.


def diffusion_unet(widths=(16, 32, 64), groups=8):
    """Residual blocks with a time input, and attention at the bottom (Ho et al. 2020)."""
    inputs = keras.Input((zoo.SIDE, zoo.SIDE, 3), name="image")
    time = keras.Input((1,), name="time")
    angles = time * (2 * np.pi * 2.0 ** np.arange(0, 6, 0.5, dtype="float32"))
    t = ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)
    t = layers.Dense(64, "swish")(layers.Dense(64, "swish")(t))

    def conv(x, filters, **kwargs):
        return layers.Conv2D(filters, 3, padding="same", **kwargs)(x)

    def normalized(x):
        return layers.GroupNormalization(groups)(x)

    def residual(x, filters):
        y = conv(layers.Activation("swish")(normalized(x)), filters)
        y = layers.Add()([y, layers.Reshape((1, 1, filters))(layers.Dense(filters)(t))])
        y = layers.Activation("swish")(normalized(y))
        y = conv(y, filters, kernel_initializer="zeros")
        return layers.Add()([y, x if x.shape[-1] == filters else layers.Conv2D(filters, 1)(x)])

    def attention(x):
        y = normalized(x)
        return layers.Add()(
            [x, layers.MultiHeadAttention(4, x.shape[-1] // 4, attention_axes=(1, 2))(y, y)]
        )

    x = conv(inputs, widths[0])
    skips = []
    for filters in widths[:-1]:
        x = residual(x, filters)
        skips.append(x)
        x = layers.AveragePooling2D(2)(x)
    x = residual(attention(residual(x, widths[-1])), widths[-1])
    for filters in reversed(widths[:-1]):
        x = layers.UpSampling2D()(x)
        x = residual(layers.Concatenate()([x, skips.pop()]), filters)
    x = layers.Activation("swish")(normalized(x))
    x = conv(x, 3, kernel_initializer="zeros", dtype=_wide())
    return keras.Model({"image": inputs, "time": time}, x)


def mobilenet():
    shape = (zoo.SIDE, zoo.SIDE, 3)
    body = keras.applications.MobileNetV3Small(
        weights=None, input_shape=shape, include_top=False, include_preprocessing=False
    )
    inputs = keras.Input(shape)
    x = layers.GlobalAveragePooling2D()(body(inputs))
    return keras.Model(inputs, layers.Dense(zoo.CLASSES, dtype=_wide())(x))


def bert_classifier():
    import keras_hub

    backbone = keras_hub.models.BertBackbone(
        **SMALL_TRANSFORMER, num_heads=4, max_sequence_length=64, dropout=0.0
    )
    x = layers.Dense(len(data.PACKAGES), dtype=_wide())(backbone.output["pooled_output"])
    return keras.Model(backbone.input, x)


def llama():
    import keras_hub

    backbone = keras_hub.models.LlamaBackbone(
        **SMALL_TRANSFORMER, num_query_heads=4, num_key_value_heads=2
    )
    return keras.Model(backbone.input, layers.Dense(VOCABULARY, dtype=_wide())(backbone.output))


def forecast():
    inputs = keras.Input((30, 5))
    return keras.Model(inputs, layers.Dense(5, dtype=_wide())(layers.LSTM(32)(inputs)))


def _wide():
    return keras.config.dtype_policy().variable_dtype


CASES = {
    case.name: case
    for case in (
        Case(
            "Diffusion, U-Net",
            diffusion_unet,
            lambda images: images,
            noisy,
            zoo.mean_square,
        ),
        Case(
            "Vision, ViT",
            lambda: zoo.transformer(blocks=6),
            lambda images: images,
            classified,
            zoo.cross_entropy,
        ),
        Case(
            "Vision, MobileNetV3Small",
            mobilenet,
            lambda images: images,
            classified,
            zoo.cross_entropy,
        ),
        Case(
            "Text, BERT of KerasHub",
            bert_classifier,
            lambda images: data.source_code(),
            package_of_text,
            zoo.cross_entropy,
        ),
        Case(
            "Text, Llama of KerasHub",
            llama,
            lambda images: data.source_code(),
            next_characters,
            zoo.cross_entropy,
        ),
        Case(
            "Forecast, LSTM",
            forecast,
            lambda images: data.prices(),
            next_day,
            zoo.mean_square,
        ),
    )
}


class Trainee:
    """A model under one strategy, which can be trained from any weights."""

    def __init__(self, case, strategy):
        self._case = case
        self._gradients = Gradients(case, strategy.policy, strategy.wrapped)
        model = self._gradients.model
        self._inner = keras.optimizers.Adam(case.learning_rate)
        model.compile(
            strategy.optimizer(self._inner),
            loss=case.loss,
            jit_compile=True,
            auto_scale_loss=False,
        )
        model.optimizer.build(model.trainable_variables)
        self._initial = [(v, v.numpy()) for v in [*model.variables, *model.optimizer.variables]]

    def train(self, seed, weights, source, steps):
        """Trains from `weights`. Returns mean losses of each 20 steps, and skipped steps."""
        for variable, value in self._initial:
            variable.assign(value)
        self._gradients.plain.set_weights(weights)
        history = self._gradients.model.fit(
            batches(self._case, source, seed),
            steps_per_epoch=LAST,
            epochs=steps // LAST,
            shuffle=False,
            verbose=0,
        )
        return history.history["loss"], steps - int(self._inner.iterations)

    def lost(self, reference, source):
        """Share of lost elements: of all tensors together, and of the worst."""
        weights = [v.numpy() for v in self._gradients.weights]
        states = [v.numpy() for v in self._gradients.states]
        optimizer = self._gradients.model.optimizer
        scale = float(optimizer.scale_loss(np.float32(1)))
        comparison = Comparison(len(weights))
        examples = batches(self._case, source, seed=2**32)
        for _, (x, y) in zip(range(COMPARED_BATCHES), examples, strict=False):
            found, _ = self._gradients(weights, states, scale, x, y)
            true, _ = reference(weights, [], 1.0, x, y)
            comparison.add([np.asarray(g, "float64") / scale for g in found], true)
        sizes = [w.size for w in weights]
        return {
            "all": float(np.average(comparison.lost, weights=sizes)),
            "worst": float(np.max(comparison.lost)),
            "worst_tensor": self._gradients.weights[int(np.argmax(comparison.lost))].path,
        }


def batches(case, source, seed):
    rng = np.random.default_rng(seed)
    while True:
        yield case.batch(source, rng)


def run_case(case, images, steps, seeds, advance):
    """Figures of one case for JSON."""
    keras.backend.clear_session()
    source = case.source(images)
    reference = Gradients(case, "float32")
    weights = []
    for seed in seeds:
        keras.utils.set_random_seed(seed)
        weights.append(case.build().get_weights())
    runs = {}
    for strategy in COMPARED:
        trainee = Trainee(case, strategy)
        for seed in seeds:
            losses, skipped = trainee.train(seed, weights[seed], source, steps)
            run = {
                "losses": [loss if math.isfinite(loss) else None for loss in losses],
                "skipped": skipped,
                "lost": trainee.lost(reference, source),
            }
            runs.setdefault(strategy.name, []).append(run)
            advance()
    return {"name": case.name, "steps": steps, "seeds": list(seeds), "runs": runs}


def rows(result):
    """One row per strategy."""
    for name, runs in result["runs"].items():
        losses = [run["losses"][-1] for run in runs]
        finite = None not in losses
        spread = np.std(losses, ddof=1) if finite and len(losses) > 1 else 0.0
        skipped = np.mean([run["skipped"] for run in runs])
        lost, worst = (np.mean([run["lost"][of] for run in runs]) for of in ("all", "worst"))
        yield [
            result["name"] if name == REFERENCE.name else "",
            name,
            f"{np.mean(losses):.4f} ± {spread:.4f}" if finite else "not finite",
            f"{skipped:.1f}",
            f"{lost:.2%}",
            f"{worst:.1%}",
        ]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "others")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help="names")
    parser.add_argument("--seeds", type=int, help="how many; default: 3, with --quick 1")
    args = parser.parse_args(argv)
    names = args.only or (QUICK_CASES if args.quick else list(CASES))
    if importlib.util.find_spec("keras_hub") is None:
        left_out = [name for name in names if "KerasHub" in name]
        names = [name for name in names if name not in left_out]
        if left_out:
            print(f"Left out, since keras_hub is not installed: {', '.join(left_out)}.")
    seeds = range(args.seeds or (1 if args.quick else 3))
    steps = QUICK_STEPS if args.quick else STEPS
    images = data.digits() if args.quick else data.cifar10(args.data)
    with report.progress() as progress:
        for name in names:
            bar = progress.add_task(name, total=len(COMPARED) * len(seeds))
            result = run_case(
                CASES[name], images, steps, seeds, lambda bar=bar: progress.advance(bar)
            )
            report.save_result(args.output, result)
    results = report.load_results(args.output, CASES)
    header = ["case", "scaling", "loss", "skipped", "lost", "of the worst tensor"]
    text = f"""# Models of others

Training loss: mean of the last {LAST} of {results[0]["steps"]} steps, ± standard deviation over
{len(results[0]["seeds"])} seeds. *skipped*: number of skipped steps. *lost*: share of gradient
elements that underflow after the last step, of all tensors and of the worst tensor.

{report.markdown(header, (row for result in results for row in rows(result)))}

{report.provenance_text(results)}
"""
    report.save_text(args.output, text)


if __name__ == "__main__":
    main()
