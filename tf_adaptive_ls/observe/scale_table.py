"""`scale_table`: what every layer's gradients do, at a glance."""

import dataclasses
import math
from collections.abc import Iterable

import keras

from tf_adaptive_ls.observe.named_layers import named_layers, scaled_inside
from tf_adaptive_ls.observe.narrow_reductions import NarrowReduction, advice, narrow_reductions
from tf_adaptive_ls.observe.text_table import power, powers, text_table
from tf_adaptive_ls.training.loss_scaled import LossScaled
from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer


@dataclasses.dataclass(frozen=True)
class ScaleRow:
    """One layer of a model.

    Attributes:
        name: The layer's name, behind those of the models it is nested in.
        layer_class: The name of its class.
        log2_scale: r, `None` if the layer is not scaled.
        log2_total: log2 of the scale S * 2**r that it works at, `None` if the layer
            is not scaled or the optimizer is not known.
        binades: Lowest and highest binade that its gradients were last seen to
            occupy, without any scale, `None` if none were seen.
        underflow: Estimated share of its gradients still lost to underflow, `None`
            if none were seen.
        note: Why the layer is not scaled; empty if it is.
    """

    name: str
    layer_class: str
    log2_scale: int | None
    log2_total: int | None
    binades: tuple[int, int] | None
    underflow: float | None
    note: str


class ScaleTable(list[ScaleRow]):
    """A list of `ScaleRow` that prints as an aligned table.

    Args:
        rows: The rows.
        narrow_reductions: Tuple of `NarrowReduction`, told below the table.
    """

    def __init__(
        self,
        rows: Iterable[ScaleRow] = (),
        narrow_reductions: tuple[NarrowReduction, ...] = (),
    ):
        super().__init__(rows)
        self.narrow_reductions = narrow_reductions

    def __str__(self):
        return text_table(COLUMNS, map(cells_of, self)) + advice(self.narrow_reductions)


# Names of columns, and the side that their cells are aligned to.
COLUMNS = {
    "layer": "left",
    "class": "left",
    "scale": "right",
    "S · scale": "right",
    "gradient binades": "right",
    "underflow": "right",
    "not scaled because": "left",
}


def cells_of(row):
    """What a `ScaleRow` shows in each of `COLUMNS`: strings."""
    return (
        row.name,
        row.layer_class,
        power(row.log2_scale),
        power(row.log2_total),
        powers(row.binades),
        "" if row.underflow is None else f"{row.underflow:.2%}",
        row.note,
    )


def scale_table(
    model: keras.layers.Layer, optimizer: AdaptiveLossScaleOptimizer | None = None
) -> ScaleTable:
    """What every layer's gradients do, and which layers have no scale, and why.

    Args:
        model: Any `keras.Model` or layer.
        optimizer: The `AdaptiveLossScaleOptimizer` that it is trained with, if the
            model was not compiled with one.

    Returns:
        A `ScaleTable`: a list of one `ScaleRow` per layer, in the model's order. Below it
        stands what the model computes in float16 that had better be float32.

    Raises:
        ValueError: If `model` or `optimizer` is not as said.
    """
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(
            f"Expected a model or layer. Received: {model!r} (of type {type(model).__name__})."
        )
    if optimizer is None:
        optimizer = getattr(model, "optimizer", None)
        if not isinstance(optimizer, AdaptiveLossScaleOptimizer):
            optimizer = None
    elif not isinstance(optimizer, AdaptiveLossScaleOptimizer):
        raise ValueError(
            "Expected `optimizer` to be an AdaptiveLossScaleOptimizer. Received: "
            f"{optimizer!r}. Leave it out to see scales relative to the loss scale."
        )
    log2_loss_scale = None if optimizer is None else round(math.log2(optimizer.loss_scale))
    rows = (_row(name, layer, log2_loss_scale) for name, layer in named_layers(model))
    return ScaleTable(rows, narrow_reductions(model))


def _row(name, layer, log2_loss_scale):
    if isinstance(layer, LossScaled):
        return scaled_row(name, type(layer.layer).__name__, layer.snapshot, log2_loss_scale)
    inside = scaled_inside(layer)
    note = f"has {len(inside)} scaled layers inside" if inside else _why_not(layer)
    return ScaleRow(name, type(layer).__name__, None, None, None, None, note)


def scaled_row(name, layer_class, layer_snapshot, log2_loss_scale):
    """The `ScaleRow` of a scaled layer, from a `scale_state.LayerSnapshot` of its state."""
    r, spectrum = layer_snapshot.log2_scale, layer_snapshot.spectrum
    total = None if log2_loss_scale is None else log2_loss_scale + r
    underflow = spectrum.underflow_share if spectrum.nonzero else None
    return ScaleRow(name, layer_class, r, total, layer_snapshot.binades, underflow, "")


def _why_not(layer):
    if not layer.weights:
        return "no weights"
    if layer.trainable_weights:
        return "not wrapped"
    return "no trainable weights" if layer.trainable else "frozen"
