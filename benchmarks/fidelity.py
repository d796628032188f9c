"""How exact is each layer's float16 gradient under each loss scaling?

A model trains in float32. Beside it, float16 models with the same weights compute gradients of
the same batches. Each finds loss scales in its own way, as if it were the model in training. At the
start and after some steps, the float16 gradient of every weight is compared with the float32
gradient, over eight batches:

    error   |g16 - g32| / |g32|, L2 norms; infinite if any element is
    lost    share of elements that are zero in g16 and not in g32

and with the *oracle*: the smallest error that any single loss scale 2^-8 … 2^30 gives that
tensor. The comparison at the start comes after 20 steps that do not change weights, so that scales
can adapt.

A tensor is left out if float32 is no reference for it, because its gradient differs by more than
1 % from the float64 gradient (such as an attention key bias, whose true gradient is zero). Errors
below 1e-5 count as 1e-5, because they are float32's own, from another order of summation.

Prints Markdown tables; writes them, plots, and all figures as JSON. Models from earlier runs into
the same directory stay in the tables.
"""

import argparse
import functools
import logging

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import ops

import tf_adaptive_ls as als
from benchmarks import compute, data, report, zoo
from benchmarks.strategies import OURS, STRATEGIES, VARIATIONS

ORACLE_LOG2_SCALES = range(-8, 31)
# Steps without changing weights before the first comparison, so that scales can adapt.
SETTLING_STEPS = 20
MOMENTS = (0, 50, 300)
COMPARED_BATCHES = 8
# Tensors whose float32 gradient is wrong by more than this are left out.
FLOAT32_ERROR = 0.01
# Smaller errors come from float32's summation.
SMALLEST_ERROR = 1e-5
# A tensor is good if its error is at most this multiple of the oracle's, and if it loses at most
# this share more elements.
ERROR_BAR = 1.1
LOST_BAR = 1e-3
QUICK_TASKS = ("MLP 17, vanishing", "Targets 1e-6")
QUICK_MOMENTS = (0, 10)


class Gradients:
    """Gradients of the loss of one model, at given weights and scales."""

    def __init__(self, task, policy, wrap=False):
        keras.config.set_dtype_policy(policy)
        self.plain = task.build()
        self.model = als.wrap_model(self.plain) if wrap else self.plain
        self._loss = task.loss
        self._compiled = compute.compiled(self._gradients)

    @property
    def weights(self):
        return [v for v in self.model.trainable_variables if not v.overwrite_with_gradient]

    @property
    def states(self):
        return [v for v in self.model.trainable_variables if v.overwrite_with_gradient]

    def __call__(self, weights, states, scale, x, y):
        """Gradients of `scale * loss` by `weights`, and those by `states`."""
        scale = ops.convert_to_tensor(scale, self.model.outputs[0].dtype)
        gradients = self._compiled([*weights, *states], scale, x, y)
        return gradients[: len(weights)], gradients[len(weights) :]

    def _gradients(self, values, scale, x, y):
        def loss_of(values):
            pairs = zip([*self.weights, *self.states], values, strict=True)
            with keras.StatelessScope(list(pairs)):
                outputs = self.model(x, training=True)
            return scale * ops.cast(self._loss(y, outputs), scale.dtype)

        return compute.gradients(loss_of, values)


def values_of(variables):
    return [ops.convert_to_tensor(variable) for variable in variables]


