"""A directory that a run keeps open, so that it is found after a move."""

import os
from pathlib import Path


class OpenDirectory:
    """An open directory, and the path under which it was opened.

    Raises:
        OSError: it cannot be opened; Windows opens none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.descriptor = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Close the directory."""
        os.close(self.descriptor)

    def is_in_place(self) -> bool:
        """Return whether the path still names this directory."""
        try:
            return self._is_at(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a network file system that does not answer now
            return True

    def find(self) -> Path | None:
        """Return the present path of the directory; None if it was removed, or outside Linux."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self.descriptor}"))
            return path if self._is_at(path) else None
        except OSError:
            return None

    def _is_at(self, path: Path) -> bool:
        return os.path.samestat(os.stat(path), os.fstat(self.descriptor))
