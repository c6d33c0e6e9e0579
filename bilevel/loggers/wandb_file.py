"""W&B's offline files: the steps that W&B has written, read back.

The file is a header and then blocks of 32 KiB in LevelDB's log format. A record lies in one chunk
or in several ones, each with a checksum.
"""

import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

BLOCK = 32768
CHUNK = struct.Struct("<IHB")
WHOLE, LAST = 1, 4
WAIT = 3.0
"""Seconds for which W&B's own process may still write when a run has ended."""


class Written(NamedTuple):
    """The steps that a file holds, and whether W&B has ended it in order."""

    steps: set[int]
    ended: bool


def missing_steps(folder: Path, logged: Iterable[int]) -> list[int] | None:
    """Return the logged steps that W&B's file in `folder` lacks; None if it holds the whole run.

    A file with all steps lacks the end of the run, with its summary, if the list is empty.
    """
    deadline, logged = time.monotonic() + WAIT, sorted(logged)
    while True:
        found = written(folder)
        lost = [step for step in logged if step not in found.steps]
        if not lost and found.ended:
            return None
        if time.monotonic() >= deadline:
            return lost
        time.sleep(0.05)


def written(folder: Path) -> Written:
    """Return what the file in W&B's folder of a run holds; nothing if there is no file."""
    steps, ended = set(), False
    for path in folder.glob("*.wandb"):
        for record in records(path):
            kind = record.WhichOneof("record_type")
            ended = ended or kind == "exit"
            if kind == "history":
                steps.add(record.history.step.num)
    return Written(steps, ended)


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a file up to the first one that is cut off or damaged."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    new_record: Any = vars(wandb_internal_pb2)["Record"]
    with open(path, "rb") as file:
        for content in _contents(file):
            record = new_record()
            try:
                record.ParseFromString(content)
            except DecodeError:
                return
            yield record


def _contents(file: BinaryIO) -> Iterator[bytes]:
    position, gathered = CHUNK.size, b""  # the header of the file is as long as that of a chunk
    file.seek(position)
    while True:
        if (left := BLOCK - position % BLOCK) < CHUNK.size:  # too short for a chunk: zeros
            position += len(file.read(left))
        header = file.read(CHUNK.size)
        if len(header) < CHUNK.size:
            return
        checksum, size, kind = CHUNK.unpack(header)
        content = file.read(size)
        if len(content) < size or zlib.crc32(bytes([kind]) + content) != checksum:
            return
        position += CHUNK.size + size
        gathered += content
        if kind in (WHOLE, LAST):
            yield gathered
            gathered = b""
