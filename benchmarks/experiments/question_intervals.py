"""Vary the intervals: T_train training steps, then T_valid steps of λ."""

from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.report import table
from benchmarks.experiments.reviewers import (
    METHODS,
    PAGE,
    at_best,
    grouped,
    mean_loss,
    percent,
    score,
)

GRID = (
    "+experiment=questions",
    "solver.inner_steps=1,2,5,10",
    "solver.outer_steps=1,2,5",
    *METHODS["delta_stn"],
)
QUICK = ("runner.epochs=10", "seed=100", "solver.inner_steps=2,5,10", "solver.outer_steps=1,2")


def intervals(config: object) -> tuple[int, int]:
    """Return T_train and T_valid of a run."""
    assert isinstance(config, dict)
    return config["solver"]["inner_steps"], config["solver"]["outer_steps"]


def report(context: Context) -> str:
    """Return one row for each pair of intervals."""
    groups = grouped(context.runs("grid"), intervals)
    rows = []
    for (train, valid), runs in groups.items():
        cells = [score(runs, of) for of in (at_best("valid_loss"), at_best("test_loss"), percent)]
        cost = [
            score(runs, lambda run, name=name: run.total(name))
            for name in ("outer_steps", "seconds")
        ]
        rows.append([str(train), str(valid), str(len(runs)), *cells, *cost])
    titles = [
        "T_train",
        "T_valid",
        "n",
        "best validation loss",
        "test loss there",
        "test accuracy, %",
        "outer steps",
        "seconds",
    ]
    means = {pair: mean_loss(runs) for pair, runs in groups.items()}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    ends = [
        f"{means[pair]:.4g} at T_train = {pair[0]}, T_valid = {pair[1]}" for pair in (low, high)
    ]
    extremes = f"{' and '.join(ends)}, a ratio of {means[high] / means[low]:.2f}"
    return f"{table(titles, rows)}\n\nLowest and highest mean: {extremes}."


EXPERIMENT = Experiment(page=PAGE, sweeps={"grid": Sweep(GRID, QUICK)}, report=report)
