"""`scale_table`: the scale of each layer, and what its gradients look like."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import keras

from tf_adaptive_ls.backend.tables import Shown, Table, power, powers
from tf_adaptive_ls.models.planned_call import reasons_for_no_plan
from tf_adaptive_ls.numerics.float_format import FloatFormat
from tf_adaptive_ls.observe.named_layers import named_layers, scaled_inside
from tf_adaptive_ls.observe.narrow_reductions import NarrowReduction, advice, narrow_reductions
from tf_adaptive_ls.training.companion import scaling_of
from tf_adaptive_ls.training.float8.products import products_in
from tf_adaptive_ls.training.layer_scaling import snapshots_of
from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer
from tf_adaptive_ls.training.readings import LayerSnapshot
from tf_adaptive_ls.training.saved_bytes import saved_bytes


@dataclasses.dataclass(frozen=True)
class ScaleRow:
    """One layer in a `ScaleTable`.

    Attributes:
        name: Name of the layer, after the names of the models that contain it.
        layer_class: Name of the class of the layer.
        log2_scale: The int r of the scale 2**r, or `None` if the layer is not scaled.
        log2_total: log2 of the total scale S * 2**r, or `None` if the layer is not scaled or the
            optimizer is unknown.
        binades: Lowest and highest binade of the gradients of the layer, without any scale, in
            the last sample. `None` if no gradients were seen.
        underflow: Estimated share of gradients that become zero in float16 at this scale. `None`
            if no gradients were seen.
        note: Why the layer is not scaled. Empty if it is scaled.
        float8: The float8 formats of inputs and kernels, and of gradients. Or the reason why the
            layer does not use float8, if other layers do.
        flushed: Share of gradients that become zero in float8. `None` if no gradients were seen.
        saturations: Number of steps on which a gradient saturated in float8. `None` likewise.
        saved_bytes: Number of bytes per example that the layer saves in 8 bits for the backward
            pass, see `saved_activations` of `wrap_model`. `None` if it saves none, or has not been
            trained yet. Two adjacent layers may count the same tensor; XLA keeps it once.
    """

    name: str
    layer_class: str
    log2_scale: int | None
    log2_total: int | None
    binades: tuple[int, int] | None
    underflow: float | None
    note: str
    float8: str = ""
    flushed: float | None = None
    saturations: int | None = None
    saved_bytes: int | None = None


class ScaleTable(Shown, list[ScaleRow]):
    """A list of `ScaleRow`. Prints as a table; notebooks show it as HTML.

    ```python
    table = als.scale_table(model, optimizer)
    print(table.scaled)
    worst = max(row.underflow or 0 for row in table)
    ```

    `pandas.DataFrame(table)` works as well.

    Args:
        rows: Iterable of `ScaleRow`.
        narrow_reductions: Tuple of `NarrowReduction`, printed below the table.
        without_plan: Dict of reasons why gradients return to the loss scale S between layers, by
            the name of the model or layer that contains them. Printed below the table.
    """

    def __init__(
        self,
        rows: Iterable[ScaleRow] = (),
        narrow_reductions: tuple[NarrowReduction, ...] = (),
        without_plan: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(rows)
        self.narrow_reductions = narrow_reductions
        self.without_plan = without_plan

    @property
    def scaled(self) -> "ScaleTable":
        """The same table, with only those layers that are scaled."""
        rows = (row for row in self if row.log2_scale is not None)
        return ScaleTable(rows, self.narrow_reductions, self.without_plan)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for JSON.

        `pandas.DataFrame` accepts the value of "layers".
        """
        return {
            "layers": [dataclasses.asdict(row) for row in self],
            "narrow_reductions": [dataclasses.asdict(each) for each in self.narrow_reductions],
            "without_plan": dict(self.without_plan),
        }

    def _parts(self) -> list[str | Table]:
        columns = columns_of(self)
        table = Table(columns, [cells_of(row, columns) for row in self])
        heading = "Gradients return to the loss scale between the layers of:"
        lines = [f"  {name}: {reason}" for name, reason in self.without_plan.items()]
        without = "\n".join([heading, *lines]) if lines else ""
        return [table, advice(self.narrow_reductions), without]


# Titles of columns, and the alignment of their cells.
COLUMNS = {
    "layer": "left",
    "class": "left",
    "scale": "right",
    "S · scale": "right",
    "gradient binades": "right",
    "underflow": "right",
    "not scaled because": "left",
}
# Additional columns if any layer uses float8.
FLOAT8_COLUMNS = {"float8": "left", "flushed": "right", "saturated steps": "right"}
# Additional column if any layer saves 8 bits.
SAVED_COLUMNS = {"kept in 8 bits": "right"}


def columns_of(rows: ScaleTable) -> dict[str, str]:
    """The titles of the columns that have cells.

    These are `COLUMNS`, without "not scaled because" if all rows are scaled, and with optional
    columns where needed.
    """
    columns = dict(COLUMNS)
    if rows and not any(row.note for row in rows):
        del columns["not scaled because"]
    if any(row.float8 for row in rows):
        columns |= FLOAT8_COLUMNS
    if any(row.saved_bytes is not None for row in rows):
        columns |= SAVED_COLUMNS
    return columns


