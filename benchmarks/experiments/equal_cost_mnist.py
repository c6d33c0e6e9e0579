"""Give every solver the same seconds on a part of MNIST; see docs/experiments/equal-cost.md."""

from functools import partial

from benchmarks.experiments import equal_cost
from benchmarks.experiments.harness import Experiment

EXPERIMENT = Experiment(
    page="experiments/equal-cost.md",
    sweeps=equal_cost.sweeps(
        "mnist", 0.2, "problem.train_size=2000", "problem.valid_size=1000", "runner.seconds=3"
    ),
    report=partial(equal_cost.section, problem="mnist"),
)
