"""The record of a training run: what every layer's gradients did, and when.

It is a file of JSON lines. One of them starts each process that trains the model and
names its layers; each other one holds a `Snapshot`. Lines are only
added, and each is handed to the system at once, so that a process that is killed
leaves at most its last line unfinished. A start at an earlier step than the record
has reached, as after going back to a checkpoint, supersedes what comes after it.

Each line ends in the CRC-32 of what stands before it: one that is damaged is known, and
left out.
"""

import dataclasses
import datetime
import json
import math
import os
import re
import warnings
import weakref
import zlib

import keras
import numpy as np

from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT, FloatFormat
from tf_adaptive_ls.numerics.spectrum import Spectrum, num_bins, rebinned
from tf_adaptive_ls.observe.exclusive_file import ExclusiveFile
from tf_adaptive_ls.observe.float8_record import (
    Float8Record,
    float8_of,
    formats_of,
    last_of_layer,
)
from tf_adaptive_ls.observe.float8_record import line_of as float8_line_of
from tf_adaptive_ls.observe.loss_change_record import LossChanges, line_of, loss_changes_of
from tf_adaptive_ls.observe.named_layers import scaled_layers
from tf_adaptive_ls.observe.scale_table import ScaleTable, float8_row, scaled_row
from tf_adaptive_ls.observe.snapshot import Snapshot
from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer
from tf_adaptive_ls.training.readings import LayerSnapshot

VERSION = 3
_START = b'{"tf_adaptive_ls":'
_SNAPSHOT = re.compile(rb'\{"step":(\d+),.*\}')
_LOSS_CHANGE = re.compile(rb'\{"loss_change":(\d+),.*\}')
_CRC = b',"crc32":'


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The record of a run as arrays: N snapshots of L layers.

    Attributes:
        layers, layer_classes: Lists of L strings, as in `scale_table`.
        float_formats: List of L, the `FloatFormat` of each layer.
        steps: `[N]`, how many steps had been taken or skipped.
        skipped_steps: `[N]`, how many of them were skipped.
        log2_loss_scale: `[N]`, log2(S).
        log2_scales: `[N, L]`, each layer's r.
        log2_sampled_at: `[N, L]`, log2 of the scale S * 2**r at the last sample.
        overflows: `[N, L]`, on how many steps the layer had made finite gradients
            non-finite.
        underflow: `[N, L]`, estimated share of gradients lost to underflow; NaN for
            none seen.
        subnormal: `[N, L]`, share of gradients without full precision, likewise.
        spectra: `[N, L, bins]`, the last sample of gradients, counted in the binades of
            float16, see `Spectrum`.
        logs: Dict of arrays `[N]`: what else Keras logged. Its metrics are means over
            the epoch so far. NaN where there was no finite value.
        loss_changes: `LossChanges`, if there was a `LossChangeMonitor`.
        float8: `Float8Record`, if layers compute in float8.
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

    def table(self) -> ScaleTable:
        """`scale_table` of the last snapshot, of the scaled layers; empty if there is none."""
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
    """The `Run` of a single `Snapshot`, taken now.

    Args:
        model: A model with `LossScaled` layers.
        optimizer: Its `AdaptiveLossScaleOptimizer`, if it was not compiled with that.

    Raises:
        ValueError: If `model` or `optimizer` is not as said.
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
    start = json.loads(_start_line(layers, snapshot.step))
    return _run(start, [json.loads(_snapshot_line(snapshot, 0, {}))], [])


def load_run(path: str | os.PathLike[str], max_snapshots: int | None = None) -> Run:
    """Reads the record of a run that a `LossScaleMonitor` has written.

    Args:
        path: The file.
        max_snapshots: Int. If there are more than this, so many of them, evenly
            spread, with the first and the last. Counts of steps skipped and of
            overflows add up all the same. Defaults to all.

    Returns:
        A `Run`. If lines are damaged it is that of the others, with a warning.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is none of these records, of another version, or has no
            snapshot in it yet; if an argument is not as said.
    """
    check_path("path", path)
    whole = isinstance(max_snapshots, int) and not isinstance(max_snapshots, bool)
    if max_snapshots is not None and not (whole and max_snapshots > 0):
        raise ValueError(
            "Expected `max_snapshots` to be a whole number, at least 1. Received: "
            f"max_snapshots={max_snapshots!r}."
        )
    with open(path, "rb") as file:
        content = file.read()
    if not content.startswith(_START):
        raise ValueError(
            "Expected the record of a run, as `LossScaleMonitor(path)` writes it. "
            f"Received: {str(path)!r}, which does not begin like one."
        )
    *lines, _ = content.split(b"\n")  # the last is unfinished, or empty
    start = None
    entries: list[tuple[int, bytes]] = []
    num_damaged = 0
    for line in lines:
        if line.startswith(_START):
            _check_version(line, path)
        if not _is_whole(line):
            num_damaged += 1
        elif line.startswith(_START):
            new_start = json.loads(line)
            if start is None or new_start["layers"] != start["layers"]:
                entries = []
            entries = [(step, text) for step, text in entries if step <= new_start["step"]]
            start = new_start
        elif match := _SNAPSHOT.fullmatch(line) or _LOSS_CHANGE.fullmatch(line):
            entries.append((int(match[1]), line))
    damage = f"{num_damaged} of its {len(lines)} lines are damaged"
    if start is None or not entries:
        raise ValueError(
            "Expected the record of a run with figures in it. Received: "
            f"{str(path)!r}, which has none"
            + (f": {damage}." if num_damaged else " yet.")
            + " They come every so many steps, and when `fit` ends."
        )
    if num_damaged:
        warnings.warn(f"Of the record '{path}' {damage} and left out.", stacklevel=2)
    records = [json.loads(text) for _, text in entries]
    snapshots = [record for record in records if "step" in record]
    if max_snapshots is not None and len(snapshots) > max_snapshots:
        places = np.linspace(0, len(snapshots) - 1, max_snapshots).round().astype(int)
        snapshots = [snapshots[place] for place in places]
    return _run(start, snapshots, [record for record in records if "loss_change" in record])


def check_path(name, path):
    """Raises a `ValueError` if `path` is none."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ValueError(f"Expected `{name}` to be the path of a file. Received: {name}={path!r}.")


