"""Files that are written completely or not at all, and JSON that every parser reads."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bilevel.errors import Unwritable


def strict_json(value: Any, *, indent: int | None = None) -> str:
    """Return JSON that every parser reads; a number that is not finite becomes null.

    Example:
        >>> strict_json({"valid_loss": float("nan")})
        '{"valid_loss": null}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def write_atomically(path: Path, write: Any, mode: str = "w") -> None:
    """Call `write(file)` so that `path` holds either its old content or all of the new content.

    This holds after a power failure too.

    Raises:
        Unwritable: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
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
        raise Unwritable(
            f"cannot write {path}: {reason.strerror or reason}; free some space or move the run"
        ) from None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
