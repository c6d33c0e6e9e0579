"""Find wrong labels by one weight per example; see docs/problems/cleaning.md."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from benchmarks.experiments.harness import Context, Experiment, Sweep, read_config
from benchmarks.experiments.report import by_solver, spread, table
from bilevel import Runner
from bilevel.checkpoint.checkpoints import best_solution
from bilevel.cli.targets import build
from bilevel.comparison import curve_plots, plot_style
from bilevel.comparison.runs import Run
from bilevel.problems import MLP
from bilevel.problems.datasets import standard_images
from bilevel.problems.hyper_cleaning import HyperCleaning, detection
from bilevel.solvers import Fixed

DETECTION = {"f1": "F1", "precision": "precision", "recall": "recall", "roc_auc": "ROC AUC"}
HEAD = ["", "test accuracy", "validation loss", *DETECTION.values(), "seconds"]
ONES = "problem.space={example_weight: {init: 1.0, frozen: true}}"
DELTA_STN = (
    "solver=delta_stn",
    "solver.response_optimizer="
    "{_target_: torch.optim.SGD, _partial_: true, lr: 1.0e-4, momentum: 0.9}",
    "problem.space={example_weight: {scale: 0.1}}",
)


def sweeps(base: str, solvers: str, few: str, *quick: str) -> dict[str, Sweep]:
    """Return sweeps: weights of 1, weights tuned by `solvers` or `few`, right labels."""
    reduced = ("seed=100,101", *quick)
    return {
        "ones": Sweep((base, "solver=fixed", ONES), reduced),
        "tuned": Sweep((base, f"solver={solvers}"), (*reduced, f"solver={few}")),
        "right": Sweep((base, "solver=fixed", "problem.oracle=true"), reduced),
    }


def comparison(context: Context) -> list[list[str]]:
    """Return the rows that digits and MNIST share."""
    ones = context.runs("ones")
    ranked = context.map(loss_ranking, [run.directory for run in ones])
    found = [spread((one[name] for one in ranked), ".3f") for name in DETECTION]
    rows = [["all labels, weight 1", *measured(ones), *[""] * 4, seconds(ones)]]
    rows.append(["the same, the highest losses declared wrong", "", "", *found, ""])
    rows += [
        [f"weights tuned by `{solver}`", *whole(runs)]
        for solver, runs in by_solver(context.runs("tuned")).items()
    ]
    right = context.runs("right")
    return [
        *rows,
        ["the right labels alone (a bound)", *measured(right), *[""] * 4, seconds(right)],
    ]


def measured(runs: Sequence[Run]) -> list[str]:
    """Return test accuracy and validation loss at the lowest validation loss."""
    return [
        spread((run.at_best("test_accuracy") for run in runs), "%"),
        spread((run.at_best("valid_loss") for run in runs), ".3f"),
    ]


def whole(runs: Sequence[Run]) -> list[str]:
    """Return all columns for runs that tune the weights."""
    found = [spread((run.at_best(f"exact.{name}") for run in runs), ".3f") for name in DETECTION]
    return [*measured(runs), *found, seconds(runs)]


def seconds(runs: Sequence[Run]) -> str:
    """Return the seconds of training."""
    return spread((run.total("seconds") for run in runs), ".1f")


def gain(runs: Sequence[Run], over: Sequence[Run], name: str, form: str) -> str:
    """Return the gain of a score over the run of the same seed in the other group."""
    before = {run.seed: run.at_best(name) for run in over}
    pairs = [(run.at_best(name), before.get(run.seed)) for run in runs]
    return spread(
        (None if now is None or then is None else now - then for now, then in pairs), form
    )


def loss_ranking(directory: Path) -> dict[str, float]:
    """Return how well training losses find wrong labels, given their number."""
    config = read_config(directory)
    problem, solution = build(config["problem"], "problem"), best_solution(directory)
    batch = problem.data(torch.device("cpu"), torch.Generator()).train.peek()
    with torch.no_grad():
        prediction, _ = problem.predict(
            solution.hypers, solution.params, solution.carry, batch, train=False, generator=None
        )
        losses = F.cross_entropy(prediction, batch[1], reduction="none")
    declared = losses >= losses.topk(int(problem.corrupted.sum())).values[-1]
    return {
        name: float(value) for name, value in detection(losses, problem.corrupted, declared).items()
    }


def on_validation_alone(seed: int) -> float:
    """Return the test accuracy of the same model trained on the clean validation split."""
    images = standard_images.load_digits(seed)
    problem = HyperCleaning(partial(MLP, [64, 10]), images._replace(train=images.valid), rate=0.0)
    solver = Fixed(inner_optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    with TemporaryDirectory() as directory:
        runner = Runner(epochs=1000, evaluate_every=50, progress="none", picture=False)
        return float(
            runner.run(problem, solver, directory=directory, seed=seed)["last"]["test_accuracy"]
        )


def report(context: Context) -> str:
    """Return the tables of digits and the picture."""
    rows = comparison(context)
    rows.insert(-1, ["weights tuned by `delta_stn`", *whole(context.runs("delta_stn"))])
    alone = context.map(on_validation_alone, [run.seed for run in context.runs("ones")])
    rows.append(["the validation labels alone", spread(alone, "%"), *[""] * 6])
    kinds: dict[str, list[Run]] = {}
    for run in [
        *context.runs("rates"),
        *context.runs("pairwise"),
        *by_solver(context.runs("tuned")).get("sama", []),
    ]:
        problem = run.config["problem"]
        kinds.setdefault(f"{problem['noise']}, {problem['rate']:.0%}", []).append(run)
    others = [[kind, *whole(runs)] for kind, runs in sorted(kinds.items())]
    _picture(context)
    return "\n\n".join(
        [
            table(HEAD, rows),
            f"n = {len(context.runs('ones'))} each.\n\nSAMA at other rates and kinds of noise:",
            table(["wrong labels", *HEAD[1:]], others),
            "![learned weights of right and of wrong labels, and F1 along training](cleaning.png)",
        ]
    )


def _picture(context: Context) -> None:
    tuned = by_solver(context.runs("tuned"))
    with plot_style.figure(context.figures / "cleaning.png", columns=2, size=(4.2, 2.9)) as axes:
        left, right = axes[0]
        run = tuned["sama"][0]
        problem, weight = (
            build(run.config["problem"], "problem"),
            best_solution(run.directory).hypers["example_weight"],
        )
        sides = {"right": ~problem.corrupted, "wrong": problem.corrupted}
        for (name, side), color in zip(sides.items(), plot_style.COLORS, strict=False):
            label = f"{name} label (n = {int(side.sum())})"
            left.hist(
                weight[side].numpy(), bins=40, range=(0, 1), color=color, alpha=0.6, label=label
            )
        left.set(
            xlabel="learned weight of an example",
            ylabel="training examples",
            title=f"SAMA, seed {run.seed}",
        )
        left.legend()
        groups = {**tuned, "delta_stn": context.runs("delta_stn")}
        curve_plots.draw_bands(right, groups, "exact.f1")
        right.set(ylabel="F1", ylim=(0, 1.02))
        right.legend(loc="lower right", fontsize="x-small")


BASE = "+experiment=cleaning"
SOLVERS = "sama,implicit_identity,implicit_cg,soba,penalty,unrolled"
QUICK = ("runner.epochs=300",)

EXPERIMENT = Experiment(
    page="problems/cleaning.md",
    sweeps={
        **sweeps(BASE, SOLVERS, "sama,implicit_cg", *QUICK),
        "delta_stn": Sweep((BASE, *DELTA_STN), ("seed=100,101", *QUICK)),
        "rates": Sweep(
            (BASE, "solver=sama", "problem.rate=0.1,0.3,0.7"),
            ("seed=100,101", *QUICK, "problem.rate=0.3"),
        ),
        "pairwise": Sweep(
            (BASE, "solver=sama", "problem.rate=0.3", "problem.noise=pairwise"),
            ("seed=100,101", *QUICK),
        ),
    },
    report=report,
)
