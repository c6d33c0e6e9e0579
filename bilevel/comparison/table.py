"""Tables of groups of runs as text: cells with mean ± standard deviation, and marks."""

import math
from collections.abc import Callable, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Literal, NamedTuple

from bilevel.comparison.runs import Run
from bilevel.comparison.statistics import MeanStd, mean_std
from bilevel.loggers.tables import duration, number

if TYPE_CHECKING:
    from rich.table import Table

MARK = "* "
"""Stands before the best value of a column; it is visible in print, as bold text may not be."""
MARK_NOTE = (
    "* marks the best mean of a column. A group with a diverged run, or without a number for one "
    "of its runs, gets no mark."
)


TITLE = 20
"""Letters of a title that stand in one line, also above narrower cells."""


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        title: the title.
        of: the value of a run.
        form: the text of mean and standard deviation.
        better: the better values; None for a column without a best one.
    """

    title: str
    of: Callable[[Run], float | None]
    form: Callable[[float, float | None], str]
    better: Literal["low", "high"] | None = None


class Rows(NamedTuple):
    """A table as text: titles, a row of cells for each group, and the marked cells.

    A mark is the place of a cell: row and column.
    """

    titles: list[str]
    cells: list[list[str]]
    marks: frozenset[tuple[int, int]] = frozenset()

    def text(self, row: int, column: int) -> str:
        """Return a cell with its mark."""
        mark = MARK if (row, column) in self.marks else ""
        return f"{mark}{self.cells[row][column]}"

    def title_lines(self, column: int) -> list[str]:
        """Return a title in lines that are not much wider than the cells of its column."""
        cells = (len(self.text(row, column)) for row in range(len(self.cells)))
        return wrap(self.titles[column], max(TITLE, *cells), break_on_hyphens=False) or [""]

    def width(self, column: int) -> int:
        """Return the width of a column in letters."""
        cells = [self.text(row, column) for row in range(len(self.cells))]
        return max(map(len, [*self.title_lines(column), *cells]))


def rows(groups: Mapping[str, Sequence[Run]], columns: Sequence[Column]) -> Rows:
    """Return a row for each group: label, n, the columns with any value, and failures.

    Failures count the runs that did not end in order. The best value of a column is marked.
    """
    kept = [
        column
        for column in columns
        if any(column.of(run) is not None for runs in groups.values() for run in runs)
    ]
    cells = [
        [label, str(len(runs)), *(_cell(column, runs) for column in kept), failures(runs)]
        for label, runs in groups.items()
    ]
    titles = ["solver", "n", *(column.title for column in kept), ""]
    if not any(row[-1] for row in cells):
        titles, cells = titles[:-1], [row[:-1] for row in cells]
    marks = {(row, 2 + at) for at, column in enumerate(kept) for row in _best(column, groups)}
    return Rows(titles, cells, frozenset(marks))


def _best(column: Column, groups: Mapping[str, Sequence[Run]]) -> list[int]:
    """Return the rows with the best mean, or none where all means are equal."""
    if column.better is None:
        return []
    sign = 1 if column.better == "low" else -1
    known: dict[int, MeanStd] = {}
    for row, runs in enumerate(groups.values()):
        if (found := mean_std(column.of(run) for run in runs)) is not None:
            known[row] = found
    sound = [not any(run.status == "diverged" for run in runs) for runs in groups.values()]
    means = {
        row: sign * found.mean for row, found in known.items() if sound[row] and found.n == found.of
    }
    if not means or len({found.mean for found in known.values()}) < 2:
        return []
    return [row for row, mean in means.items() if mean == min(means.values())]


def rich_table(content: Rows, title: str | None = None) -> "Table":
    """Return the rows as a table of rich; a long label is broken into lines."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None,
        padding=(0, 1),
        header_style="bold",
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=any(content.titles),
    )
    for index, name in enumerate(content.titles):
        left = index == 0 or not name
        lines = "\n".join(content.title_lines(index))
        table.add_column(Text(lines), justify="left" if left else "right", overflow="fold")
    for row, cells in enumerate(content.cells):
        styles = ["bold" if (row, at) in content.marks else "" for at in range(len(cells))]
        texts = [content.text(row, at) for at in range(len(cells))]
        table.add_row(*map(Text, texts, styles))
    return table


def failures(runs: Sequence[Run]) -> str:
    """Return the number of runs that did not end in order, as text."""
    words = {"diverged": "diverged", "interrupted": "interrupted", "running": "not ended"}
    return ", ".join(
        f"{n} {word}"
        for status, word in words.items()
        if (n := sum(run.status == status for run in runs))
    )


def plus_minus(mean: float, std: float | None = None) -> str:
    """Return a mean with its standard deviation, to two digits of the latter.

    Example:
        >>> plus_minus(0.646, 0.00131), plus_minus(2.51e-05, 4.08e-05)
        ('0.6460 ± 0.0013', '(2.5 ± 4.1)e-05')
        >>> plus_minus(142800.0, 2078.0), plus_minus(0.5)
        ('142,800 ± 2,078', '0.5')
    """
    if std is None:
        return _plain(mean)
    size = max(abs(mean), std)
    if std == 0 or not math.isfinite(size) or size > 2e4 * std:
        return f"{_plain(mean, digits=5)} ± {std:.1g}"
    exponent = math.floor(math.log10(size))
    if -4 <= exponent < 9:
        decimals = max(0, 1 - math.floor(math.log10(std)))
        return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}"
    decimals = max(0, 1 - math.floor(math.log10(std / 10**exponent)))
    return (
        f"({mean / 10**exponent:.{decimals}f} ± {std / 10**exponent:.{decimals}f})e{exponent:+03d}"
    )


def _plain(value: float, digits: int = 4) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e3 and value == round(value) else f"{value:.{digits}g}"


def percent(mean: float, std: float | None = None) -> str:
    """Return a mean of accuracies in percent, with its standard deviation."""
    return number("accuracy", mean) if std is None else f"{100 * mean:.2f} ± {100 * std:.2f} %"


def seconds_text(mean: float, std: float | None = None) -> str:
    """Return a mean of seconds in suitable units, with its standard deviation."""
    if mean >= 60:
        return duration(mean) if std is None else f"{duration(mean)} ± {duration(std)}"
    return f"{mean:.2f} s" if std is None else f"{mean:.2f} ± {std:.2f} s"


def memory(mean: float, std: float | None = None) -> str:
    """Return a mean of bytes in MiB, with its standard deviation."""
    mib = 1024.0**2
    return f"{mean / mib:,.0f} MiB" if std is None else f"{mean / mib:,.0f} ± {std / mib:,.0f} MiB"


def _cell(column: Column, runs: Sequence[Run]) -> str:
    summary = mean_std(column.of(run) for run in runs)
    if summary is None:
        return ""
    text = column.form(summary.mean, summary.std if summary.n > 1 else None)
    return text if summary.n == summary.of else f"{text} ({summary.n} of {summary.of})"
