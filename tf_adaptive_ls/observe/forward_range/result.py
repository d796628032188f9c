"""The result of `forward_range`."""

import dataclasses
import math
from typing import Any

from tf_adaptive_ls.backend.tables import Shown, Table
from tf_adaptive_ls.numerics.float_format import FloatFormat

# A larger relative error cannot come from rounding, which causes 3e-4 … 1e-3 in a part.
WRONG = 0.1

ENTRY, OUTPUT, INSIDE = "entry", "output", "inside"


@dataclasses.dataclass(frozen=True)
class PartRange:
    """The range of one part of a model: a layer, or an operation between layers.

    Attributes:
        name: Its path in the model.
        kind: Name of its class.
        float_format: Name of the dtype that it computes in.
        calls: Number of calls, over all batches.
        largest_in: Largest magnitude of its floating-point inputs, in float32.
        largest_out: Largest finite magnitude of its outputs, in float32.
        casts: Whether it casts its inputs to the dtype that it computes in.
        returns_narrow: Whether its outputs have a dtype with less range than float32. For a
            Functional model, its layers tell instead.
        error: Relative error of its own output, `norm(narrow - wide) / norm(wide)`, when it alone
            computes in its dtype. Infinite if the output is not finite. `None` if it was not run
            alone: because its dtype is not narrow, or because inputs or outputs overflow anyway.
        error_grown: The same at inputs that are up to `2**room` times as large.
        verdicts: Where it overflows, or would overflow at values `2**room` times as large: a tuple
            of "entry", "output" and "inside".
        problem: Why it could not be run alone. Empty if it could.
        multiplications: Number of multiplications by weights and in attention, in all calls. 0 for
            a part that is made of other parts.
    """

    name: str
    kind: str
    float_format: str
    calls: int
    largest_in: float
    largest_out: float
    casts: bool
    returns_narrow: bool
    error: float | None
    error_grown: float | None
    verdicts: tuple[str, ...]
    problem: str = ""
    multiplications: float = 0.0

    @property
    def room(self) -> float:
        """Number of binades by which inputs and outputs can grow before they overflow.

        Infinite if the dtype is not narrow, or if all values are zero.
        """
        if not FloatFormat(self.float_format).is_narrow:
            return math.inf
        largest_in = self.largest_in if self.casts else 0.0
        largest_out = self.largest_out if self.returns_narrow else 0.0
        return _room(self.float_format, max(largest_in, largest_out))

    def room_of_inputs(self, dtype: str) -> float:
        """Number of binades by which inputs can grow in another dtype, such as "float8_e4m3fn"."""
        return _room(dtype, self.largest_in)


@dataclasses.dataclass(frozen=True)
class ForwardRange(Shown):
    """How close each part of a model comes to overflow in the forward pass.

    Prints as a table of the parts whose dtype has less range than float32: parts with a verdict
    first, then by room. The columns "e4m3" and "e5m2" are the room of inputs if they were cast to
    these dtypes without a scale. Notebooks show the table as HTML.

    ```python
    result = als.forward_range(model, [x])
    print(result.flagged)
    ```

    Attributes:
        parts: A `PartRange` for each part that was called, in the order of the model.
        room: The number of binades that was asked for.
        finite: Whether the outputs of the model are finite in its own dtypes.
    """

    parts: tuple[PartRange, ...]
    room: float
    finite: bool

    @property
    def flagged(self) -> tuple[PartRange, ...]:
        """The parts with a verdict, those with the least room first."""
        return tuple(part for part in self._sorted() if part.verdicts)

    def _sorted(self) -> list[PartRange]:
        narrow = [part for part in self.parts if FloatFormat(part.float_format).is_narrow]
        return sorted(narrow, key=lambda part: (not part.verdicts, part.room))

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for JSON.

        `pandas.DataFrame` accepts the value of "parts".
        """
        return dataclasses.asdict(self)

    def _parts(self) -> list[str | Table]:
        parts = self._sorted()
        if not parts:
            return ["No part of this model computes in a dtype with less range than float32."]
        columns = {"part": "left", "class": "left", "dtype": "left", "largest in": "right"}
        columns |= {"out": "right", "room": "right", "error": "right", "verdict": "left"}
        columns |= {"e4m3": "right", "e5m2": "right"}
        return [Table(columns, list(map(_row, parts))), self._summary()]

    def _summary(self) -> str:
        number, times = len(self.flagged), f"{2**self.room:g} times as large"
        if not number:
            return f"Nothing overflows, nor would at values {times}."
        count = "1 part overflows" if number == 1 else f"{number} parts overflow"
        outputs = "finite" if self.finite else "not finite"
        return f"{count}, or would at values {times}. The model's outputs are {outputs}."


def _row(part: PartRange) -> tuple[str, ...]:
    errors = [error for error in (part.error, part.error_grown) if error is not None]
    return (
        part.name,
        part.kind,
        part.float_format,
        f"{part.largest_in:.3g}",
        f"{part.largest_out:.3g}",
        _binades(part.room),
        part.problem or (f"{max(errors):.1e}" if errors else ""),
        ", ".join(part.verdicts),
        _binades(part.room_of_inputs("float8_e4m3fn")),
        _binades(part.room_of_inputs("float8_e5m2")),
    )


def _binades(room: float) -> str:
    return "" if math.isinf(room) else f"{room:.1f}"


def _room(dtype: str, largest: float) -> float:
    if math.isinf(largest):
        return -math.inf
    return math.log2(FloatFormat(dtype).largest / largest) if largest else math.inf
