"""`RoomWatch`: measures the room of the forward pass during training."""

import collections
import contextlib
import math
import warnings
from typing import Any, TypeAlias

import keras
import numpy as np

from tf_adaptive_ls.numerics.float_format import is_narrow_dtype
from tf_adaptive_ls.observe.forward_range.compiled_pass import CompiledPass
from tf_adaptive_ls.observe.forward_range.ranges import ranges_of
from tf_adaptive_ls.observe.forward_range.result import INSIDE, PartRange

# In binades. `RoomWatch` warns about a part that has a verdict for the first, as `forward_range`
# does by default, or whose room fell to the second, by at least the third.
_ROOM, _LOW, _FALLEN = 2, 4, 1
# It also warns if the room falls at a rate that would use it up within this many more records. A
# longer forecast is no use, because values that start at zero grow fast.
_RECORDS, _AHEAD, _NEAR = 5, 10, 10
# The fourth power of smaller values does not overflow.
_SMALL = 14

_MOST_NAMED = 5

# The last records of a part: pairs of a step and the room.
_Recent: TypeAlias = "collections.deque[tuple[int, float]]"


class RoomWatch:
    """Measures the room of all parts of a model on one batch, and warns when it runs out.

    One look is a compiled forward pass in float32 that computes maxima. To find overflows inside of
    parts, it also runs parts by themselves: at the first look, and whenever the values of a part
    have doubled since.

    Args:
        model: The model.
        x: One batch of inputs.

    Attributes:
        least: The least room of any part at the last look, in binades. Infinite if no part computes
            in a dtype with less range than float32.
    """

    def __init__(self, model: keras.Model, x: Any) -> None:
        self._model, self._x = model, x
        self._pass = CompiledPass(model, x)
        self._first: dict[str, float] = {}
        self._recent: dict[str, _Recent] = {}
        self._at_own_runs: dict[str, float] = {}
        self._told: set[str] = set()
        self.least = math.inf

    def look(self, step: int) -> dict[str, float]:
        """Measures the room, and warns about parts that were not warned about before.

        Args:
            step: Number of steps so far.

        Returns:
            Dict of the room, in binades, of each part that computes in a dtype with less range than
            float32.

        Raises:
            ValueError: At the first look, if the outputs of the model are not finite in float32.
        """
        parts = [part for part in self._pass.ranges(_ROOM) if is_narrow_dtype(part.float_format)]
        rooms = {part.name: part.room for part in parts}
        self.least = min(rooms.values(), default=math.inf)
        for part in parts:
            self._first.setdefault(part.name, part.room)
            recent = self._recent.setdefault(part.name, collections.deque(maxlen=_RECORDS))
            recent.append((step, part.room))
        inside = self._overflow_inside(rooms)
        parts.sort(key=lambda part: part.room)
        reasons = {part.name: self._reason(part, inside) for part in parts}
        self._warn(step, {name: reason for name, reason in reasons.items() if reason})
        return rooms

    def _overflow_inside(self, rooms: dict[str, float]) -> set[str]:
        """Names of parts that overflow inside, or nearly. Empty if it is not time to look."""
        lowest = self._at_own_runs
        if lowest and not any(
            room < min(_SMALL, lowest.get(name, math.inf) - 1) for name, room in rooms.items()
        ):
            return set()
        self._at_own_runs = {
            name: min(room, lowest.get(name, math.inf)) for name, room in rooms.items()
        }
        # A part that is not finite in float32 either is an error at the first look only.
        with contextlib.suppress(*[ValueError] if lowest else []):
            found = ranges_of(self._model, [self._x], _ROOM, training=True)
            return {part.name for part in found.parts if INSIDE in part.verdicts}
        return set()

    def _reason(self, part: PartRange, inside: set[str]) -> str:
        """Why to warn about a part, or an empty string."""
        recent = self._recent[part.name]
        lost, steps = recent[0][1] - part.room, recent[-1][0] - recent[0][0]
        falls = f", {lost:.1f} less than {steps} steps before" if lost >= _FALLEN else ""
        left = f"has {part.room:.1f} binades left in {part.float_format}{falls}"
        fallen = self._first[part.name] - part.room
        if part.verdicts or (part.room < _LOW and fallen >= _FALLEN):
            return left
        if part.name in inside:
            return "overflows in what it computes in between, or would at values 4 times as large"
        at = _step_of_overflow(recent)
        return "" if at is None else f"{left}: going on like that it overflows at step {at:.0f}"

    def _warn(self, step: int, reasons: dict[str, str]) -> None:
        new = {name: reason for name, reason in reasons.items() if name not in self._told}
        self._told |= new.keys()
        if not new:
            return
        lines = [f"'{name}' {reason}" for name, reason in new.items()]
        if len(lines) > _MOST_NAMED:
            lines[_MOST_NAMED:] = [f"and {len(lines) - _MOST_NAMED} more"]
        warnings.warn(
            f"At step {step} the forward pass is close to overflow. No loss scale can help.\n  "
            + "\n  ".join(lines)
            + "\n`tf_adaptive_ls.widen(model, batches)` makes these parts compute in float32. If "
            "values keep growing, lower the learning rate.",
            stacklevel=2,
        )


def _step_of_overflow(recent: _Recent) -> float | None:
    """The step at which the trend of the last records leads to overflow, if it is near."""
    steps, rooms = np.array(recent).T
    if len(recent) < _RECORDS or not np.isfinite(rooms).all() or rooms[-1] > _NEAR:
        return None
    # A decline that slows down will stop: the last two records must lead to overflow, too.
    slope = max(np.polyfit(steps, rooms, 1)[0], np.polyfit(steps[-2:], rooms[-2:], 1)[0])
    ahead = _AHEAD * (steps[-1] - steps[0]) / (_RECORDS - 1)
    if slope >= 0 or rooms[-1] + slope * ahead > 0:
        return None
    return float(steps[-1] - rooms[-1] / slope)
