"""Learn augmentation of MNIST with few training images; see docs/problems/augmentation.md."""

from benchmarks.experiments.augmentation import PAGE, comparison, sweeps
from benchmarks.experiments.harness import Context, Experiment


def report(context: Context) -> str:
    """Return the tables of the five settings and the picture of the strengths' paths."""
    return comparison(context, "augmentation_mnist")


EXPERIMENT = Experiment(
    page=PAGE,
    sweeps=sweeps("mnist_augmented", "runner.epochs=8", "runner.warmup_epochs=2"),
    report=report,
)
