"""The columns of the table that a sweep prints at its end."""

from bilevel.comparison.cost_table import COST
from bilevel.comparison.quality_table import ACCURACY, BEST, LAST_REGRET, TEST, TO_PART

SWEEP = (BEST, TEST, ACCURACY, LAST_REGRET, TO_PART, *COST)
