"""The results of the runs on one problem."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bilevel.comparison.figures import Picture
from bilevel.comparison.part import Part
from bilevel.comparison.runs import Run
from bilevel.comparison.statistics import Paired


@dataclass(frozen=True, kw_only=True)
class Section:
    """The results of the runs on one problem.

    Attributes:
        problem: name of the problem.
        groups: its runs by label.
        target: the validation loss whose cost is reported; None where no run has a loss.
        tables: the tables before the pictures, in their order.
        pairs: the paired comparisons, by compared quantity.
        all_pairs: True where they are all pairs.
        notes: facts about these runs that a reader must consider.
        pictures: pictures as PNG.
    """

    problem: str
    groups: Mapping[str, Sequence[Run]]
    target: float | None
    tables: Sequence[Part]
    pairs: Mapping[str, Sequence[Paired]]
    all_pairs: bool
    notes: Sequence[str]
    pictures: Sequence[Picture]

    def table(self, title: str) -> Part:
        """Return the table with a title."""
        return next(part for part in self.tables if part.title == title)
