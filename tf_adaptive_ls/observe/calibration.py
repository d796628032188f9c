"""`calibrate`: finds the scales of a model before training."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tf_adaptive_ls.backend.arguments import MAX_LOG2_SCALE
from tf_adaptive_ls.backend.batches import batches_of
from tf_adaptive_ls.backend.tables import Shown, Table, power, powers
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.observe.named_layers import scaled_layers
from tf_adaptive_ls.observe.narrow_reductions import NarrowReduction, advice, narrow_reductions
from tf_adaptive_ls.observe.record.snapshot import Snapshot
from tf_adaptive_ls.training.layer_scaling import LayerScaling
from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer
from tf_adaptive_ls.training.readings import LayerSnapshot

# Scales have settled if none has moved by more than this many binades in this many batches. Smaller
# moves follow differences between batches.
_STILL_BINADES = 2
_STILL_BATCHES = 5

# The share of a layer's gradients that may be lost, and that its range leaves out at the lower end,
# as in Zhao et al.
_TAIL = 1e-3


@dataclasses.dataclass(frozen=True)
class LayerRange:
    """The range of the gradients of one layer, and what one loss scale would lose.

    Attributes:
        name, layer_class: As in `scale_table`.
        log2_total: log2 of the scale S * 2**r that the layer settled at.
        binades: Lowest and highest binade of the gradients, without any scale and without the
            smallest 0.1 %. `None` if all gradients were zero.
        underflow: Estimated share of gradients that become zero at that scale.
        subnormal: Share of gradients that lose precision because they are subnormal.
        float_format: Name of the format that the layer computes in.
        fits: Whether the format holds all but 0.1 % of the gradients.
        lost_by_one_scale: Number of binades that would be lost under the largest single loss scale
            that overflows in no layer.
    """

    name: str
    layer_class: str
    log2_total: int
    binades: tuple[int, int] | None
    underflow: float
    subnormal: float
    float_format: str
    fits: bool
    lost_by_one_scale: int


@dataclasses.dataclass(frozen=True)
class Calibration(Shown):
    """The result of `calibrate`. Prints as a table; notebooks show it as HTML.

    ```python
    model.compile(als.AdaptiveLossScaleOptimizer("adam"), loss=loss_fn)
    calibration = als.calibrate(model, (x, y))
    losing = [layer.name for layer in calibration.layers if layer.lost_by_one_scale]
    ```

    Attributes:
        layers: A `LayerRange` for each scaled layer.
        log2_loss_scale: log2 of the loss scale S that suits the loss. `calibrate` does not change
            the S of the model's optimizer.
        log2_one_scale: log2 of the largest single loss scale under which no layer overflows. `None`
            if all gradients were zero.
        settled: Whether scales had stopped changing.
        batches: Number of batches used.
        narrow_reductions: Operations that no loss scale can help, see `NarrowReduction`.
    """

    layers: tuple[LayerRange, ...]
    log2_loss_scale: int
    log2_one_scale: int | None
    settled: bool
    batches: int
    narrow_reductions: tuple[NarrowReduction, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for JSON.

        `pandas.DataFrame` accepts the value of "layers".
        """
        return dataclasses.asdict(self)

    def _parts(self) -> list[str | Table]:
        columns = {
            "layer": "left",
            "class": "left",
            "S · scale": "right",
            "gradient binades": "right",
            "needs": "right",
            "underflow": "right",
            "subnormal": "right",
            "format": "left",
            "lost by one scale": "right",
        }
        rows = [
            (
                layer.name,
                layer.layer_class,
                power(layer.log2_total),
                powers(layer.binades),
                str(layer.binades[1] - layer.binades[0] + 1) if layer.binades else "",
                f"{layer.underflow:.2%}" if layer.binades else "",
                f"{layer.subnormal:.2%}" if layer.binades else "",
                layer.float_format if layer.fits else f"{layer.float_format} is too small",
                f"{layer.lost_by_one_scale} binades" if layer.lost_by_one_scale else "",
            )
            for layer in self.layers
        ]
        state = "Settled" if self.settled else "Not settled yet"
        text = f"{state} after {self.batches} batches; loss scale S: {power(self.log2_loss_scale)}."
        if self.log2_one_scale is not None:
            text += f" One scale for all layers could be {power(self.log2_one_scale)} at most."
        return [text, Table(columns, rows), advice(self.narrow_reductions)]


def calibrate(model: keras.Model, batches: Any, *, batch_size: int = 32) -> Calibration:
    """Finds the scale of each layer without training.

    Runs batches forward and backward and updates the scales until they have settled or there are no
    more batches. Only the scales of layers change. Weights, statistics, seeds, metrics and the
    optimizer stay the same. If the loss needs another S than the optimizer has, the result says so.

    ```python
    model.compile(als.AdaptiveLossScaleOptimizer("adam"), loss=loss_fn)
    print(als.calibrate(model, (x, y)))
    ```

    Args:
        model: A built model with scaled layers, compiled with an `AdaptiveLossScaleOptimizer`,
            whose rule is used.
        batches: Data as for `fit`: arrays `(x, y)` or `(x, y, sample_weight)`, or an iterable of
            such batches, such as a `tf.data.Dataset`. Twenty batches are usually enough.
        batch_size: Int. The batch size, if `batches` are arrays.

    Returns:
        A `Calibration`, which prints as a table.

    Raises:
        ValueError: If `model` is not as described, or if there are no batches.
    """
    _check_ready(model)
    named = scaled_layers(model)
    layers = [layer for _, layer in named]

    batches = batches_of(batches, batch_size)
    first = next(batches, None)
    if first is None:
        raise ValueError("`calibrate` expected at least one batch. Received: none.")
    seen: list[Snapshot] = []  # after each batch since the last overflow
    with _without_updates(model) as optimizer:
        for batch in itertools.chain([first], batches):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
            model.train_on_batch(x, y, sample_weight)
            seen = [] if optimizer.last_step_skipped else [*seen, Snapshot.of(layers, optimizer)]
            if settled := _is_settled(seen):
                break
        used, log2_loss_scale = optimizer.steps, round(math.log2(optimizer.loss_scale))
        log2_scales = [layer.log2_scale for layer in layers]

    if seen:  # otherwise every batch overflowed, and the scales mean nothing
        change_of_s = round(math.log2(model.optimizer.loss_scale)) - log2_loss_scale
        for layer, r in zip(layers, log2_scales, strict=True):
            layer.log2_scale = max(-MAX_LOG2_SCALE, min(r - change_of_s, MAX_LOG2_SCALE))
    found = _calibration(named, seen[-_STILL_BATCHES:], log2_loss_scale, settled, used)
    return dataclasses.replace(found, narrow_reductions=narrow_reductions(model))


