"""Which overflows of the forward pass does `forward_range` find, and what does `widen` cost?

Parts:

    planted   `forward_range` on healthy models with one planted cause of overflow
    healthy   the models of the gradient benchmarks, in which nothing should be flagged
    training  models that overflow in float16: trained in float16, with clipping by hand, in
              float32, and after `widen`, all under Keras's `LossScaleOptimizer`
    drift     models whose activations grow during training, and healthy ones: when does
              `LossScaleMonitor` warn?

Prints Markdown tables, and writes them and all figures as JSON.
"""

import argparse
import statistics

import keras
import numpy as np

import tf_adaptive_ls as als
from benchmarks import data, drift, overflowing, report, zoo
from benchmarks.overflowing import HOSTS, MODELS, PLANTS

PARTS = ("planted", "healthy", "training", "drift")
SEEDS = (0, 1, 2)
FLOAT16, CLIPPED, FLOAT32, WIDENED = WAYS = (
    "float16",
    "clipped by hand",
    "float32",
    "widened",
)
BATCH_SIZE, LOOKED_AT, LAST_STEPS = 32, 16, 20
EXAMPLES_OF_TOKENS = 2048


def started(seed, policy="mixed_float16"):
    keras.backend.clear_session()
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(seed)


def planted(images, seeds, advance):
    """What was found of each planted cause, in each host, in each of its three blocks."""
    outcomes = []
    for plant, function in PLANTS.items():
        for host, build in HOSTS.items():
            for seed in seeds:
                started(seed)
                model, expected = build(function, seed % 3)
                result = als.forward_range(model, [images[:8]])
                flagged = {part.name for part in result.flagged}
                outcomes.append(
                    {
                        "plant": plant,
                        "host": host,
                        "seed": seed,
                        "planted": len(expected),
                        "missed": sorted(expected - flagged),
                        "false": sorted(flagged - expected),
                        "parts": len(result.parts),
                    }
                )
                advance()
    return {"name": "planted", "outcomes": outcomes}


def healthy(images):
    """What was flagged in models that train well in float16."""
    outcomes = []
    for name, task in zoo.TASKS.items():
        started(0)
        model = task.build()
        x, _ = task.examples(images.x_train[:LOOKED_AT], images.y_train[:LOOKED_AT])
        result = als.forward_range(model, [x])
        flagged = [part.name for part in result.flagged]
        room = min((part.room for part in result.parts), default=float("inf"))
        outcomes.append(
            {"model": name, "parts": len(result.parts), "flagged": flagged, "room": room}
        )
    return {"name": "healthy", "outcomes": outcomes}


def trained(name, way, seed, images):
    """Losses of one model trained in one way."""
    case = MODELS[name]
    started(seed, "float32" if way == FLOAT32 else "mixed_float16")
    model = case.build(way == CLIPPED)
    if case.of_tokens:
        x, y = overflowing.tokens(EXAMPLES_OF_TOKENS, seed)
    else:
        x, y = 2 * images.x_train - 1, images.y_train
    order = np.random.default_rng(seed).permutation(len(x))
    figures = {"way": way, "seed": seed}
    if way == WIDENED:
        widening = als.widen(model, [x[order[:LOOKED_AT]]])
        figures |= {
            "widened": len(widening.names),
            "layers": len(model.layers),
            "share_narrow": widening.share_narrow,
            "remaining": list(widening.remaining),
        }
    figures["error"] = error_of(case, model, seed, x[order[:LOOKED_AT]], way)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-3))
    model.compile(optimizer, loss, auto_scale_loss=False, jit_compile=True)
    losses = []
    for step in range(case.steps):
        chosen = order[np.arange(step * BATCH_SIZE, (step + 1) * BATCH_SIZE) % len(order)]
        losses.append(float(model.train_on_batch(x[chosen], y[chosen])))
        # Keras reports means since metrics were last reset.
        model.reset_metrics()
    return figures | {"loss": statistics.mean(losses[-LAST_STEPS:])}


