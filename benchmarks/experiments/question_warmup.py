"""Compare the methods from the same warmed-up weights, and from warm-ups of their own."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.experiments.harness import QUIET, Context, Experiment, Sweep
from benchmarks.experiments.report import table
from benchmarks.experiments.reviewers import PAGE, TITLES, mean_std_text
from benchmarks.toys import RECIPES
from bilevel import Runner, problems

WARMUP = 5


class Job(NamedTuple):
    """One run; `warm` is the run that gives the weights, or None for a warm-up of its own."""

    method: str
    seed: int
    epochs: int
    warm: Path | None


def run(job: Job) -> dict[str, Any]:
    """Return the summary of a run of `epochs` epochs, warm-up included."""
    solver = RECIPES[job.method](
        inner_optimizer=lambda w: torch.optim.SGD(w, lr=0.03, momentum=0.9),
        outer_optimizer=lambda u: torch.optim.RMSprop(u, lr=0.03),
    )
    runner = Runner(
        epochs=job.epochs if job.warm is None else job.epochs - WARMUP,
        warmup_epochs=WARMUP if job.warm is None else 0,
        initial_params=None if job.warm is None else str(job.warm),
        device="cpu",
        **QUIET,
    )
    with tempfile.TemporaryDirectory() as directory:
        return runner.run(
            problems.digits(), solver, directory=Path(directory) / "run", seed=job.seed
        )


def report(context: Context) -> str:
    """Return each method with a warm-up of its own and from the shared weights."""
    epochs = 15 if context.quick else 40
    warm = {run.seed: run for run in context.runs("warmup")}
    jobs = [
        Job(method, seed, epochs, directory)
        for directory_of in (lambda run: None, lambda run: run.directory)
        for method in RECIPES
        for seed, directory in (
            (seed, directory_of(run)) for seed, run in warm.items() if seed is not None
        )
    ]
    ended: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for job, summary in zip(jobs, context.map(run, jobs), strict=True):
        ended.setdefault((job.warm is not None, job.method), []).append(summary)
    rows = []
    for (shared, method), summaries in ended.items():
        cells = [
            _score(summaries, name, of)
            for name, of in (("valid_loss", 1), ("test_loss", 1), ("test_accuracy", 100))
        ]
        bad = sum(summary["diverged"] for summary in summaries)
        n = f"{len(summaries)}" + (f", {bad} diverged" if bad else "")
        rows.append(["shared" if shared else "its own", TITLES[method], n, *cells])
    start = [loss for run in warm.values() if (loss := run.at_best("valid_loss")) is not None]
    note = (
        f"The shared weights have a validation loss of {mean_std_text(start)} (n = {len(start)})."
    )
    titles = ["warm-up", "", "n", "best validation loss", "test loss there", "test accuracy, %"]
    return f"{table(titles, rows)}\n\n{note}"


def _score(summaries: list[dict[str, Any]], name: str, factor: float) -> str:
    return mean_std_text(
        [factor * summary["best"][name] for summary in summaries if not summary["diverged"]]
    )


EXPERIMENT = Experiment(
    page=PAGE,
    sweeps={
        "warmup": Sweep(
            (
                "+experiment=questions",
                "solver=fixed",
                f"runner.epochs={WARMUP}",
                "seed=0,1,2,3,4",
                "runner.warmup_epochs=0",
            ),
            ("seed=100",),
        )
    },
    report=report,
)
