"""`OwnRuns`: every part of a model run once more by itself, in the dtype that it has."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls.backend import functions, keras_internals, routes
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.float_format import FloatFormat, is_narrow_dtype, narrowest
from tf_adaptive_ls.observe.forward_range.multiplications import multiplications_of
from tf_adaptive_ls.observe.forward_range.parts import Part
from tf_adaptive_ls.observe.forward_range.result import (
    ENTRY,
    INSIDE,
    OUTPUT,
    WRONG,
    PartRange,
)
from tf_adaptive_ls.training.call_tensors import CallTensors
from tf_adaptive_ls.training.neutral_scales import neutral_scales


class _Reading:
    """What was seen of a part so far."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.policies = [(layer, layer.dtype_policy) for layer in part.inside]
        self.dtype = part.dtype  # of an operation: once it was called
        self.dtypes: list[list[str]] = []  # of the inputs of each call
        self.calls, self.multiplications = 0, 0.0
        self.returns_narrow = False
        self.largest_in = self.largest_out = 0.0
        self.errors: list[float] = []
        self.errors_grown: list[float] = []
        self.problem = ""

    @property
    def is_narrow(self) -> bool:
        return self.dtype is not None and is_narrow_dtype(self.dtype)

    @property
    def casts(self) -> bool:
        """Whether it casts what it takes to a narrow dtype."""
        part = self.part
        if not part.casts or self.dtype is None:
            return False
        own = self.dtype if part.is_graph else str(part.operation.compute_dtype)
        return is_narrow_dtype(own)

    @property
    def limit(self) -> float:
        return FloatFormat(self.dtype or "float32").largest

    def add(self, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[bool, bool]:
        """Adds what was seen of a call in float32.

        Returns:
            Whether the part made what is not finite of what is; and whether its dtype holds
            all that it takes and returns.
        """
        largest_in, finite_in = _largest(inputs)
        largest_out, finite_out = _largest(outputs)
        makes_nonfinite = finite_in and not finite_out
        written = list(filter(is_narrow_dtype, map(_dtype, outputs)))
        if makes_nonfinite and written and not self.part.is_graph:
            # It casts, whatever its policy is.
            self.dtype, self.returns_narrow = narrowest(written).name, True
            largest_out = math.inf
        self.calls += 1
        if not self.part.is_open:
            self.multiplications += multiplications_of(self.part.operation, inputs, outputs)
        self.largest_in = max(self.largest_in, largest_in)
        self.largest_out = max(self.largest_out, largest_out)
        return makes_nonfinite, max(largest_in, largest_out) <= self.limit

    def result(self, room: float) -> PartRange:
        part, bound = self.part, self.limit / 2**room
        # What a graph returns is told of what is in it.
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
            max(self.errors, default=None),
            max(self.errors_grown, default=None),
            tuple(verdict for verdict, yes in found.items() if yes and self.is_narrow),
            self.problem,
            self.multiplications,
        )


