"""Compare Δ-STN with training at the same bad start; see docs/experiments/digits.md."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.experiments.digits import BAD_START, EPOCHS, REDUCED, SOLVERS, Job, train
from benchmarks.experiments.harness import Context, Experiment
from benchmarks.experiments.report import spread, table


def report(context: Context) -> str:
    """Return one row for each solver, and the paired difference."""
    seeds, epochs = ((100, 101), REDUCED) if context.quick else (range(10), EPOCHS)
    runs = context.map(
        train, [Job(name, seed, BAD_START, epochs) for seed in seeds for name in SOLVERS]
    )
    return block({name: [run for run in runs if run["solver"] == name] for name in SOLVERS})


def block(groups: dict[str, list[dict[str, Any]]]) -> str:
    """Return the block from the summaries of both solvers, in the order of the seeds."""
    rows = [
        [
            f"`{name}`"
            + (f", {gone} diverged" if (gone := sum(run["diverged"] for run in runs)) else ""),
            spread([run["best"]["valid_loss"] for run in runs], ".4f"),
            spread([run["best"]["test_accuracy"] for run in runs], "%"),
        ]
        for name, runs in groups.items()
    ]
    ours, fixed = (
        [run["best"]["valid_loss"] for run in groups[name]] for name in ("delta_stn", "fixed")
    )
    differences = [a - b for a, b in zip(ours, fixed, strict=True)]
    test = f"t = {paired_t(differences):.1f}, n = {len(differences)}"
    result = f"{spread(differences, '.4f')}, {test}".replace("-", "−")
    head = ["solver", "validation loss", "test accuracy"]
    return f"{table(head, rows)}\n\nPaired difference in validation loss {result}."


def paired_t(differences: Sequence[float]) -> float:
    """Return the t statistic of paired differences, with n − 1 degrees of freedom.

    Example:
        >>> round(paired_t([1.0, 2.0, 3.0]), 3)
        3.464
    """
    return statistics.mean(differences) / (
        statistics.stdev(differences) / math.sqrt(len(differences))
    )


EXPERIMENT = Experiment(page="experiments/digits.md", report=report)
