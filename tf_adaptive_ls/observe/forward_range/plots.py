"""Pictures of the room of the forward pass, at one moment and over time."""

import math
import os

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from tf_adaptive_ls.numerics.float_format import FloatFormat
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
from tf_adaptive_ls.observe.forward_range.result import ForwardRange
from tf_adaptive_ls.observe.record.run import Run, load_run

# Binades between the last and the first color: those that float16 has above 1.
_MOST_ROOM = 16
# The room below which `LossScaleMonitor` warns about falling room.
_LOW = 4


def plot_forward_range(result: ForwardRange, *, dark: bool = False) -> Figure:
    """Draws the largest activations of every part of a model, and what its dtype can hold.

    Each row is a part, in the order of the model. A circle marks the largest input, a disc the
    largest output. Beyond the red line, the dtype overflows. The zone before the line is the room
    that was asked for. Parts with a verdict are red.

    Args:
        result: A `ForwardRange`.
        dark: Whether to draw on black.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If `result` is not a `ForwardRange`.
    """
    if not isinstance(result, ForwardRange):
        raise ValueError(
            "Expected what `forward_range` returned. "
            f"Received: {result!r:.200} (of type {type(result).__name__})."
        )
    parts = [part for part in result.parts if FloatFormat(part.float_format).is_narrow]
    with style(dark):
        figure = Figure(figsize=(9, height_of(len(parts)) + 1.2), layout="constrained")
        axes = figure.subplots()
        rows = np.arange(len(parts))
        colors = [RED if part.verdicts else BLUE for part in parts]
        inputs = [_log2(part.largest_in) for part in parts]
        outputs = [_log2(part.largest_out) for part in parts]
        axes.hlines(rows, inputs, outputs, color=colors, linewidth=0.8)
        axes.scatter(inputs, rows, s=22, facecolors="none", edgecolors=colors, label="in")
        axes.scatter(outputs, rows, s=22, color=colors, label="out")
        limits = {math.log2(FloatFormat(part.float_format).largest) for part in parts}
        for limit in limits:
            axes.axvspan(limit - result.room, limit, color=ORANGE, alpha=0.25, linewidth=0)
            axes.axvline(limit, color=RED)
        for dtype in ("float8_e4m3fn", "float8_e5m2"):
            axes.axvline(math.log2(FloatFormat(dtype).largest), color=GREEN, linestyle=":")
        axes.set_xlabel("largest magnitude (dotted: what e4m3 and e5m2 hold)")
        axes.xaxis.set_major_formatter(StrMethodFormatter("2^{x:.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(len(parts) - 0.5, -0.5)
        label_layers(axes, [part.name for part in parts], rows)
        return figure


def plot_forward_rooms(run: Run | str | os.PathLike[str], *, dark: bool = False) -> Figure:
    """Draws how much room every part of the forward pass had before overflow, over time.

    The upper part shows the least room of any part, in binades; below zero, the forward pass
    overflows. In the lower part, each row is a part, in the order of the model. Its color is its
    room; red means no room.

    Args:
        run: A `Run` of a `LossScaleMonitor` with a `batch`, or the path of its record.
        dark: Whether to draw on black.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        OSError: If there is no such file.
        ValueError: If `run` is not such a run.
    """
    if isinstance(run, (str, os.PathLike)):
        run = load_run(run)
    if not isinstance(run, Run) or run.forward_rooms is None:
        raise ValueError(
            "Expected the run of a LossScaleMonitor(batch=…), or the path of its record. "
            + (
                "Received: one without a batch."
                if isinstance(run, Run)
                else f"Received: {run!r:.200} (of type {type(run).__name__})."
            )
        )
    found = run.forward_rooms
    with style(dark):
        height = height_of(len(found.parts))
        figure = Figure(figsize=(9, height + 2.4), layout="constrained")
        above, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1.4, height])
        least = np.where(np.isinf(found.least), np.nan, found.least)
        above.plot(found.steps, least, color=BLUE, marker=".", markersize=3)
        above.axhspan(0, _LOW, color=ORANGE, alpha=0.25, linewidth=0)
        above.axhline(0, color=RED)
        above.set_ylabel("least room\n(binades)")
        mesh = axes.pcolormesh(
            edges_of(found.steps),
            np.arange(len(found.parts) + 1) - 0.5,
            found.rooms.T,
            cmap=matplotlib.colormaps["viridis"].with_extremes(under=RED),
            vmin=0,
            vmax=_MOST_ROOM,
            rasterized=True,
        )
        axes.set_xlabel("step")
        axes.set_ylim(len(found.parts) - 0.5, -0.5)
        label_layers(axes, found.parts, range(len(found.parts)))
        figure.colorbar(
            mesh, ax=[above, axes], label="room (binades)", extend="both", aspect=30, pad=0.01
        )
        return figure


def _log2(magnitude: float) -> float:
    """log2 of magnitudes. NaN, which is not drawn, for zero and infinity."""
    return math.log2(magnitude) if 0 < magnitude < math.inf else math.nan
