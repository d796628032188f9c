"""A file of lines with one writer at a time."""

import os
import pathlib
import weakref

try:
    import fcntl
except ImportError:  # not on Windows, where writers are trusted to keep apart
    fcntl = None  # type: ignore[assignment]

_writers: "weakref.WeakValueDictionary[tuple[int, int], ExclusiveFile]"
_writers = weakref.WeakValueDictionary()


class ExclusiveFile:
    """Adds lines, each in one piece, to a file that no other process adds to meanwhile.

    In the same process the newer one takes over: what was interrupted, in a notebook, may
    never have said that it is done. The system takes the lock away from a process that dies.

    Args:
        path: The file; made if there is none, with its directory.

    Raises:
        OSError: If the file cannot be written, now or later; `BlockingIOError` if another
            process writes it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # What is open holds the lock. Lines are added by way of the path, so that it is
        # noticed when the file is no longer there.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self._close = weakref.finalize(self, os.close, descriptor)
        status = os.fstat(descriptor)
        identity = status.st_dev, status.st_ino
        if identity in _writers:
            _writers[identity].close()
        try:
            _lock(descriptor)
        except BlockingIOError:
            self.close()
            raise BlockingIOError("another process is writing it") from None
        _writers[identity] = self

    def read(self) -> bytes:
        """All of it, in bytes."""
        return self.path.read_bytes()

    def drop_unfinished(self) -> None:
        """Drops what a killed process left of its last line."""
        os.truncate(self.path, self.read().rfind(b"\n") + 1)

    def add(self, line: str) -> None:
        """Adds a line, a string without its end."""
        if not self._close.alive:
            raise OSError("another run in this process writes it now")
        with open(self.path, "r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(f"{line}\n".encode())

    def close(self) -> None:
        """Lets others write the file."""
        self._close()


def _lock(descriptor: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems know no locks
        pass
