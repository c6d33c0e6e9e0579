"""Search architectures, retrain cells, watch the collapse; see docs/problems/architecture.md."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.report import spread, table
from bilevel.comparison import curve_plots, plot_style
from bilevel.comparison.runs import Run
from bilevel.problems.architecture.cell import pairs
from bilevel.problems.architecture.drawing import draw_search
from bilevel.problems.architecture.genotype import Edge, Genotype, derive, random_genotype
from bilevel.problems.architecture.operations import SKIP

RANDOM = 3
"""Number of random cells for each seed of the searches."""
LONGER = 3
"""Ratio of a cell's training time to its search time; cells of convolutions train slowly."""
TABLE = ("problem=architecture_tabular", "solver.inner_steps=1", "seed=0,1,2", "runner.epochs=15")
IMAGES = (
    *(
        "problem=architecture_images",
        "problem.nodes=2",
        "solver=first_order,delta_stn",
        "solver.inner_steps=1",
    ),
    *("seed=0,1,2", "runner.epochs=8", "lr.outer=0.03"),
)
QUICK = ("seed=100", "runner.epochs=2", "runner.warmup_epochs=1")
REMEDIES = {
    "no remedy": (),
    "price 1": ("problem.free_price=1",),
    "warm-up 5 epochs": ("runner.warmup_epochs=5",),
}
"""Remedies against the collapse, with their overrides."""
SWEEPS = {
    "table": Sweep((*TABLE, "solver=first_order,unrolled,implicit_identity,delta_stn"), QUICK),
    "table neumann": Sweep(
        (*TABLE, "solver=implicit_neumann", "solver.linear_solve.terms=3"), QUICK
    ),
    **{
        remedy: Sweep(
            (*IMAGES, *overrides),
            (*QUICK[:1], "runner.epochs=3", "runner.warmup_epochs=2")
            if "warm" in remedy
            else QUICK,
        )
        for remedy, overrides in REMEDIES.items()
    },
}
NAMES = {
    "first_order": "first order: the direct term alone",
    "unrolled": "second order: one step unrolled",
    "implicit_identity": "implicit, identity",
    "implicit_neumann": "implicit, Neumann",
    "delta_stn": "Δ-STN",
}


class Retraining(NamedTuple):
    """A derived cell and the settings of its plain training from scratch."""

    problem: dict[str, Any]
    cell: str
    seed: int
    epochs: int
    rate: float


def retrained(job: Retraining) -> float | None:
    """Return the test accuracy at the lowest validation loss."""
    import torch
    from hydra.utils import instantiate

    from bilevel import Runner
    from bilevel.solvers import Fixed

    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=job.rate, momentum=0.9)

    problem = instantiate({**job.problem, "genotype": job.cell})
    runner = Runner(
        epochs=job.epochs, warmup_epochs=0, device="cpu", threads=1, progress="none", picture=False
    )
    with tempfile.TemporaryDirectory() as place:
        summary = runner.run(
            problem,
            Fixed(inner_steps=1, inner_optimizer=sgd),
            directory=Path(place) / "run",
            seed=job.seed,
        )
    return summary["best"].get("test_accuracy")


def found(run: Run) -> Genotype:
    """Return the cell that is derived from the last α of a run."""
    settings = run.config["problem"]
    assert run.summary is not None
    return derive(
        run.summary["hypers"], settings["operations"], settings["nodes"], settings["keep"]
    )


def retraining(run: Run, cell: Genotype, seed: int) -> Retraining:
    """Return the settings that train a cell in place of the search network of `run`.

    The cell trains `LONGER` times as long as the search, at the same learning rate.
    """
    return Retraining(
        run.config["problem"],
        str(cell),
        seed,
        LONGER * run.config["runner"]["epochs"],
        run.config["lr"]["inner"],
    )


def all_skip(nodes: int, keep: int) -> Genotype:
    """Return the cell of a collapsed search: nothing but skip connections."""
    return Genotype(Edge(source, node, SKIP) for source, node in pairs(nodes) if source < keep)


