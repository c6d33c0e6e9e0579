"""Make the STN paper's Table 1 on the embedded text; see docs/experiments/language.md."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.experiments.harness import QUIET, Context, Experiment
from benchmarks.experiments.report import spread
from benchmarks.experiments.report import table as markdown
from bilevel import Runner, Solver, solvers
from bilevel.problems.language_modeling.corpus import load_corpus
from bilevel.problems.language_modeling.problem import Language

WARMUP = 1
START, GRID_SEED = 0.05, 100
STD, AMPLITUDE = 0.05, 0.1
PERIOD = 3.63
"""Period of the sinusoid in epochs: the paper's 1200 steps of 331 per epoch."""
OTHERS = ("input_dropout", "embedding_dropout", "weight_dropout", "ar", "tar")

ADAM = partial(torch.optim.Adam, lr=0.003)
INNER = {"inner_steps": 2, "inner_optimizer": ADAM, "clip_norm": 1.0}
TUNED = {**INNER, "outer_optimizer": partial(torch.optim.Adam, lr=0.03), "tune_scale": False}

Summary = dict[str, Any]
PAIRS = (
    *(
        ("stn", "best"),
        ("stn", "schedule"),
        ("schedule", "best"),
        ("schedule", "final"),
        ("final", "best"),
    ),
    *(("gaussian", "best"), ("sinusoid", "best"), ("delta_stn", "best")),
)
SHORT = {"stn": "STN", "gaussian": "Gaussian", "delta_stn": "Δ-STN"}


class Size(NamedTuple):
    """The size of the experiment.

    Attributes:
        seeds: Seeds of the rows.
        grid: Fixed rates.
        epochs: Epochs of every run.
        train: Tokens of the training split, few enough for overfitting within the run.
        held_out: Tokens of each other split; None for all.
    """

    seeds: Sequence[int]
    grid: Sequence[float]
    epochs: int
    train: int
    held_out: int | None = None


FULL = Size(range(3), (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), 24, 24_000)
QUICK = Size((101, 102), (0.4, 0.7), 3, 6000, 2000)


def report(context: Context) -> str:
    """Return the table, the grid, and the paired differences."""
    size = QUICK if context.quick else FULL
    losses = dict(
        zip(size.grid, context.map(at_rate, [(rate, size) for rate in size.grid]), strict=True)
    )
    best = min(losses, key=losses.__getitem__)
    seeds = context.map(at_seed, [(seed, best, size) for seed in size.seeds])
    return block(losses, dict(zip(size.seeds, seeds, strict=True)))


# --- what is run ---


def at_rate(job: tuple[float, Size]) -> float:
    """Return the lowest validation loss at one rate of the grid, on the seed of the grid."""
    rate, size = job
    with tempfile.TemporaryDirectory() as directory:
        return train(solvers.Fixed(**INNER), rate, GRID_SEED, Path(directory) / "grid", size)[
            "best"
        ]["valid_loss"]


def at_seed(job: tuple[int, float, Size]) -> dict[str, Summary]:
    """Return every row on one seed; it is one job, because some rows replay STN's run."""
    seed, best, size = job
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        rows = arms(best, folder / "stn", size)
        return {
            name: train(make(), rate, seed, folder / name, size)
            for name, (rate, make) in rows.items()
        }


def arms(best: float, stn: Path, size: Size) -> dict[str, tuple[float, Callable[[], Solver]]]:
    """Return the start and the solver of every row; rows that replay STN's run come after it."""
    steps = round(
        PERIOD
        * problem(START, size).data(torch.device("cpu"), torch.Generator()).train.steps_per_epoch
    )

    def fixed(hypers: Callable[[], solvers.HyperSchedule]) -> Callable[[], Solver]:
        return lambda: solvers.Fixed(hypers=hypers(), **INNER)

    return {
        "start": (START, fixed(solvers.Constant)),
        "best": (best, fixed(solvers.Constant)),
        "gaussian": (best, fixed(lambda: solvers.Gaussian(STD))),
        "sinusoid": (best, fixed(lambda: solvers.Sinusoidal(AMPLITUDE, steps))),
        "stn": (START, lambda: solvers.stn(**TUNED)),
        "schedule": (START, fixed(lambda: solvers.Replayed(stn))),
        "final": (START, fixed(lambda: solvers.Replayed(stn, final=True))),
        "delta_stn": (START, lambda: solvers.delta_stn(**TUNED)),
    }


