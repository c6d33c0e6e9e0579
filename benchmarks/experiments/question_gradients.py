"""Measure the alignment of training and validation gradients, and its push on λ."""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.experiments.harness import Context, Experiment
from benchmarks.experiments.report import table
from benchmarks.experiments.reviewers import PAGE, RATES, TITLES, mean_std_text
from benchmarks.toys import RECIPES
from bilevel import Params, Problem, Runner, problems
from bilevel.comparison.plot_style import COLORS, figure
from bilevel.loggers.logger import Logger, Progress, RunInfo
from bilevel.loggers.records import Record
from bilevel.params import count_examples
from bilevel.solvers import SelfTuning

STARTS = (0.05, 0.8)
WARMUP = 5
LATER = 10
"""Number of epochs after warm-up, and at the end, over which the push on λ is averaged."""


class Job(NamedTuple):
    """One run: a method, the initial dropout rates, a seed and its length."""

    method: str
    start: float
    seed: int
    epochs: int


class Point(NamedTuple):
    """The gradients of both losses after a round, and the push of the hypergradient.

    Attributes:
        product: The inner product ⟨∇_w L_T, ∇_w L_V⟩ over the whole splits.
        cosine: The cosine between both gradients.
        outward: The cosine of −dL_V/du with u for the dropout rates; positive if λ is pushed away
            from u = 0.
    """

    epoch: float
    product: float
    cosine: float
    outward: float


