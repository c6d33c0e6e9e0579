"""Data hyper-cleaning on MNIST; the protocol is in docs/problems/cleaning.md."""

from benchmarks.experiments.cleaning import HEAD, comparison, sweeps
from benchmarks.experiments.harness import Context, Experiment
from benchmarks.experiments.report import table


def report(context: Context) -> str:
    """Return the table of MNIST."""
    return f"{table(HEAD, comparison(context))}\n\nn = {len(context.runs('ones'))} each."


EXPERIMENT = Experiment(
    page="problems/cleaning.md",
    sweeps=sweeps(
        "+experiment=cleaning_mnist", "sama,implicit_cg", "sama", "runner.epochs=100", "seed=100"
    ),
    report=report,
)
