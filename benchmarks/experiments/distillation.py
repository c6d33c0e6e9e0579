"""Train fresh networks on ten learned images; see docs/problems/distillation.md."""

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.experiments.harness import Context, Experiment, Sweep, read_config
from benchmarks.experiments.report import by_solver, spread, table
from bilevel import Hypers, evaluate
from bilevel.checkpoint.checkpoints import best_solution
from bilevel.cli.targets import build
from bilevel.comparison import plot_style
from bilevel.comparison.runs import Run
from bilevel.problems.dataset_distillation.problem import Distillation
from bilevel.problems.dataset_distillation.recipes import distillation

CPU = torch.device("cpu")
STEPS = 1000
"""Training steps of a fresh network, at `lr` 0.05 with momentum 0.9."""

BASE = "+experiment=distillation"
CG = ("solver=implicit_cg", "solver.curvature.damping=0.0", "solver.linear_solve.iterations=20")
MLP_CG = (
    "problem.hidden=[32]",
    "solver=implicit_cg",
    "solver.curvature.damping=0.01",
    "runner.epochs=900",
)
QUICK = ("seed=100", "runner.epochs=300", "runner.warmup_epochs=50")


def initial(problem: Distillation) -> Hypers:
    """Return the initial λ."""
    return problem.space.constrain(problem.space.init())


def fresh(problem: Distillation, hypers: Hypers, seed: int, *, real: bool = False) -> float:
    """Return the test accuracy of a fresh network, trained on λ or on all real images."""
    data = problem.data(CPU, torch.Generator())
    assert data.test is not None
    on = data.valid.peek() if real else None
    solution = problem.retrained(
        hypers, torch.Generator().manual_seed(1000 + seed), on=on, steps=STEPS
    )
    return evaluate(problem, solution, data.test)["accuracy"]


def of_run(directory: Path) -> tuple[float, float]:
    """Return accuracies of a fresh network of the same kind and of the other kind."""
    config = read_config(directory)
    own, hypers = build(config["problem"], "problem"), best_solution(directory).hypers
    other = distillation(hidden=() if config["problem"]["hidden"] else (32,))
    return fresh(own, hypers, config["seed"]), fresh(other, hypers, config["seed"])


def baselines(seed: int) -> list[tuple[float, float]]:
    """Return accuracies of both networks on random real images, class means, and all images."""
    kinds = []
    for start, real in (("real", False), ("mean", False), ("real", True)):
        made = [
            distillation(hidden=hidden, start=start, start_seed=seed, batch_size=None)
            for hidden in ((), (32,))
        ]
        logistic, mlp = (fresh(problem, initial(problem), seed, real=real) for problem in made)
        kinds.append((logistic, mlp))
    return kinds


def report(context: Context) -> str:
    """Return the table and the picture."""
    tuned = {
        "logistic regression": [*context.runs("cg"), *context.runs("others")],
        "an MLP": context.runs("mlp"),
    }
    seeds = sorted({run.seed for runs in tuned.values() for run in runs if run.seed is not None})
    names = (
        "one random real image per class",
        "the mean of each class",
        "all 1078 training images",
    )
    rows = [
        [name, "", *(spread((pair[i] for pair in pairs), "%") for i in (0, 1)), ""]
        for name, pairs in zip(names, zip(*context.map(baselines, seeds), strict=True), strict=True)
    ]
    for kind, runs in tuned.items():
        for solver, group in by_solver(runs).items():
            ended = [run for run in group if run.best is not None]
            worth = context.map(of_run, [run.directory for run in ended])
            logistic, mlp = zip(
                *(pair if kind == "logistic regression" else pair[::-1] for pair in worth),
                strict=True,
            )
            rows.append(
                [
                    f"distilled for {kind} by `{solver}`",
                    spread((run.at_best("test_accuracy") for run in group), "%"),
                    spread(logistic, "%"),
                    spread(mlp, "%"),
                    spread((run.total("seconds") for run in group), ".1f"),
                ]
            )
    _picture(context, tuned["logistic regression"])
    head = [
        "ten training images",
        "network of the run",
        "fresh logistic regression",
        "fresh MLP",
        "seconds",
    ]
    text = f"Test accuracy, n = {len(seeds)} each."
    return "\n\n".join(
        [
            text,
            table(head, rows),
            "![The learned images at the start and at the end](distillation.png)",
        ]
    )


def _picture(context: Context, runs: Sequence[Run]) -> None:
    """Draw a row of ten images for the start of the first seed, and one for each solver."""
    shown = [
        next(run for run in group if run.best is not None) for group in by_solver(runs).values()
    ]
    problem = build(shown[0].config["problem"], "problem")
    rows = {"start": initial(problem)} | {
        run.solver: best_solution(run.directory).hypers for run in shown
    }
    with plot_style.figure(
        context.figures / "distillation.png", rows=len(rows), columns=10, size=(0.78, 0.85)
    ) as axes:
        for line, (name, hypers) in zip(axes, rows.items(), strict=True):
            pixels = problem.pixels(hypers)[:, 0]
            for label, (ax, image) in enumerate(zip(line, pixels, strict=True)):
                ax.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=16)
                ax.set(xticks=[], yticks=[])
                ax.grid(visible=False)
                if ax is line[0]:
                    ax.set_ylabel(name.replace("_", "\n"), rotation=0, ha="right", va="center")
                if line is axes[0]:
                    ax.set_title(str(label))


EXPERIMENT = Experiment(
    page="problems/distillation.md",
    sweeps={
        "cg": Sweep((BASE, *CG), QUICK),
        "others": Sweep(
            (BASE, "solver=unrolled,sama,implicit_identity"), (*QUICK, "solver=unrolled")
        ),
        "mlp": Sweep((BASE, *MLP_CG), QUICK),
    },
    report=report,
)
