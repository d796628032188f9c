"""`RunWriter`: appends to the record of a run, for all callbacks of one `fit`."""

import os
import weakref
from typing import Any

from tf_adaptive_ls.observe.loss_change.allocation import Allocation
from tf_adaptive_ls.observe.record.exclusive_file import ExclusiveFile
from tf_adaptive_ls.observe.record.forward_rooms import entry_of_forward_rooms
from tf_adaptive_ls.observe.record.lines import (
    begins_like_one,
    entry_of_snapshot,
    last_layers,
    line_of,
    start_of,
)
from tf_adaptive_ls.observe.record.loss_changes import entry_of_loss_change
from tf_adaptive_ls.observe.record.snapshot import Snapshot
from tf_adaptive_ls.training.layer_scaling import LayerScaling


class RunWriter:
    """Appends to the record of a run.

    Callbacks of one `fit` can share a writer, see `shared`.

    Args:
        path: The file. It is created with its directory if it does not exist.
        layers: Pairs of a name and a `LayerScaling`.
        step: Number of steps before the first record.

    Raises:
        OSError: If the file cannot be written, now or later: `BlockingIOError` if another process
            writes it, `FileExistsError` if it is the record of another model.
        ValueError: If it exists and is not a record.
    """

    def __init__(
        self, path: str | os.PathLike[str], layers: list[tuple[str, LayerScaling]], step: int
    ) -> None:
        self.path = path
        self._file = ExclusiveFile(path)
        content = self._file.read()
        if not begins_like_one(content):
            self._file.close()
            raise ValueError(
                "Expected the path of a new file, or of the record of a run to append to. "
                f"Received: '{path}', which is something else."
            )
        names = [name for name, _ in layers]
        self._begun_with, self._num_users = (names, step), 1
        names_before = last_layers(content)
        if names_before is not None and names_before != names:
            self._file.close()
            raise FileExistsError(
                f"it is the record of another model, with {len(names_before)} layers "
                f"({', '.join(names_before[:3])}, …) instead of {len(names)} "
                f"({', '.join(names[:3])}, …)"
            )
        self._file.drop_unfinished()
        self._file.add(line_of(start_of(layers, step)))

    @classmethod
    def shared(
        cls, path: str | os.PathLike[str], layers: list[tuple[str, LayerScaling]], step: int
    ) -> "RunWriter":
        """An open writer with the same arguments, or a new one."""
        key = os.path.realpath(path)
        writer = _writers.get(key)
        if writer is None or not writer.join(layers, step):
            _writers[key] = writer = cls(path, layers, step)
        return writer

    def join(self, layers: list[tuple[str, LayerScaling]], step: int) -> bool:
        """Adds a user of this writer, if the arguments match and it is open. Returns whether."""
        joined = bool(self._num_users) and self._begun_with == (
            [name for name, _ in layers],
            step,
        )
        self._num_users += joined
        return joined

    def add(self, snapshot: Snapshot, epoch: int, logs: dict[str, Any]) -> None:
        """Appends a `Snapshot`, with the epoch and Keras's logs."""
        self._file.add(line_of(entry_of_snapshot(snapshot, epoch, logs)))

    def add_loss_change(
        self,
        step: int,
        since: int,
        epoch: int,
        allocation: Allocation,
        as_trained: Allocation | None,
    ) -> None:
        """Appends the `Allocation` of a path between two steps, and the one as trained."""
        entry = entry_of_loss_change(step, since, epoch, allocation, as_trained)
        self._file.add(line_of(entry))

    def add_forward_rooms(self, step: int, epoch: int, rooms: dict[str, float]) -> None:
        """Appends the room of each part of the forward pass, in binades, by name."""
        self._file.add(line_of(entry_of_forward_rooms(step, epoch, rooms)))

    def close(self) -> None:
        """Allows others to write the file, once all users of this writer have closed it."""
        self._num_users -= 1
        if not self._num_users:
            self._file.close()


_writers: weakref.WeakValueDictionary[str, RunWriter] = weakref.WeakValueDictionary()
