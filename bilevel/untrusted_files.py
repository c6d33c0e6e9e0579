"""Files that may come from somebody else: regular ones only, of limited size and nesting.

A pipe would wait for ever, a device would fill the memory, and YAML aliases multiply their text.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from bilevel.files import NO_LINK
from bilevel.text import byte_size

MOST_BYTES = 2**30
MOST_YAML_BYTES = 2**24
MOST_NESTING = 50


def open_regular(path: Path, *, write: bool = False, new: bool = False) -> BinaryIO:
    """Open a regular file, and never a pipe, a device or (to write) a symbolic link.

    A file that is also written has no buffer.

    Args:
        path: the file.
        write: whether the file is also written; it then must not be a symbolic link.
        new: whether to make the file if it is missing, and to empty it otherwise.

    Raises:
        OSError: the file cannot be opened, or is none.
    """
    flags = (os.O_RDWR | NO_LINK) if write else os.O_RDONLY
    flags |= getattr(os, "O_NONBLOCK", 0) | (os.O_CREAT if new else 0)  # a pipe does not block
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if new:
            os.ftruncate(descriptor, 0)
        return open(descriptor, "r+b", buffering=0) if write else open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger.
    """
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            text = f"its size, {byte_size(size)}, is above the limit of {byte_size(most)}"
            raise OSError(errno.EFBIG, text, str(path))
        parts = []
        while part := file.read(min(most, 2**20) + 1):
            parts.append(part)
            if (most := most - len(part)) < 0:  # it grew meanwhile, or it has no size
                raise OSError(errno.EFBIG, "it is too large", str(path))
        return b"".join(parts)


def yaml_fault(text: str) -> str | None:
    r"""Return what makes a YAML text unsafe to load: aliases or deep nesting; None if nothing does.

    An alias repeats a part of the text. 600 bytes with aliases of aliases have 10⁹ values.

    Example:
        >>> yaml_fault("a: &x [1]\nb: *x"), yaml_fault("a: [1]")
        ('has the alias *x', None)
    """
    import yaml

    depth = 0
    for token in yaml.scan(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(token, yaml.AliasToken):
            return f"has the alias *{token.value}"
        depth += isinstance(
            token,
            (
                yaml.BlockMappingStartToken,
                yaml.BlockSequenceStartToken,
                yaml.FlowMappingStartToken,
                yaml.FlowSequenceStartToken,
            ),
        )
        depth -= isinstance(
            token, (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
        )
        if depth > MOST_NESTING:
            return f"is nested more than {MOST_NESTING} levels deep"
    return None


def read_yaml(path: Path) -> Any:
    """Return the plain content of a YAML file.

    Raises:
        OSError: see `read_bytes`.
        ValueError: the file is not YAML, or is unsafe; the message continues a sentence.
    """
    import yaml

    try:
        text = read_bytes(path, MOST_YAML_BYTES).decode()
        if fault := yaml_fault(text):
            raise ValueError(fault)
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError):
        raise ValueError("is not YAML") from None
