"""Tune from three starts, and compare with plain training; see docs/experiments/do-no-harm.md."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from scipy.stats import t as student

from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.report import spread, table
from bilevel.comparison.runs import Run

STARTS = (0.3, 0.5, 0.7)
LEVEL, MARGIN = 0.95, 0.05
"""The level of the one-sided bound, and the part of `fixed` below which it must lie."""
TRIALS, EPOCHS = 30, 60
UNITS = {"plain": 3.0, "response": 5.0, "outer": 4.0}
"""Multiplications by all weights for one batch (docs/step-cost.md)."""

Scored = tuple[float, float]
"""The validation loss by which a result is chosen, and its test loss."""


def sweeps(problem: str, *quick: str) -> dict[str, Sweep]:
    """Return the command lines of one problem without random search."""
    starts, seeds = ",".join(map(str, STARTS)), ",".join(map(str, range(10)))
    small = ("seed=100,101", "runner.epochs=6", *quick)
    phases = ("runner.plain_epochs=1", "runner.warmup_epochs=1")

    def line(overlay: str, solver: str, *others: str) -> tuple[str, ...]:
        return (f"+experiment=[do_no_harm_{problem},{overlay}]", f"solver={solver}", *others)

    each = (f"start={starts}", f"seed={seeds}")
    return {
        "fixed": Sweep(line("annealed", "fixed", *each), small),
        "early": Sweep(line("annealed", "delta_stn", *each), (*small, "runner.warmup_epochs=1")),
        "late": Sweep(line("late", "delta_stn", *each), (*small, *phases)),
    }


def with_search(problem: str, *quick: str) -> dict[str, Sweep]:
    """Return all command lines of one problem."""
    search = ("runner.epochs=1800", "trial.epochs=60", "solver.inner_scheduler.T_max=60")
    few = ("runner.epochs=6", "trial.epochs=3", "solver.inner_scheduler.T_max=3")
    line = (f"+experiment=[do_no_harm_{problem},annealed]", "solver=random_search", *search)
    random = Sweep((*line, "seed=0,1,2,3,4"), ("seed=100,101", *few, *quick))
    return sweeps(problem, *quick) | {"random": random}


# --- the results of a run ---


def own(run: Run) -> Scored | None:
    """Return the losses at the evaluation of the lowest validation loss."""
    return _scored(run.at_best("valid_loss"), run.at_best("test_loss"))


def candidate(run: Run, name: str) -> Scored | None:
    """Return the losses of one candidate of a run with refits: `run`, `start` or `end`."""
    found = ((run.summary or {}).get("refit") or {}).get("candidates", {}).get(name, {})
    return _scored(found.get("valid_loss"), found.get("test_loss"))


def chosen(run: Run, names: Sequence[str]) -> Scored | None:
    """Return the candidate of the lowest validation loss."""
    found = [scored for name in names if (scored := candidate(run, name)) is not None]
    return min(found, default=None)


def _scored(valid: float | None, test: float | None) -> Scored | None:
    return None if valid is None or test is None else (valid, test)


ROWS: Mapping[str, tuple[str, Callable[[Run], Scored | None]]] = {
    "`fixed` at the start": ("fixed", own),
    "Δ-STN from epoch 5": ("early", own),
    "late tuning, no refit": ("late", partial(candidate, name="run")),
    "late tuning, refit at its λ": ("late", partial(candidate, name="end")),
    "the better of the two": ("late", partial(chosen, names=("run", "end"))),
    "the best of the two and of a refit at the start": (
        "late",
        partial(chosen, names=("run", "end", "start")),
    ),
}
"""The rows of the table: the sweep, and the result of a run of it."""
COST = dict(zip(ROWS, (0, 0, 0, 1, 1, 2), strict=True))
"""The number of refits of a row."""


def trainings(*, plain: float, warmup: float, tuned: float, frozen: float, every: int) -> float:
    """Return the multiplications of a run of Δ-STN with 5 + 1 steps, in plain trainings.

    The arguments are numbers of epochs; `every` is `response_every`.

    Example:
        >>> round(trainings(plain=0, warmup=5, tuned=55, frozen=0, every=1), 2)
        2.91
        >>> round(trainings(plain=7, warmup=5, tuned=30, frozen=18, every=2), 2)
        1.62
    """
    response = UNITS["plain"] + UNITS["response"] / every
    units = UNITS["plain"] * (plain + frozen) + response * (warmup + tuned)
    units += UNITS["outer"] / 5 * tuned
    return units / (UNITS["plain"] * (plain + warmup + tuned + frozen))


RUNS = {
    "fixed": 1.0,
    "early": trainings(plain=0, warmup=5, tuned=55, frozen=0, every=1),
    "late": trainings(plain=7, warmup=5, tuned=30, frozen=18, every=2),
}


# --- the report ---


def upper_bound(differences: Sequence[float]) -> float:
    """Return the upper one-sided bound of the mean, mean + t_{0.95, n−1} · s / √n.

    Example:
        >>> round(upper_bound([1.0, 2.0, 3.0]), 3)
        3.686
    """
    n = len(differences)
    quantile = float(student.ppf(LEVEL, n - 1))
    return statistics.mean(differences) + quantile * statistics.stdev(differences) / math.sqrt(n)


def report(context: Context) -> str:
    """Return the table of test losses."""
    return harm({name: context.runs(name) for name in ("fixed", "early", "late")})


def report_search(context: Context) -> str:
    """Return the table of test losses over those of random search."""
    return against_search({n: context.runs(n) for n in ("fixed", "early", "late", "random")})


def harm(runs: Mapping[str, Sequence[Run]]) -> str:
    """Return one row for each way to train, with its test loss from every start."""
    reference = {(start, seed): scored for start, seed, scored in _results(runs["fixed"], own)}
    head = ["test loss", "trainings", *(f"from {start:g}" for start in STARTS)]
    head += [f"against `fixed`, bound from {start:g}" for start in STARTS]
    rows = []
    for name, (sweep, result) in ROWS.items():
        found = list(_results(runs[sweep], result))
        losses = [[s[1] for at, _, s in found if at == start and s] for start in STARTS]
        cells = [name, f"{RUNS[sweep] + COST[name]:.2f}", *(spread(each, ".3f") for each in losses)]
        for start in STARTS:
            pairs = [
                (s[1], base[1])
                for at, seed, s in found
                if at == start and s and (base := reference.get((at, seed)))
            ]
            cells.append("" if sweep == "fixed" else relative_bound(pairs))
        rows.append(cells)
    return table(head, rows)


def relative_bound(pairs: Sequence[tuple[float, float]]) -> str:
    """Return the mean paired difference and its upper bound, in percent of `fixed`."""
    if len(pairs) < 2:
        return "–"
    base = statistics.mean(theirs for _, theirs in pairs)
    differences = [ours - theirs for ours, theirs in pairs]
    mean, bound = statistics.mean(differences) / base, upper_bound(differences) / base
    verdict = "" if bound < MARGIN else " ✗"
    return f"{mean:+.1%}, {bound:+.1%}{verdict}".replace("-", "−").replace("%", " %")


def against_search(runs: Mapping[str, Sequence[Run]]) -> str:
    """Return the ratio of test losses to that of the best random trial of the same seed."""
    best = {run.seed: scored[1] for run in runs["random"] if (scored := own(run))}
    head = ["test loss over that of the best random trial", "trainings"]
    head += [f"from {start:g}" for start in STARTS]
    rows = []
    for name, (sweep, result) in ROWS.items():
        found = list(_results(runs[sweep], result))
        ratios = [
            [s[1] / best[seed] for at, seed, s in found if at == start and s and seed in best]
            for start in STARTS
        ]
        cost = f"{RUNS[sweep] + COST[name]:.2f}"
        rows.append([name, cost, *(spread(each, ".2f") for each in ratios)])
    trials = spread(list(best.values()), ".3f")
    note = f"The best of {TRIALS} random trials has a test loss of {trials} (n = {len(best)})."
    return f"{table(head, rows)}\n\n{note}"


def _results(
    runs: Sequence[Run], result: Callable[[Run], Scored | None]
) -> list[tuple[float, int | None, Scored | None]]:
    """Return the start, the seed and the result of each run."""
    return [(float(run.config["start"]), run.seed, result(run)) for run in runs]


EXPERIMENT = Experiment(page="experiments/do-no-harm.md", sweeps=sweeps("digits"), report=report)