class RunWriter:
    """Appends to the record of a run.

    Callbacks of one `fit` share a writer, see `shared`.

    Args:
        path: The file; made if there is none, with its directory.
        layers: Pairs of a name and a `LossScaled` layer.
        step: How many steps had been taken or skipped before.

    Raises:
        OSError: If the file cannot be written, now or later: `BlockingIOError` if another
            process writes it, `FileExistsError` if it is the record of another model.
        ValueError: If it exists and is something else.
    """

    def __init__(self, path, layers, step):
        self.path = path
        self._file = ExclusiveFile(path)
        content = self._file.read()
        if content[: len(_START)] != _START[: len(content)]:
            self._file.close()
            raise ValueError(
                "Expected the path of a new file, or of the record of a run to append to. "
                f"Received: '{path}', which is something else."
            )
        names = [name for name, _ in layers]
        self._begun_with, self._num_users = (names, step), 1
        names_before = _last_layers(content)
        if names_before is not None and names_before != names:
            self._file.close()
            raise FileExistsError(
                f"it is the record of another model, with {len(names_before)} layers "
                f"({', '.join(names_before[:3])}, …) instead of {len(names)} "
                f"({', '.join(names[:3])}, …)"
            )
        self._file.drop_unfinished()
        self._file.add(_start_line(layers, step))

    @classmethod
    def shared(cls, path, layers, step):
        """The writer that can be joined, or a new one."""
        key = os.path.realpath(path)
        writer = _writers.get(key)
        if writer is None or not writer.join(layers, step):
            _writers[key] = writer = cls(path, layers, step)
        return writer

    def join(self, layers, step):
        """Whether it was begun with the same arguments and is not closed: then one more uses it."""
        joined = bool(self._num_users) and self._begun_with == (
            [name for name, _ in layers],
            step,
        )
        self._num_users += joined
        return joined

    def add(self, snapshot, epoch, logs):
        """Adds a `Snapshot`, with the epoch and what Keras has logged."""
        self._file.add(_snapshot_line(snapshot, epoch, logs))

    def add_loss_change(self, step, since, epoch, allocation, as_trained):
        """Adds the `Allocation` of a path from one step to another, and that as trained."""
        self._file.add(_line(line_of(step, since, epoch, allocation, as_trained)))

    def close(self):
        """Lets others write the file, once all who share it have said so."""
        self._num_users -= 1
        if not self._num_users:
            self._file.close()


_writers: weakref.WeakValueDictionary[str, RunWriter] = weakref.WeakValueDictionary()


def _last_layers(content):
    """The names of layers in the last whole start of a record, `None` if there is none."""
    starts = [line for line in content.split(b"\n") if line.startswith(_START)]
    whole = [line for line in starts if _is_whole(line)]
    return json.loads(whole[-1])["layers"] if whole else None


def _check_version(line, path):
    version = re.match(rb"\d+", line[len(_START) :])
    if version is not None and int(version[0]) != VERSION:
        raise ValueError(
            f"Expected the record of a run of version {VERSION}. Received: {str(path)!r}, of "
            f"version {int(version[0])}. Read it with the tf_adaptive_ls that wrote it."
        )


def _line(values):
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    crc = zlib.crc32(text.encode())
    return f"{text[:-1]}{_CRC.decode()}{crc}}}"


def _is_whole(line):
    text, _, crc = line.rpartition(_CRC)
    return crc == b"%d}" % zlib.crc32(text + b"}")


def _start_line(layers, step):
    start = {
        "tf_adaptive_ls": VERSION,
        "step": step,
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "float_formats": [layer.float_format.name for _, layer in layers],
        "layers": [name for name, _ in layers],
        "classes": [type(layer.layer).__name__ for _, layer in layers],
        **formats_of([layer for _, layer in layers]),
    }
    return _line(start)


def _snapshot_line(snapshot, epoch, logs):
    layer_snapshots = snapshot.layers
    line = {
        "step": snapshot.step,
        "epoch": epoch,
        "skipped_steps": snapshot.skipped_steps,
        "log2_loss_scale": snapshot.log2_loss_scale,
        "logs": {name: _number(value) for name, value in logs.items() if np.ndim(value) == 0},
        "log2_scales": [r.log2_scale for r in layer_snapshots],
        "log2_sampled_at": [r.log2_sampled_at for r in layer_snapshots],
        "overflows": [r.overflows for r in layer_snapshots],
        "underflow": [_number(r.spectrum.underflow_share) for r in layer_snapshots],
        "subnormal": [_number(r.spectrum.subnormal_share) for r in layer_snapshots],
        "spectra": [_counts(r.spectrum).astype(int).tolist() for r in layer_snapshots],
        **float8_line_of(layer_snapshots),
    }
    return _line(line)


def _counts(spectrum):
    return rebinned(spectrum.counts, spectrum.float_format, COUNTING_FORMAT)


def _number(value):
    """A number as JSON knows them: `null` for what is not finite."""
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _run(start, snapshots, loss_changes):
    def array(name):
        return np.array([snapshot[name] for snapshot in snapshots], "float64")

    def per_layer(name, *shape):
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
        loss_changes=loss_changes_of(loss_changes),
        float8=float8_of(start, snapshots),
    )
