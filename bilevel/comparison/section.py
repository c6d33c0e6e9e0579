"""The results of the runs on one problem."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bilevel.comparison.figures import Picture
from bilevel.comparison.runs import Run
from bilevel.comparison.statistics import Paired
from bilevel.comparison.table import Rows


@dataclass(frozen=True, kw_only=True)
class Section:
    """The results of the runs on one problem.

    Attributes:
        problem: name of the problem.
        groups: its runs by label.
        target: the validation loss whose cost is reported; None where no run has a loss.
        target_source: the choice of the target, in words.
        quality, cost, step: tables of quality, cost, and cost per step.
        pairs: the paired comparisons, by compared quantity.
        all_pairs: True where they are all pairs.
        notes: facts about these runs that a reader must consider.
        pictures: pictures as PNG.
    """

    problem: str
    groups: Mapping[str, Sequence[Run]]
    target: float | None
    target_source: str
    quality: Rows
    cost: Rows
    step: Rows
    pairs: Mapping[str, Sequence[Paired]]
    all_pairs: bool
    notes: Sequence[str]
    pictures: Sequence[Picture]
