"""Compare tuning on 1,000 MNIST images with random search; see docs/experiments/do-no-harm.md."""

from benchmarks.experiments import do_no_harm
from benchmarks.experiments.harness import Experiment

EXPERIMENT = Experiment(
    page="experiments/do-no-harm.md",
    sweeps=do_no_harm.with_search("mnist", "problem.train_size=200", "problem.valid_size=200"),
    report=do_no_harm.report_search,
    shares="do_no_harm_mnist",
)
