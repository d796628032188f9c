"""`PartCalls`: intercepts the calls of all parts of a model."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

from tf_adaptive_ls.backend import functions, keras_internals, routes
from tf_adaptive_ls.observe.forward_range.parts import parts_of_model
from tf_adaptive_ls.observe.forward_range.readings import Reading, dtype_of
from tf_adaptive_ls.training.call_tensors import CallTensors
from tf_adaptive_ls.training.neutral_scales import neutral_scales


class PartCalls:
    """Intercepts the calls of all parts of a model for a while.

    Args:
        model: The model.

    Attributes:
        readings: A `Reading` for each part, in the order of the model.
    """

    def __init__(self, model: keras.Model) -> None:
        self.readings = [Reading(part) for part in parts_of_model(model)]
        self._model = model
        self._run: Callable[..., Any] = straight_on
        self._trace: Any = None
        self._state: list[Any] = []

    @contextlib.contextmanager
    def seen(self, state: Iterable[Any] = ()) -> Iterator[None]:
        """Context manager in which calls of parts can be intercepted.

        Args:
            state: Pairs of a variable of the model and its value during these calls.
        """
        self._trace, self._state = functions.current_trace(), list(state)
        with (
            contextlib.ExitStack() as undo,
            keras_internals.not_rematerialized(self._model),
            neutral_scales(),
        ):
            for reading in self.readings:
                run = functools.partial(self._call, reading)
                undo.callback(routes.Route(reading.part.operation, "call", run).end)
            yield

    @contextlib.contextmanager
    def intercepting(self, run: Callable[..., Any]) -> Iterator[None]:
        """Context manager in which every call becomes `run(reading, call, args, kwargs)`."""
        before, self._run = self._run, run
        try:
            yield
        finally:
            self._run = before

    def are_outside_loops(self, tensors: list[Any]) -> bool:
        """Whether these tensors are outside of loops. A loop belongs to the part that runs it."""
        return functions.belong_to(self._trace, tensors)

    def as_built(self, x: Any, training: bool) -> Any:
        """The outputs of the unchanged model. Readings record the dtypes."""
        for reading in self.readings:
            reading.dtypes = []
        with keras.StatelessScope(self._state), self.intercepting(self._look):
            return self._model(x, training=training)

    def in_float32(self, run: Callable[..., Any], x: Any, training: bool) -> Any:
        """The outputs of the model computed in float32, with calls of parts going to `run`."""
        with (
            keras.StatelessScope(self._state),
            self.intercepting(run),
            keras_internals.computing_in_float32(self._model),
        ):
            return self._model(x, training=training)

    def _call(self, reading: Reading, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return self._run(reading, original, args, kwargs)

    def _look(self, reading: Reading, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        tensors = CallTensors((args, kwargs)).tensors
        if not self.are_outside_loops(tensors):
            return original(*args, **kwargs)
        dtypes = list(map(dtype_of, tensors))
        outputs = original(*args, **kwargs)
        reading.add_dtypes(dtypes, list(map(dtype_of, CallTensors(outputs).tensors)))
        return outputs


def straight_on(reading: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return original(*args, **kwargs)
