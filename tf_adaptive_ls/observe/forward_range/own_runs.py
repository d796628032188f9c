"""`OwnRuns`: runs each part of a model by itself, in its own dtype."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls.backend import keras_internals
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.float_format import FloatFormat, is_narrow_dtype
from tf_adaptive_ls.observe.forward_range.multiplications import multiplications_of
from tf_adaptive_ls.observe.forward_range.part_calls import PartCalls, straight_on
from tf_adaptive_ls.observe.forward_range.readings import (
    Reading,
    arrays_of,
    dtype_of,
    magnitudes,
)
from tf_adaptive_ls.observe.forward_range.result import WRONG, PartRange
from tf_adaptive_ls.training.call_tensors import CallTensors


class OwnRuns:
    """Reads the ranges of all parts of a model while it runs, and runs each part by itself.

    Args:
        model: The model.
        room: Number of binades by which inputs are enlarged.
        only: Name of the only part to run by itself. `None` for all.

    Attributes:
        first_nonfinite: Name of the first part that returned Inf or NaN in float32 for finite
            inputs. Empty if there was none.
        finite_as_built: Whether all outputs of the unchanged model were finite.
    """

    def __init__(self, model: keras.Model, room: float, only: str | None = None) -> None:
        self.calls = PartCalls(model)
        self._room, self._only = room, only
        self._number_of_call: dict[int, int] = {}
        self.first_nonfinite = ""
        self.finite_as_built = True

    def read_batch(self, x: Any, training: bool) -> Any:
        """Reads the parts on one batch. Returns the outputs of the model, computed in float32."""
        self._number_of_call = {}
        with (
            self.calls.seen(),
            # a tensor that is not computed from inputs
            np.errstate(over="ignore", invalid="ignore"),
        ):
            outputs = CallTensors(self.calls.as_built(x, training)).tensors
            self.finite_as_built = self.finite_as_built and magnitudes(outputs).finite
            return self.calls.in_float32(self._read, x, training)

    def ranges(self) -> list[PartRange]:
        """A `PartRange` for each part that was called."""
        return [reading.result(self._room) for reading in self.calls.readings if reading.calls]

    def _read(self, reading: Reading, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inputs = CallTensors((args, kwargs)).tensors
        if not self.calls.are_outside_loops(inputs):
            return original(*args, **kwargs)
        part = reading.part
        number = self._number_of_call.get(id(reading), 0)
        self._number_of_call[id(reading)] = number + 1
        variables = [v for layer in part.inside[:1] for v in layer.variables]
        values = [(v, v.value) for v in variables]
        outputs = original(*args, **kwargs)
        returned = CallTensors(outputs).tensors
        of_inputs = magnitudes(inputs)
        makes_nonfinite, fits = reading.add(
            of_inputs, magnitudes(returned), list(map(dtype_of, returned))
        )
        if not part.is_open:
            reading.multiplications += multiplications_of(part.operation, inputs, returned)
        if makes_nonfinite:
            self.first_nonfinite = self.first_nonfinite or part.name
        known = number < len(reading.dtypes) and len(reading.dtypes[number]) == len(inputs)
        runs = part.runs_alone and self._only in (None, part.name)
        if reading.is_narrow and fits and known and runs:
            own_run = _OwnRun(self, reading, original, values, reading.dtypes[number])
            try:
                self._measure(reading, own_run, args, kwargs, of_inputs.largest)
            except Exception as error:  # a layer may raise anything
                reading.problem = f"{type(error).__name__}: {error}"[:80]
        return outputs

    def _measure(
        self, reading: Reading, own_run: "_OwnRun", args: Any, kwargs: Any, largest_in: float
    ) -> None:
        wide, narrow = own_run.both(args, kwargs, 1.0)
        error = _error(wide, narrow)
        if error > WRONG and _error(wide, own_run.both(args, kwargs, 1.0)[0]) > 0:
            return  # In another dtype, it would draw other random numbers.
        reading.errors.append(error)
        # Inputs may be enlarged until they themselves would overflow.
        factor = 2.0**self._room
        if largest_in:
            factor = min(factor, 2.0 ** math.floor(math.log2(reading.limit / largest_in)))
        if error > WRONG or factor <= 1 or not largest_in:
            return
        wide, narrow = own_run.both(args, kwargs, factor)
        if magnitudes(wide).largest <= reading.limit:
            reading.errors_grown.append(_error(wide, narrow))

    def force(self, reading: Reading, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls a part inside of the part that runs by itself: computes in float32, then casts."""
        up = CallTensors((args, kwargs))
        args, kwargs = up.replaced([_cast(tensor, "float32") for tensor in up.tensors])
        with self.calls.intercepting(straight_on), keras_internals.AutocastScope("float32"):
            outputs = original(*args, **kwargs)
        if not reading.returns_narrow:
            return outputs
        down = CallTensors(outputs)
        return down.replaced([_cast(tensor, reading.dtype) for tensor in down.tensors])