def error_of(case, model, seed, x, way):
    """Relative error of the outputs of a model against its float32 twin."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    twin = case.build(False)
    keras.config.set_dtype_policy(policy)
    twin.set_weights(model.get_weights())
    # As in training, because moving statistics have no meaning yet.
    with keras.StatelessScope():
        expected, actual = (np.array(each(x, training=True), "float64") for each in (twin, model))
    if not np.all(np.isfinite(actual)):
        return float("inf")
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def drifted(images, seeds, names, advance):
    runs = []
    for name in names:
        for seed in seeds:
            started(seed)
            runs.append(drift.drifted(name, seed, images))
            advance()
    return {"name": "drift", "data": images.name, "outcomes": runs}


# Tables.


def planted_table(outcomes):
    rows = []
    for plant in [*PLANTS, None]:
        chosen = [each for each in outcomes if plant in (None, each["plant"])]
        count = sum(each["planted"] for each in chosen)
        missed = sum(len(each["missed"]) for each in chosen)
        false = sum(len(each["false"]) for each in chosen)
        parts = sum(each["parts"] for each in chosen)
        label = plant or "**all**"
        rows.append((label, str(count), str(count - missed), str(missed), f"{false} of {parts:,}"))
    return report.markdown(("planted", "number", "found", "missed", "false alarms"), rows)


def healthy_table(outcomes):
    rows = [
        (each["model"], str(each["parts"]), ", ".join(each["flagged"]), f"{each['room']:.1f}")
        for each in outcomes
    ]
    return report.markdown(("sound model", "parts", "flagged", "least room, binades"), rows)


def drift_table(outcomes):
    rows = []
    for name in dict.fromkeys(each["run"] for each in outcomes):
        runs = [each for each in outcomes if each["run"] == name]
        bad, warned, first, later = (
            [run[key] for run in runs] for key in ("first_bad", "warned", "first_record", "record")
        )
        ahead = [a - b for a, b in zip(bad, warned, strict=True) if None not in (a, b)]
        rows.append(
            (
                name,
                listed(bad),
                listed(warned),
                f"{min(ahead)} … {max(ahead)}" if ahead else "",
                f"{median_of(first):.2g}",
                f"{1000 * median_of(later):.2g}",
            )
        )
    header = ("run", "first bad step", "warned at", "ahead", "first record, s", "record, ms")
    return report.markdown(header, rows)


def listed(steps):
    return ", ".join("-" if step is None else str(step) for step in steps)


def median_of(times):
    return statistics.median([time for time in times if time is not None] or [float("nan")])


def spread(values, digits=".3f"):
    if not np.all(np.isfinite(values)):
        bad = sum(not np.isfinite(value) for value in values)
        return "NaN" if bad == len(values) else f"NaN in {bad} of {len(values)}"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{digits}} ({low:{digits}} … {high:{digits}})"


def training_table(results):
    rows = []
    for result in results:
        by_way = {way: [r for r in result["runs"] if r["way"] == way] for way in WAYS}
        widened = by_way[WIDENED]
        shares = [run["share_narrow"] for run in widened]
        errors = [
            f"{statistics.median(r['error'] for r in by_way[w]):.0e}" for w in (CLIPPED, WIDENED)
        ]
        rows.append(
            (
                result["name"],
                *(spread([run["loss"] for run in by_way[way]]) for way in WAYS),
                ", ".join(errors),
                f"{max(run['widened'] for run in widened)} of {widened[0]['layers']}",
                f"{100 * min(shares):.0f} %",
            )
        )
    header = ("model", *WAYS, "error: clipped, widened", "layers widened", "stays narrow")
    return report.markdown(header, rows)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "forward")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--only", nargs="+", choices=MODELS, metavar="MODEL")
    args = parser.parse_args(argv)
    images = data.digits() if args.quick else data.cifar10(args.data)
    seeds = SEEDS[:1] if args.quick else SEEDS
    names = args.only or (list(MODELS)[-1:] if args.quick else list(MODELS))
    with report.progress() as progress:
        if "planted" in args.parts:
            bar = progress.add_task("planted", total=len(PLANTS) * len(HOSTS) * len(seeds))
            inputs = 2 * images.x_train[:LOOKED_AT] - 1
            result = planted(inputs, seeds, lambda: progress.advance(bar))
            report.save_result(args.output, result)
        if "healthy" in args.parts:
            report.save_result(args.output, healthy(images))
        for name in names if "training" in args.parts else ():
            bar = progress.add_task(name, total=len(WAYS) * len(seeds))
            runs = []
            for way in WAYS:
                for seed in seeds:
                    runs.append(trained(name, way, seed, images))
                    progress.advance(bar)
            report.save_result(args.output, {"name": name, "data": images.name, "runs": runs})
        if "drift" in args.parts:
            chosen = list(drift.DRIFTS)[:1] if args.quick else [*drift.DRIFTS, *drift.SOUND]
            bar = progress.add_task("drift", total=len(chosen) * len(seeds))
            result = drifted(images, seeds, chosen, lambda: progress.advance(bar))
            report.save_result(args.output, result)
    results = report.load_results(args.output, ["planted", "healthy", *MODELS, "drift"])
    report.save_text(args.output, text_of(results))


def text_of(results):
    sections = ["# Overflows of the forward pass"]
    for result in results:
        if result["name"] == "planted":
            sections += ["## Planted", planted_table(result["outcomes"])]
        if result["name"] == "healthy":
            sections += ["## Sound models", healthy_table(result["outcomes"])]
    models = [result for result in results if "runs" in result]
    if models:
        sections += [
            f"## Trained on {models[0]['data']}",
            f"Mean loss of the last {LAST_STEPS} steps of batches of {BATCH_SIZE}, Adam: median "
            f"(least … largest) of {len(models[0]['runs']) // len(WAYS)} seeds. Error: of the "
            "outputs before training, against float32. Layers and multiplications that stay in "
            "float16: the least of all seeds.",
            training_table(models),
        ]
    for result in results:
        if result["name"] == "drift":
            sections += [
                "## While training",
                f"`LossScaleMonitor(every={drift.EVERY}, batch=…)` of {drift.LOOKED_AT} examples, "
                f"{drift.STEPS} steps of {drift.BATCH_SIZE} at most. A figure for each seed; the "
                f"last {len(drift.SOUND)} are sound runs. Ahead: by how many steps of the first "
                "whose loss is not finite, least … largest. The first record compiles, and runs "
                "every part by itself.",
                drift_table(result["outcomes"]),
            ]
    return "\n\n".join([*sections, report.provenance_text(results)]) + "\n"


if __name__ == "__main__":
    main()
