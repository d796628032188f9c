"""Draws the quantization errors of all channels."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tf_adaptive_ls.deploy.report import QuantizationReport
from tf_adaptive_ls.observe.drawing import BLUE, GREEN, ORANGE, height_of, label_layers, style


def plot_quantization(report: QuantizationReport, *, dark: bool = False) -> Figure:
    """Draws the output error of every channel of a quantized model, and the size of its kernels.

    Each row is a kernel, in the order of calls. On the left, each dot is a channel: its error on
    the calibration data, relative to the outputs of the layer. Channels with more points, or more
    bits than most channels of the kernel, are orange. On the right is the size of the kernel, in
    front of its size in float32.

    Args:
        report: A `QuantizationReport`.
        dark: Whether to draw on black.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If `report` is not a `QuantizationReport`.
    """
    if not isinstance(report, QuantizationReport):
        raise ValueError(
            "Expected the report that `quantize_weights` returned. "
            f"Received: {report!r:.200} (of type {type(report).__name__})."
        )
    rows = np.arange(len(report.kernels))
    with style(dark):
        figure = Figure(figsize=(9, height_of(len(rows)) + 1.2), layout="constrained")
        axes, sizes = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
        for row, kernel in zip(rows, report.kernels, strict=True):
            more = (kernel.bits > kernel.bits.min()) | (kernel.points > 1)
            colors = np.where(more, ORANGE, BLUE)
            axes.scatter(kernel.output_error, np.full(len(more), row), s=12, c=colors, alpha=0.6)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("error of outputs, by channel (orange: got more bytes)")
        axes.set_xlim(left=0)
        wide = [4 * np.prod(kernel.shape) / 1024 for kernel in report.kernels]
        sizes.barh(rows, wide, color=GREEN, alpha=0.25)
        sizes.barh(rows, [kernel.bytes.sum() / 1024 for kernel in report.kernels], color=GREEN)
        sizes.set_xlabel("KiB (pale: float32)")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        label_layers(axes, [kernel.name for kernel in report.kernels], rows)
        return figure
