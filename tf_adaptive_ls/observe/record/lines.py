"""The lines of a record: the scales and gradients of all layers, step by step.

A record is a file of JSON lines. Each process that trains the model begins with a line that
names the layers. Each further line holds a `Snapshot`. Lines are only appended, each with one
write, so that a killed process leaves at most an unfinished last line. If a process starts at
an earlier step than the record has reached, for instance from a checkpoint, it supersedes the
lines after that step.

Each line ends with the CRC-32 of the text before it. Damaged lines are thereby detected, and
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
    """Whether the bytes of a file, which may be unfinished, can be the start of a record."""
    return content[: len(_START)] == _START[: len(content)]


def entries_in(
    content: bytes, path: str | os.PathLike[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads a record.

    Args:
        content: The bytes of the file.
        path: The path of the file, for messages.

    Returns:
        The last start, a dict, and the list of the other entries, dicts, in order.

    Raises:
        ValueError: If it is not a record, is of another version, or has no entries yet.
    """
    if not content.startswith(_START):
        raise ValueError(
            "Expected the record of a run, as `LossScaleMonitor(path)` writes it. "
            f"Received: {str(path)!r}, which does not begin like one."
        )
    *lines, _ = content.split(b"\n")  # the last line is unfinished, or empty
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
    """The names of layers in the last complete start of a record, or `None`."""
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
    """The line of a dict, with its checksum."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    crc = zlib.crc32(text.encode())
    return f"{text[:-1]}{_CRC.decode()}{crc}}}"


def _is_whole(line: bytes) -> bool:
    text, _, crc = line.rpartition(_CRC)
    return crc == b"%d}" % zlib.crc32(text + b"}")


def start_of(layers: list[tuple[str, LayerScaling]], step: int) -> dict[str, Any]:
    """The dict for the first line of a process. `layers` are pairs of a name and a layer."""
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
    """The dict for the line of a `Snapshot`."""
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
    """A number for JSON: `null` if it is not finite."""
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None