def problem(rate: float, size: Size) -> Language:
    """Return one LSTM of 128 units with output dropout alone, from `rate`."""
    text = load_corpus(vocabulary_size=1000)
    held_out = {split: getattr(text, split)[: size.held_out] for split in ("valid", "test")}
    off = {name: {"init": 0.0, "frozen": True} for name in OTHERS}
    sizes = {"embedding": 128, "hidden": 128, "layers": 1, "batch_size": 20, "bptt": 20}
    text = text._replace(train=text.train[: size.train], **held_out)
    return Language(text, space={"output_dropout": {"init": rate}, **off}, **sizes)


def train(solver: Solver, rate: float, seed: int, directory: Path, size: Size) -> Summary:
    """Run one solver and return the summary."""
    runner = Runner(epochs=size.epochs, warmup_epochs=WARMUP, **QUIET)
    return runner.run(
        problem(rate, size),
        solver,
        directory=directory,
        seed=seed,
        names=("language", directory.name),
    )


# --- the block ---


def block(losses: Mapping[float, float], runs: Mapping[int, Mapping[str, Summary]]) -> str:
    """Return the block from the grid's losses by rate and the rows' summaries by seed."""
    best = min(losses, key=losses.__getitem__)
    grid = ", ".join(
        f"**{rate}: {loss:.3f}**" if rate == best else f"{rate}: {loss:.3f}"
        for rate, loss in losses.items()
    )
    notes = f"Mean ± standard deviation over the seeds {', '.join(map(str, runs))}."
    notes += f"\nValidation losses of the grid on seed {GRID_SEED}: {grid}."
    paired = f"Paired differences in validation perplexity, seed by seed:\n\n{differences(runs)}"
    return f"{table(best, runs)}\n\n{notes}\n{paired}"


def table(best: float, runs: Mapping[int, Mapping[str, Summary]]) -> str:
    """Return one row for each arm."""
    names = {
        "start": f"*start*: {START}, fixed",
        "best": f"*best*: {best}, fixed",
        "gaussian": f"*Gaussian* around {best}",
        "sinusoid": f"*sinusoid* around {best}",
        "stn": f"*STN*, from {START}",
        "schedule": "*schedule* of STN, replayed",
        "final": "*final* rate of STN, fixed",
        "delta_stn": f"*Δ-STN*, from {START}",
    }
    rows = []
    for arm, name in names.items():
        group = [seed[arm] for seed in runs.values()]
        at_best, rates = (
            [run["best"] for run in group],
            [run["hypers"]["output_dropout"] for run in group],
        )
        gone = sum(run["diverged"] for run in group)
        rows.append(
            [
                f"{name}, {gone} diverged" if gone else name,
                spread([b["valid_perplexity"] for b in at_best], ".2f"),
                spread([b["test_perplexity"] for b in at_best], ".2f"),
                spread(rates if len(set(rates)) > 1 else rates[:1], ".2f"),
                spread([b["epoch"] for b in at_best], ".1f"),
                spread([run["seconds"] for run in group], ".0f"),
            ]
        )
    head = [
        "row",
        "validation perplexity",
        "test perplexity",
        "rate at the end",
        "epoch of the best",
        "seconds",
    ]
    return markdown(head, rows, best={1: min, 2: min})


def differences(runs: Mapping[int, Mapping[str, Summary]]) -> str:
    """Return one row for each pair of arms, with one column for each seed."""
    rows = []
    for first, second in PAIRS:
        values = [
            seed[first]["best"]["valid_perplexity"] - seed[second]["best"]["valid_perplexity"]
            for seed in runs.values()
        ]
        cells = [
            *(f"{value:+.2f}" for value in values),
            f"{'+' if sum(values) >= 0 else ''}{spread(values, '.2f')}",
        ]
        rows.append(
            [
                f"{SHORT.get(first, first)} − {SHORT.get(second, second)}",
                *(cell.replace("-", "−") for cell in cells),
            ]
        )
    return markdown(["", *(f"seed {seed}" for seed in runs), "mean ± std"], rows)


EXPERIMENT = Experiment(page="experiments/language.md", report=report)
