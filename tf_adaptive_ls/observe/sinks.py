"""`Sinks`: the outputs of a callback. An output that fails does not stop training."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

from tf_adaptive_ls.observe.loss_change.allocation import Allocation
from tf_adaptive_ls.observe.record.snapshot import Snapshot

Logs: TypeAlias = dict[str, Any]


class Sink(Protocol):
    """An output of a callback."""

    @property
    def path(self) -> str | os.PathLike[str]:
        """The path that it writes to."""

    def add(self, snapshot: Snapshot, epoch: int, logs: Logs) -> None:
        """Adds a `Snapshot`, with the epoch and Keras's logs."""

    def add_loss_change(
        self,
        step: int,
        since: int,
        epoch: int,
        allocation: Allocation,
        as_trained: Allocation | None,
    ) -> None:
        """Adds the `Allocation` of a path between two steps, and the one as trained."""

    def add_forward_rooms(self, step: int, epoch: int, rooms: dict[str, float]) -> None:
        """Adds the room of each part of the forward pass, in binades, by name."""

    def close(self) -> None:
        """Ends the output."""


class Sinks:
    """The outputs of a callback. An output that fails is dropped, with a warning.

    Args:
        callback: Name of the callback, for warnings.
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
        """Adds the output `kind(path, layers, step)`, unless `path` is `None`."""
        if path is not None:
            with self._only_warning(path):
                self._sinks.append(kind(path, layers, step))

    def add(self, *args: Any) -> None:
        """Calls `Sink.add` of all outputs."""
        self._call(lambda sink: sink.add(*args))

    def add_loss_change(self, *args: Any) -> None:
        """Calls `Sink.add_loss_change` of all outputs."""
        self._call(lambda sink: sink.add_loss_change(*args))

    def add_forward_rooms(self, *args: Any) -> None:
        """Calls `Sink.add_forward_rooms` of all outputs."""
        self._call(lambda sink: sink.add_forward_rooms(*args))

    def close(self) -> None:
        """Calls `Sink.close` of all outputs."""
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
