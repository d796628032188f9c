"""The lines of a record: the scales and gradients of all layers at a step.

It is a file of JSON lines. One of them starts each process that trains the model and
names its layers; each other one holds a `Snapshot`. Lines are only
added, and each is handed to the system at once, so that a process that is killed
leaves at most its last line unfinished. A start at an earlier step than the record
has reached, as after going back to a checkpoint, supersedes what comes after it.

Each line ends in the CRC-32 of what stands before it: one that is damaged is known, and
left out.
"""

import datetime
import json
import math
import os
import re
import warnings
import zlib
from typing import Any

import numpy as np

from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT
from tf_adaptive_ls.numerics.spectrum import Spectrum, rebinned
from tf_adaptive_ls.observe.record.float8 import formats_of
from tf_adaptive_ls.observe.record.float8 import line_of as float8_line_of
from tf_adaptive_ls.observe.record.snapshot import Snapshot
from tf_adaptive_ls.training.layer_scaling import LayerScaling

VERSION = 3
_START = b'{"tf_adaptive_ls":'
_SNAPSHOT = re.compile(rb'\{"step":(\d+),.*\}')
_OTHERS = re.compile(rb'\{"(?:loss_change|forward_rooms)":(\d+),.*\}')
_CRC = b',"crc32":'


def begins_like_one(content: bytes) -> bool:
    """Whether the bytes of a file, perhaps of an unfinished one, may be those of a record."""
    return content[: len(_START)] == _START[: len(content)]


def entries_in(
    content: bytes, path: str | os.PathLike[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a record holds.

    Args:
        content: The bytes of the file.
        path: Where it is, for messages.

    Returns:
        The last start, and what other lines say of it, in order: a dict, and a list of dicts.

    Raises:
        ValueError: If it is no record, of another version, or has no figures in it yet.
    """
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
        elif match := _SNAPSHOT.fullmatch(line) or _OTHERS.fullmatch(line):
            entries.append((int(match[1]), line))
    damage = f"{num_damaged} of its {len(lines)} lines are damaged"
    if start is None or not entries:
        raise ValueError(
            "Expected the record of a run with at least one snapshot. Received: "
            f"{str(path)!r}, which has none"
            + (f": {damage}." if num_damaged else " yet.")
            + " LossScaleMonitor writes one every `every` steps, and when `fit` ends."
        )
    if num_damaged:
        warnings.warn(f"Record '{path}': {damage} and left out.", stacklevel=3)
    return start, [json.loads(text) for _, text in entries]


def last_layers(content: bytes) -> list[str] | None:
    """The names of layers in the last whole start of a record, `None` if there is none."""
    starts = [line for line in content.split(b"\n") if line.startswith(_START)]
    whole = [line for line in starts if _is_whole(line)]
    return json.loads(whole[-1])["layers"] if whole else None


def _check_version(line: bytes, path: str | os.PathLike[str]) -> None:
    version = re.match(rb"\d+", line[len(_START) :])
    if version is not None and int(version[0]) != VERSION:
        raise ValueError(
            f"Expected the record of a run of version {VERSION}. Received: {str(path)!r}, of "
            f"version {int(version[0])}. Read it with the tf_adaptive_ls that wrote it."
        )


def line_of(values: dict[str, Any]) -> str:
    """The line that says a dict, with its checksum."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    crc = zlib.crc32(text.encode())
    return f"{text[:-1]}{_CRC.decode()}{crc}}}"


def _is_whole(line: bytes) -> bool:
    text, _, crc = line.rpartition(_CRC)
    return crc == b"%d}" % zlib.crc32(text + b"}")


def start_of(layers: list[tuple[str, LayerScaling]], step: int) -> dict[str, Any]:
    """What the first line of a process says, a dict. `layers` are pairs of a name and a layer."""
    return {
        "tf_adaptive_ls": VERSION,
        "step": step,
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "float_formats": [layer.float_format.name for _, layer in layers],
        "layers": [name for name, _ in layers],
        "classes": [type(layer.layer).__name__ for _, layer in layers],
        **formats_of([layer for _, layer in layers]),
    }


def entry_of_snapshot(snapshot: Snapshot, epoch: int, logs: dict[str, Any]) -> dict[str, Any]:
    """What a line says of a `Snapshot`, a dict."""
    layer_snapshots = snapshot.layers
    return {
        "step": snapshot.step,
        "epoch": epoch,
        "skipped_steps": snapshot.skipped_steps,
        "log2_loss_scale": snapshot.log2_loss_scale,
        "logs": {name: _number(value) for name, value in logs.items() if np.ndim(value) == 0},
        "log2_scales": [each.log2_scale for each in layer_snapshots],
        "log2_sampled_at": [each.log2_sampled_at for each in layer_snapshots],
        "overflows": [each.overflows for each in layer_snapshots],
        "underflow": [_number(each.spectrum.underflow_share) for each in layer_snapshots],
        "subnormal": [_number(each.spectrum.subnormal_share) for each in layer_snapshots],
        "spectra": [_counts(each.spectrum).astype(int).tolist() for each in layer_snapshots],
        **float8_line_of(layer_snapshots),
    }


def _counts(spectrum: Spectrum) -> np.ndarray:
    return rebinned(spectrum.counts, spectrum.float_format, COUNTING_FORMAT)


def _number(value: float) -> float | None:
    """A number as JSON knows them: `null` for what is not finite."""
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None
