"""Train the runs of both comparisons on digits; the protocol is in docs/experiments/digits.md."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.experiments.harness import QUIET
from bilevel import Runner, problems, solvers

EPOCHS, WARMUP = 100, 5
REDUCED = 15
"""Number of epochs at the reduced size."""
DROPOUTS = ("input_dropout", "dropout1", "dropout2")
BAD_START = dict.fromkeys(DROPOUTS, 0.5) | {"weight_decay": 0.1}
SGD = partial(torch.optim.SGD, lr=0.03, momentum=0.9)
SOLVERS = {
    "fixed": partial(solvers.Fixed, inner_optimizer=SGD),
    "delta_stn": partial(solvers.delta_stn, inner_optimizer=SGD, entropy_weight=0.03),
}


class Job(NamedTuple):
    """One run: the solver, the seed and the initial hyperparameters."""

    solver: str
    seed: int
    start: dict[str, float]
    epochs: int = EPOCHS


def train(job: Job) -> dict[str, Any]:
    """Run the job and return its summary."""
    problem = problems.digits(space={hyper: {"init": value} for hyper, value in job.start.items()})
    with tempfile.TemporaryDirectory() as directory:
        runner = Runner(epochs=job.epochs, warmup_epochs=WARMUP, **QUIET)
        place = {"directory": Path(directory) / "run", "names": ("digits", job.solver)}
        return runner.run(problem, SOLVERS[job.solver](), seed=job.seed, **place)
