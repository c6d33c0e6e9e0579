"""The origin of a report: its command and date, and device, commit and versions of its runs."""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from bilevel.comparison.part import Part
from bilevel.comparison.runs import Run
from bilevel.comparison.table import Rows
from bilevel.loggers.records import DESCRIPTION, METRICS
from bilevel.text import printable

UNKNOWN = "not recorded"
OF_TIME = ("device", "threads", "torch")
"""Facts on which training time depends."""
OF_NUMBERS = ("commit", "bilevel", "torch", "python")
"""Facts on which the other numbers may depend."""


def origin(runs: Sequence[Run], command: str) -> Part:
    """Return the table of the origin of runs and report, with a warning where runs differ.

    Commit, device, threads and versions are those that the files of the runs name.
    """
    facts: dict[str, Callable[[Run], str | None]] = {
        name: lambda run, name=name: fact(run, name)  # type: ignore[misc]
        for name in dict.fromkeys(("commit", "device", "threads", *OF_NUMBERS))
    }
    found = {name: _counted([of(run) for run in runs]) for name, of in facts.items()}
    cells = [["report", f"{datetime.now():%Y-%m-%d %H:%M}, by {command}"]]
    cells += [["runs", _dates(runs)]]
    cells += [[name, _listed(values)] for name, values in found.items() if set(values) != {None}]
    missing = [name for name, values in found.items() if set(values) == {None}]
    if missing:
        cells += [[", ".join(missing), UNKNOWN]]
    return Part("Origin", Rows(["", ""], cells), _warning(found), words=(0, 1))


def fact(run: Run, name: str) -> str | None:
    """Return a fact that the files of a run name in `environment`, as text.

    Other programs may name it at the top, or elsewhere one level below.
    """
    for record in (run.description, run.summary or {}):
        own = record.get("environment")
        for part in (own, record, *record.values()):
            if not isinstance(part, dict):
                continue
            value: Any = part.get(name)
            if isinstance(value, (str, int, float)) and value != "":
                return printable(str(value))
    return None


def _counted(values: Sequence[str | None]) -> Mapping[str | None, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}


def _listed(values: Mapping[str | None, int]) -> str:
    if len(values) == 1:
        return str(next(iter(values)))
    return ", ".join(
        f"{value or UNKNOWN} ({count} {'run' if count == 1 else 'runs'})"
        for value, count in values.items()
    )


def _dates(runs: Sequence[Run]) -> str:
    """Return the number of runs, and when the first began and the last ended, by their files."""
    times = [t for run in runs for name in (DESCRIPTION, METRICS) if (t := _time(run, name))]
    count = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}"
    if not times:
        return count
    first, last = (f"{datetime.fromtimestamp(t):%Y-%m-%d %H:%M}" for t in (min(times), max(times)))
    return f"{count}, {first}" + ("" if first == last else f" to {last}")


def _time(run: Run, name: str) -> float | None:
    try:
        return os.stat(run.directory / name).st_mtime
    except OSError:
        return None


def _warning(found: Mapping[str, Mapping[str | None, int]]) -> str:
    differ = [name for name, values in found.items() if len(values) > 1]
    sentences = []
    if of_time := [name for name in differ if name in OF_TIME]:
        sentences.append(f"The runs differ in {_and(of_time)}, so do not compare their times.")
    if of_numbers := [name for name in differ if name in OF_NUMBERS]:
        sentences.append(
            f"The runs differ in {_and(of_numbers)}, which may change their other numbers too."
        )
    return " ".join(sentences)


def _and(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
