"""A lock as a file with a heartbeat, for file systems that do not lock directories."""

import json
import os
import secrets
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from bilevel.errors import DirectoryLocked
from bilevel.files import NO_LINK
from bilevel.text import printable
from bilevel.untrusted_files import read_bytes

NAME = "run.lock"
HEARTBEAT = 30.0
"""Seconds between two refreshes of a lock file."""
STALE = 300.0
"""Age in seconds at which a lock file counts as left behind by a killed run."""


class LockFile:
    """Hold a directory by a file in it, which a thread refreshes.

    A lock file is left behind if a run is killed. The next run replaces it at once if that process
    ran on the same machine, and after `STALE` seconds otherwise. Ages compare two times of the file
    system, so the clocks of the machines may differ.

    Raises:
        DirectoryLocked: another run holds the directory.
        OSError: the file cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self.token = secrets.token_hex(8)
        if not self._create():
            self._remove_stale()
            if not self._create():
                raise DirectoryLocked(_sentence(self.path, _read(self.path), 0.0))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)
        self._thread.start()

    @property
    def is_ours(self) -> bool:
        """Return whether no other run has replaced the file, which happens to a suspended run."""
        return _read(self.path).get("token", self.token) == self.token

    def close(self) -> None:
        """Remove the file."""
        self._ended.set()
        self._thread.join()
        if self.is_ours:
            with suppress(OSError):  # it becomes stale
                self.path.unlink()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666)
        except FileExistsError:
            return False
        content = {"host": _host(), "pid": os.getpid(), "token": self.token}
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(content))
        return True

    def _remove_stale(self) -> None:
        """Remove the file of a run that has ended.

        Raises:
            DirectoryLocked: the run may still be going on.
        """
        found, age = _read(self.path), _age(self.path)
        if not _is_dead(found) and age < STALE:
            raise DirectoryLocked(_sentence(self.path, found, age))
        aside = self.path.with_name(f".{NAME}.{self.token}.tmp")
        with suppress(FileNotFoundError):  # another run was faster
            os.rename(self.path, aside)
            if _read(aside).get("token") != found.get("token"):  # the file of that run
                os.rename(aside, self.path)
            else:
                aside.unlink()

    def _refresh(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with suppress(OSError):  # the next refresh may succeed
                if self.is_ours:
                    os.utime(self.path)


def _host() -> str:
    """Return the name of the machine, and of the container if processes are numbered there."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bytes(path, 4096))
    except (OSError, ValueError, RecursionError):  # it is being written, or was removed
        return {}
    return found if isinstance(found, dict) else {}


def _age(path: Path) -> float:
    """Return the seconds since the last refresh, by the clock of the file system."""
    clock = path.with_name(f".{NAME}.{secrets.token_hex(8)}.tmp")
    try:
        os.close(os.open(clock, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o600))
        return clock.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:  # the other run has just ended
        return STALE
    finally:
        clock.unlink(missing_ok=True)


def _is_dead(found: dict[str, Any]) -> bool:
    """Return whether the process of a lock file ran on this machine and has ended."""
    pid = found.get("pid")
    if os.name != "posix" or found.get("host") != _host() or type(pid) is not int or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it belongs to another user
        return False
    return False


def _sentence(path: Path, found: dict[str, Any], age: float) -> str:
    host = printable(str(found.get("host", "an unknown machine")).partition(" ")[0])[:100]
    return (
        f"{path.parent} is in use by process {printable(str(found.get('pid', '?')))[:20]} on "
        f"{host}, which refreshed {path.name} {max(0.0, age):.0f} s ago; wait for its end, stop "
        f"it, or choose another directory (a killed run holds it for {STALE / 60:g} minutes)"
    )
