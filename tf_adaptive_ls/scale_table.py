"""`scale_table`: what every layer's gradients do, at a glance."""

import dataclasses
import io
import math

import keras
from rich import box
from rich.console import Console
from rich.table import Table

from tf_adaptive_ls.loss_scaled import LossScaled
from tf_adaptive_ls.optimizer import AdaptiveLossScaleOptimizer


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
            occupy, without any scale if `log2_total` is known and else at the
            layer's scale. `None` if none were seen.
        underflow: Estimated share of its gradients still lost to underflow, `None`
            if none were seen.
        note: Why the layer is not scaled; empty if it is.
    """

    name: str
    layer_class: str
    log2_scale: int | None
    log2_total: int | None
    binades: tuple | None
    underflow: float | None
    note: str


class ScaleTable(list):
    """A list of `ScaleRow` that prints as an aligned table."""

    def __str__(self):
        table = Table(box=box.SIMPLE, pad_edge=False)
        for title, justify in [
            ("layer", "left"),
            ("class", "left"),
            ("scale", "right"),
            ("S · scale", "right"),
            ("gradient binades", "right"),
            ("underflow", "right"),
            ("not scaled because", "left"),
        ]:
            table.add_column(title, justify=justify, no_wrap=True)
        for row in self:
            table.add_row(
                row.name,
                row.layer_class,
                _power(row.log2_scale),
                _power(row.log2_total),
                f"{_power(row.binades[0])} … {_power(row.binades[1])}" if row.binades else "",
                "" if row.underflow is None else f"{row.underflow:.2%}",
                row.note,
            )
        # Wide enough for anything: a table in a log file must not wrap.
        console = Console(file=io.StringIO(), width=1000)
        console.print(table)
        lines = console.file.getvalue().splitlines()
        return "\n".join(line.rstrip() for line in lines).strip("\n")


def scale_table(model, optimizer=None):
    """What every layer's gradients do, and which layers have no scale, and why.

    Args:
        model: Any `keras.Model` or layer.
        optimizer: The `AdaptiveLossScaleOptimizer` that it is trained with, if the
            model was not compiled with one.

    Returns:
        A `ScaleTable`: a list of one `ScaleRow` per layer, in the model's order.

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
    layers = model.layers if isinstance(model, keras.Model) else [model]
    return ScaleTable(_rows(layers, "", log2_loss_scale))


def _rows(layers, prefix, log2_loss_scale):
    for layer in layers:
        name = prefix + layer.name
        if isinstance(layer, keras.Model):
            yield from _rows(layer.layers, f"{name}/", log2_loss_scale)
        elif isinstance(layer, LossScaled):
            yield _scaled_row(layer, name, log2_loss_scale)
        else:
            inside = [
                each
                for each in layer._flatten_layers(include_self=False)
                if isinstance(each, LossScaled)
            ]
            note = f"has {len(inside)} scaled layers inside" if inside else _why_not(layer)
            nothing = (None, None, None, None)
            yield ScaleRow(name, type(layer).__name__, *nothing, note)
            yield from _rows(inside, f"{name}/", log2_loss_scale)


def _scaled_row(layer, name, log2_loss_scale):
    r, spectrum, binades = layer.log2_scale, layer.spectrum, layer.spectrum.binades
    total = None if log2_loss_scale is None else log2_loss_scale + r
    if binades and total is not None:
        binades = tuple(binade - total for binade in binades)
    kind = type(layer.layer).__name__
    underflow = spectrum.underflow_share if spectrum.nonzero else None
    return ScaleRow(name, kind, r, total, binades, underflow, "")


def _why_not(layer):
    if not layer.weights:
        return "no weights"
    if layer.trainable_weights:
        return "not wrapped"
    return "no trainable weights" if layer.trainable else "frozen"


def _power(exponent):
    return "" if exponent is None else f"2^{exponent}"
