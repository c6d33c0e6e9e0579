"""Records as arrays: a column for every name, a row for every evaluation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.loggers.records import Record
from bilevel.text import printable
from bilevel.validate import is_number

Array = NDArray[np.float64]

HUGE = 1e100
"""Number above which a value counts as infinite, since no axis can show it beside others."""


SEVERAL = ("hypers.", "scales.")
"""Names that may have several entries."""


def columns_of(records: Sequence[Record]) -> dict[str, Array]:
    """Return the values of each name, [evaluations] or [evaluations, entries].

    NaN stands where a record lacks the name, and where a list stands in place of a number. Only
    hyperparameters and their scales have several entries.
    """
    columns: dict[str, Array] = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [record.get(name) for record in records]
        several = name.startswith(SEVERAL)
        example = next((value for value in values if value is not None), None) if several else None
        name = printable(name)
        if isinstance(example, dict):
            for key in ("mean", "min", "max"):
                parts = [value.get(key) if isinstance(value, dict) else None for value in values]
                columns[name if key == "mean" else f"{name}.{key}"] = _numbers(parts)
        elif isinstance(example, list):
            columns[name] = _table(values, np.size(np.asarray(example, dtype=object)))
        else:
            columns[name] = _numbers(values)
    return columns


def _numbers(values: Sequence[Any]) -> Array:
    try:
        numbers = np.array(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError):
        return np.array(
            [np.nan if (number := finite(value)) is None else number for value in values]
        )
    numbers[~(np.abs(numbers) < HUGE)] = np.nan
    return numbers


def _table(values: Sequence[Any], width: int) -> Array:
    """Return [evaluations, entries]; a row is NaN where the record has another shape."""
    table = np.full((len(values), width), np.nan)
    for row, value in enumerate(values):
        try:
            flat = np.array(value, dtype=np.float64).reshape(-1)
        except (TypeError, ValueError, OverflowError):
            continue
        if flat.size == width:
            table[row] = flat
    return table


def finite(value: Any) -> float | None:
    """Return the number, or None where the value is not a finite number."""
    if is_number(value):
        try:
            number = float(value)
        except OverflowError:  # JSON has integers of any size
            return None
        return number if abs(number) < HUGE else None
    return None
