"""Wide tables as blocks of columns below one another, so that no page cuts a column off."""

from collections.abc import Sequence

from bilevel.comparison.table import Rows

GAP = 2
"""Letters between two columns."""


def blocks(content: Rows, width: int, fixed: int = 1, *, label: int | None = None) -> list[Rows]:
    """Return the table as blocks that are at most `width` letters wide.

    Each block repeats the first `fixed` columns. A single column that is wider has its own block.
    A label takes at most `label` letters, since it may be broken into lines; by default half of
    the width.

    Example:
        >>> rows = Rows(["solver", "loss", "time"], [["stn", "0.5", "3.00 s"]])
        >>> [block.titles for block in blocks(rows, 20)]
        [['solver', 'loss'], ['solver', 'time']]
    """
    widths = [content.width(at) + GAP for at in range(len(content.titles))]
    longest = width // 2 if label is None else label
    room = width - min(widths[0], longest) - sum(widths[1:fixed])
    kept: list[list[int]] = []
    used = 0
    for index in range(fixed, len(widths)):
        if not kept or used + widths[index] > room:
            kept.append([])
            used = 0
        kept[-1].append(index)
        used += widths[index]
    return [_select(content, [*range(fixed), *columns]) for columns in kept] or [content]


def _select(content: Rows, columns: Sequence[int]) -> Rows:
    """Return some columns of a table, with their marks."""
    return Rows(
        [content.titles[index] for index in columns],
        [[row[index] for index in columns] for row in content.cells],
        frozenset(
            (row, columns.index(column)) for row, column in content.marks if column in columns
        ),
    )
