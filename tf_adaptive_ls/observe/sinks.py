"""`Sinks`: the outputs of a callback, none of which may stop training."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

from tf_adaptive_ls.observe.loss_change.allocation import Allocation
from tf_adaptive_ls.observe.record.snapshot import Snapshot

Logs: TypeAlias = dict[str, Any]


class Sink(Protocol):
    """What can be written to."""

    @property
    def path(self) -> str | os.PathLike[str]:
        """Where that is."""

    def add(self, snapshot: Snapshot, epoch: int, logs: Logs) -> None:
        """Adds a `Snapshot`, with the epoch and what Keras has logged."""

    def add_loss_change(
        self,
        step: int,
        since: int,
        epoch: int,
        allocation: Allocation,
        as_trained: Allocation | None,
    ) -> None:
        """Adds the `Allocation` of a path from one step to another, and that as trained."""

    def add_forward_rooms(self, step: int, epoch: int, rooms: dict[str, float]) -> None:
        """Adds the room of each part of the forward pass in binades, by name."""

    def close(self) -> None:
        """Nothing more comes."""


class Sinks:
    """Several of a callback: where one fails, it is left out from then on, with a warning.

    Args:
        callback: The name of the callback.
    """

    def __init__(self, callback: str) -> None:
        self._callback = callback
        self._sinks: list[Sink] = []

    def open(
        self,
        kind: Callable[..., Sink],
        path: str | os.PathLike[str] | None,
        layers: list[Any],
        step: int,
    ) -> None:
        """Adds `kind(path, layers, step)`, if there is a path."""
        if path is not None:
            with self._only_warning(path):
                self._sinks.append(kind(path, layers, step))

    def add(self, *args: Any) -> None:
        """As that of a `Sink`, of all."""
        self._call(lambda sink: sink.add(*args))

    def add_loss_change(self, *args: Any) -> None:
        """As that of a `Sink`, of all."""
        self._call(lambda sink: sink.add_loss_change(*args))

    def add_forward_rooms(self, *args: Any) -> None:
        """As that of a `Sink`, of all."""
        self._call(lambda sink: sink.add_forward_rooms(*args))

    def close(self) -> None:
        """As that of a `Sink`, of all."""
        self._call(lambda sink: sink.close())

    def _call(self, write: Callable[[Sink], None]) -> None:
        for sink in tuple(self._sinks):
            self._sinks.remove(sink)
            with self._only_warning(sink.path):
                write(sink)
                self._sinks.append(sink)

    @contextlib.contextmanager
    def _only_warning(self, path: str | os.PathLike[str]) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            warnings.warn(
                f"{self._callback} cannot write to '{path}' and stops recording: {error}. "
                "Training continues.",
                stacklevel=2,
            )