def baselines(run: Run) -> Iterator[tuple[str, Genotype, int]]:
    """Yield the cells that need no search, each with its seed."""
    settings = run.config["problem"]
    form = settings["nodes"], settings["keep"]
    seed = run.seed or 0
    for number in range(RANDOM):
        yield (
            "random cells",
            random_genotype(RANDOM * seed + number, settings["operations"], *form),
            seed,
        )
    yield "skip connections alone", all_skip(*form), seed


def comparison(context: Context, groups: Mapping[str, Sequence[Run]]) -> str:
    """Return a table of each search, its retrained cell, the baselines and the collapse."""
    groups = {
        name: [run for run in runs if run.status == "finished"] for name, runs in groups.items()
    }
    groups = {name: runs for name, runs in groups.items() if runs}
    named = [
        (name, retraining(run, found(run), run.seed or 0))
        for name, runs in groups.items()
        for run in runs
    ]
    for run in next(iter(groups.values())):
        named += [(name, retraining(run, cell, seed)) for name, cell, seed in baselines(run)]
    accuracies: dict[str, list[float | None]] = {}
    for (name, _), accuracy in zip(
        named, context.map(retrained, [job for _, job in named]), strict=True
    ):
        accuracies.setdefault(name, []).append(accuracy)
    rows = []
    for name, values in accuracies.items():
        runs = groups.get(name, [])
        searched = spread([run.at_best("test_accuracy") for run in runs], "%") if runs else ""
        free = [
            spread([run.at_end(f"exact.{part}") for run in runs], ".2f") if runs else ""
            for part in SHARES
        ]
        seconds = spread([run.total("seconds") for run in runs], ".3g") if runs else ""
        rows.append([name, str(len(values)), searched, spread(values, "%"), *free, seconds])
    head = [
        "",
        "n",
        "search network",
        "derived cell, retrained",
        "weight of parameter-free",
        "parameter-free edges",
        "search, s",
    ]
    return table(head, rows, best={3: max})


SHARES = ("parameter_free", "derived_parameter_free")


def collapse(arms: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Draw the weight of parameter-free operations: a panel per solver, a line per remedy."""
    solvers = list(dict.fromkeys(run.solver for runs in arms.values() for run in runs))
    with plot_style.figure(path, 1, len(solvers), size=(3.6, 2.9)) as axes:
        for ax, solver in zip(axes[0], solvers, strict=True):
            shown = {
                remedy: [run for run in runs if run.solver == solver]
                for remedy, runs in arms.items()
            }
            curve_plots.draw_bands(ax, shown, "exact.parameter_free")
            ax.set_title(NAMES[solver].partition(":")[0])
            ax.set_yscale("linear")  # a share needs no logarithmic axis
            ax.set_ylim(0, 1)
            ax.set_ylabel("")
        axes[0][0].set_ylabel("weight of parameter-free operations")
        plot_style.legend(axes[0][0].figure, [axes[0][0]])


def by_solver(runs: Sequence[Run], suffix: str = "") -> dict[str, list[Run]]:
    """Group the runs under the names of the tables."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        name = NAMES[run.solver]
        groups.setdefault(f"{name.partition(':')[0]}, {suffix}" if suffix else name, []).append(run)
    return groups


def report(context: Context) -> str:
    """Return both tables and both pictures."""
    rows = by_solver([*context.runs("table"), *context.runs("table neumann")])
    arms = {remedy: context.runs(remedy) for remedy in REMEDIES}
    images = {
        name: found
        for remedy, runs in arms.items()
        for name, found in by_solver(runs, remedy).items()
    }
    shown = next(run for run in rows[NAMES["delta_stn"]])
    draw_search(shown.directory, context.figures / "architecture.png")
    collapse(arms, context.figures / "architecture_collapse.png")
    parts = [
        "**On the table**, test accuracies:",
        comparison(context, rows),
        f"The first Δ-STN search of the table (seed {shown.seed}) along its epochs, "
        "and the cell derived from its last α:",
        "![α of every edge along a search, and its derived cell](architecture.png)",
        "**On the images**, test accuracies:",
        comparison(context, images),
        "![The weight of parameter-free operations along the searches](architecture_collapse.png)",
    ]
    return "\n\n".join(parts)


EXPERIMENT = Experiment(page="problems/architecture.md", sweeps=SWEEPS, report=report)
