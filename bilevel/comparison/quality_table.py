"""The table of quality: the scores of the best evaluation of each run."""

from collections.abc import Mapping, Sequence

import numpy as np

from bilevel.comparison.curves import LOSS, reached
from bilevel.comparison.part import Part
from bilevel.comparison.runs import Run
from bilevel.comparison.table import Column, percent, plus_minus, rows

REGRET = "exact.regret"
PART = 0.1
"""Part of the initial regret down to which the number of examples is reported."""


def quality_table(groups: Mapping[str, Sequence[Run]]) -> Part:
    """Return the table of quality."""
    return Part("Quality", rows(groups, QUALITY), NOTE)


def part_of_regret(run: Run) -> float | None:
    """Return the examples consumed when regret first fell to a tenth of its initial value.

    Returns None where regret is unknown.
    """
    column = run.column(REGRET)
    if not column.size or not np.isfinite(column[0]):
        return None
    cost = reached(run, PART * float(column[0]), REGRET)
    return None if cost is None else cost.examples


NOTE = (
    "At the best evaluation of each run, by default that of lowest validation loss; mean ± "
    "standard deviation over runs."
)
BEST = Column("best valid loss", lambda run: run.at_best(LOSS), plus_minus, "low")
TEST = Column("test loss there", lambda run: run.at_best("test_loss"), plus_minus, "low")
ACCURACY = Column("test accuracy", lambda run: run.at_best("test_accuracy"), percent, "high")
LAST_REGRET = Column("regret of last λ", lambda run: run.at_end(REGRET), plus_minus, "low")
TO_PART = Column("examples to ⅒ of it", part_of_regret, plus_minus, "low")

QUALITY = (
    BEST,
    Column("valid accuracy", lambda run: run.at_best("valid_accuracy"), percent, "high"),
    TEST,
    ACCURACY,
    Column("regret there", lambda run: run.at_best(REGRET), plus_minus, "low"),
    LAST_REGRET,
)
