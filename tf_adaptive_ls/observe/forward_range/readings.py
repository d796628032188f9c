"""`Reading`: what was seen of one part of a model so far, and its verdicts."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.float_format import FloatFormat, is_narrow_dtype, narrowest
from tf_adaptive_ls.observe.forward_range.parts import Part
from tf_adaptive_ls.observe.forward_range.result import (
    ENTRY,
    INSIDE,
    OUTPUT,
    WRONG,
    PartRange,
)


class Magnitudes(NamedTuple):
    """The magnitudes of several tensors.

    Attributes:
        largest: The largest finite magnitude.
        finite: Whether all numbers are finite.
    """

    largest: float
    finite: bool


class Reading:
    """What was seen of a part so far.

    Args:
        part: The `Part`.

    Attributes:
        dtype: Its compute dtype. That of an operation between layers is known after its first call.
        dtypes: For each call, a list of the dtypes of its inputs in the unchanged model.
        returns_narrow: Whether it has returned a narrow dtype.
        multiplications: Number of multiplications in all calls.
        errors: List of relative errors of its own output.
        errors_grown: List of these errors with enlarged inputs.
        problem: Why it could not be run by itself. Empty if it could.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.policies = [(layer, layer.dtype_policy) for layer in part.inside]
        self.dtype = part.dtype
        self.dtypes: list[list[str]] = []
        self.returns_narrow = False
        self.forget()

    def forget(self) -> None:
        """Forgets all values, but not the dtypes."""
        self.calls, self.multiplications = 0, 0.0
        self.largest_in = self.largest_out = 0.0
        self.errors: list[float] = []
        self.errors_grown: list[float] = []
        self.problem = ""

    @property
    def is_narrow(self) -> bool:
        return self.dtype is not None and is_narrow_dtype(self.dtype)

    @property
    def casts(self) -> bool:
        """Whether it casts its inputs to a narrow dtype."""
        part = self.part
        if not part.casts or self.dtype is None:
            return False
        own = self.dtype if part.is_graph else str(part.operation.compute_dtype)
        return is_narrow_dtype(own)

    @property
    def limit(self) -> float:
        return FloatFormat(self.dtype or "float32").largest

    def add_dtypes(self, inputs: list[str], outputs: list[str]) -> None:
        """Records the dtypes of a call in the unchanged model."""
        self.dtypes.append(inputs)
        if self.part.dtype is None:
            self.dtype = narrowest(inputs).name if _are_narrow(inputs) else "float32"
        self.returns_narrow = self.returns_narrow or any(map(is_narrow_dtype, outputs))

    def add(
        self, inputs: Magnitudes, outputs: Magnitudes, dtypes_out: list[str]
    ) -> tuple[bool, bool]:
        """Records the values of a call in float32.

        Returns:
            Whether the part turned finite inputs into non-finite outputs; and whether its dtype can
            hold all of its inputs and outputs.
        """
        largest_out = outputs.largest
        makes_nonfinite = inputs.finite and not outputs.finite
        written = list(filter(is_narrow_dtype, dtypes_out))
        if makes_nonfinite and written and not self.part.is_graph:
            # It casts, whatever its policy is.
            self.dtype, self.returns_narrow = narrowest(written).name, True
            largest_out = math.inf
        self.calls += 1
        self.largest_in = max(self.largest_in, inputs.largest)
        self.largest_out = max(self.largest_out, largest_out)
        return makes_nonfinite, max(inputs.largest, largest_out) <= self.limit

    def result(self, room: float) -> PartRange:
        """The `PartRange`, with verdicts for `room` binades."""
        part, bound = self.part, self.limit / 2**room
        # The outputs of a graph are reported for the parts inside of it.
        returns_narrow = self.returns_narrow and not part.is_graph
        errors = [*self.errors, *self.errors_grown]
        found = {
            ENTRY: self.casts and self.largest_in > bound,
            OUTPUT: returns_narrow and self.largest_out > bound,
            INSIDE: any(error > WRONG for error in errors),
        }
        return PartRange(
            part.name,
            type(part.operation).__name__,
            self.dtype or "float32",
            self.calls,
            self.largest_in,
            self.largest_out,
            self.casts,
            returns_narrow,
            max(self.errors, default=None),
            max(self.errors_grown, default=None),
            tuple(verdict for verdict, yes in found.items() if yes and self.is_narrow),
            self.problem,
            self.multiplications,
        )


def magnitudes(tensors: Sequence[Tensor]) -> Magnitudes:
    """The `Magnitudes` of concrete tensors."""
    largest, all_finite = 0.0, True
    for array in arrays_of(tensors):
        finite = np.isfinite(array)
        all_finite = all_finite and bool(finite.all())
        largest = max(largest, float(np.max(np.abs(array), initial=0.0, where=finite)))
    return Magnitudes(largest, all_finite)


def arrays_of(tensors: Sequence[Tensor]) -> Iterator[np.ndarray]:
    """The floating-point tensors among `tensors`, as float32 arrays."""
    for tensor in floats_of(tensors):
        yield np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))


def floats_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if keras.backend.is_float_dtype(dtype_of(tensor))]


def dtype_of(tensor: Tensor) -> str:
    return str(keras.backend.standardize_dtype(tensor.dtype))


def _are_narrow(dtypes: Sequence[str]) -> bool:
    """Whether a computation with inputs of these dtypes has a narrow result."""
    floats = [dtype for dtype in dtypes if keras.backend.is_float_dtype(dtype)]
    return bool(floats) and is_narrow_dtype(keras.backend.result_type(*floats))
