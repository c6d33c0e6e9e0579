"""Tune the inner learning rate, which self-tuning refuses, by solvers that support it."""

import tempfile
from contextlib import redirect_stderr
from io import StringIO

from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.report import table
from benchmarks.experiments.reviewers import PAGE, at_best, percent, score
from bilevel.cli.app import main

RATE = "problem.space.rate={optimizer: lr, init: 0.001}"
BASE = ("+experiment=questions", "problem.dropout=gaussian", "runner.epochs=60")
QUICK = ("runner.epochs=12", "seed=100", "trial.epochs=3")
ROWS = {
    "fixed_low": ("fixed, rate 0.001", ("solver=fixed", "lr.inner=0.001")),
    "delta_stn_low": ("Δ-STN, rate 0.001 (not tuned)", ("solver=delta_stn", "lr.inner=0.001")),
    "delta_stn": ("Δ-STN, rate 0.03 by hand (not tuned)", ("solver=delta_stn",)),
    "unrolled": ("unrolled, rate tuned from 0.001", ("solver=unrolled", RATE)),
    "es": ("evolution strategies, rate tuned from 0.001", ("solver=es", RATE)),
    "tpe": ("TPE, rate tuned on 10⁻⁶ … 1", ("solver=tpe", RATE)),
}


def refused(overrides: tuple[str, ...]) -> str:
    """Return the error that the command prints for these overrides."""
    errors = StringIO()
    with tempfile.TemporaryDirectory() as directory, redirect_stderr(errors):
        main(
            [
                *overrides,
                f"hydra.run.dir='{directory}/run'",
                "runner.progress=none",
                "wandb.mode=disabled",
            ]
        )
    return errors.getvalue().strip()


def report(context: Context) -> str:
    """Return the printed refusal, and the results of the other solvers."""
    asked = ("problem=digits", "solver=delta_stn", RATE)
    (sentence,) = context.map(refused, [asked])
    shown = " ".join(f"'{text}'" if " " in text else text for text in asked)
    rows = []
    for key, (title, _) in ROWS.items():
        runs = context.runs(key)
        cells = [score(runs, of) for of in (at_best("valid_loss"), at_best("test_loss"), percent)]
        tuned = score(runs, at_best("hypers.rate")) if "hypers.rate" in runs[0].columns else ""
        cost = [
            score(runs, lambda run, name=name: run.total(name)) for name in ("examples", "seconds")
        ]
        rows.append([title, str(len(runs)), *cells, tuned, *cost])
    titles = [
        "",
        "n",
        "best validation loss",
        "test loss there",
        "test accuracy, %",
        "rate there",
        "examples",
        "seconds",
    ]
    command = f"    $ bilevel {shown}\n    {sentence}"
    return f"The command and its error:\n\n{command}\n\n{table(titles, rows)}"


EXPERIMENT = Experiment(
    page=PAGE,
    sweeps={key: Sweep((*BASE, *overrides), QUICK) for key, (_, overrides) in ROWS.items()},
    report=report,
)
