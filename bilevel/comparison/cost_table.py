"""The table of cost: training time and examples, of the whole run and until a target."""

from collections.abc import Mapping, Sequence

from bilevel.comparison.curves import reached
from bilevel.comparison.part import Part
from bilevel.comparison.runs import Run
from bilevel.comparison.table import Column, plus_minus, rows, seconds_text


def cost_table(
    groups: Mapping[str, Sequence[Run]], target: float | None, target_source: str
) -> Part:
    """Return the table of cost; `target_source` is the choice of the target in words."""
    note = "" if target is None else f"The target, {target:.4g}, is {target_source}."
    return Part("Cost", rows(groups, (*targeted(target), *COST)), note)


def targeted(target: float | None) -> tuple[Column, ...]:
    """Return the columns with the cost of reaching a target."""
    if target is None:
        return ()

    def seconds(run: Run) -> float | None:
        cost = reached(run, target)
        return None if cost is None else cost.seconds

    def examples(run: Run) -> float | None:
        cost = reached(run, target)
        return None if cost is None else cost.examples

    return Column(f"time to {target:.4g}", seconds, seconds_text, "low"), Column(
        f"examples to {target:.4g}", examples, plus_minus, "low"
    )


TIME = Column("time", lambda run: run.total("seconds"), seconds_text, "low")
EXAMPLES = Column("examples", lambda run: run.total("examples"), plus_minus, "low")
OUTER = Column("outer steps", lambda run: run.total("outer_steps"), plus_minus)
OF_REFITS = (
    Column("time of refits", lambda run: run.of_refits("seconds"), seconds_text),
    Column("examples of refits", lambda run: run.of_refits("examples"), plus_minus),
)
COST = (TIME, EXAMPLES, *OF_REFITS, OUTER)
