"""Vary the initial λ, and measure the speed of λ with and without a centered response."""

import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.experiments.harness import Context, Experiment
from benchmarks.experiments.report import table
from benchmarks.experiments.reviewers import (
    PAGE,
    RATES,
    TITLES,
    Of,
    at_best,
    grouped,
    mean_std_text,
    path,
    percent,
    score,
    sweeps,
)
from bilevel.comparison.curve_plots import draw_paths
from bilevel.comparison.plot_style import figure, styles
from bilevel.comparison.quality_table import part_of_regret
from bilevel.comparison.runs import Run

WARMUP = 5
EARLY = 10
"""Number of epochs after warm-up over which the speed is measured."""
ON_DIGITS = ("fixed", "stn", "centered_only", "delta_stn")
ON_RIDGE = ("stn", "centered_only", "centered_stn", "delta_stn")
DIGITS = (
    "+experiment=questions",
    "lr.inner=0.01",
    "runner.epochs=60",
    "start=0.05,0.3,0.5,0.7,0.9",
)
RIDGE = (
    "problem=ridge",
    "problem.space.log_decay.init=-6.0,-4.0,-1.0,1.0",
    "runner.evaluate_every=10",
    "seed=0,1,2,3,4",
)


def start(config: object) -> float:
    """Return the initial dropout rate."""
    assert isinstance(config, dict)
    return float(config["start"])


def log_decay(config: object) -> float:
    """Return the initial λ of ridge."""
    assert isinstance(config, dict)
    return float(config["problem"]["space"]["log_decay"]["init"])


def speed(run: Run) -> float | None:
    """Return the mean of |u(t₂) − u(t₁)| per epoch over the dropout rates, soon after warm-up."""
    epoch, u = run.column("epoch"), path(run, RATES)
    if epoch[len(u) - 1] < WARMUP + EARLY:
        return None
    first, last = (
        int(np.flatnonzero(epoch[: len(u)] <= until)[-1]) for until in (WARMUP, WARMUP + EARLY)
    )
    return float(np.abs(u[last] - u[first]).mean() / (epoch[last] - epoch[first]))


def report(context: Context) -> str:
    """Report the result and the spread of each start, and the time to come near λ* on ridge."""
    found = {method: grouped(context.runs(f"digits_{method}"), start) for method in ON_DIGITS}
    rows, spreads = [], []
    for method, groups in found.items():
        for init, runs in groups.items():
            ends = [] if method == "fixed" else [score(runs, _end(name)) for name in RATES]
            pace = "" if method == "fixed" else score(runs, speed)
            cells = [
                score(runs, at_best("valid_loss")),
                score(runs, percent),
                *(ends or [""] * len(RATES)),
                pace,
            ]
            rows.append([TITLES[method], f"{init:g}", str(len(runs)), *cells])
        means = [statistics.fmean(losses) for runs in groups.values() if (losses := _losses(runs))]
        gone = sum(any(run.status == "diverged" for run in runs) for runs in groups.values())
        lost = f" (diverged from {gone} of {len(groups)} starts)" if gone else ""
        spreads.append(f"{TITLES[method]} {min(means):.3g} to {max(means):.3g}{lost}")
    titles = [
        "",
        "initial dropout",
        "n",
        "best validation loss",
        "test accuracy there, %",
        *(f"last {name}" for name in RATES),
    ]
    titles.append(f"\\|Δu\\| per epoch, {EARLY} epochs after warm-up")
    draw(found, context)
    return "\n\n".join(
        [
            f"Digits:\n\n{table(titles, rows)}",
            "Lowest and highest mean of the starts, best validation loss:",
            "\n".join(f"- {spread}" for spread in spreads),
            "![Paths of the first hidden layer's dropout rate from five starts]"
            "(question_starts.png)",
            "Ridge, λ\\* known: examples until a tenth of the initial regret was left.\n\n"
            + ridge(context),
        ]
    )


def ridge(context: Context) -> str:
    """Return one row for each start, with a column for each method."""
    found = {method: grouped(context.runs(f"ridge_{method}"), log_decay) for method in ON_RIDGE}
    inits = list(found["stn"])
    rows = [
        [f"{init:g}", *(score(groups[init], part_of_regret) for groups in found.values())]
        for init in inits
    ]
    ratios = [
        [
            a / b
            for init in inits
            for a, b in zip(_examples(groups[init]), _examples(found["stn"][init]), strict=True)
            if a and b
        ]
        for groups in found.values()
    ]
    cells = [f"{mean_std_text(each)} (n = {len(each)})" if each else "" for each in ratios]
    return table(
        ["initial log decay", *(TITLES[m] for m in found)],
        [*rows, ["× STN's, seed by seed", *cells]],
    )


def draw(found: dict[str, dict[float, list[Run]]], context: Context) -> None:
    """Draw a panel for each method, with a line for each start."""
    methods = [method for method in found if method != "fixed"]
    with figure(context.figures / "question_starts.png", 1, len(methods), size=(2.9, 2.6)) as axes:
        for ax, method in zip(axes[0], methods, strict=True):
            groups = {f"from {init:g}": runs for init, runs in found[method].items()}
            draw_paths(ax, groups, "dropout1", looks=styles(list(groups)))
            ax.axvspan(0, WARMUP, color="0.93", zorder=0)
            ax.set_yscale("linear")
            ax.set_ylim(0, 0.95)
            ax.set_title(TITLES[method])
        handles, labels = axes[0, 0].get_legend_handles_labels()
        axes[0, 0].figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))


def _end(name: str) -> Of:
    return lambda run: run.at_end(f"hypers.{name}")


def _losses(runs: Sequence[Run]) -> list[float]:
    return [
        loss
        for run in runs
        if run.status != "diverged" and (loss := run.at_best("valid_loss")) is not None
    ]


def _examples(runs: Sequence[Run]) -> list[float | None]:
    return [part_of_regret(run) for run in sorted(runs, key=lambda run: run.seed or 0)]


EXPERIMENT = Experiment(
    page=PAGE,
    sweeps={
        **sweeps(
            ON_DIGITS,
            *DIGITS,
            prefix="digits_",
            quick=("runner.epochs=20", "seed=100", "start=0.05,0.7"),
        ),
        **sweeps(
            ON_RIDGE,
            *RIDGE,
            prefix="ridge_",
            quick=("runner.epochs=1000", "seed=100,101", "problem.space.log_decay.init=-4.0,1.0"),
        ),
    },
    report=report,
)
