"""Pictures of the records of a `LossChangeMonitor`."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.observe.drawing import (
    BLUE,
    ORANGE,
    edges_of,
    height_of,
    label_layers,
    shortened,
    style,
)
from tf_adaptive_ls.observe.record.loss_changes import LossChanges
from tf_adaptive_ls.observe.record.run import Run, load_run

# As many lines as there are distinct colors.
_MOST_NAMED = 8
_CLIPPED_AT = 99  # percentile

# What can be drawn: a run with `loss_changes`, or the path of its record.
Changing: TypeAlias = Run | str | os.PathLike[str]


def plot_loss_change(run: Changing, *, dark: bool = False) -> Figure:
    """Draws the loss, its change allocated to each layer, and the share of weights that help.

    The upper part shows the true loss and, dashed, the loss that the allocated shares lead to from
    the start of each path. The middle part shows cumulative shares: the eight layers with the
    largest have a color and a name, all others are gray. The lower part shows the share of weights
    whose change has lowered the loss.

    Args:
        run: A `Run`, or the path of its record.
        dark: Whether to draw on black.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    with _drawing(run, dark) as changes:
        figure = Figure(figsize=(9, 8), layout="constrained")
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[2, 3, 1.5])
        paths = np.stack([changes.since, changes.steps], axis=1).astype(float)
        true = np.stack([changes.loss_before, changes.loss_after], axis=1)
        given = changes.allocated.sum(axis=1) + changes.statistics
        led_to = np.stack([changes.loss_before, changes.loss_before + given], axis=1)
        top.plot(*_with_gaps(paths, true), color=BLUE, label="true")
        top.plot(*_with_gaps(paths, led_to), "--", color=ORANGE, label="allocated")
        top.set_ylabel("loss")
        top.legend(fontsize="small")

        sums = np.cumsum(changes.allocated, axis=0)
        steps = np.concatenate([changes.since[:1], changes.steps])
        sums = np.concatenate([np.zeros_like(sums[:1]), sums])
        most = np.argsort(-np.abs(sums[-1]), kind="stable")[:_MOST_NAMED]
        others = np.delete(np.arange(len(changes.layers)), most)
        if len(others):
            label = f"{len(others)} more"
            lines = middle.plot(steps, sums[:, others], color="gray", alpha=0.5, linewidth=0.7)
            lines[0].set_label(label)
        shades = matplotlib.colormaps["turbo"](np.linspace(0.08, 0.92, len(most)))
        for shade, i in zip(shades, sorted(most), strict=True):
            middle.plot(steps, sums[:, i], color=shade, label=shortened(changes.layers[i]))
        middle.axhline(0, color="gray", linewidth=0.5)
        middle.set_ylabel("given to each layer\n(sum so far)")
        figure.legend(
            *middle.get_legend_handles_labels(), loc="outside right center", fontsize="small"
        )

        bottom.axhline(0.5, color="gray", linewidth=0.5)
        bottom.plot(changes.steps, changes.helping, color=BLUE, marker=".", markersize=3)
        bottom.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        bottom.set_ylabel("weights that help")
        bottom.set_xlabel("step")
        return figure


def plot_loss_change_map(run: Changing, *, dark: bool = False) -> Figure:
    """Draws the share of each layer over time.

    Each row is a layer, from first to last. Its color is the change of the loss per step: blue has
    lowered it, red has raised it. Colors saturate at the 99th percentile.

    Args:
        run: A `Run`, or the path of its record.
        dark: Whether to draw on black.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    with _drawing(run, dark) as changes:
        layers = len(changes.layers)
        figure = Figure(figsize=(9, height_of(layers) + 1.0), layout="constrained")
        axes = figure.subplots()
        rate = changes.allocated / (changes.steps - changes.since)[:, None]
        limit = float(np.percentile(np.abs(rate), _CLIPPED_AT)) or 1.0
        mesh = axes.pcolormesh(
            edges_of(changes.steps),
            np.arange(layers + 1) - 0.5,
            rate.T,
            cmap=_diverging(dark),
            vmin=-limit,
            vmax=limit,
            rasterized=True,
        )
        axes.set_xlabel("step")
        axes.set_ylim(layers - 0.5, -0.5)
        label_layers(axes, changes.layers, range(layers))
        figure.colorbar(
            mesh, ax=axes, label="change of the loss per step", extend="both", aspect=30, pad=0.01
        )
        return figure


def plot_loss_change_layers(run: Changing, *, dark: bool = False) -> Figure:
    """Draws the total share of each layer, and how much of it was lost to underflow.

    A bar to the left has lowered the loss. Error bars are standard errors of the share as an
    estimate for all data. If the record has shares as trained, a second bar shows them: where it is
    shorter, underflow has lost the difference.

    Args:
        run: A `Run`, or the path of its record.
        dark: Whether to draw on black.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    with _drawing(run, dark) as changes:
        names = [*changes.layers, "(moving statistics)"][: None if changes.statistics.any() else -1]
        places = np.arange(len(names))
        given = [*changes.allocated.sum(axis=0), changes.statistics.sum()][: len(names)]
        # All paths are seen by the same batches: their errors add up.
        errors = np.zeros(len(names))
        errors[: len(changes.layers)] = np.nan_to_num(changes.standard_errors).sum(axis=0)
        trained = changes.as_trained.sum(axis=0)
        has_trained = bool(np.isfinite(trained).any())
        figure = Figure(figsize=(9, height_of(len(names)) + 1.0), layout="constrained")
        axes = figure.subplots()
        height = 0.4 if has_trained else 0.8
        thin = {"linewidth": 1.2 if len(names) <= 40 else 0.4}
        bars = {
            "color": BLUE,
            "ecolor": matplotlib.rcParams["axes.edgecolor"],
            "error_kw": thin,
        }
        shift = height / 2 if has_trained else 0.0
        axes.barh(places - shift, given, height, xerr=errors, label="float32", **bars)
        if has_trained:
            trained = places[: len(trained)] + shift, trained
            axes.barh(*trained, height, color=ORANGE, label="as trained")
            axes.legend(fontsize="small")
        axes.axvline(0, color="gray", linewidth=0.5)
        axes.set_xlabel("change of the loss")
        axes.set_ylim(len(names) - 0.4, -0.6)
        label_layers(axes, names, range(len(names)))
        return figure


@contextlib.contextmanager
def _drawing(run: Changing, dark: bool) -> Iterator[LossChanges]:
    """Context manager that yields the `LossChanges` of `run`, to draw in light or dark."""
    with style(dark):
        if isinstance(run, (str, os.PathLike)):
            run = load_run(run)
        if not isinstance(run, Run):
            raise ValueError(
                "Expected a Run, or the path of its record. "
                f"Received: {run!r} (of type {type(run).__name__})."
            )
        if run.loss_changes is None:
            raise ValueError(
                "Expected the run of a model with a LossChangeMonitor. Received: one without."
            )
        yield run.loss_changes


def _with_gaps(x: Tensor, y: np.ndarray) -> Iterator[Any]:
    """Lines `[N, 2]` as one line, with gaps where a line does not start at the end of the last."""
    apart = np.full((len(x), 1), np.nan)
    return (np.concatenate([values, apart], axis=1).ravel() for values in (x, y))


def _diverging(dark: bool) -> str:
    """Colors from blue through the background color to red."""
    return "berlin" if dark and "berlin" in matplotlib.colormaps else "RdBu_r"
