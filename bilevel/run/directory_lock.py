"""A lock on a run directory, so that one process at a time works in it."""

import math
import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from bilevel.errors import DirectoryLocked, DirectoryLost
from bilevel.run.lock_file import LockFile
from bilevel.run.open_directory import OpenDirectory

_held: set[int] = set()


class DirectoryLock:
    """Hold a directory from `take` until the context ends, against every other process.

    The lock lies on the directory itself (flock). It leaves no file behind, and it ends with the
    process, however the process ends. File systems without such locks (Windows, many network file
    systems) get a lock file instead.
    """

    def __init__(self) -> None:
        self._directory: OpenDirectory | None = None
        self._file: LockFile | None = None
        self._looked = -math.inf

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._directory is not None:
            _held.discard(self._directory.descriptor)
            self._directory.close()
            self._directory = None

    def take(self, directory: Path) -> None:
        """Lock `directory`.

        Raises:
            DirectoryLocked: another run holds the lock.
        """
        try:
            opened = OpenDirectory(directory)
        except OSError:  # the next access to the directory raises a clearer error
            opened = None
        try:
            if opened is None or not _flock(opened.descriptor, directory):
                with suppress(PermissionError, FileNotFoundError):  # as above
                    self._file = LockFile(directory)
        except BaseException:
            if opened is not None:
                opened.close()
            raise
        if opened is not None:
            self._directory = opened
            _held.add(opened.descriptor)

    def is_lost(self) -> bool:
        """Return whether the directory was moved, removed or taken; looked at once a second."""
        if self._directory is None or time.monotonic() - self._looked < 1:
            return False
        self._looked = time.monotonic()
        return not (self._directory.is_in_place() and (self._file is None or self._file.is_ours))

    def place(self, directory: Path) -> Path:
        """Return the path of the locked directory, which may have been moved.

        Raises:
            DirectoryLost: it was removed, or another run has taken it.
        """
        if self._directory is None:
            return directory
        if self._directory.is_in_place():
            if self._file is not None and not self._file.is_ours:
                raise DirectoryLost(
                    f"{directory} was taken by another run while this one was suspended; this run "
                    "ends, and that one continues"
                )
            return directory
        if (place := self._directory.find()) is None:
            raise DirectoryLost(
                f"{directory} was removed during the run, or moved to an unknown place; the run "
                "ends, since it cannot save anything"
            )
        return place


def _flock(descriptor: int, directory: Path) -> bool:
    """Lock an open directory, and return whether its file system has such locks.

    Raises:
        DirectoryLocked: another run holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DirectoryLocked(
            f"{directory} is in use by another run; wait for its end, stop it, or choose another "
            "directory"
        ) from None
    except OSError:
        return False
    return True


def _release_in_child() -> None:
    """Close the locks in a forked process (a worker of a DataLoader), which may outlive the run."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
