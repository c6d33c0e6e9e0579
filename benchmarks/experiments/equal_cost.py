"""Give every solver the same seconds of training on digits; see docs/experiments/equal-cost.md."""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.report import counted, never, spread, table
from bilevel.comparison import curve_plots, plot_style
from bilevel.comparison.curves import LOSS, reached
from bilevel.comparison.runs import Run

GRADIENT = ("delta_stn", "stn", "implicit_cg", "implicit_nystrom", "implicit_identity", "unrolled")
BLACK_BOX = ("random_search", "tpe", "gp", "pbt")
SOLVERS = ("fixed", *GRADIENT, *BLACK_BOX)
REFERENCE = "random_search"


def sweeps(problem: str, perturbation: float, *quick: str) -> dict[str, Sweep]:
    """Return the command lines; the experiment's YAML has the rates that solvers share."""
    base, reduced = f"+experiment=equal_cost_{problem}", ("seed=100,101", "trial.epochs=3", *quick)
    return {
        problem: Sweep((base, f"solver=fixed,{','.join(GRADIENT)},random_search"), reduced),
        f"{problem}_model": Sweep((base, "solver=tpe,gp", "solver.sampler.startup=2"), reduced),
        f"{problem}_pbt": Sweep(
            (base, "solver=pbt", f"solver.perturbation={perturbation}"), reduced
        ),
    }


def section(context: Context, problem: str) -> str:
    """Return the table and the picture of one problem."""
    runs = [
        run
        for name in (problem, f"{problem}_model", f"{problem}_pbt")
        for run in context.runs(name)
    ]
    groups = {solver: [run for run in runs if run.solver == solver] for solver in SOLVERS}
    groups = {solver: members for solver, members in groups.items() if members}
    return f"{_table(groups)}\n\n{_picture(context, groups, problem)}"


def targets(groups: Mapping[str, Sequence[Run]]) -> dict[int | None, float]:
    """Return the lowest validation loss of random search, by seed."""
    found = {run.seed: run.at_best(LOSS) for run in groups.get(REFERENCE, ())}
    return {seed: loss for seed, loss in found.items() if loss is not None}


def _table(groups: Mapping[str, Sequence[Run]]) -> str:
    target = targets(groups)
    rows = []
    for solver, runs in groups.items():
        times = [reached(run, target[run.seed]) for run in runs if run.seed in target]
        rows.append(
            [
                f"`{solver}`",
                counted(runs),
                *(
                    spread([run.at_best(name) for run in runs], form)
                    for name, form in SCORES.items()
                ),
                never([time and time.seconds for time in times], ".2g"),
                never([time and time.examples / 1000 for time in times], ".3g"),
                spread([run.total("steps") for run in runs], ".3g"),
                spread([run.total("outer_steps") for run in runs], ".3g"),
            ]
        )
    head = [
        "",
        "n",
        *(plot_style.readable_name(name) for name in SCORES),
        "seconds to random search's",
        "thousand examples to it",
    ]
    return table([*head, "inner steps", "λ steps or trials"], rows)


SCORES = {LOSS: ".4f", "valid_accuracy": "%", "test_loss": ".4f", "test_accuracy": "%"}


def _picture(context: Context, groups: Mapping[str, Sequence[Run]], problem: str) -> str:
    """Draw the best validation loss against seconds and examples; Δ-STN is in both rows."""
    rows = [("fixed", *GRADIENT), ("fixed", "delta_stn", *BLACK_BOX)]
    looks = {**plot_style.styles(GRADIENT), **plot_style.styles(["delta_stn", *BLACK_BOX])}
    looks["fixed"] = {**looks["delta_stn"], "color": "0.5", "linestyle": "--", "linewidth": 1.2}
    path = context.figures / f"equal-cost-{problem}.png"
    with plot_style.figure(path, rows=2, columns=2, size=(3.7, 2.7)) as axes:
        for line, solvers in zip(axes, rows, strict=True):
            shown = {solver: groups[solver] for solver in solvers if solver in groups}
            for ax, x in zip(line, ("seconds", "examples"), strict=True):
                curve_plots.draw_bands(
                    ax, shown, LOSS, x, best_so_far=True, looks=looks, n_in_label=False
                )
                ax.set_ylim(*_limits(groups))
                plot_style.logarithmic(ax)
            line[1].legend(
                loc="center left", bbox_to_anchor=(1.02, 0.5)
            )  # colours repeat in the next row
    n = min(len(runs) for runs in groups.values())
    caption = (
        f"{problem}: best validation loss so far, mean ± standard deviation over n = {n} seeds"
    )
    return f"![{caption}, against seconds of training and examples]({path.name})"


def _limits(groups: Mapping[str, Sequence[Run]]) -> tuple[float, float]:
    """Return the limits of the loss axis: all runs are inside once training has begun."""
    best = [run.at_best(LOSS) for runs in groups.values() for run in runs]
    losses = np.array([loss for loss in best if loss is not None])
    return 0.8 * float(losses.min()), max(8 * float(np.median(losses)), 1.2 * float(losses.max()))


def report(context: Context) -> str:
    """Return the block of digits."""
    return section(context, "digits")


EXPERIMENT = Experiment(
    page="experiments/equal-cost.md",
    sweeps=sweeps("digits", 0.1, "runner.seconds=3", "runner.warmup_epochs=1"),
    report=report,
)
