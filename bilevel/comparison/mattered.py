"""A table of the hyperparameters that mattered, from the sensitivities in summaries."""

from collections.abc import Callable, Mapping, Sequence

from bilevel.comparison.part import Part
from bilevel.comparison.record_columns import finite
from bilevel.comparison.runs import Run
from bilevel.comparison.statistics import mean_std
from bilevel.comparison.table import Rows, plus_minus

NUMBERS = {
    "moved / σ": "moved",
    "dL_V/du": "hypergradient",
    "d²L_V/du²": "curvature",
    "effect": "effect",
}
"""The columns, and the keys of `bilevel.run.sensitivities`."""
MOST = 10
"""Hyperparameters of a group that are listed."""


MATTERED = (
    "At the end of each run, in unconstrained coordinates u, with σ the initial scale of the "
    "perturbation. The effect is |dL_V/du| σ + |d²L_V/du²| σ²/2, the change of the validation loss "
    "that a step of one σ can make. The second derivative is known to solvers that hold the "
    "response of the weights as a function (self-tuning)."
)


def mattered_table(groups: Mapping[str, Sequence[Run]]) -> Part | None:
    """Return the table of the hyperparameters that mattered; None if no run knows them."""
    found = mattered(groups)
    if not found.cells:
        return None
    return Part("Which hyperparameters mattered", found, MATTERED, fixed=2, words=(0, 1))


def mattered(groups: Mapping[str, Sequence[Run]]) -> Rows:
    """Return a row for each group and hyperparameter, the largest effects of a group first.

    Cells are mean ± standard deviation over the runs that know the number. A group without a
    derivative has no row.
    """
    cells: list[list[str]] = []
    for label, runs in groups.items():
        names = [name for name in _names(runs) if _mean(runs, name, "hypergradient") is not None]
        names.sort(key=lambda name: _influence(runs, name), reverse=True)
        for name in names[:MOST]:
            numbers = (_cell(runs, name, key) for key in NUMBERS.values())
            cells.append([label, name, str(len(runs)), *numbers])
        if (left := len(names) - MOST) > 0:
            cells.append([label, f"and {left} more", "", *([""] * len(NUMBERS))])
    return Rows(["solver", "hyperparameter", "n", *NUMBERS], cells)


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in _found(run)))


def _found(run: Run) -> dict[str, dict[str, object]]:
    """Return the sensitivities of a run whose entries have the right form."""
    found = (run.summary or {}).get("sensitivities")
    entries = found.items() if isinstance(found, dict) else ()
    return {str(name): entry for name, entry in entries if isinstance(entry, dict)}


def _values(runs: Sequence[Run], name: str, key: str) -> list[float | None]:
    return [finite(_found(run).get(name, {}).get(key)) for run in runs]


def _mean(
    runs: Sequence[Run], name: str, key: str, of: Callable[[float], float] = float
) -> float | None:
    summary = mean_std(None if x is None else of(x) for x in _values(runs, name, key))
    return None if summary is None else summary.mean


def _influence(runs: Sequence[Run], name: str) -> float:
    """Return the mean effect, or else the mean size of the hypergradient."""
    effect = _mean(runs, name, "effect")
    return effect if effect is not None else _mean(runs, name, "hypergradient", abs) or 0.0


def _cell(runs: Sequence[Run], name: str, key: str) -> str:
    summary = mean_std(_values(runs, name, key))
    if summary is None:
        return ""
    return plus_minus(summary.mean, summary.std if summary.n > 1 else None)
