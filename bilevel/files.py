"""Files that are written completely or not at all, and JSON that every parser reads.

A run directory may come from somebody else, so no symbolic link in it is followed to write.
"""

import errno
import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bilevel.errors import Unwritable

NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
"""Flags of `os.open` that follow no symbolic link."""

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def strict_json(value: Any, *, indent: int | None = None) -> str:
    """Return JSON that every parser reads; a number that is not finite becomes null.

    Example:
        >>> strict_json({"valid_loss": float("nan")})
        '{"valid_loss": null}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def temporary_beside(path: Path) -> Path:
    """Return a new hidden name in the same directory, which nobody can foresee."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def write_atomically(path: Path, write: Any, mode: str = "w") -> None:
    """Call `write(file)` so that `path` holds either its old content or all of the new content.

    This holds after a power failure too.

    Raises:
        Unwritable: the file cannot be written.
    """
    temporary = temporary_beside(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK
    try:
        descriptor = os.open(temporary, flags, 0o666)
        with open(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename is durable once the directory is
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError in place of the error of the file system
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        with suppress(OSError):  # the error below is the one that matters
            temporary.unlink(missing_ok=True)
        remedy = "choose a folder that exists, and a name of a file in it"
        if reason.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
            remedy = "free some space or move the run"
        raise Unwritable(f"cannot write {path}: {reason.strerror or reason}; {remedy}") from None


def remove_temporaries(directory: Path) -> None:
    """Remove the temporary files that killed processes left in a directory.

    The caller holds the lock of the directory. A link is removed, and its target stays.
    """
    for name in os.listdir(directory):
        if _TEMPORARY.fullmatch(name):
            with suppress(OSError):  # a leftover is harmless
                os.unlink(directory / name)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