class _OwnRun:
    """Runs one call of a part by itself, in its own dtype and in float32.

    Args:
        runs: The `OwnRuns`.
        reading: The `Reading` of the part.
        call: The function that calls it.
        values: Pairs of its variables and the values that they had before the call.
        dtypes: The dtypes of its inputs in the unchanged model.
    """

    def __init__(
        self,
        runs: OwnRuns,
        reading: Reading,
        call: Callable[..., Any],
        values: list[tuple[keras.Variable, Tensor]],
        dtypes: list[str],
    ) -> None:
        self._runs, self._reading, self._original = runs, reading, call
        self._values, self._dtypes = values, dtypes

    def both(self, args: Any, kwargs: Any, factor: float) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs in float32 and in the part's dtype, for inputs times `factor`, a power of two."""
        found = CallTensors((args, kwargs))
        inputs = [
            _cast(_times(tensor, factor), dtype)
            for tensor, dtype in zip(found.tensors, self._dtypes, strict=True)
        ]
        # Both start from the same rounded inputs, so that comparisons inside of the part have the
        # same results.
        wide_args, wide_kwargs = found.replaced([_cast(tensor, "float32") for tensor in inputs])
        with self._runs.calls.intercepting(straight_on):
            wide = self._run(wide_args, wide_kwargs, "float32")
        args, kwargs = found.replaced(inputs)
        with (
            self._runs.calls.intercepting(self._runs.force),
            keras_internals.with_policies(self._reading.policies),
        ):
            narrow = self._run(args, kwargs, self._reading.dtype)
        return CallTensors(wide).tensors, CallTensors(narrow).tensors

    def _run(self, args: Any, kwargs: Any, dtype: str | None) -> Any:
        part = self._reading.part
        if part.is_random:
            kwargs = {**kwargs, "training": False}
        with (
            keras.StatelessScope(self._values),
            keras_internals.AutocastScope(dtype if part.autocasts else None),
        ):
            return self._original(*args, **kwargs)


def _cast(tensor: Tensor, dtype: Any) -> Tensor:
    """A floating-point tensor in another dtype. Finite numbers stay finite."""
    if not keras.backend.is_float_dtype(dtype_of(tensor)):
        return tensor
    if is_narrow_dtype(dtype) and dtype_of(tensor) != dtype:
        limit = FloatFormat(dtype).largest
        tensor = ops.clip(tensor, -limit, limit)
    return ops.cast(tensor, dtype)


def _times(tensor: Tensor, factor: float) -> Tensor:
    if factor == 1 or not keras.backend.is_float_dtype(dtype_of(tensor)):
        return tensor
    return ops.multiply(tensor, factor)


def _error(wide: Sequence[Tensor], narrow: Sequence[Tensor]) -> float:
    """The largest `norm(narrow - wide) / norm(wide)` of several tensors.

    Numbers that are not finite in float32 are left out.
    """
    worst = 0.0
    for reference, array in zip(arrays_of(wide), arrays_of(narrow), strict=True):
        if not np.isfinite(reference).all():
            continue
        if not np.isfinite(array).all():
            return math.inf
        norm = np.linalg.norm(reference.astype("float64"))
        if norm:
            difference = array.astype("float64") - reference
            worst = max(worst, float(np.linalg.norm(difference) / norm))
    return worst