def cells_of(row: ScaleRow, columns: Iterable[str]) -> list[str]:
    """The cells of a `ScaleRow`, a dict of strings by column."""
    cells = {
        "layer": row.name,
        "class": row.layer_class,
        "scale": power(row.log2_scale),
        "S · scale": power(row.log2_total),
        "gradient binades": powers(row.binades),
        "underflow": "" if row.underflow is None else f"{row.underflow:.2%}",
        "not scaled because": row.note,
        "float8": row.float8,
        "flushed": "" if row.flushed is None else f"{row.flushed:.2%}",
        "saturated steps": "" if row.saturations is None else str(row.saturations),
        "kept in 8 bits": "" if row.saved_bytes is None else f"{row.saved_bytes:,} B",
    }
    return [cells[name] for name in columns]


def scale_table(
    model: keras.layers.Layer, optimizer: AdaptiveLossScaleOptimizer | None = None
) -> ScaleTable:
    """Shows the scale of each layer, what its gradients look like, and why a layer has no scale.

    ```python
    print(als.scale_table(model, optimizer))
    ```

    Args:
        model: Any `keras.Model` or layer.
        optimizer: The `AdaptiveLossScaleOptimizer` of the model. Defaults to the one that the model
            was compiled with.

    Returns:
        A `ScaleTable`: a list with one `ScaleRow` per layer, in the order of the model. Below the
        table, it lists float16 operations that should compute in float32.

    Raises:
        ValueError: If `model` or `optimizer` is not as described.
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
    named = list(named_layers(model))
    layers = [layer for _, layer in named]
    scalings = [scaling for scaling in map(scaling_of, layers) if scaling is not None]
    shown = dict(zip(map(id, scalings), snapshots_of(scalings), strict=True))
    rows = [
        dataclasses.replace(
            _row(name, layer, shown, log2_loss_scale), saved_bytes=_saved_bytes(layer)
        )
        for name, layer in named
    ]
    if any(scaling.float8 for scaling in scalings):
        rows = [
            _with_float8(row, layer, shown, why_wide)
            for row, layer, why_wide in zip(rows, layers, _why_wide(layers), strict=True)
        ]
    return ScaleTable(rows, narrow_reductions(model), reasons_for_no_plan(model))


def _saved_bytes(layer: keras.layers.Layer) -> int | None:
    scaling = scaling_of(layer)
    return saved_bytes(layer if scaling is None else scaling.layer)


def _with_float8(
    row: ScaleRow, layer: keras.layers.Layer, shown: dict[int, LayerSnapshot], why_wide: str
) -> ScaleRow:
    scaling = scaling_of(layer)
    if scaling is None or scaling.float8 is None:
        return dataclasses.replace(row, float8=why_wide)
    formats = (scaling.float8.forward_format, scaling.float8.backward_format)
    return float8_row(row, formats, shown[id(scaling)])


def float8_row(
    row: ScaleRow, formats: tuple[FloatFormat | None, FloatFormat | None], shown: LayerSnapshot
) -> ScaleRow:
    """A `ScaleRow` with float8 information added.

    Args:
        row: A row without float8 information.
        formats: The `FloatFormat` of inputs and kernels, and that of gradients. Both `None` if the
            layer does not use float8.
        shown: The `LayerSnapshot` of the layer.
    """
    names = [each.name.removeprefix("float8_") for each in formats if each]
    row = dataclasses.replace(row, float8=", ".join(names))
    if shown.operands is None or not shown.operands.nonzero:
        return row
    return dataclasses.replace(row, flushed=shown.flushed_share, saturations=shown.saturations)


def _why_wide(layers: list[keras.layers.Layer]) -> Iterator[str]:
    """For each layer of a model that does not use float8, the reason."""
    have_products = [bool(layer.weights and products_in(layer)) for layer in layers]
    places = [place for place, has in enumerate(have_products) if has]
    for place, (layer, has) in enumerate(zip(layers, have_products, strict=True)):
        if not layer.weights:
            yield ""
        elif not has:
            yield "no product"
        elif place in (places[0], places[-1]):
            yield "first product" if place == places[0] else "last product"
        else:
            yield "not chosen"


def _row(
    name: str,
    layer: keras.layers.Layer,
    shown: dict[int, LayerSnapshot],
    log2_loss_scale: int | None,
) -> ScaleRow:
    scaling = scaling_of(layer)
    if scaling is not None:
        layer = scaling.layer
        row = scaled_row(name, type(layer).__name__, shown[id(scaling)], log2_loss_scale)
        if layer.trainable or row.log2_scale or row.binades:
            return row
        # It is frozen, and no gradients passed through it, either.
        return ScaleRow(name, type(layer).__name__, None, None, None, None, _why_not(layer))
    inside = scaled_inside(layer)
    layers = "layer" if len(inside) == 1 else "layers"
    note = f"has {len(inside)} scaled {layers} inside" if inside else _why_not(layer)
    return ScaleRow(name, type(layer).__name__, None, None, None, None, note)


def scaled_row(
    name: str, layer_class: str, layer_snapshot: LayerSnapshot, log2_loss_scale: int | None
) -> ScaleRow:
    """The `ScaleRow` of a scaled layer, from its `LayerSnapshot`."""
    r, spectrum = layer_snapshot.log2_scale, layer_snapshot.spectrum
    total = None if log2_loss_scale is None else log2_loss_scale + r
    underflow = spectrum.underflow_share if spectrum.nonzero else None
    return ScaleRow(name, layer_class, r, total, layer_snapshot.binades, underflow, "")


def _why_not(layer: keras.layers.Layer) -> str:
    if not layer.weights:
        return "no weights"
    if layer.trainable_weights:
        return "not wrapped"
    return "no trainable weights" if layer.trainable else "frozen"
