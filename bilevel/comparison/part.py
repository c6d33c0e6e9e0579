"""One table of a report: its title, its rows, and the sentence that explains them."""

from typing import NamedTuple

from bilevel.comparison.table import Rows


class Part(NamedTuple):
    """A table of a report.

    Attributes:
        title: heading of the table.
        rows: titles and cells.
        note: explanation of the numbers; empty for none.
        fixed: number of leading columns that a wide table repeats in each of its blocks.
        words: columns of text, which are left-aligned.
    """

    title: str
    rows: Rows
    note: str = ""
    fixed: int = 1
    words: tuple[int, ...] = (0,)
