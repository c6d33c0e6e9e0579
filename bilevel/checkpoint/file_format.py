"""One file with a checksum in it: what a checkpoint is on disk.

It is what `torch.save` writes, a zip, whose comment holds the version of the format and the SHA-256 of everything before that
sum. One write and one rename bring both, and a flipped bit anywhere is noticed before anything is unpickled; the sums of a zip
itself leave out its headers, and `torch.load` does not look at them.
"""

import hashlib
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bilevel.errors import BilevelError

FORMAT = "bilevel-checkpoint"
VERSION = 2
"""2: with a checksum. 1 had none, and is no longer read."""

FOREIGN = "is no checkpoint of bilevel"

_SEAL = re.compile(rb"bilevel-checkpoint (\d+) sha256 ([0-9a-f]{64})\Z")
_HEX, _LENGTH = 64, struct.Struct("<H")


class Unreadable(Exception):
    """What is wrong with a file, as the rest of a sentence that begins with its name."""


def write(content: dict[str, Any], file: BinaryIO) -> None:
    """Write tensors, numbers, strings and containers of them."""
    sealing = _Sealing(file)
    torch.save({"format": FORMAT, "version": VERSION, **content}, sealing)  # type: ignore[arg-type]  # it writes, no more
    sealing.seal(f"{FORMAT} {VERSION} sha256 ".encode())


def read(path: Path) -> dict[str, Any]:
    """What was written, on the CPU; code is never executed.

    Raises:
        Unreadable: the file is not whole, or something else.
        BilevelError: it is of another version.
    """
    try:
        with open(path, "rb") as file:
            seal = _verified(file)
            _check_version(path, _unsealed(file) if seal is None else int(seal[1]))
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (BilevelError, Unreadable):
        raise
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or error})") from None
    except Exception as error:  # unpickling what `write` has not written raises nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unreadable(f"is damaged, or no checkpoint of bilevel ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Unreadable(FOREIGN)
    return content


class _Sealing:
    """A file that sums up what it is given; the last two bytes, the length of a zip's comment, are held back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.tail = file, hashlib.sha256(), b""

    def write(self, data: Any) -> int:
        body = memoryview(data).cast("B")
        split = max(0, len(body) - _LENGTH.size)
        if split:
            self._write(self.tail)
            self._write(body[:split])
            self.tail = bytes(body[split:])
        else:
            self.tail += body
            self._write(self.tail[: -_LENGTH.size])
            self.tail = self.tail[-_LENGTH.size :]
        return len(body)

    def flush(self) -> None:
        self.file.flush()

    def seal(self, text: bytes) -> None:
        """End the archive with a comment: `text`, and the sum of everything before that sum."""
        self._write(_LENGTH.pack(len(text) + _HEX) + text)
        self.file.write(self.digest.hexdigest().encode())

    def _write(self, data: Any) -> None:
        self.digest.update(data)
        self.file.write(data)


def _verified(file: BinaryIO) -> "re.Match[bytes] | None":
    """The seal of a file that matches its content; None where it has no seal."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 128))
    seal = _SEAL.search(file.read())
    if seal is None:
        return None
    file.seek(0)
    digest, left = hashlib.sha256(), size - _HEX
    while left > 0 and (part := file.read(min(left, 1 << 20))):
        digest.update(part)
        left -= len(part)
    if digest.hexdigest().encode() != seal[2]:
        raise Unreadable("is damaged (it does not match its checksum)")
    return seal


def _unsealed(file: BinaryIO) -> int:
    """The version of a whole file from before there were checksums.

    Raises:
        Unreadable: it is no such file.
    """
    file.seek(0)
    if file.read(2) not in (b"PK", b"P", b""):
        raise Unreadable(FOREIGN)
    if not zipfile.is_zipfile(file):  # whose end marks it as whole
        raise Unreadable("is truncated")
    with zipfile.ZipFile(file) as archive:
        if archive.comment:
            ours = FORMAT.encode()[: len(archive.comment)] == archive.comment[: len(FORMAT)]
            raise Unreadable("is truncated" if ours else FOREIGN)
        if damaged := archive.testzip():
            raise Unreadable(f"is damaged ({damaged} in it does not match its checksum)")
    file.seek(0)
    content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Unreadable(FOREIGN)
    if content["version"] >= VERSION:
        raise Unreadable("is truncated (it has lost its checksum)")
    return int(content["version"])


def _check_version(path: Path, version: int) -> None:
    if version == VERSION:
        return
    written, otherwise = (
        ("a newer", "or update this one")
        if version > VERSION
        else ("an older", "or start a new run")
    )
    raise BilevelError(
        f"{path} was written by {written} bilevel (its format is {version}, and this bilevel reads {VERSION}); resume it with "
        f"the bilevel that wrote it, {otherwise}"
    )
