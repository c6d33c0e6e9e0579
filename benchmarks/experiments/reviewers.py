"""The page, the methods and the measures that the reviewers' questions share."""

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.experiments.harness import Sweep
from bilevel.comparison.runs import Array, Run
from bilevel.comparison.statistics import mean_std
from bilevel.comparison.table import failures, plus_minus
from bilevel.loggers.space_json import space_from_json

PAGE = "experiments/reviewers-questions.md"
RATES = ("input_dropout", "dropout1", "dropout2")
METHODS: Mapping[str, tuple[str, ...]] = {
    "fixed": ("solver=fixed",),
    "stn": ("solver=stn",),
    "centered_only": ("solver=delta_stn", "solver.regularized_w0=false", "solver.linearize=false"),
    "centered_stn": ("solver=centered_stn",),
    "delta_stn": ("solver=delta_stn",),
}
"""The overrides of each method; `centered_only` has only the first of Δ-STN's three parts."""
TITLES = {
    "fixed": "fixed",
    "stn": "STN",
    "centered_only": "STN, centered only",
    "centered_stn": "centered STN",
    "delta_stn": "Δ-STN",
}

Key = TypeVar("Key", bound=Hashable)
Of = Callable[[Run], float | None]


def sweeps(
    methods: Iterable[str], *overrides: str, quick: tuple[str, ...], prefix: str = ""
) -> dict[str, Sweep]:
    """Return the same command line for each method, by `prefix` and the method's name."""
    return {prefix + method: Sweep((*overrides, *METHODS[method]), quick) for method in methods}


def grouped(runs: Iterable[Run], key: Callable[[Mapping[str, Any]], Key]) -> dict[Key, list[Run]]:
    """Return the runs by the `key` of their settings, in the order of first appearance."""
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run.config), []).append(run)
    return groups


def path(run: Run, names: Sequence[str] | None = None) -> Array:
    """Return the finite part of a run's u, [evaluations, coordinates], of all or some `names`."""
    space = space_from_json(run.description["space"])
    columns = [
        space[name]
        .unconstrain(torch.from_numpy(run.column(f"hypers.{name}")))
        .reshape(run.evaluations, -1)
        .numpy()
        for name in (names or space.tuned)
    ]
    u = np.concatenate(columns, axis=1)
    return u[np.isfinite(u).all(axis=1)]


def spike(u: Array) -> float:
    """Return max_t |u_t − u_end|, the largest over coordinates.

    Example:
        >>> u = np.array([[0.0], [3.0], [-0.5], [1.0]])
        >>> spike(u), overshoot(u)
        (2.0, (0.5, 2.0))
        >>> u = np.array([[0.0], [1.0], [4.0]])
        >>> spike(u), overshoot(u)
        (4.0, (0.0, 0.0))
    """
    return float(np.abs(u - u[-1]).max())


def overshoot(u: Array) -> tuple[float, float]:
    """Return the distances of u behind its start and beyond its end, largest over coordinates.

    A path without a detour has a spike as long as its way, and no overshoot.
    """
    forward = np.where(u[-1] >= u[0], 1.0, -1.0)
    return float((forward * (u[0] - u)).max()), float((forward * (u - u[-1])).max())


def score(runs: Sequence[Run], of: Of) -> str:
    """Return mean ± standard deviation over runs that did not diverge, and the number of others."""
    found = mean_std(None if run.status == "diverged" else of(run) for run in runs)
    if found is None:
        return failures(runs) or "never"
    missing = f" ({found.n} of {found.of})" if found.n < found.of else ""
    return (
        plus_minus(found.mean, found.std if found.n > 1 else None)
        + missing
        + (f", {bad}" if (bad := failures(runs)) else "")
    )


def mean_std_text(values: Sequence[float]) -> str:
    """Return mean ± standard deviation; an empty text without values.

    Example:
        >>> mean_std_text([1.0, 3.0]), mean_std_text([])
        ('2.0 ± 1.4', '')
    """
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return plus_minus(statistics.fmean(values), deviation)


def at_best(name: str) -> Of:
    """Return a function that reads a score at the run's best evaluation."""
    return lambda run: run.at_best(name)


def percent(run: Run) -> float | None:
    """Return the test accuracy at the best evaluation, in per cent."""
    accuracy = run.at_best("test_accuracy")
    return None if accuracy is None else 100 * accuracy


def mean_loss(runs: Sequence[Run]) -> float:
    """Return the mean best validation loss; infinite if a run diverged or has none."""
    losses = [run.at_best("valid_loss") for run in runs]
    if any(loss is None for loss in losses) or failures(runs):
        return float("inf")
    return statistics.fmean(loss for loss in losses if loss is not None)
