"""The table of hyperparameters: their start, and the values that each solver found."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bilevel.comparison.part import Part
from bilevel.comparison.runs import Array, Run
from bilevel.comparison.statistics import mean_std
from bilevel.comparison.table import Rows, plus_minus

NOTE = (
    "λ at the end of each run, in its own units: mean ± standard deviation over runs. Of a "
    "hyperparameter with several entries, the number is the mean of its entries, and the range "
    "is that of all entries of all runs."
)
DIFFERS = "differs"


class Value(NamedTuple):
    """One value of a hyperparameter: the mean of its entries, their range and their number."""

    mean: float
    low: float
    high: float
    entries: int | None


def hyper_table(groups: Mapping[str, Sequence[Run]]) -> Part | None:
    """Return the table of hyperparameters; None where no run has recorded one.

    Each hyperparameter has a row, and each group a column. Where groups begin at different values,
    the cell of a group has its own start.
    """
    runs = [run for members in groups.values() for run in members]
    cells = []
    for name in dict.fromkeys(name for run in runs for name in run.part("hypers.")):
        starts = {label: _values(members, name, 0) for label, members in groups.items()}
        first = _text([value for values in starts.values() for value in values], spread=False)
        found = {label: _values(members, name, -1) for label, members in groups.items()}
        if not any(found.values()):
            continue
        own = len({_text(values, spread=False) for values in starts.values() if values}) > 1
        row = [_titled(name, runs), DIFFERS if own else first]
        for label in groups:
            text = _text(found[label], spread=True)
            own_start = f" (from {_text(starts[label], spread=False)})" if own and text else ""
            row.append(text + own_start)
        cells.append(row)
    if not cells:
        return None
    return Part("Hyperparameters", Rows(["hyperparameter", "start", *groups], cells), NOTE, fixed=2)


def _values(runs: Sequence[Run], name: str, at: int) -> list[Value]:
    """Return the first (`at=0`) or last (`at=-1`) known value of each run that has one."""
    found = (_value(run, name, at) for run in runs)
    return [value for value in found if value is not None]


def _value(run: Run, name: str, at: int) -> Value | None:
    column = run.column(f"hypers.{name}")
    rows = _known(column)
    if not rows.size:
        return None
    entries = np.atleast_1d(column[rows[at]])
    low, high = (run.columns.get(f"hypers.{name}.{end}") for end in ("min", "max"))
    if low is not None and high is not None:  # a large one is recorded by mean and range
        return Value(float(entries[0]), float(low[rows[at]]), float(high[rows[at]]), None)
    return Value(float(entries.mean()), float(entries.min()), float(entries.max()), entries.size)


def _known(column: Array) -> NDArray[np.intp]:
    """Return the evaluations at which all entries are known."""
    finite = np.isfinite(column)
    return np.flatnonzero(finite if finite.ndim == 1 else finite.all(axis=1))


def _text(values: Sequence[Value], *, spread: bool) -> str:
    """Return mean ± standard deviation of the values, with the range of several entries."""
    summary = mean_std(value.mean for value in values)
    if summary is None:
        return ""
    text = plus_minus(summary.mean, summary.std if spread and summary.std > 0 else None)
    low, high = min(value.low for value in values), max(value.high for value in values)
    several = any(value.entries != 1 for value in values)
    if high > low and (several or not spread):
        return f"{text} ({low:.3g} to {high:.3g})"
    return text


def _titled(name: str, runs: Sequence[Run]) -> str:
    """Return the name, with the number of entries where there are several."""
    sizes = {value.entries for value in _values(runs, name, 0)}
    known = sorted(size for size in sizes if size is not None)
    return name if known in ([], [1]) else f"{name} [{' or '.join(map(str, known))}]"
