"""Pictures of gradients and scales of a training run.

Each function takes a `Run` (see `load_run`), the path of its record, or a model that is being
trained, and returns a `matplotlib.figure.Figure`:

```python
model.compile(optimizer, loss=loss_fn)
model.fit(x, y, verbose=0, callbacks=[als.LossScaleMonitor("run.jsonl", every=1)])
als.plots.plot_scales("run.jsonl").savefig("scales.png")
```
"""

import collections
import contextlib
import numbers
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import keras
import numpy as np

from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT, FloatFormat
from tf_adaptive_ls.observe.record.run import Run, load_run, snapshot_run

try:
    import matplotlib
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    from tf_adaptive_ls.observe.drawing import (
        BLUE,
        GREEN,
        ORANGE,
        RED,
        edges_of,
        height_of,
        label_layers,
        style,
    )
    from tf_adaptive_ls.observe.forward_range.plots import plot_forward_range, plot_forward_rooms
    from tf_adaptive_ls.observe.loss_change.plots import (
        plot_loss_change,
        plot_loss_change_layers,
        plot_loss_change_map,
    )
    from tf_adaptive_ls.observe.quantization_plots import plot_quantization
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("matplotlib"):
        raise
    raise ImportError(
        "Expected matplotlib for plots of runs. Received: no such package. Install it with "
        "`pip install 'tf_adaptive_ls[plots]'`."
    ) from error

__all__ = [
    "plot_forward_range",
    "plot_forward_rooms",
    "plot_loss_change",
    "plot_loss_change_layers",
    "plot_loss_change_map",
    "plot_quantization",
    "plot_scales",
    "plot_spectra",
    "plot_training",
]

# About as many snapshots as a picture has columns of pixels.
MAX_SNAPSHOTS = 500

_LOST, _SUBNORMAL, _SKIPPED = RED, ORANGE, RED
_COLORS_OF_SCALES = "viridis"
# The least width of a bar, as a share of the axis, so that one step in thousands is visible.
_LEAST_SHARE_OF_WIDTH = 1 / 300
# More binades than any format has.
_FAR = 400
# Ridges overlap. If there are many, outlines are thinner.
_MANY_LAYERS = 60

# What can be drawn: a run, the path of its record, or a model that is being trained.
Drawable: TypeAlias = Run | str | os.PathLike[str] | keras.Model


