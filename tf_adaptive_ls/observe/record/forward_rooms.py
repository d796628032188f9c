"""The part of a record about the room of the forward pass."""

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardRooms:
    """The distance of the forward pass from overflow, during a run.

    Arrays of N records and P parts: layers at any depth, and operations between layers, whose dtype
    has less range than float32.

    Attributes:
        parts: List of P names, as in `forward_range`.
        steps: `[N]`, number of steps so far, including skipped ones.
        rooms: `[N, P]`, number of binades by which inputs and outputs of each part could have grown
            on the batch of the monitor. Negative if they overflow. NaN where all values were zero.
    """

    parts: list[str]
    steps: np.ndarray
    rooms: np.ndarray

    @property
    def least(self) -> np.ndarray:
        """`[N]`, the least room of any part."""
        known = np.where(np.isnan(self.rooms), np.inf, self.rooms)
        return np.asarray(known.min(axis=1, initial=np.inf))


def entry_of_forward_rooms(step: int, epoch: int, rooms: dict[str, float]) -> dict[str, Any]:
    """A dict for JSON. The arguments are those of `RunWriter.add_forward_rooms`."""
    return {
        "forward_rooms": step,
        "epoch": epoch,
        "parts": {name: _number(room) for name, room in rooms.items()},
    }


def forward_rooms_of(lines: list[dict[str, Any]]) -> ForwardRooms | None:
    """The `ForwardRooms` of a list of entries. `None` if the list is empty."""
    if not lines:
        return None
    # In the order of the last entry, because parts may have been widened in between.
    parts = list(dict.fromkeys(name for line in reversed(lines) for name in line["parts"]))
    rooms = [[line["parts"].get(name) for name in parts] for line in lines]
    return ForwardRooms(
        parts=parts,
        steps=np.array([line["forward_rooms"] for line in lines]),
        rooms=np.array(rooms, "float64").reshape(len(lines), len(parts)),
    )


def _number(room: float) -> float | None:
    """A number for JSON: `null` if all values were zero. Values beyond float32 are clipped."""
    if room == math.inf:
        return None
    return float(f"{max(room, -128.0):.4g}")
