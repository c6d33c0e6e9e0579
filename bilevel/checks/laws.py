"""The lists of laws that solvers rely on in a problem."""

from bilevel.checks.finding import Law
from bilevel.checks.gradient_laws import (
    gradients_of_weights,
    hyperparameters,
    per_example_leaves,
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

ALL: tuple[Law, ...] = (
    initial_weights,
    prediction_tree,
    purity,
    depends_on_weights,
    scalar_objectives,
    finite_objectives,
    averages,
    gradients_of_weights,
    hyperparameters,
    per_example_leaves,
    example_axis,
    metrics,
    split_average,
    last_batch,
)
AT_SETUP: tuple[Law, ...] = (prediction_tree, depends_on_weights, scalar_objectives)
"""Laws whose violation spoils every run; the loop itself detects losses that are not finite."""
WARNINGS: tuple[Law, ...] = (gradients_of_weights, hyperparameters, batch_average)
"""Laws whose violation may waste a run without ending it.

A weight is unused, or a hyperparameter has no effect.
"""
