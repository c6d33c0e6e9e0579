"""Measure a step and an epoch, and explain why STN is quicker per epoch."""

import os
import statistics

import torch

from benchmarks.experiments.harness import Context, Experiment
from benchmarks.experiments.report import table
from benchmarks.experiments.reviewers import PAGE, TITLES
from benchmarks.measure import alternating, median_ratio, peak_memory
from benchmarks.step import measured
from benchmarks.workloads import VARIANTS, Timed, set_up
from bilevel import problems

NETWORK = "mlp"
STEPS = 398
"""Training steps in an epoch of MNIST's 51,000 training images in batches of 128."""
NAMES = {"plain": "plain training", **TITLES}
COMPARED = ("plain", "stn", "centered_stn", "delta_stn")
CPU = torch.device("cpu")


def steps(seconds: float) -> dict[str, dict[str, float | None]]:
    """Return the rows of `benchmarks.step` for the MLP: time, multiplications and peak memory."""
    torch.set_num_threads(1)
    memory = {variant: peak_memory(NETWORK, variant, CPU) for variant in VARIANTS}
    return measured(NETWORK, memory, seconds, CPU)["steps"]


def rounds(seconds: float) -> dict[str, list[float]]:
    """Return the seconds of whole rounds on digits: five training steps and the outer step."""
    torch.set_num_threads(1)
    ready = {name: _ready(name) for name in COMPARED}
    return alternating({name: solver.step for name, solver in ready.items()}, seconds, CPU)


def report(context: Context) -> str:
    """Make two tables: MNIST, and digits, where launches dominate."""
    seconds = 3.0 if context.quick else 25.0
    (step_rows,) = context.map(steps, [seconds])
    (taken,) = context.map(rounds, [seconds / 2])
    outer = step_rows["outer step"]
    rows = []
    for name in COMPARED:
        row, tuned = step_rows[name], name != "plain"
        units, ms = (
            row[key] + (outer[key] / 5 if tuned else 0.0) for key in ("units", "milliseconds")
        )
        cells = [
            f"{row['units']:.2f}",
            f"{row['milliseconds']:.1f}",
            f"{row['of_stn']:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        rows.append([NAMES[name], *cells, f"{units * STEPS:,.0f}", f"{ms * STEPS / 1e3:.1f}"])
    rows.append(
        [
            "outer step",
            f"{outer['units']:.2f}",
            f"{outer['milliseconds']:.1f}",
            f"{outer['of_stn']:.2f}",
            "",
            "",
            "",
        ]
    )
    first = table(
        [
            "",
            "units a step",
            "ms a step, median",
            "× STN",
            "peak MiB",
            f"units an epoch of {STEPS} steps",
            "s an epoch",
        ],
        rows,
    )
    per_epoch = problems.digits().data(CPU, torch.Generator()).train.steps_per_epoch / 5
    second = table(
        ["", "ms an epoch, median", "× STN"],
        [
            [
                NAMES[name],
                f"{1e3 * per_epoch * statistics.median(taken[name]):.0f}",
                f"{median_ratio(taken[name], taken['stn']):.2f}",
            ]
            for name in COMPARED
        ],
    )
    busy = f"Load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores."
    return (
        "The MLP 784-1200-1200-1200-10, batch 128, one outer step after five training steps:\n\n"
        f"{first}\n\nDigits, {per_epoch * 5:.0f} training steps an epoch "
        f"({len(taken['stn'])} rounds of each in turn):\n\n"
        f"{second}\n\n{busy}"
    )


def _ready(name: str) -> Timed:
    solver, problem = VARIANTS[name](), problems.digits()
    set_up(solver, problem, CPU)
    return solver


EXPERIMENT = Experiment(page=PAGE, report=report)
