"""Records of W&B's offline files, by kind."""

from pathlib import Path
from typing import Any

from bilevel.loggers.wandb_file import records


def read_file(path: Path) -> list[Any]:
    """Return the records of a file; a record that was cut off at its end is left out."""
    return list(records(path))


def of_kind(records: list[Any], kind: str) -> list[Any]:
    """Return the records of one kind: `run`, `history`, `summary`, `exit` and so on."""
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]