class Probe(Logger):
    """A logger that measures a run after every round and restores its random numbers."""

    def __init__(self, problem: Problem, solver: SelfTuning) -> None:
        self.problem = problem
        self.solver = solver
        self.points: list[Point] = []
        self.masks = torch.Generator()

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        self.masks.manual_seed(run.seed)

    def log(self, record: Record) -> None:
        """Ignore evaluations; the probe measures rounds."""

    def advance(self, progress: Progress) -> None:
        train, valid = self.gradients()
        product = train @ valid
        before = self.solver.core.generator.get_state()
        push = -self.solver.hypergradient(next(self.solver.core.data.valid.once()))
        self.solver.core.generator.set_state(before)
        space = self.problem.space
        push, u = (
            torch.stack([space.by_name(v)[name] for name in RATES])
            for v in (push, self.solver.core.search.u0)
        )
        numbers = torch.stack(
            [product, product / (train.norm() * valid.norm()), push @ u / (push.norm() * u.norm())]
        )
        self.points.append(Point(progress.epoch, *numbers.tolist()))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return ∇_w L_T (with penalties and dropout) and ∇_w L_V over the whole splits, flat."""
        hypers, params, carry = self.solver.solution()
        data = self.solver.core.data

        def inner(w: Params) -> Iterator[tuple[Tensor, int]]:
            for batch in data.train.once():
                yield (
                    self.problem.inner_loss(hypers, w, carry, batch, self.masks)[0],
                    count_examples(batch),
                )

        def outer(w: Params) -> Iterator[tuple[Tensor, int]]:
            for batch in data.valid.once():
                yield self.problem.outer_loss(hypers, w, carry, batch)[0], count_examples(batch)

        return _gradient(inner, params), _gradient(outer, params)


def _gradient(losses: Callable[[Params], Iterator[tuple[Tensor, int]]], params: Params) -> Tensor:
    w = {name: p.detach().requires_grad_() for name, p in params.items()}
    parts = list(losses(w))
    loss = sum(part * n for part, n in parts) / sum(n for _, n in parts)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(w.values()))])


def watch(job: Job) -> list[Point]:
    """Run the job and return its points."""
    problem = problems.digits(space={name: {"init": job.start} for name in RATES})
    solver = RECIPES[job.method](
        inner_optimizer=lambda w: torch.optim.SGD(w, lr=0.01, momentum=0.9),
        outer_optimizer=lambda u: torch.optim.RMSprop(u, lr=0.03),
    )
    probe = Probe(problem, solver)
    runner = Runner(
        epochs=job.epochs,
        warmup_epochs=WARMUP,
        threads=1,
        device="cpu",
        progress="none",
        picture=False,
    )
    with tempfile.TemporaryDirectory() as directory:
        runner.run(
            problem, solver, directory=Path(directory) / "run", seed=job.seed, loggers=[probe]
        )
    return probe.points


def report(context: Context) -> str:
    """Return cosines early and late, and the push on λ after warm-up."""
    seeds, epochs = ((100,), 25) if context.quick else ((0, 1, 2), 40)
    jobs = [
        Job(method, start, seed, epochs) for start in STARTS for method in RECIPES for seed in seeds
    ]
    runs: dict[tuple[str, float], list[list[Point]]] = {}
    for job, points in zip(jobs, context.map(watch, jobs), strict=True):
        runs.setdefault((job.method, job.start), []).append(points)
    draw(runs, context)
    phases = [
        ("cosine, first epoch", "cosine", 0.0, 1.0),
        (f"last {LATER} epochs", "cosine", epochs - LATER, epochs),
        ("push outward, first epoch after warm-up", "outward", WARMUP, WARMUP + 1),
        (f"first {LATER} epochs after warm-up", "outward", WARMUP, WARMUP + LATER),
    ]
    rows = []
    for (method, start), each in runs.items():
        means = [
            [_mean(points, of, low, high) for points in each if points[-1].epoch >= high]
            for _, of, low, high in phases
        ]
        ended = [points for points in each if points[-1].epoch >= epochs]
        negative = [
            statistics.fmean(p.product < 0 for p in _within(points, epochs - LATER, epochs))
            for points in ended
        ]
        cells = [mean_std_text(values) for values in means]
        lost = f", {len(each) - len(ended)} diverged" if len(ended) < len(each) else ""
        rows.append(
            [
                f"{start:g}",
                TITLES[method],
                f"{len(each)}{lost}",
                *cells[:2],
                mean_std_text(negative),
                *cells[2:],
            ]
        )
    titles = [
        "initial dropout",
        "",
        "n",
        phases[0][0],
        phases[1][0],
        "share of negative products there",
        phases[2][0],
        phases[3][0],
    ]
    return (
        f"Mean ± standard deviation over {len(seeds)} seeds.\n\n{table(titles, rows)}\n\n"
        "![Cosine of training and validation gradients, "
        "and of the push on λ with u, along training]"
        "(question_gradients.png)"
    )


def draw(runs: dict[tuple[str, float], list[list[Point]]], context: Context) -> None:
    """Draw the cosine of the gradients above and the push below; a column for each start."""
    rows = {"cosine": "cosine of ∇L_T and ∇L_V", "outward": "cosine of −dL_V/du and u"}
    with figure(
        context.figures / "question_gradients.png", 2, len(STARTS), size=(3.6, 2.2)
    ) as axes:
        for column, start in enumerate(STARTS):
            for row, (of, label) in enumerate(rows.items()):
                ax = axes[row, column]
                for color, method in zip((COLORS[1], COLORS[2], COLORS[0]), RECIPES, strict=True):
                    each = runs[method, start]
                    epochs = [p.epoch for p in min(each, key=len)]  # a diverged run ends the line
                    values = list(
                        zip(
                            *([getattr(p, of) for p in points[: len(epochs)]] for points in each),
                            strict=True,
                        )
                    )
                    dash = (
                        "--" if method == "delta_stn" else "-"
                    )  # it often lies on centered STN's line
                    means = [statistics.fmean(v) for v in values]
                    ax.plot(
                        epochs,
                        means,
                        color=color,
                        linestyle=dash,
                        linewidth=0.9,
                        label=TITLES[method],
                    )
                    low, high = [min(v) for v in values], [max(v) for v in values]
                    ax.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
                ax.axvspan(0, WARMUP, color="0.93", zorder=0)
                ax.axhline(0, color="0.5", linewidth=0.6)
                ax.set_ylim(-1.05, 1.05)
                if row == 0:
                    ax.set_title(f"initial dropout {start:g} (n = {len(each)})")
                else:
                    ax.set_xlabel("epochs")
                if column == 0:
                    ax.set_ylabel(label)
        axes[0, 0].figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3
        )


def _within(points: Sequence[Point], low: float, high: float) -> list[Point]:
    return [p for p in points if low < p.epoch <= high]


def _mean(points: Sequence[Point], of: str, low: float, high: float) -> float:
    return statistics.fmean(getattr(p, of) for p in _within(points, low, high))


EXPERIMENT = Experiment(page=PAGE, report=report)