class Shadow:
    """A strategy that adapts its scales while another model trains."""

    def __init__(self, strategy, gradients):
        self.strategy = strategy
        self.skipped = []
        self._gradients = gradients
        # Weight updates are discarded, updates of scales are not.
        self._optimizer = strategy.optimizer(keras.optimizers.SGD(0.0))
        self._optimizer.build(gradients.model.trainable_variables)
        self._values = values_of(self._optimizer.variables)
        self._states = values_of(gradients.states)
        self._update = compute.compiled(self._updated)

    @property
    def scale(self):
        """The loss scale of the next step."""
        pairs = zip(self._optimizer.variables, self._values, strict=True)
        with keras.StatelessScope(list(pairs)):
            return float(self._optimizer.scale_loss(ops.ones(())))

    def gradients(self, weights, x, y):
        """Unscaled float16 gradients of the loss by `weights`, as float32."""
        gradients, _ = self._gradients(weights, self._states, self.scale, x, y)
        return [g / self.scale for g in gradients]

    def step(self, weights, x, y):
        """Adapts the scales to one batch."""
        gradients, reports = self._gradients(weights, self._states, self.scale, x, y)
        self.skipped.append(not all(np.isfinite(g).all() for g in gradients))
        self._values, self._states = self._update(
            self._values, [*weights, *self._states], [*gradients, *reports]
        )

    def _updated(self, values, before, gradients):
        """New values of the optimizer and of the states; both take lists with the weights first."""
        model = self._gradients
        ours = [id(v) for v in [*model.weights, *model.states]]
        order = [ours.index(id(v)) for v in model.model.trainable_variables]
        after, values = compute.updated(
            self._optimizer,
            model.model.trainable_variables,
            values,
            [gradients[i] for i in order],
            [before[i] for i in order],
        )
        after = dict(zip(order, after, strict=True))
        return values, [after[i] for i in range(len(model.weights), len(ours))]


class Comparison:
    """Sums over batches of the differences between gradients and reference gradients."""

    def __init__(self, tensors):
        self._difference = np.zeros(tensors)
        self._norm = np.zeros(tensors)
        self._lost = np.zeros(tensors)
        self._elements = np.zeros(tensors)

    def add(self, gradients, true):
        for i, (g, t) in enumerate(zip(gradients, true, strict=True)):
            g, t = np.asarray(g, "float64"), np.asarray(t, "float64")
            difference = np.sum((g - t) ** 2)
            self._difference[i] += difference if np.isfinite(difference) else np.inf
            self._norm[i] += np.sum(t**2)
            self._lost[i] += np.sum((g == 0) & (t != 0))
            self._elements[i] += t.size

    @property
    def errors(self):
        return np.sqrt(self._difference / np.maximum(self._norm, 1e-300))

    @property
    def lost(self):
        return self._lost / self._elements


def compare(reference, exact, plain, shadows, weights, batches):
    """Rows of figures, one per tensor for which float32 is a reference."""
    names = [v.path for v in reference.weights]
    of_float64, of_scales, of_shadows = Comparison(len(names)), {}, {}
    for x, y in batches:
        true, _ = reference(weights, [], 1.0, x, y)
        with compute.float64_enabled():
            wide = [ops.cast(w, "float64") for w in weights]
            of_float64.add(exact(wide, [], 1.0, *_widened((x, y)))[0], true)
        for k in ORACLE_LOG2_SCALES:
            gradients, _ = plain(weights, [], 2.0**k, x, y)
            sums = of_scales.setdefault(k, Comparison(len(names)))
            sums.add([g * 2.0**-k for g in gradients], true)
        for shadow in shadows:
            sums = of_shadows.setdefault(shadow.strategy.name, Comparison(len(names)))
            sums.add(shadow.gradients(weights, x, y), true)
    errors = {k: sums.errors for k, sums in of_scales.items()}
    rows = []
    for i in np.flatnonzero(of_float64.errors < FLOAT32_ERROR):
        best = min(errors, key=lambda k: errors[k][i])
        figures = {"oracle": of_scales[best], **of_shadows}
        rows.append(
            {
                "tensor": names[i],
                "oracle_log2_scale": best,
                "error": {name: _or_none(sums.errors[i]) for name, sums in figures.items()},
                "lost": {name: float(sums.lost[i]) for name, sums in figures.items()},
            }
        )
    return rows


def _or_none(figure):
    """`None` instead of infinity, for JSON."""
    return float(figure) if np.isfinite(figure) else None


