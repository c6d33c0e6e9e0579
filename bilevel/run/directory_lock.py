"""A lock on a run directory, so that one process at a time works in it."""

import os
from pathlib import Path
from types import TracebackType

from bilevel.errors import DirectoryLocked

_held: set[int] = set()


class DirectoryLock:
    """Hold a directory from `take` until the context ends, against every other process.

    The lock lies on the directory itself (flock). It leaves no file behind, and it ends with the
    process, however the process ends. Systems without such locks (Windows, some network file
    systems) hold nothing.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def take(self, directory: Path) -> None:
        """Lock `directory`.

        Raises:
            DirectoryLocked: another run holds the lock.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            descriptor = os.open(directory, os.O_RDONLY)
        except OSError:  # the next access to the directory raises a clearer error
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DirectoryLocked(
                f"{directory} is in use by another run; wait for its end, stop it, or choose "
                "another directory"
            ) from None
        except OSError:  # this file system has no locks
            os.close(descriptor)
            return
        self._descriptor = descriptor
        _held.add(descriptor)


def _release_in_child() -> None:
    """Close the locks in a forked process (a worker of a DataLoader), which may outlive the run."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
