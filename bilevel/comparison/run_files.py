"""The files of runs: where they lie, and how damaged ones are read."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bilevel.loggers.records import METRICS, SUMMARY, Record
from bilevel.text import printable
from bilevel.untrusted_files import read_bytes, read_yaml

CONFIG = "config.yaml"
Warn = Callable[[str], None]
"""Receives a sentence about a file that cannot be used."""


def find_runs(place: Path, warn: Warn) -> Iterator[Path]:
    """Yield the run directories at or below `place`; a run's own subdirectories belong to it."""

    def unreadable(error: OSError) -> None:
        warn(f"cannot list {error.filename} ({error.strerror or error}); its content is left out")

    for root, below, files in os.walk(place, onerror=unreadable):
        if METRICS in files or SUMMARY in files:
            below.clear()
            yield Path(root)
        below.sort(key=_in_order)


def _in_order(name: str) -> tuple[int, str]:
    """Return a sort key; sweeps number their runs from 0 without leading zeros."""
    number = name.partition("-")[0]
    return (int(number) if number.isascii() and number.isdigit() else -1, name)


def parse_records(path: Path) -> tuple[list[Record], int]:
    """Return the records and the number of damaged lines; an unfinished last line is neither."""
    lines = read_bytes(path).split(b"\n")[:-1]
    try:
        # parsing all lines at once takes half the time
        records = json.loads(b"[" + b",".join(lines) + b"]")
        if len(records) == len(lines) and all(type(record) is dict for record in records):
            return records, 0
    except (ValueError, RecursionError):
        pass
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records, len(lines) - len(records)


def read_object(path: Path, warn: Warn) -> Record:
    """Return a JSON object; {} without the file, and {} after a warning where it is damaged."""
    try:
        found = json.loads(read_bytes(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not JSON"
        warn(f"cannot use {path} ({reason}); the run is read without it")
        return {}
    if isinstance(found, dict):
        return _printable(found)
    warn(f"cannot use {path} (it holds no object); the run is read without it")
    return {}


def read_config(path: Path, warn: Warn) -> dict[str, Any]:
    """Return the settings in a YAML file; {} without the file, and {} after a warning."""
    try:
        found = read_yaml(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else f"it {error}"
        warn(f"cannot use {path} ({reason}); the run is read without it")
        return {}
    if isinstance(found, dict):
        return _printable({str(key): value for key, value in found.items()})
    warn(f"cannot use {path} (it holds no settings); the run is read without it")
    return {}


def _printable(node: Any) -> Any:
    """Return nested containers whose text has no characters that command a terminal."""
    if isinstance(node, str):
        return printable(node)
    if isinstance(node, dict):
        return {
            printable(key) if isinstance(key, str) else key: _printable(value)
            for key, value in node.items()
        }
    return [_printable(value) for value in node] if isinstance(node, list) else node
