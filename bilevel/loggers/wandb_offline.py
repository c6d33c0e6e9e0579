"""What W&B's offline files of a run really hold: a process that is killed loses what W&B had not yet written."""

import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK = 32768  # a file is LevelDB's log: blocks of this size, records in pieces with a header of 7 bytes, the file's own before
HEADER = struct.Struct("<IHB")
WHOLE, LAST = 1, 4


def last_step(directory: Path, run_id: str) -> int:
    """The last step in the offline files of a run, -1 where there is none; pieces that were cut off are skipped.

    Raises:
        ImportError: this W&B has its messages elsewhere.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # protobuf makes it when it is imported

    last = -1
    for file in sorted(directory.glob(f"wandb/offline-run-*/run-{run_id}.wandb")):
        for piece in _records(file.read_bytes()):
            record = Record()
            try:
                record.ParseFromString(piece)
            except Exception:  # protobuf's own error, whose place varies: the rest of a record whose beginning was lost
                continue
            if record.WhichOneof("record_type") == "history":
                last = max(last, record.history.step.num)
    return last


def _records(content: bytes) -> Iterator[bytes]:
    position, gathered = HEADER.size, b""
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
                yield gathered
            gathered = b""
