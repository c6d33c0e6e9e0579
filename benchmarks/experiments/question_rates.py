"""Compare Δ-STN with STN at chosen and scheduled values of the three learning rates."""

from collections.abc import Sequence

from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.report import table
from benchmarks.experiments.reviewers import (
    METHODS,
    PAGE,
    TITLES,
    at_best,
    grouped,
    mean_loss,
    percent,
    score,
)
from bilevel.comparison.runs import Run

GRID = (
    "+experiment=questions_rates",
    "lr.inner=0.01,0.03,0.1",
    "response_part=0.1,1",
    "lr.outer=0.003,0.01,0.03",
)
COSINE = "_target_: torch.optim.lr_scheduler.CosineAnnealingLR, _partial_: true"
ANNEALED = (
    *("+experiment=questions_rates", "lr.inner=0.03,0.1", "response_part=1", "lr.outer=0.01,0.03"),
    f"solver.inner_scheduler={{{COSINE}, T_max: 40}}",
)
QUICK = ("runner.epochs=12", "seed=100", "lr.inner=0.01,0.03", "lr.outer=0.03")
QUICK_ANNEALED = (
    *("runner.epochs=12", "seed=100", "lr.inner=0.03", "lr.outer=0.03"),
    f"solver.inner_scheduler={{{COSINE}, T_max: 12}}",
)
COMPARED = ("stn", "delta_stn")
DEFAULT = (0.01, 1.0, 0.03)
"""α₁, α₂/α₁ and α₃ of the default configuration."""
Rates = tuple[float, float, float, bool]


def rates(config: object) -> Rates:
    """Return α₁, α₂/α₁, α₃, and whether the rates of w₀ and Θ are annealed."""
    assert isinstance(config, dict)
    annealed = config["solver"]["inner_scheduler"] is not None
    return config["lr"]["inner"], float(config["response_part"]), config["lr"]["outer"], annealed


def report(context: Context) -> str:
    """Return the whole grid, and the results of its best points."""
    groups = {
        method: grouped(
            [*context.runs(f"grid_{method}"), *context.runs(f"annealed_{method}")], rates
        )
        for method in COMPARED
    }
    best = {
        method: min(found, key=lambda point: mean_loss(found[point]))
        for method, found in groups.items()
    }
    default = next(
        runs for point, runs in groups["delta_stn"].items() if point == (*DEFAULT, False)
    )
    chosen = [
        ("STN, its best point", best["stn"], groups["stn"][best["stn"]]),
        ("Δ-STN, default rates", (*DEFAULT, False), default),
        ("Δ-STN, its best point", best["delta_stn"], groups["delta_stn"][best["delta_stn"]]),
    ]
    summary = [
        [name, *_point(point), *_cells(runs), score(runs, percent)] for name, point, runs in chosen
    ]
    rows = [
        [TITLES[method], *_point(point), *_cells(runs)]
        for method, found in groups.items()
        for point, runs in found.items()
    ]
    titles = ["", "α₁ (w₀)", "α₂ (Θ)", "α₃ (λ, σ)", "n", "best validation loss", "test loss there"]
    worse = {
        method: (sum(mean_loss(runs) > mean_loss(default) for runs in found.values()), len(found))
        for method, found in groups.items()
    }
    return (
        f"{table([*titles, 'test accuracy, %'], summary)}\n\n"
        f"Points that are worse than Δ-STN at its default rates, by mean best validation loss: "
        f"{' and '.join(f'{TITLES[method]} {n} of {of}' for method, (n, of) in worse.items())}.\n\n"
        f"<details><summary>Every point</summary>\n\n{table(titles, rows)}\n\n</details>"
    )


def _point(point: Rates) -> list[str]:
    inner, part, outer, annealed = point
    fall = ", annealed" if annealed else ""
    return [f"{inner:g}{fall}", f"{part * inner:g}{fall}", f"{outer:g}"]


def _cells(runs: Sequence[Run]) -> list[str]:
    return [str(len(runs)), score(runs, at_best("valid_loss")), score(runs, at_best("test_loss"))]


EXPERIMENT = Experiment(
    page=PAGE,
    sweeps={
        **{f"grid_{method}": Sweep((*GRID, *METHODS[method]), QUICK) for method in COMPARED},
        **{
            f"annealed_{method}": Sweep((*ANNEALED, *METHODS[method]), QUICK_ANNEALED)
            for method in COMPARED
        },
    },
    report=report,
)
