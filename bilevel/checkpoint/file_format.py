"""The format of a checkpoint on disk: one file with a checksum in it.

The file is what `torch.save` writes, a zip archive. Its comment holds the version of the format and
the SHA-256 of everything before that sum. One write and one rename store both, and a flipped bit is
found before anything is unpickled. The sums of a zip archive leave out its headers, and
`torch.load` does not check them.
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
from bilevel.text import byte_size, first_line
from bilevel.untrusted_files import open_regular

FORMAT = "bilevel-checkpoint"
VERSION = 3
"""Version 3 has solvers and problems in `bilevel.solvers` and `bilevel.problems`."""

FOREIGN = "is not a checkpoint of bilevel (it has no checksum)"

_SEAL = re.compile(rb"bilevel-checkpoint (\d+) sha256 ([0-9a-f]{64})\Z")
_HEX = 64
_LENGTH = struct.Struct("<H")
_END = b"PK\x05\x06"
"""The start of the last record of a zip archive, whose comment follows it after 22 bytes."""


class Unreadable(Exception):
    """A file cannot be read; the message continues a sentence that begins with its path."""


def write(content: dict[str, Any], file: BinaryIO) -> None:
    """Write tensors, numbers, strings and containers of them."""
    summing = _ChecksumWriter(file)
    everything = {"format": FORMAT, "version": VERSION, **content}
    torch.save(everything, summing)  # type: ignore[arg-type]  # it has what torch.save calls
    summing.seal(f"{FORMAT} {VERSION} sha256 ".encode())


def read(path: Path) -> dict[str, Any]:
    """Return what was written, on the CPU, without executing code.

    Raises:
        Unreadable: the file is truncated, damaged or foreign.
        BilevelError: the file has another version.
    """
    try:
        with open_regular(path) as file:
            _check_version(path, _verified(file))
            _check_size(file)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (BilevelError, Unreadable):
        raise
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or error})") from None
    except Exception as error:  # unpickling another file raises nearly anything
        reason = first_line(error).partition(". ")[0]  # without advice to run code
        raise Unreadable(f"is damaged, or is not a checkpoint of bilevel ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Unreadable(FOREIGN)
    return content


def check_version(path: Path) -> None:
    """Check the version that a checkpoint claims; a file without a checksum passes.

    Raises:
        BilevelError: the version is another one.
    """
    with open_regular(path) as file:
        seal = _SEAL.search(_tail(file))
    if seal is not None:
        _check_version(path, seal)


def _check_version(path: Path, seal: "re.Match[bytes]") -> None:
    version = int(seal[1])
    if version > VERSION:
        raise BilevelError(
            f"{path} has format {version}, which is newer than this bilevel reads ({VERSION}); "
            "update bilevel, or resume with the bilevel that wrote it"
        )
    if version < VERSION:
        raise BilevelError(
            f"{path} has format {version}, from before solvers and problems moved into "
            "bilevel.solvers and bilevel.problems; resume with the bilevel that wrote it, or start "
            "a new run"
        )


class _ChecksumWriter:
    """A file that sums up what is written to it.

    It holds back the last two bytes, which are the length of the comment of a zip archive.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.tail = b""

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


def _verified(file: BinaryIO) -> "re.Match[bytes]":
    """Return the seal of a file that matches its content.

    Raises:
        Unreadable: it does not match, or there is none.
    """
    seal = _SEAL.search(_tail(file))
    if seal is None:
        raise Unreadable(_without_seal(file))
    digest, left = hashlib.sha256(), file.seek(0, os.SEEK_END) - _HEX
    file.seek(0)
    while left > 0 and (part := file.read(min(left, 1 << 20))):
        digest.update(part)
        left -= len(part)
    if digest.hexdigest().encode() != seal[2]:
        raise Unreadable("is damaged (it does not match its checksum)")
    return seal


def _check_size(file: BinaryIO) -> None:
    """Check that an archive unpacks to no more than its size; `torch.save` compresses nothing.

    Raises:
        Unreadable: it would unpack to more.
    """
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Unreadable(
            f"would unpack {byte_size(size)} to {byte_size(unpacked)}, so bilevel did not write it"
        )


def _without_seal(file: BinaryIO) -> str:
    """Return what is wrong with a file that has no checksum: a whole zip archive is foreign."""
    file.seek(0)
    if file.read(2) not in (b"PK", b"P", b""):
        return FOREIGN
    tail = _tail(file)
    end = tail.rfind(_END)
    rest = tail[end + 20 :]
    if end < 0 or len(rest) < _LENGTH.size:
        return "is truncated"
    (length,) = _LENGTH.unpack_from(rest)
    return "is truncated" if len(rest) < _LENGTH.size + length else FOREIGN


def _tail(file: BinaryIO) -> bytes:
    """Return the last bytes of a file, which hold the checksum."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 128))
    return file.read()
