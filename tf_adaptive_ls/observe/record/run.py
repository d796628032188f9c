"""`Run`: a record as arrays, from a file or of the current state of a model."""

import dataclasses
import os
from typing import Any

import keras
import numpy as np

from tf_adaptive_ls.backend.arguments import check_whole
from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT, FloatFormat
from tf_adaptive_ls.numerics.spectrum import Spectrum, num_bins, rebinned
from tf_adaptive_ls.observe.checks import check_path
from tf_adaptive_ls.observe.named_layers import scaled_layers
from tf_adaptive_ls.observe.record.float8 import Float8Record, float8_of, last_of_layer
from tf_adaptive_ls.observe.record.forward_rooms import ForwardRooms, forward_rooms_of
from tf_adaptive_ls.observe.record.lines import entries_in, entry_of_snapshot, start_of
from tf_adaptive_ls.observe.record.loss_changes import LossChanges, loss_changes_of
from tf_adaptive_ls.observe.record.snapshot import Snapshot
from tf_adaptive_ls.observe.scale_table import ScaleTable, float8_row, scaled_row
from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer
from tf_adaptive_ls.training.readings import LayerSnapshot


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The record of a run as arrays: N snapshots of L layers.

    Attributes:
        layers, layer_classes: Lists of L strings, as in `scale_table`.
        float_formats: List of L `FloatFormat`s.
        steps: `[N]`, number of steps so far, including skipped ones.
        skipped_steps: `[N]`, number of skipped steps so far.
        log2_loss_scale: `[N]`, log2(S).
        log2_scales: `[N, L]`, r of each layer.
        log2_sampled_at: `[N, L]`, log2 of the scale S * 2**r at the last sample.
        overflows: `[N, L]`, number of steps on which the layer made finite gradients non-finite.
        underflow: `[N, L]`, estimated share of gradients lost to underflow; NaN if none were seen.
        subnormal: `[N, L]`, share of subnormal gradients, likewise.
        spectra: `[N, L, bins]`, the last sample of gradients, counted in the binades of float16,
            see `Spectrum`.
        logs: Dict of arrays `[N]`: other logs of Keras. Metrics are means over the epoch so far.
            NaN where there was no finite value.
        loss_changes: `LossChanges`, if there was a `LossChangeMonitor`.
        float8: `Float8Record`, if layers compute in float8.
        forward_rooms: `ForwardRooms`, if the `LossScaleMonitor` was given a batch.
    """

    layers: list[str]
    layer_classes: list[str]
    float_formats: list[FloatFormat]
    steps: np.ndarray
    skipped_steps: np.ndarray
    log2_loss_scale: np.ndarray
    log2_scales: np.ndarray
    log2_sampled_at: np.ndarray
    overflows: np.ndarray
    underflow: np.ndarray
    subnormal: np.ndarray
    spectra: np.ndarray
    logs: dict[str, np.ndarray]
    loss_changes: LossChanges | None = None
    float8: Float8Record | None = None
    forward_rooms: ForwardRooms | None = None

    def table(self) -> ScaleTable:
        """The `scale_table` of the scaled layers at the last snapshot. Empty if there is none."""
        if not len(self.steps):
            return ScaleTable([])
        rows = []
        for i, (name, kind) in enumerate(zip(self.layers, self.layer_classes, strict=True)):
            float_format = self.float_formats[i]
            counts = rebinned(self.spectra[-1, i], COUNTING_FORMAT, float_format)
            spectrum = Spectrum(counts, float_format)
            layer_snapshot = LayerSnapshot(
                int(self.log2_scales[-1, i]),
                int(self.log2_sampled_at[-1, i]),
                int(self.overflows[-1, i]),
                spectrum,
                peaks=None,
                **last_of_layer(self.float8, i),
            )
            row = scaled_row(name, kind, layer_snapshot, int(self.log2_loss_scale[-1]))
            if self.float8 is not None:
                formats = (self.float8.forward[i], self.float8.backward[i])
                row = float8_row(row, formats, layer_snapshot)
            rows.append(row)
        return ScaleTable(rows)


def snapshot_run(model: keras.Model, optimizer: AdaptiveLossScaleOptimizer | None = None) -> Run:
    """Takes one snapshot of a model now, as a `Run`.

    ```python
    run = als.snapshot_run(model, optimizer)
    print(run.log2_scales)
    ```

    Args:
        model: A model with scaled layers.
        optimizer: Its `AdaptiveLossScaleOptimizer`. Defaults to the one that the model was compiled
            with.

    Raises:
        ValueError: If `model` or `optimizer` is not as described.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a model. Received: model={model!r} (of type {type(model).__name__})."
        )
    optimizer = getattr(model, "optimizer", None) if optimizer is None else optimizer
    if not isinstance(optimizer, AdaptiveLossScaleOptimizer):
        raise ValueError(
            "Expected a model compiled with an AdaptiveLossScaleOptimizer, or that optimizer. "
            f"Received: {optimizer!r} for model '{model.name}'."
        )
    layers = scaled_layers(model)
    snapshot = Snapshot.of([layer for _, layer in layers], optimizer)
    start, entry = start_of(layers, snapshot.step), entry_of_snapshot(snapshot, 0, {})
    return _run(start, [entry])


