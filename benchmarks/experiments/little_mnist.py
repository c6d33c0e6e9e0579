"""Tune 12 hyperparameters on 500 images of MNIST; see docs/experiments/little-data.md."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from benchmarks.experiments.do_no_harm import (
    RUNS,
    Scored,
    candidate,
    chosen,
    own,
    relative_bound,
)
from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.report import spread, table
from bilevel.comparison.runs import Run

SEEDS = "seed=0,1,2,3,4"
START = {"plain": "", "regularized": ",regularized"}
"""The overlay of each start: that of the preset, and one on the regularized side."""
FEW, MANY = 3, 9
"""Trials of a search at about the cost of a full tuning, and at three times that cost."""
WITHOUT_DERIVATIVE = tuple(
    f"problem.space.cutout_{name}.frozen=true" for name in ("holes", "length")
)
SEARCHES = {"random_search": "random search", "tpe": "TPE", "gp": "GP"}


def sweeps() -> dict[str, Sweep]:
    """Return the command lines."""
    small = ("seed=100,101", "runner.epochs=6")
    short = (*small, "runner.warmup_epochs=1")
    found = {}
    for start, overlay in START.items():

        def line(preset: str, solver: str, *others: str, overlay: str = overlay) -> tuple[str, ...]:
            experiment = f"+experiment=[little_mnist,{preset}{overlay}]"
            return (experiment, f"solver={solver}", SEEDS, *others)

        found[f"fixed_{start}"] = Sweep(line("annealed", "fixed"), small)
        found[f"late_{start}"] = Sweep(line("late", "delta_stn"), (*short, "runner.plain_epochs=1"))
        for solver in ("delta_stn", "centered_stn", "stn"):
            found[f"{solver}_{start}"] = Sweep(line("annealed", solver), short)
        relaxed = line("annealed", "implicit_cg", "problem.dropout=concrete", *WITHOUT_DERIVATIVE)
        found[f"implicit_{start}"] = Sweep(relaxed, short)
    few = ("runner.epochs=6", "trial.epochs=3", "solver.inner_scheduler.T_max=3")
    for solver in SEARCHES:
        for trials in (FEW, MANY):
            if solver != "random_search" and trials == FEW:
                continue  # its first trials are random
            line = ("+experiment=[little_mnist,annealed]", f"solver={solver}", SEEDS)
            length = (f"runner.epochs={60 * trials}", "trial.epochs=60")
            model = () if solver == "random_search" else (f"solver.sampler.startup={FEW}",)
            search = (*line, *length, "solver.inner_scheduler.T_max=60", *model)
            found[f"{solver}_{trials}"] = Sweep(search, ("seed=100,101", *few))
    return found


Result = Callable[[Run], Scored | None]
ROWS: Mapping[str, tuple[str, Result, float | None]] = {
    "`fixed` at the start": ("fixed", own, 1.0),
    "late tuning, no refit": ("late", partial(candidate, name="run"), RUNS["late"]),
    "late tuning, refit at its λ": ("late", partial(candidate, name="end"), RUNS["late"] + 1),
    "the better of the two": ("late", partial(chosen, names=("run", "end")), RUNS["late"] + 1),
    "Δ-STN from epoch 5": ("delta_stn", own, RUNS["early"]),
    "centered STN from epoch 5": ("centered_stn", own, RUNS["early"]),
    "STN from epoch 5": ("stn", own, None),
    "implicit, CG, relaxed dropout": ("implicit", own, None),
}
"""The rows of a start: the sweep, the result of a run of it, and its cost in trainings."""


def report(context: Context) -> str:
    """Return the table of both starts, and that of the searches."""
    parts = []
    for start in START:
        reference = {run.seed: own(run) for run in context.runs(f"fixed_{start}")}
        rows = [
            [name, "" if cost is None else f"{cost:.2f}", *_cells(runs, result, reference)]
            for name, (sweep, result, cost) in ROWS.items()
            for runs in [context.runs(f"{sweep}_{start}")]
        ]
        parts.append(
            table([f"from the {start} start", "trainings", *HEAD, "against `fixed`"], rows)
        )
    rows = [
        [f"{name}, {trials} trials", f"{trials:.2f}", *_cells(context.runs(sweep), own)]
        for solver, name in SEARCHES.items()
        for trials in (FEW, MANY)
        if (sweep := f"{solver}_{trials}") in EXPERIMENT.sweeps
    ]
    return "\n\n".join([*parts, table(["search", "trainings", *HEAD], rows)])


HEAD = ("validation loss", "test loss")


def _cells(
    runs: Sequence[Run], result: Result, reference: Mapping[int | None, Scored | None] | None = None
) -> list[str]:
    """Return both losses, and the paired difference in test loss against the reference."""
    found = {run.seed: result(run) for run in runs}
    cells = [spread([s and s[i] for s in found.values()], ".3f") for i in (0, 1)]
    if reference is None:
        return cells
    pairs = [(s[1], r[1]) for seed, s in found.items() if s and (r := reference.get(seed))]
    same = all(ours == theirs for ours, theirs in pairs)
    return [*cells, "" if same else relative_bound(pairs)]


EXPERIMENT = Experiment(page="experiments/little-data.md", sweeps=sweeps(), report=report)