def plot_scales(run: Drawable, *, dark: bool = False) -> Figure:
    """Draws the scale of every layer over time, and the skipped steps.

    Each row is a layer, from first to last. Its color is log2 of the scale S * 2**r at which it
    works. Crosses mark overflows of the layer. Bars above show how many steps were skipped.

    Args:
        run: A `Run`, the path of its record, or a model.
        dark: Whether to draw on black.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    with _drawing(run, dark) as run:
        layers = len(run.layers)
        figure = Figure(figsize=(9, height_of(layers) + 1.2), layout="constrained")
        above, axes = figure.subplots(
            2, 1, sharex=True, height_ratios=[0.6, max(height_of(layers), 1)], squeeze=True
        )
        _bars_of_skipped(above, run)
        steps = edges_of(run.steps)
        total = run.log2_loss_scale[:, None] + run.log2_scales
        mesh = axes.pcolormesh(
            steps, np.arange(layers + 1) - 0.5, total.T, cmap=_COLORS_OF_SCALES, rasterized=True
        )
        times, places = np.nonzero(_increase(run.overflows))
        if len(times):
            for color, size, width in (("white", 5, 2.4), (_SKIPPED, 4, 1.4)):
                style = {"color": color, "markersize": size, "markeredgewidth": width}
                axes.plot(run.steps[times], places, "x", **style)
        axes.set_xlabel("step")
        axes.set_xlim(steps[0], steps[-1])
        axes.set_ylim(layers - 0.5, -0.5)
        label_layers(axes, run.layers, range(layers))
        figure.colorbar(
            mesh,
            ax=[above, axes],
            label="scale S · 2^r",
            format=StrMethodFormatter("2^{x:.0f}"),
            ticks=MaxNLocator(8, integer=True),
            aspect=30,
            pad=0.01,
        )
        return figure


def plot_spectra(run: Drawable, *, step: int | None = None, dark: bool = False) -> Figure:
    """Draws the magnitudes of every layer's gradients, and what the format can represent.

    Each ridge is a layer, from first to last: the number of its gradients in each binade. On the
    left are gradients without any scale, beside them gradients at the scale of the layer. If layers
    use float8, the right shows gradients before they are quantized to float8. Shaded zones are
    those of the format that most layers have; for other layers, the format stands beside the name.

    Args:
        run: A `Run`, the path of its record, or a model.
        step: Int. Shows the last snapshot up to this step. Defaults to the last snapshot.
        dark: Whether to draw on black.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    if step is not None and not isinstance(step, numbers.Integral):
        raise ValueError(f"Expected `step` to be a whole number. Received: step={step!r}.")
    with _drawing(run, dark) as run:
        snapshot = len(run.steps) - 1
        if step is not None:
            snapshot = max(int(np.searchsorted(run.steps, step, side="right")) - 1, 0)
        finite = slice(1, spectrum.NONFINITE)
        counts = run.spectra[snapshot][:, finite]
        scales = run.log2_sampled_at[snapshot]
        layers = len(run.layers)
        binades = np.array(COUNTING_FORMAT.exponents) + 0.5
        float_format = _most_common(run.float_formats)
        panels = [
            ("gradients themselves", counts, -scales, float_format),
            ("at each layer's scale", counts, 0 * scales, float_format),
        ]
        if run.float8 is not None:
            rounded = run.float8.spectra[snapshot][:, finite]
            narrow = _most_common(filter(None, run.float8.backward))
            panels.append((f"rounded to {narrow.name}", rounded, 0 * scales, narrow))
        width = 4.5 * len(panels)
        figure = Figure(figsize=(width, height_of(layers) + 1.2), layout="constrained")
        left, *others = figure.subplots(1, len(panels), sharex=True, sharey=True)
        for axes, panel in zip((left, *others), panels, strict=True):
            title, rows, shifts, format_of_panel = panel
            _shade_zones(axes, format_of_panel)
            _draw_ridges(axes, rows, binades, shifts)
            axes.set_title(title, fontsize="medium", pad=16)
            axes.set_xlabel("log2 of magnitude")
        left.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        left.set_xlim(*_limits(counts, binades, -scales, float_format))
        left.set_ylim(layers - 0.4, -1.6)
        names = [
            name if each == float_format else f"{name} ({each.name})"
            for name, each in zip(run.layers, run.float_formats, strict=True)
        ]
        label_layers(left, names, range(layers))
        for axes in others:
            axes.tick_params(left=False)
        figure.suptitle(f"step {run.steps[snapshot]}", fontsize="medium")
        return figure


