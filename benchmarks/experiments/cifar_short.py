"""Train a short form of VGG16 on CIFAR-10, tuned and not; see docs/experiments/cifar.md."""

from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.mnist_mlp import pairs, picture, scores
from benchmarks.experiments.report import by_solver
from bilevel.comparison.curves import LOSS

QUICK = (
    "seed=100,101",
    "problem.width=0.125",
    "problem.train_size=256",
    "problem.valid_size=256",
    "runner.epochs=4",
)


def report(context: Context) -> str:
    """Return the table, the paired differences and the picture."""
    groups = by_solver(context.runs("vgg16"))
    shown = ((LOSS, "epochs"), (LOSS, "seconds"), ("valid_accuracy", "epochs"))
    drawn = picture(
        groups, context.figures / "cifar-vgg16.png", "VGG16 on CIFAR-10, short form", shown
    )
    return f"{scores(groups)}\n\n{pairs(groups)}\n\n{drawn}"


EXPERIMENT = Experiment(
    page="experiments/cifar.md",
    sweeps={
        "vgg16": Sweep(
            ("+experiment=cifar_vgg16_short", "solver=fixed,stn,delta_stn", "seed=0,1,2"), QUICK
        )
    },
    report=report,
)