class OwnRuns:
    """Reads the range of all parts of a model while it runs.

    Args:
        parts: List of the `Part`.
        room: By how many binades inputs are made larger.
        only: Name of the only part that is run by itself, `None` for all.

    Attributes:
        first_nonfinite: Name of the first part that has returned Inf or NaN for finite inputs in
            float32; empty for none.
        finite_as_it_is: Whether all outputs of the model as it is were finite.
    """

    def __init__(self, parts: list[Part], room: float, only: str | None = None) -> None:
        self._only = only
        self._readings = [_Reading(part) for part in parts]
        self._room = room
        self._run: Callable[..., Any] = _straight_on
        self._number_of_call: dict[int, int] = {}
        self.first_nonfinite = ""
        self.finite_as_it_is = True

    def read_batch(self, model: keras.Model, x: Any, training: bool) -> Any:
        """The outputs of a model for a batch, computed in float32, during which parts are read."""
        for reading in self._readings:
            reading.dtypes = []
        self._number_of_call = {}
        with (
            keras_internals.not_rematerialised(model),
            neutral_scales(),
            self._intercepted(),
            np.errstate(over="ignore", invalid="ignore"),  # of constants
        ):
            with keras.StatelessScope(), self.calls_lead_to(self._look):
                as_it_is = model(x, training=training)
                finite = _largest(CallTensors(as_it_is).tensors)[1]
                self.finite_as_it_is = self.finite_as_it_is and finite
            with (
                keras.StatelessScope(),
                self.calls_lead_to(self._read),
                keras_internals.computing_in_float32(model),
            ):
                return model(x, training=training)

    def ranges(self) -> list[PartRange]:
        """A `PartRange` for each part that was called."""
        return [reading.result(self._room) for reading in self._readings if reading.calls]

    @contextlib.contextmanager
    def _intercepted(self) -> Iterator[None]:
        """Context in which calls of parts are seen."""
        with contextlib.ExitStack() as undo:
            for reading in self._readings:
                run = functools.partial(self._call, reading)
                undo.callback(routes.Route(reading.part.operation, "call", run).end)
            yield

    @contextlib.contextmanager
    def calls_lead_to(self, run: Callable[..., Any]) -> Iterator[None]:
        before, self._run = self._run, run
        try:
            yield
        finally:
            self._run = before

    def _call(self, reading: _Reading, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return self._run(reading, original, args, kwargs)

    def _look(self, reading: _Reading, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        tensors = CallTensors((args, kwargs)).tensors
        if not functions.are_values_known(tensors):
            return original(*args, **kwargs)  # in a loop: what runs it answers for it
        dtypes = [_dtype(tensor) for tensor in tensors]
        reading.dtypes.append(dtypes)
        outputs = original(*args, **kwargs)
        if reading.part.dtype is None:
            reading.dtype = narrowest(dtypes).name if _are_narrow(dtypes) else "float32"
        returned = [_dtype(tensor) for tensor in CallTensors(outputs).tensors]
        reading.returns_narrow = reading.returns_narrow or any(map(is_narrow_dtype, returned))
        return outputs

    def _read(self, reading: _Reading, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inputs = CallTensors((args, kwargs)).tensors
        if not functions.are_values_known(inputs):
            return original(*args, **kwargs)
        number = self._number_of_call.get(id(reading), 0)
        self._number_of_call[id(reading)] = number + 1
        variables = [v for layer in reading.part.inside[:1] for v in layer.variables]
        values = [(v, v.value) for v in variables]
        outputs = original(*args, **kwargs)
        makes_nonfinite, fits = reading.add(inputs, CallTensors(outputs).tensors)
        if makes_nonfinite:
            self.first_nonfinite = self.first_nonfinite or reading.part.name
        known = number < len(reading.dtypes) and len(reading.dtypes[number]) == len(inputs)
        runs = reading.part.runs_alone and self._only in (None, reading.part.name)
        if reading.is_narrow and fits and known and runs:
            own_run = _OwnRun(self, reading, original, values, reading.dtypes[number])
            try:
                self._measure(reading, own_run, args, kwargs, _largest(inputs)[0])
            except Exception as error:  # whatever a layer cannot do
                reading.problem = f"{type(error).__name__}: {error}"[:80]
        return outputs

    def _measure(
        self, reading: _Reading, own_run: "_OwnRun", args: Any, kwargs: Any, largest_in: float
    ) -> None:
        wide, narrow = own_run.both(args, kwargs, 1.0)
        error = _error(wide, narrow)
        if error > WRONG and _error(wide, own_run.both(args, kwargs, 1.0)[0]) > 0:
            return  # It draws other random numbers each time.
        reading.errors.append(error)
        # As much as inputs may grow without overflowing themselves.
        factor = 2.0**self._room
        if largest_in:
            factor = min(factor, 2.0 ** math.floor(math.log2(reading.limit / largest_in)))
        if error > WRONG or factor <= 1 or not largest_in:
            return
        wide, narrow = own_run.both(args, kwargs, factor)
        if _largest(wide)[0] <= reading.limit:
            reading.errors_grown.append(_error(wide, narrow))

    def force(self, reading: _Reading, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a part inside another that is run by itself: as in float32, then cast."""
        up = CallTensors((args, kwargs))
        args, kwargs = up.replaced([_cast(tensor, "float32") for tensor in up.tensors])
        with self.calls_lead_to(_straight_on), keras_internals.AutocastScope("float32"):
            outputs = original(*args, **kwargs)
        if not reading.returns_narrow:
            return outputs
        down = CallTensors(outputs)
        return down.replaced([_cast(tensor, reading.dtype) for tensor in down.tensors])


class _OwnRun:
    """Runs one call of a part by itself, in the dtype that it has and in float32.

    Args:
        runs: The `OwnRuns`.
        reading: Of the part.
        call: What is called for it.
        values: Pairs of its variables and the values that they had before the call.
        dtypes: The dtypes of its inputs when the model runs as it is.
    """

    def __init__(
        self,
        runs: OwnRuns,
        reading: _Reading,
        call: Callable[..., Any],
        values: list[tuple[keras.Variable, Tensor]],
        dtypes: list[str],
    ) -> None:
        self._runs, self._reading, self._original = runs, reading, call
        self._values, self._dtypes = values, dtypes

    def both(self, args: Any, kwargs: Any, factor: float) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs in float32 and in the part's dtype, of inputs times `factor`, a power of two."""
        found = CallTensors((args, kwargs))
        inputs = [
            _cast(_times(tensor, factor), dtype)
            for tensor, dtype in zip(found.tensors, self._dtypes, strict=True)
        ]
        # Both are of inputs as they are when rounded: what then decides, as by comparing them,
        # decides the same.
        wide_args, wide_kwargs = found.replaced([_cast(tensor, "float32") for tensor in inputs])
        with self._runs.calls_lead_to(_straight_on):
            wide = self._run(wide_args, wide_kwargs, "float32")
        args, kwargs = found.replaced(inputs)
        with (
            self._runs.calls_lead_to(self._runs.force),
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


def _straight_on(reading: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return original(*args, **kwargs)


def _dtype(tensor: Tensor) -> str:
    return str(keras.backend.standardize_dtype(tensor.dtype))


def _are_narrow(dtypes: Sequence[str]) -> bool:
    """Whether what is computed from floats of several dtypes has a narrow one."""
    floats = [dtype for dtype in dtypes if keras.backend.is_float_dtype(dtype)]
    return bool(floats) and is_narrow_dtype(keras.backend.result_type(*floats))


def _cast(tensor: Tensor, dtype: Any) -> Tensor:
    """A floating-point tensor in another dtype, finite if it was."""
    if not keras.backend.is_float_dtype(_dtype(tensor)):
        return tensor
    if is_narrow_dtype(dtype) and _dtype(tensor) != dtype:
        limit = FloatFormat(dtype).largest
        tensor = ops.clip(tensor, -limit, limit)
    return ops.cast(tensor, dtype)


def _times(tensor: Tensor, factor: float) -> Tensor:
    if factor == 1 or not keras.backend.is_float_dtype(_dtype(tensor)):
        return tensor
    return ops.multiply(tensor, factor)


def _arrays(tensors: Sequence[Tensor]) -> Iterator[np.ndarray]:
    for tensor in tensors:
        if keras.backend.is_float_dtype(_dtype(tensor)):
            yield np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))


def _largest(tensors: Sequence[Tensor]) -> tuple[float, bool]:
    """The largest finite magnitude of several tensors, and whether all is finite."""
    largest, all_finite = 0.0, True
    for array in _arrays(tensors):
        finite = np.isfinite(array)
        all_finite = all_finite and bool(finite.all())
        largest = max(largest, float(np.max(np.abs(array), initial=0.0, where=finite)))
    return largest, all_finite


def _error(wide: Sequence[Tensor], narrow: Sequence[Tensor]) -> float:
    """The largest of `norm(narrow - wide) / norm(wide)` of several tensors.

    What is not finite in float32 either does not count.
    """
    worst = 0.0
    for reference, array in zip(_arrays(wide), _arrays(narrow), strict=True):
        if not np.isfinite(reference).all():
            continue
        if not np.isfinite(array).all():
            return math.inf
        norm = np.linalg.norm(reference.astype("float64"))
        if norm:
            difference = array.astype("float64") - reference
            worst = max(worst, float(np.linalg.norm(difference) / norm))
    return worst