def plot_training(run: Drawable, *, dark: bool = False) -> Figure:
    """Draws the loss and the loss scale over time, and the skipped steps.

    The loss is that of Keras's logs, a mean over the epoch so far. The band extends from the
    smallest to the largest scale of any layer.

    Args:
        run: A `Run`, the path of its record, or a model.
        dark: Whether to draw on black.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    with _drawing(run, dark) as run:
        figure = Figure(figsize=(9, 5), layout="constrained")
        above, top, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[0.5, 2, 2])
        _bars_of_skipped(above, run)
        if "loss" in run.logs:
            top.plot(run.steps, run.logs["loss"], color=BLUE)
            positive = run.logs["loss"][np.isfinite(run.logs["loss"])]
            if len(positive) and positive.min() > 0 and positive.max() > 20 * positive.min():
                top.set_yscale("log")
        top.set_ylabel("loss (mean of the\nepoch so far)")
        bottom.step(run.steps, run.log2_loss_scale, where="post", color=BLUE, label="S")
        total = run.log2_loss_scale[:, None] + run.log2_scales
        bottom.fill_between(
            run.steps,
            total.min(axis=1),
            total.max(axis=1),
            step="post",
            alpha=0.25,
            color=GREEN,
            linewidth=0,
            label="S · 2^r of the layers",
        )
        bottom.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        bottom.yaxis.set_major_formatter(StrMethodFormatter("2^{x:.0f}"))
        bottom.set_ylabel("scale")
        bottom.set_xlabel("step")
        bottom.legend(fontsize="small")
        return figure


@contextlib.contextmanager
def _drawing(run: Drawable, dark: bool) -> Iterator[Run]:
    """Context manager that yields the `Run` of `run`, to draw in light or dark."""
    if isinstance(run, (str, os.PathLike)):
        run = load_run(run, MAX_SNAPSHOTS)
    elif isinstance(run, keras.Model):
        run = snapshot_run(run)
    if not isinstance(run, Run):
        raise ValueError(
            "Expected a Run, the path of its record, or a model. "
            f"Received: {run!r} (of type {type(run).__name__})."
        )
    if not len(run.steps):
        raise ValueError(
            "Expected a run with figures of scales. Received: one without. A LossScaleMonitor "
            "records them."
        )
    if not run.layers:
        raise ValueError(
            "Expected a run of a model with LossScaled layers. Received: one without. Wrap "
            "the model with `wrap_model`."
        )
    with style(dark):
        yield run


def _most_common(float_formats: Iterable[FloatFormat]) -> FloatFormat:
    return collections.Counter(float_formats).most_common(1)[0][0]


def _bars_of_skipped(axes: Any, run: Run) -> None:
    skipped = _increase(run.skipped_steps)
    edges = edges_of(run.steps)
    shown = skipped > 0
    width = np.maximum(np.diff(edges), (edges[-1] - edges[0]) * _LEAST_SHARE_OF_WIDTH)
    axes.bar(run.steps[shown], skipped[shown], width[shown], color=_SKIPPED)
    axes.set_ylim(0, max(skipped.max(initial=0), 1) * 1.15)
    axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    axes.set_ylabel("skipped", rotation=0, ha="right", va="center")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelbottom=False)


def _draw_ridges(axes: Any, counts: np.ndarray, binades: np.ndarray, shifts: np.ndarray) -> None:
    """Draws one ridge per row of `counts`, shifted sideways by `shifts`, later ones in front."""
    edge = matplotlib.rcParams["axes.edgecolor"]
    height = 1.5
    outlines, polygons = [], []
    for row, shift, place in zip(counts, shifts, range(len(counts)), strict=True):
        occupied = np.flatnonzero(row)
        if not len(occupied):
            continue
        span = slice(occupied[0], occupied[-1] + 1)
        x = np.concatenate([[binades[span][0] - 1], binades[span], [binades[span][-1] + 1]]) + shift
        y = place - height * np.concatenate([[0.0], row[span] / row.max(), [0.0]])
        polygons.append(np.column_stack([x, y]))
        outlines.append(place)
    shades = matplotlib.colormaps[_COLORS_OF_SCALES](
        0.15 + 0.7 * np.array(outlines) / max(len(counts) - 1, 1)
    )
    width = 0.8 if len(counts) <= _MANY_LAYERS else 0.4
    axes.add_collection(
        PolyCollection(polygons, facecolors=shades, edgecolors=edge, linewidths=width, alpha=0.8)
    )
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)


def _shade_zones(axes: Any, float_format: FloatFormat) -> None:
    lowest, normal = float_format.min_exponent, float_format.min_normal_exponent
    highest = float_format.max_exponent + 1
    middle = (lowest + normal) / 2
    zones = (
        # Beside the name of the next zone, which may be wider than its zone.
        (-_FAR, lowest, _LOST, "///", "lost", min(lowest, middle - 6), "right"),
        (lowest, normal, _SUBNORMAL, "", "subnormal", middle, "center"),
        (highest, _FAR, _LOST, "///", "overflow", highest, "left"),
    )
    for start, end, color, hatch, name, place, align in zones:
        axes.axvspan(
            start, end, facecolor=color, alpha=0.18, hatch=hatch, edgecolor=color, linewidth=0
        )
        axes.text(
            place,
            1.005,
            f" {name} ",
            transform=axes.get_xaxis_transform(),
            ha=align,
            va="bottom",
            fontsize="x-small",
            clip_on=False,
        )


def _limits(
    counts: np.ndarray, binades: np.ndarray, shifts: np.ndarray, float_format: FloatFormat
) -> tuple[float, float]:
    occupied = (counts > 0).any(axis=1)
    low, high = float_format.min_exponent - 4, float_format.max_exponent + 5
    if occupied.any():
        firsts = np.argmax(counts > 0, axis=1)[occupied]
        low = min(low, (binades[firsts] + shifts[occupied]).min() - 2)
    return low, high


def _increase(counts: np.ndarray) -> np.ndarray:
    """The increase of counts since the snapshot before; for the first snapshot, the counts."""
    return np.diff(counts, axis=0, prepend=np.zeros_like(counts[:1]))
