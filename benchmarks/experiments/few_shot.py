"""Adapt a learned start to unseen sinusoids; see docs/problems/few-shot.md."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.experiments.harness import Context, Experiment, Sweep, read_config
from benchmarks.experiments.report import spread, table
from bilevel import Hypers, Stream, evaluate
from bilevel.checkpoint.checkpoints import best_solution
from bilevel.cli.targets import build
from bilevel.comparison import plot_style
from bilevel.problems.few_shot.problem import REPORTED_STEPS, FewShot
from bilevel.problems.few_shot.recipes import sinusoid
from bilevel.solver import Solution

CPU = torch.device("cpu")
BASE = "+experiment=few_shot"
MAML = (
    "solver=unrolled",
    "solver.restart=true",
    "problem.proximity=0.0",
    "lr.outer=0.003",
    "runner.epochs=1500",
)
QUICK = ("seed=100", "runner.epochs=300", "runner.evaluate_every=100")

SHOWN = 2
"""The test task of the picture: its amplitude of 3.9 makes the starts look different."""

METHODS = {
    "maml": "MAML, K = 1",
    "maml_5": "MAML, K = 5",
    "maml_fixed": "MAML, K = 1, on the same 100 tasks throughout",
    "implicit": "implicit MAML, ρ = 2, on the same 100 tasks throughout",
}


def joint(seed: int, steps: int) -> Tensor:
    """Return the φ that fits all tasks at once, by Adam on new tasks at every step."""
    problem = sinusoid(start_seed=seed, tasks=100, fresh_tasks=True, proximity=0.0)
    params, data = (
        problem.init(torch.Generator())[0],
        problem.data(CPU, torch.Generator().manual_seed(seed)),
    )
    φ = problem.space.init().requires_grad_()
    optimizer = torch.optim.Adam([φ], lr=0.003)
    for _ in range(steps):
        losses = [
            problem.outer_loss(problem.space.constrain(φ), params, {}, batch)[0]
            for batch in (data.train.next(), data.valid.next())
        ]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return φ.detach()


def worth(problem: FewShot, hypers: Hypers) -> dict[str, float]:
    """Return the errors on the test tasks along adaptation."""
    params, carry = problem.init(torch.Generator())
    return evaluate(problem, Solution(hypers, params, carry), test_tasks(problem))


def test_tasks(problem: FewShot) -> Stream:
    """Return the stream of test tasks, the same for every seed."""
    test = problem.data(CPU, torch.Generator()).test
    assert test is not None
    return test


def baselines(seed: int, steps: int) -> list[tuple[dict[str, float], Tensor]]:
    """Return errors and φ of a random start, and of the start that fits all tasks jointly."""
    problem = sinusoid(start_seed=seed, proximity=0.0)
    return [
        (worth(problem, problem.space.constrain(φ)), φ)
        for φ in (problem.space.init(), joint(seed, steps))
    ]


def of_run(directory: Path) -> tuple[FewShot, Hypers]:
    """Return the problem of a run and its best λ."""
    config = read_config(directory)
    return build(config["problem"], "problem"), best_solution(directory).hypers


def report(context: Context) -> str:
    """Return the table and the picture."""
    runs = {name: context.runs(name) for name in METHODS}
    seeds = sorted({run.seed for group in runs.values() for run in group if run.seed is not None})
    made = context.map(partial(baselines, steps=200 if context.quick else 1500), seeds)
    columns = [f"mse_{step}" for step in REPORTED_STEPS]
    rows = []
    for name, results in zip(
        ("random start", "one network for all tasks"), zip(*made, strict=True), strict=True
    ):
        rows.append(
            [
                name,
                *(spread((errors[column] for errors, _ in results), ".2f") for column in columns),
                "",
            ]
        )
    for name, group in runs.items():
        errors = [[run.at_best(f"test_{column}") for run in group] for column in columns]
        seconds = spread((run.total("seconds") for run in group), ".0f")
        rows.append([METHODS[name], *(spread(values, ".2f") for values in errors), seconds])
    starts = {"random start": made[0][0][1], "one network for all tasks": made[0][1][1]}
    shown = {
        name: (sinusoid(proximity=0.0), {"initialization": φ, "proximity": torch.tensor(0.0)})
        for name, φ in starts.items()
    }
    shown |= {
        METHODS[name]: of_run(runs[name][0].directory)
        for name in ("maml", "implicit")
        if runs[name]
    }
    _picture(context, shown, seeds[0])
    head = [
        "start φ",
        *(f"after {step} step{'s' * (step != 1)}" for step in REPORTED_STEPS),
        "seconds",
    ]
    text = f"Mean squared error on 200 unseen sinusoids of ten points, n = {len(seeds)} each."
    return "\n\n".join(
        [text, table(head, rows), "![adaptation to a sinusoid that was not seen](few_shot.png)"]
    )


def _picture(context: Context, shown: dict[str, tuple[FewShot, Hypers]], seed: int) -> None:
    """Draw one test task, and each start after 0, 1 and 10 steps of adaptation."""
    with plot_style.figure(
        context.figures / "few_shot.png", columns=len(shown), size=(2.6, 2.9)
    ) as axes:
        for number, (ax, (name, (problem, hypers))) in enumerate(
            zip(axes[0], shown.items(), strict=True)
        ):
            task = {
                key: part[SHOWN : SHOWN + 1] for key, part in test_tasks(problem).peek().items()
            }
            x = torch.linspace(-5, 5, 201)[None, :, None]
            with torch.no_grad():
                path = problem.adapted(hypers, task | {"x": x}, 10)[0, :, :, 0]
            support_x, support_y = task["support_x"].flatten(), task["support_y"].flatten()
            ax.plot(
                support_x,
                support_y,
                "o",
                color="black",
                markersize=4,
                label="the ten points",
                zorder=3,
            )
            ax.plot(
                x.flatten(),
                _truth(task, x),
                color="0.6",
                linewidth=3,
                alpha=0.6,
                label="the sinusoid",
            )
            for step, color in zip((0, 1, 10), plot_style.COLORS, strict=False):
                ax.plot(
                    x.flatten(),
                    path[step],
                    color=color,
                    label=f"after {step} step{'' if step == 1 else 's'}",
                )
            ax.set(title=name.partition(", on")[0], xlabel="x", ylim=(-6, 6))
            if number == 0:
                ax.set_ylabel(f"y (test task {SHOWN + 1}, seed {seed})")
                plot_style.legend(ax.figure, [ax])


def _truth(task: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the sinusoid through a task's points: a sin x + b cos x, by least squares."""
    points, values = (
        torch.cat([task["support_x"], task["x"]], 1)[0],
        torch.cat([task["support_y"], task["y"]], 1)[0],
    )
    solution = torch.linalg.lstsq(torch.cat([points.sin(), points.cos()], 1), values).solution
    return (torch.cat([x.sin(), x.cos()], -1)[0] @ solution).flatten()


EXPERIMENT = Experiment(
    page="problems/few-shot.md",
    sweeps={
        "maml": Sweep((BASE, *MAML, "solver.inner_steps=1", "problem.fresh_tasks=true"), QUICK),
        "maml_5": Sweep((BASE, *MAML, "solver.inner_steps=5", "problem.fresh_tasks=true"), QUICK),
        "maml_fixed": Sweep((BASE, *MAML, "solver.inner_steps=1"), QUICK),
        "implicit": Sweep(
            (
                BASE,
                "solver=implicit_cg",
                "solver.curvature.damping=0.0",
                "problem.proximity=2.0",
                "solver.inner_steps=10",
                "solver.inner_optimizer.momentum=0.9",
                "lr={inner: 0.002, outer: 0.001}",
                "runner.epochs=3000",
            ),
            QUICK,
        ),
    },
    report=report,
)