def _is_settled(snapshots: list[Snapshot]) -> bool:
    if len(snapshots) <= _STILL_BATCHES:
        return False
    totals = np.array(
        [
            [snapshot.log2_loss_scale + each.log2_scale for each in snapshot.layers]
            for snapshot in snapshots[-_STILL_BATCHES - 1 :]
        ]
    )
    return bool(np.all(np.abs(totals - totals[-1]) <= _STILL_BINADES))


class _NoUpdates(keras.optimizers.Optimizer):
    """An optimizer that does not change weights."""

    def update_step(
        self, gradient: Tensor, variable: Tensor, learning_rate: keras.Variable
    ) -> None:
        pass


@contextlib.contextmanager
def _without_updates(model: keras.Model) -> Iterator[AdaptiveLossScaleOptimizer]:
    """Context manager in which training a model does not change it.

    Yields the `AdaptiveLossScaleOptimizer` that changes the scales in it.
    """
    optimizer, train_function = model.optimizer, model.train_function
    variables = [*model.variables, *model.metrics_variables]
    before = [(v, np.array(keras.ops.convert_to_numpy(v))) for v in variables]
    still = AdaptiveLossScaleOptimizer(
        _NoUpdates(0.0), initial_scale=optimizer.loss_scale, rule=optimizer.rule, sample_every=1
    )
    model.optimizer, model.train_function = still, None
    try:
        yield still
    finally:
        model.optimizer, model.train_function = optimizer, train_function
        for variable, value in before:
            variable.assign(value)
        if optimizer.built:
            optimizer.link_layers()


def _calibration(
    named: list[tuple[str, LayerScaling]],
    snapshots: list[Snapshot],
    log2_loss_scale: int,
    settled: bool,
    batches: int,
) -> Calibration:
    """The result, from what was seen in the last batches."""
    found = []
    for i, (name, layer) in enumerate(named):
        of_layer = [snapshot.layers[i] for snapshot in snapshots]
        found.append((name, layer, of_layer, _binades(of_layer)))
    most = [
        layer.float_format.max_exponent - binades[1] for _, layer, _, binades in found if binades
    ]
    one_scale = min(most, default=None)
    layers = []
    for name, layer, of_layer, binades in found:
        spectra = [each.spectrum for each in of_layer if each.spectrum.nonzero]
        shares = [each.underflow_share for each in spectra]
        subnormal = [each.subnormal_share for each in spectra]
        underflow = float(np.mean(shares)) if shares else 0.0
        lost = 0
        if binades and one_scale is not None:
            lowest = binades[0] + one_scale
            below = layer.float_format.min_exponent - lowest
            lost = min(max(below, 0), binades[1] - binades[0] + 1)
        layers.append(
            LayerRange(
                name,
                type(layer.layer).__name__,
                of_layer[-1].log2_sampled_at if of_layer else log2_loss_scale + layer.log2_scale,
                binades,
                underflow,
                float(np.mean(subnormal)) if subnormal else 0.0,
                layer.float_format.name,
                underflow <= _TAIL,
                lost,
            )
        )
    return Calibration(tuple(layers), log2_loss_scale, one_scale, settled, batches)


def _binades(of_layer: list[LayerSnapshot]) -> tuple[int, int] | None:
    """Lowest and highest binade of gradients seen at several scales, without the smallest 0.1 %."""
    lows, highs = [], []
    for each in of_layer:
        if each.spectrum.nonzero and each.peaks is not None:
            counts, float_format = each.spectrum.counts, each.spectrum.float_format
            tail = spectrum.quantile_exponent(counts[None], _TAIL, float_format)
            tops = spectrum.top_exponent(np.stack([counts, each.peaks.counts]), float_format)
            lows.append(int(tail[0]) - each.log2_sampled_at)
            highs.append(int(max(tops)) - each.log2_sampled_at)
    return (min(lows), max(highs)) if lows else None


def _check_ready(model: Any) -> None:
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(model, keras.Model):
        problem = "which is not a model."
    elif not isinstance(optimizer, AdaptiveLossScaleOptimizer):
        problem = f"compiled with {optimizer!r}. Compile it with that optimizer."
    elif not scaled_layers(model):
        problem = "which has none. Wrap it with `wrap_model`, or its layers with `LossScaled`."
    elif not model.built:
        problem = "which is not built yet. Call it on a batch of data first."
    else:
        return
    raise ValueError(
        "`calibrate` expected a built model with LossScaled layers, compiled with an "
        f"AdaptiveLossScaleOptimizer. Received: {model!r} (of type {type(model).__name__}), "
        f"{problem}"
    )