def load_run(path: str | os.PathLike[str], max_snapshots: int | None = None) -> Run:
    """Reads the record that a `LossScaleMonitor` has written.

    ```python
    model.compile(optimizer, loss=loss_fn)
    model.fit(x, y, verbose=0, callbacks=[als.LossScaleMonitor("run.jsonl", every=1)])
    run = als.load_run("run.jsonl")
    print(run.steps, run.log2_scales)
    ```

    Args:
        path: The file.
        max_snapshots: Int. If there are more snapshots, this many are loaded, evenly spaced, with
            the first and the last. Counts of skipped steps and of overflows still add up. Default:
            all.

    Returns:
        A `Run`. Damaged lines are left out, with a warning.

    Raises:
        OSError: If there is no such file.
        ValueError: If the file is not a record, is of another version, or has no snapshot yet; if
            an argument is not as described.
    """
    check_path("path", path)
    if max_snapshots is not None:
        check_whole("max_snapshots", max_snapshots)
    with open(path, "rb") as file:
        start, records = entries_in(file.read(), path)
    snapshots = [record for record in records if "step" in record]
    if max_snapshots is not None and len(snapshots) > max_snapshots:
        places = np.linspace(0, len(snapshots) - 1, max_snapshots).round().astype(int)
        snapshots = [snapshots[place] for place in places]
    return dataclasses.replace(
        _run(start, snapshots),
        loss_changes=loss_changes_of([each for each in records if "loss_change" in each]),
        forward_rooms=forward_rooms_of([each for each in records if "forward_rooms" in each]),
    )


def _run(start: dict[str, Any], snapshots: list[dict[str, Any]]) -> Run:
    def array(name: str) -> np.ndarray:
        return np.array([snapshot[name] for snapshot in snapshots], "float64")

    def per_layer(name: str, *shape: int) -> np.ndarray:
        values = np.array([snapshot[name] for snapshot in snapshots], "float32")
        return values.reshape(len(snapshots), len(start["layers"]), *shape)

    names = {name: None for snapshot in snapshots for name in snapshot["logs"]}
    return Run(
        layers=start["layers"],
        layer_classes=start["classes"],
        float_formats=[FloatFormat(name) for name in start["float_formats"]],
        steps=array("step").astype(int),
        skipped_steps=array("skipped_steps").astype(int),
        log2_loss_scale=array("log2_loss_scale").astype(int),
        log2_scales=per_layer("log2_scales").astype(int),
        log2_sampled_at=per_layer("log2_sampled_at").astype(int),
        overflows=per_layer("overflows").astype(int),
        underflow=per_layer("underflow"),
        subnormal=per_layer("subnormal"),
        spectra=per_layer("spectra", num_bins(COUNTING_FORMAT)),
        logs={
            name: np.array([snapshot["logs"].get(name) for snapshot in snapshots], "float64")
            for name in names
        },
        float8=float8_of(start, snapshots),
    )