def _widened(arrays):
    return keras.tree.map_structure(
        lambda a: a.astype("float64") if a.dtype == np.float32 else a, arrays
    )


def run_task(task, strategies, images, seed, moments, advance):
    """Figures of one model for JSON. Calls `advance` after each step."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    reference = Gradients(task, "float32")
    with compute.float64_enabled():
        exact = Gradients(task, "float64")
    plain = Gradients(task, "mixed_float16")
    wrapped = Gradients(task, "mixed_float16", wrap=True)
    shadows = [Shadow(s, wrapped if s.wrapped else plain) for s in strategies]
    optimizer = keras.optimizers.Adam(task.learning_rate)
    optimizer.build(reference.weights)
    batches = (task.examples(*batch) for batch in images.batches(task.batch_size, seed))

    update = compute.compiled(functools.partial(compute.updated, optimizer, reference.weights))
    weights, values = values_of(reference.weights), values_of(optimizer.variables)

    for _ in range(SETTLING_STEPS):
        batch = next(batches)
        for shadow in shadows:
            shadow.step(weights, *batch)
        advance()
    compared = {}
    for step in range(max(moments) + 1):
        batch = next(batches)
        if step in moments:
            others = [next(batches) for _ in range(COMPARED_BATCHES - 1)]
            compared[step] = compare(reference, exact, plain, shadows, weights, [batch, *others])
        for shadow in shadows:
            shadow.step(weights, *batch)
        gradients, _ = reference(weights, [], 1.0, *batch)
        weights, values = update(values, gradients, weights)
        advance()
    skipped = {s.strategy.name: list(map(int, np.flatnonzero(s.skipped))) for s in shadows}
    return {"name": task.name, "seed": seed, "moments": compared, "skipped": skipped}


# Tables and plots.


def ratio(row, name):
    """The error of a strategy divided by the oracle's."""
    figures = row["error"]
    if figures[name] is None:
        return np.inf
    oracle = np.inf if figures["oracle"] is None else figures["oracle"]
    return max(figures[name], SMALLEST_ERROR) / max(oracle, SMALLEST_ERROR)


def is_good(row, name):
    lost = row["lost"][name] - row["lost"]["oracle"]
    return ratio(row, name) <= ERROR_BAR and lost <= LOST_BAR


def rows_of(result):
    return [row for rows in result["moments"].values() for row in rows]


def table(results, names):
    """The worst ratio of each model and strategy, and how many tensors are not good."""
    lines = []
    for result in results:
        rows = rows_of(result)
        cells = [result["name"], f"{len(rows)}"]
        for name in names:
            worst = max(ratio(row, name) for row in rows)
            bad = sum(not is_good(row, name) for row in rows)
            figure = f"{worst:.2f}" if worst < 10 else f"{worst:.0e}".replace("e+0", "e")
            cells.append(f"**{figure}**" if not bad else f"{figure} ({bad})")
        lines.append(cells)
    good = [f"{models_without_bad_tensors(results, name)} of {len(results)}" for name in names]
    lines.append(["models without a bad tensor", "", *good])
    return report.markdown(["model", "tensors", *names], lines)


def models_without_bad_tensors(results, name):
    return sum(all(is_good(row, name) for row in rows_of(result)) for result in results)


def plot_models(results, names):
    """A bar per strategy: the number of models without a bad tensor."""
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    counts = [models_without_bad_tensors(results, name) for name in names]
    colors = ["tab:blue" if name == OURS else "0.6" for name in names]
    bars = axes.barh(names, counts, color=colors)
    axes.bar_label(bars, [f"{count} of {len(results)}" for count in counts], padding=4)
    axes.set(xlim=(0, len(results) * 1.1), xlabel="models whose gradients are all good")
    axes.invert_yaxis()
    return figure


