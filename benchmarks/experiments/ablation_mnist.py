"""Turn Δ-STN's three parts on and off on a part of MNIST; see docs/experiments/ablation.md."""

from functools import partial

from benchmarks.experiments import ablation
from benchmarks.experiments.harness import Experiment

EXPERIMENT = Experiment(
    page="experiments/ablation.md",
    sweeps=ablation.sweeps(
        "mnist", "problem.train_size=2000", "problem.valid_size=1000", "runner.epochs=8"
    ),
    report=partial(ablation.section, problem="mnist"),
)
