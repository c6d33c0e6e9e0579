"""The short forms of VGG16 and ResNet-18 on CIFAR-10, tuned and not; the protocol is in docs/experiments/cifar.md."""

from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.mnist_mlp import pairs, picture, scores
from benchmarks.experiments.report import by_solver
from bilevel.comparison.curves import LOSS

NETWORKS = {"vgg16": "VGG16", "resnet18": "ResNet-18"}
SOLVERS = "solver=fixed,stn,delta_stn"
QUICK = ("seed=100,101", "problem.width=0.125", "problem.train_size=256", "problem.valid_size=256", "runner.epochs=4")


def sweeps() -> dict[str, Sweep]:
    """The command lines: all three solvers on each network."""
    return {network: Sweep((f"+experiment=cifar_{network}_short", SOLVERS, "seed=0,1,2"), QUICK) for network in NETWORKS}


def report(context: Context) -> str:
    """A table, the pairs and a picture for each network."""
    parts = []
    for network, name in NETWORKS.items():
        groups = by_solver(context.runs(network))
        shown = ((LOSS, "epochs"), (LOSS, "seconds"), ("valid_accuracy", "epochs"))
        drawn = picture(groups, context.figures / f"cifar-{network}.png", f"{name} on CIFAR-10, short form", shown)
        parts.append(f"### {name}\n\n{scores(groups)}\n\n{pairs(groups)}\n\n{drawn}")
    return "\n\n".join(parts)


EXPERIMENT = Experiment(page="experiments/cifar.md", sweeps=sweeps(), report=report)
