"""One process in a run directory at a time."""

import os
from pathlib import Path
from types import TracebackType

from bilevel.errors import Taken

_held: set[int] = set()


class Alone:
    """While entered, holds the directory that `take` is given, against every other process.

    The lock is on the directory itself (flock): it leaves no file behind, and ends with the process, whatever ends that. Where
    there are no such locks (some network file systems, Windows) nothing is held.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def __enter__(self) -> "Alone":
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
        """Hold `directory`.

        Raises:
            Taken: another run holds it.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            descriptor = os.open(directory, os.O_RDONLY)
        except OSError:  # what reads or writes there next says it better
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Taken(
                f"another run is going on in {directory}; let it end, stop it, or choose another directory"
            ) from None
        except OSError:  # no locks in this file system
            os.close(descriptor)
            return
        self._descriptor = descriptor
        _held.add(descriptor)


def _let_go() -> None:
    """In a forked process (a DataLoader's worker), which may outlive a run that is killed, and must not hold its lock."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
