"""Compare Δ-STN with the best of many random `fixed` runs; see docs/experiments/digits.md."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.experiments.digits import BAD_START, DROPOUTS, EPOCHS, REDUCED, Job, train
from benchmarks.experiments.harness import Context, Experiment
from benchmarks.experiments.report import spread, table

Summary = dict[str, Any]


def report(context: Context) -> str:
    """Return one row for each seed, and their mean."""
    seeds, points, epochs = ((100, 101), 3, REDUCED) if context.quick else (range(5), 30, EPOCHS)
    runs = context.map(train, [job for seed in seeds for job in jobs(seed, points, epochs)])
    each = points + 1
    return block({seed: runs[k * each : (k + 1) * each] for k, seed in enumerate(seeds)})


def jobs(seed: int, points: int, epochs: int) -> list[Job]:
    """Return Δ-STN from the bad start and `points` random starts, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    grid = [Job("fixed", seed, draw(generator), epochs) for _ in range(points)]
    return [Job("delta_stn", seed, BAD_START, epochs), *grid]


def draw(generator: torch.Generator) -> dict[str, float]:
    """Draw dropout rates uniformly on (0, 0.95), weight decay log-uniformly on (1e-6, 1e-1)."""
    rates = (
        (0.95 * torch.rand(3, generator=generator, dtype=torch.float64)).clamp(min=1e-3).tolist()
    )
    decay = 10 ** (-6 + 5 * torch.rand((), generator=generator, dtype=torch.float64).item())
    return dict(zip(DROPOUTS, rates, strict=True)) | {"weight_decay": decay}


def block(groups: dict[int, list[Summary]]) -> str:
    """Return the block from the summaries by seed: Δ-STN first, then the grid."""
    points = len(next(iter(groups.values()))) - 1
    head = [
        "seed",
        "Δ-STN",
        f"best of {points}",
        "ratio",
        "cost in `fixed` runs: seconds",
        "examples",
    ]
    head += [f"test accuracy, Δ-STN / best of {points}"]
    rows, numbers = [], []
    for seed, (ours, *grid) in groups.items():
        best = min(grid, key=lambda run: run["best"]["valid_loss"])["best"]
        ratio = ours["best"]["valid_loss"] / best["valid_loss"]
        costs = [
            ours[unit] / statistics.mean(run[unit] for run in grid)
            for unit in ("seconds", "examples")
        ]
        numbers.append([ratio, *costs])
        cells = [
            str(seed),
            f"{ours['best']['valid_loss']:.4f}",
            f"{best['valid_loss']:.4f}",
            f"{ratio:.3f}",
        ]
        cells += [f"{cost:.2f}" for cost in costs]
        rows.append(
            [
                *cells,
                f"{100 * ours['best']['test_accuracy']:.2f} / {100 * best['test_accuracy']:.2f} %",
            ]
        )
    means = [
        spread(column, form)
        for column, form in zip(zip(*numbers, strict=True), (".3f", ".2f", ".2f"), strict=True)
    ]
    text = table(head, [*rows, ["mean ± std", "", "", *means, ""]])
    return text + _diverged([run for runs in groups.values() for run in runs])


def _diverged(runs: Sequence[Summary]) -> str:
    gone = sum(run["diverged"] for run in runs)
    return (
        f"\n\nOf the {len(runs)} runs {gone} diverged, and count with what they had reached."
        if gone
        else ""
    )


EXPERIMENT = Experiment(page="experiments/digits.md", report=report)
