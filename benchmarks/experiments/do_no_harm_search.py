"""Compare tuning on digits with random search; see docs/experiments/do-no-harm.md."""

from benchmarks.experiments import do_no_harm
from benchmarks.experiments.harness import Experiment

EXPERIMENT = Experiment(
    page="experiments/do-no-harm.md",
    sweeps=do_no_harm.with_search("digits"),
    report=do_no_harm.report_search,
    shares="do_no_harm",
)