def plot_ratios(results, names):
    """A dot per tensor: its error divided by the oracle's, by strategy."""
    rng = np.random.default_rng(0)
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    top = 1e4
    for i, name in enumerate(names):
        ratios = np.array([ratio(row, name) for result in results for row in rows_of(result)])
        x = i + rng.uniform(-0.3, 0.3, len(ratios))
        color = "tab:blue" if name == OURS else "0.35"
        axes.scatter(x, np.clip(ratios, None, top), s=6, alpha=0.4, linewidths=0, color=color)
    axes.axhline(ERROR_BAR, color="0.4", linewidth=0.8, linestyle="--")
    axes.text(len(names) - 0.6, ERROR_BAR * 1.1, f"{ERROR_BAR}", color="0.4")
    axes.set(yscale="log", ylim=(0.7, top * 1.5), ylabel="error over oracle's (from 10⁴: infinite)")
    axes.set_xticks(range(len(names)), [n.replace(" ", "\n", 1) for n in names])
    axes.set_title("Every tensor of every model at every moment")
    return figure


def plot_layers(result, names):
    """The error of each tensor in the order of layers, at the first comparison."""
    rows = next(iter(result["moments"].values()))
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    colors = iter(plt.colormaps["Dark2"].colors)
    for name in ["oracle", *names]:
        errors = [np.nan if r["error"][name] is None else r["error"][name] for r in rows]
        if name == "oracle":
            style = {"color": "0.75", "linewidth": 6}
        elif name == OURS:
            style = {"color": "tab:blue", "marker": "o"}
        else:
            style = {"color": next(colors), "marker": ".", "linewidth": 0.8}
        axes.plot(errors, label=name, **style)
    axes.set(yscale="log", xlabel="tensor, from input to output", ylabel="relative error")
    axes.set_title(f"{result['name']}: float16 gradients against float32")
    axes.legend(fontsize="small", ncols=2)
    return figure


def write_report(directory, names):
    """Writes table and plots of all models with figures in `directory`."""
    results = report.load_results(directory, order=list(zoo.TASKS))
    report.save_plot(directory, "models", plot_models(results, names))
    report.save_plot(directory, "ratios", plot_ratios(results, names))
    for result in results:
        if result["name"] == "MLP 17, vanishing":
            report.save_plot(directory, "layers", plot_layers(result, names))
    moments = ", ".join(str(moment) for moment in results[0]["moments"])
    text = f"""# Fidelity of float16 gradients

Error of each float16 gradient tensor against float32, divided by the error of the *oracle*: the
smallest error that any single loss scale could give this tensor. 1.00 is ideal. The table shows the
worst tensor of each model. In brackets: number of bad tensors, which have more than {ERROR_BAR}
times the oracle's error, or lose more than {LOST_BAR:g} of their elements in addition to the
oracle. Measured after {moments} steps on {results[0]["images"]}, seed {results[0]["seed"]}.

{table(results, names)}

{report.provenance_text(results)}
"""
    report.save_text(directory, text)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "fidelity")
    parser.add_argument("--only", nargs="+", metavar="MODEL", choices=zoo.TASKS, help="names")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--variations", action="store_true", help="compare settings of the default rule instead"
    )
    args = parser.parse_args(argv)
    # Each strategy needs one compiled function, so this is not needless retracing.
    logging.getLogger("tensorflow").setLevel("ERROR")
    strategies = VARIATIONS if args.variations else STRATEGIES
    names = args.only or (QUICK_TASKS if args.quick else list(zoo.TASKS))
    moments = QUICK_MOMENTS if args.quick else MOMENTS
    images = data.digits() if args.quick else data.cifar10(args.data)

    with report.progress() as progress:
        for name in names:
            bar = progress.add_task(name, total=SETTLING_STEPS + max(moments) + 1)
            result = run_task(
                zoo.TASKS[name],
                strategies,
                images,
                args.seed,
                moments,
                lambda bar=bar: progress.advance(bar),
            )
            result["images"] = images.name
            report.save_result(args.output, result)

    write_report(args.output, [s.name for s in strategies])


if __name__ == "__main__":
    main()
