"""Read W&B's offline files: a header, then blocks of 32 KiB in LevelDB's log format."""

import struct
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = struct.Struct("<IHB")
WHOLE, LAST = 1, 4


def read_file(path: Path) -> list[Any]:
    """Return the records of a file; a record that was cut off at its end is left out."""
    from wandb.proto import wandb_internal_pb2

    records, content, position, gathered = [], path.read_bytes(), HEADER.size, b""
    assert content[:4] in (b":W&B", b"")
    while position + HEADER.size <= len(content):
        if (left := BLOCK - position % BLOCK) < HEADER.size:  # too short for a header: zeros
            position += left
            continue
        _, size, kind = HEADER.unpack_from(content, position)
        position += HEADER.size
        gathered += content[position : position + size]
        position += size
        if kind in (WHOLE, LAST):
            if position <= len(content):
                records.append(wandb_internal_pb2.Record())
                records[-1].ParseFromString(gathered)
            gathered = b""
    return records


def of_kind(records: list[Any], kind: str) -> list[Any]:
    """Return the records of one kind: `run`, `history`, `summary`, `exit` and so on."""
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]
