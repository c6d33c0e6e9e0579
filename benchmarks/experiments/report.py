"""Format numbers and tables for the pages."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bilevel.comparison.runs import Run


def spread(values: Iterable[float | None], form: str) -> str:
    """Return mean ± standard deviation of the finite values, with their number if some are not.

    The form `%` writes percent.

    Example:
        >>> spread([1.0, 2.0], ".2g"), spread([0.98, 0.96], "%")
        ('1.5 ± 0.71', '97.00 ± 1.41 %')
        >>> spread([1.0, None], ".2g"), spread([], ".2g")
        ('1 (1 of 2)', '–')
    """
    given = list(values)
    known = [value for value in given if value is not None and math.isfinite(value)]
    if not known:
        return "–"
    scale, end, form = (100, " %", ".2f") if form == "%" else (1, "", form)
    text = f"{scale * statistics.mean(known):{form}}"
    if len(known) > 1:
        text += f" ± {scale * statistics.stdev(known):{form}}"
    return text + end + (f" ({len(known)} of {len(given)})" if len(known) < len(given) else "")


def by_solver(runs: "Sequence[Run]") -> "dict[str, list[Run]]":
    """Return the runs of each solver, in the order of the command line."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.solver, []).append(run)
    return groups


def counted(runs: "Sequence[Run]") -> str:
    """Return the number of runs and of diverged ones, which count with their best so far.

    Example:
        >>> counted([])
        '0'
    """
    gone = sum(run.status == "diverged" for run in runs)
    return f"{len(runs)}, {gone} diverged" if gone else str(len(runs))


def never(times: Iterable[float | None], form: str) -> str:
    """Return the time to a target as `spread` does, and the number of runs that never reached it.

    Example:
        >>> never([1.0, 3.0], ".2g"), never([1.0, None], ".2g"), never([None, None], ".2g")
        ('2 ± 1.4', '1; never in 1 of 2', 'never in 2 of 2')
    """
    given = list(times)
    known = [time for time in given if time is not None]
    parts = [spread(known, form)] if known else []
    if len(known) < len(given):
        parts.append(f"never in {len(given) - len(known)} of {len(given)}")
    return "; ".join(parts) or "–"


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    best: Mapping[int, Callable[[Iterable[float]], float]] | None = None,
) -> str:
    """Return a Markdown table; the best mean of a column in `best` is bold.

    Example:
        >>> print(table(["", "loss"], [["a", "2 ± 1"], ["b", "1 ± 1"]], best={1: min}))
        | | loss |
        |---|---|
        | a | 2 ± 1 |
        | b | **1 ± 1** |
    """
    cells = [list(row) for row in rows]
    for column, pick in (best or {}).items():
        means = [_mean(row[column]) for row in cells]
        known = [mean for mean in means if mean is not None]
        for row, mean in zip(cells, means, strict=True):
            if known and mean == pick(known):
                row[column] = f"**{row[column]}**"
    lines = [list(head), *cells]
    text = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(head), *text[1:]])


def _mean(cell: str) -> float | None:
    try:
        return float(cell.split()[0])
    except (ValueError, IndexError):
        return None
