"""Vary the entropy weight τ, the same for all methods."""

import numpy as np

from benchmarks.experiments.harness import Context, Experiment
from benchmarks.experiments.report import table
from benchmarks.experiments.reviewers import (
    PAGE,
    RATES,
    TITLES,
    at_best,
    grouped,
    percent,
    score,
    sweeps,
)
from bilevel.comparison.runs import Run

COMPARED = ("stn", "centered_stn", "delta_stn")
TAUS = "solver.entropy_weight=0.0,1.0e-5,1.0e-4,1.0e-3,1.0e-2"


def tau(config: object) -> float:
    """Return τ of a run."""
    assert isinstance(config, dict)
    return float(config["solver"]["entropy_weight"])


def report(context: Context) -> str:
    """Return one row for each method and τ."""
    rows = []
    for method in COMPARED:
        for weight, runs in grouped(context.runs(method), tau).items():
            cells = [
                score(runs, of)
                for of in (at_best("valid_loss"), at_best("test_loss"), percent, _sigma)
            ]
            rows.append([TITLES[method], f"{weight:g}", str(len(runs)), *cells])
    titles = [
        "",
        "τ",
        "n",
        "best validation loss",
        "test loss there",
        "test accuracy, %",
        "last σ, mean of dropout rates",
    ]
    return table(titles, rows)


def _sigma(run: Run) -> float:
    return float(np.mean([run.at_end(f"scales.{name}") or np.nan for name in RATES]))


EXPERIMENT = Experiment(
    page=PAGE,
    sweeps=sweeps(
        COMPARED,
        "+experiment=questions",
        TAUS,
        quick=("runner.epochs=12", "seed=100", "solver.entropy_weight=0.0,1.0e-3,1.0e-2"),
    ),
    report=report,
)
