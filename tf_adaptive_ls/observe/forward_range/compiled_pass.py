"""`CompiledPass`: the largest values of all parts of a model, in one compiled pass."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from tf_adaptive_ls.backend import functions
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.observe.forward_range.part_calls import PartCalls
from tf_adaptive_ls.observe.forward_range.readings import (
    Magnitudes,
    Reading,
    dtype_of,
    floats_of,
)
from tf_adaptive_ls.observe.forward_range.result import PartRange
from tf_adaptive_ls.training.call_tensors import CallTensors


class _SeenCall(NamedTuple):
    """A call of a part, as traced.

    Attributes:
        reading: The `Reading` of the part.
        magnitudes: Four scalars: for inputs and for outputs, the largest finite magnitude, and 1 if
            all are finite, otherwise 0.
        dtypes_out: List of the dtypes of the outputs.
    """

    reading: Reading
    magnitudes: list[Tensor]
    dtypes_out: list[str]


class CompiledPass:
    """Runs a model on one batch in float32, and finds the largest values of all parts.

    The pass is compiled unless the model is eager. Unlike `forward_range`, it does not run parts by
    themselves.

    Args:
        model: The model.
        x: One batch of inputs.
    """

    def __init__(self, model: keras.Model, x: Any) -> None:
        self._model, self._calls = model, PartCalls(model)
        self._x = tree.map_structure(ops.convert_to_tensor, x)
        run_eagerly = getattr(model, "run_eagerly", False)
        self._run = self._maxima if run_eagerly else functions.compiled(self._maxima)
        self._seen: list[_SeenCall] = []

    def ranges(self, room: float) -> list[PartRange]:
        """A `PartRange` for each part at the current weights, with verdicts for `room`."""
        values = [ops.convert_to_tensor(v.value) for v in self._model.variables]
        rows = ops.convert_to_numpy(self._run(values, self._x)).tolist()
        for reading in self._calls.readings:
            reading.forget()
        for call, (largest_in, finite_in, largest_out, finite_out) in zip(
            self._seen, rows, strict=True
        ):
            inputs = Magnitudes(largest_in, bool(finite_in))
            outputs = Magnitudes(largest_out, bool(finite_out))
            call.reading.add(inputs, outputs, call.dtypes_out)
        return [reading.result(room) for reading in self._calls.readings if reading.calls]

    def _maxima(self, values: list[Tensor], x: Any) -> Tensor:
        """Array with a row of `_SeenCall.magnitudes` for each call."""
        self._seen = []
        with self._calls.seen(zip(self._model.variables, values, strict=True)):
            self._calls.as_built(x, training=True)
            self._calls.in_float32(self._note, x, training=True)
        rows = [ops.stack(call.magnitudes) for call in self._seen]
        return ops.stack(rows) if rows else ops.zeros((0, 4))

    def _note(self, reading: Reading, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inputs = CallTensors((args, kwargs)).tensors
        if not self._calls.are_outside_loops(inputs):
            return original(*args, **kwargs)
        outputs = original(*args, **kwargs)
        returned = CallTensors(outputs).tensors
        both = [*_magnitudes(inputs), *_magnitudes(returned)]
        self._seen.append(_SeenCall(reading, both, list(map(dtype_of, returned))))
        return outputs


def _magnitudes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The fields of `Magnitudes` as two scalar tensors."""
    largest, finite = ops.zeros(()), ops.ones((), "bool")
    for x in floats_of(tensors):
        if 0 in x.shape:
            continue
        x = ops.cast(x, "float32")
        is_finite = ops.isfinite(x)
        largest = ops.maximum(largest, ops.max(ops.where(is_finite, ops.abs(x), 0.0)))
        finite = ops.logical_and(finite, ops.all(is_finite))
    return [largest, ops.cast(finite, "float32")]
