"""The lists of laws that solvers rely on in a problem."""

from bilevel.checks.dropout_laws import dropout_rates
from bilevel.checks.example_laws import per_example_leaves
from bilevel.checks.finding import Law
from bilevel.checks.gradient_laws import (
    gradients_of_weights,
    hyperparameters,
    outer_gradient,
    trains_weights,
)
from bilevel.checks.last_batch import last_batch
from bilevel.checks.metric_laws import batch_average, metrics, split_average
from bilevel.checks.objective_laws import (
    averages,
    finite_objectives,
    scalar_objectives,
)
from bilevel.checks.prediction_laws import (
    depends_on_weights,
    example_axis,
    initial_weights,
    prediction_tree,
    purity,
)
from bilevel.checks.splits import splits
from bilevel.requirements import Need, Trait
from bilevel.solver import Solver

ALL: tuple[Law, ...] = (
    splits,
    initial_weights,
    prediction_tree,
    purity,
    depends_on_weights,
    scalar_objectives,
    finite_objectives,
    trains_weights,
    outer_gradient,
    averages,
    gradients_of_weights,
    hyperparameters,
    dropout_rates,
    per_example_leaves,
    example_axis,
    metrics,
    split_average,
    last_batch,
)
AFTER_SPLITS: frozenset[Law] = frozenset(ALL) - {splits, initial_weights}
"""Laws that compute with batches, once `splits` holds."""
AFTER_PREDICTIONS: frozenset[Law] = AFTER_SPLITS - {prediction_tree}
"""Laws that compute with predictions, once `prediction_tree` holds."""
AFTER_PURITY: frozenset[Law] = frozenset(
    {averages, hyperparameters, per_example_leaves, example_axis, split_average}
)
"""Laws that compare two calls, once `purity` holds: equal calls have equal results."""
AFTER_SCALARS: frozenset[Law] = frozenset(ALL[ALL.index(finite_objectives) :]) - {example_axis}
"""Laws that compute with the values of the objectives, once `scalar_objectives` holds."""
AFTER_FINITE: frozenset[Law] = frozenset({gradients_of_weights})
"""Laws about gradients, once `finite_objectives` holds: those of NaN are NaN."""
AT_SETUP: tuple[Law, ...] = (
    prediction_tree,
    depends_on_weights,
    scalar_objectives,
    trains_weights,
)
"""Laws whose violation spoils every run."""
NEEDED: dict[Need | Trait, tuple[Law, ...]] = {
    Need.OUTER_DERIVATIVE: (finite_objectives, outer_gradient),
    Trait.PER_EXAMPLE: (per_example_leaves,),
}
"""Laws whose violation spoils the runs of solvers with a need or a trait.

A search may begin where a loss is not finite: that trial fails, and the search continues.
"""
WARNINGS: tuple[Law, ...] = (
    gradients_of_weights,
    hyperparameters,
    dropout_rates,
    averages,
    batch_average,
)
"""Laws whose violation may waste a run without ending it.

A weight is unused, a hyperparameter has no effect, a dropout rate of all is not tuned, or an
objective grows with the batch.
"""


def needed_by(solver: Solver | None) -> list[Law]:
    """Return the laws that a solver relies on; None stands for any solver."""
    given = frozenset() if solver is None else solver.needs | solver.traits
    return [*AT_SETUP, *(law for key, found in NEEDED.items() if key in given for law in found)]
