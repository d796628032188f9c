"""A picture of the quantization errors of all channels."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tf_adaptive_ls.deploy.report import QuantizationReport
from tf_adaptive_ls.observe.drawing import BLUE, GREEN, ORANGE, height_of, label_layers, style


def plot_quantization(report: QuantizationReport, *, dark: bool = False) -> Figure:
    """The error of the outputs of every channel of a quantized model, and the bytes of its kernels.

    A row is a kernel, in the order of calls. To the left a dot is a channel: its error on the
    calibration data, as a share of the outputs of its layer. Channels that got more bits than
    most of their kernel, or more points, are orange. To the right are the kernel's bytes, in front
    of those in float32.

    Args:
        report: What `quantize_weights` returned.
        dark: Whether to draw on black.

    Raises:
        ValueError: If `report` is something else.
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
            colours = np.where(more, ORANGE, BLUE)
            axes.scatter(kernel.output_error, np.full(len(more), row), s=12, c=colours, alpha=0.6)
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
