"""`ExclusiveFile`: a file of lines with one writer at a time."""

import os
import pathlib
import weakref

try:
    import fcntl
except ImportError:  # not on Windows, where nothing locks the file
    fcntl = None  # type: ignore[assignment]

_writers: "weakref.WeakValueDictionary[tuple[int, int], ExclusiveFile]"
_writers = weakref.WeakValueDictionary()


class ExclusiveFile:
    """Appends lines, each in one piece, to a file that no other process writes at the same time.

    In the same process, a newer writer takes over, because an interrupted notebook cell may never
    have closed the file. When a process dies, the operating system releases its lock.

    Args:
        path: The file. It is created with its directory if it does not exist.

    Raises:
        OSError: If the file cannot be written, now or later; `BlockingIOError` if another process
            writes it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The open file holds the lock. Lines are written through the path, to notice if the file
        # was removed.
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
        """The content of the file, as bytes."""
        return self.path.read_bytes()

    def drop_unfinished(self) -> None:
        """Removes an unfinished last line, left by a process that was killed."""
        os.truncate(self.path, self.read().rfind(b"\n") + 1)

    def add(self, line: str) -> None:
        """Appends a line, a string without its newline."""
        if not self._close.alive:
            raise OSError("another run in this process writes it now")
        with open(self.path, "r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(f"{line}\n".encode())

    def close(self) -> None:
        """Allows others to write the file."""
        self._close()


def _lock(descriptor: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems do not support locks
        pass
