"""Curves over seeds on a common grid, and the cost at which a run reached a target."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bilevel.comparison.runs import Array, Run, finite

AXES = {"epochs": "epoch", "seconds": "seconds", "examples": "examples"}
"""Horizontal axes, with their columns in the records."""

LOSS = "valid_loss"
POINTS = 200


class Band(NamedTuple):
    """Mean and standard deviation over seeds along a grid.

    Attributes:
        x: the grid, [points].
        mean, std: mean and standard deviation (0 for one run) of the runs that reach a point,
            [points].
        low, high: the lowest and the highest of them, [points].
        geometric: their geometric mean, and its ends at one geometric standard deviation,
            [3, points]. Where a run is not positive, they are the mean, the lowest positive run and
            the highest run.
        n: number of runs that reach a point, [points].
        of: number of all runs.
    """

    x: Array
    mean: Array
    std: Array
    low: Array
    high: Array
    geometric: Array
    n: Array
    of: int

    def whole(self) -> "Band":
        """Return the part of the grid that all runs reach."""
        kept = self.n == self.of
        arrays = (self.x, self.mean, self.std, self.low, self.high)
        x, mean, std, low, high = (values[kept] for values in arrays)
        geometric = self.geometric[:, kept]
        return Band(x, mean, std, low, high, geometric, self.n[kept], self.of)

    def edges(self, *, log: bool, most: float = np.inf) -> tuple[Array, Array, Array]:
        """Return the line, and the lower and the upper edge of the band.

        A lower edge that would fall to zero although no run does ends at the lowest run. The same
        holds for an upper edge above `most`, the largest possible value.

        Args:
            log: for a logarithmic axis, on which the geometric mean and deviation are drawn.
            most: the largest possible value.
        """
        if log:
            middle, low, high = self.geometric
            return middle, low, high
        low, high = self.mean - self.std, self.mean + self.std
        if ((low <= 0) & (self.low > 0)).any():
            low = np.maximum(low, self.low)
        if (high > most).any():
            high = np.minimum(high, self.high)
        return self.mean, low, high


class Reached(NamedTuple):
    """The cost at which a run first reached a target."""

    epochs: float
    seconds: float
    examples: float


def band(
    runs: Sequence[Run],
    y: str = LOSS,
    x: str = "epochs",
    *,
    best_so_far: bool = False,
    points: int = POINTS,
    entry: int | None = None,
) -> Band:
    """Return mean ± standard deviation over the runs, interpolated linearly on a common grid.

    A run counts up to its last finite value and is not continued beyond it. `n` is the number of
    runs that reach a point, and `whole` keeps the points that all reach. The best so far is a
    staircase, and is interpolated as one.

    Args:
        runs: the runs of one group, one per seed.
        y: a column of numbers.
        x: `epochs`, `seconds` or `examples`.
        best_so_far: use the running minimum instead of the value.
        points: number of grid points; the grid ends with the longest run.
        entry: the entry of a column with several.

    Example:
        >>> from pathlib import Path
        >>> def run(seed, losses):
        ...     epoch = np.array([0.0, 1.0, 2.0])[: len(losses)]
        ...     columns = {"epoch": epoch, "valid_loss": np.array(losses)}
        ...     return Run(
        ...         directory=Path(), problem="p", solver="s", label="s", seed=seed,
        ...         columns=columns)
        >>> over = band([run(0, [4.0, 2.0, 1.0]), run(1, [2.0, 2.0])], points=3)
        >>> over.mean.tolist(), over.n.tolist(), over.whole().x.tolist()
        ([3.0, 2.0, 1.0], [2, 2, 1], [0.0, 1.0])
    """
    curves = [curve for run in runs if (curve := _curve(run, y, x, best_so_far, entry)) is not None]
    if not curves:
        empty = np.empty(0)
        none = np.empty((3, 0))
        return Band(empty, empty, empty, empty, empty, none, empty, len(runs))
    end = max(at[-1] for at, _ in curves)
    ends = sorted({float(at[-1]) for at, _ in curves})
    # the grid contains the points at which n changes
    grid = np.unique(np.concatenate([np.linspace(0.0, end, points), ends]))
    table = np.full((len(curves), grid.size), np.nan)
    for row, (at, values) in enumerate(curves):
        inside = (grid >= at[0]) & (grid <= at[-1])
        if best_so_far:
            table[row, inside] = values[np.searchsorted(at, grid[inside], side="right") - 1]
        else:
            table[row, inside] = np.interp(grid[inside], at, values)
    n = np.isfinite(table).sum(axis=0)
    grid, table, n = grid[n > 0], table[:, n > 0], n[n > 0]
    mean = np.nanmean(table, axis=0)
    squares = np.nansum((table - mean) ** 2, axis=0)
    std = np.sqrt(squares / np.maximum(n - 1, 1))
    low, high = np.nanmin(table, axis=0), np.nanmax(table, axis=0)
    return Band(grid, mean, std, low, high, _geometric(table, mean), n, len(runs))


def _geometric(table: Array, mean: Array) -> Array:
    """Return geometric mean and its ends at one geometric standard deviation, [3, points]."""
    positive = np.where(table > 0, table, np.nan)
    n = np.isfinite(positive).sum(axis=0)
    logs = np.log(positive)
    center = np.nansum(logs, axis=0) / np.maximum(n, 1)
    std = np.sqrt(np.nansum((logs - center) ** 2, axis=0) / np.maximum(n - 1, 1))
    whole = n == np.isfinite(table).sum(axis=0)
    lowest = np.where(n > 0, np.min(np.where(table > 0, table, np.inf), axis=0), np.nan)
    highest = np.where(n > 0, np.max(np.where(table > 0, table, 0.0), axis=0), np.nan)
    return np.array(
        [
            np.where(whole, np.exp(center), np.where(mean > 0, mean, np.nan)),
            np.where(whole, np.exp(center - std), lowest),
            np.where(whole, np.exp(center + std), highest),
        ]
    )


def reached(run: Run, target: float, of: str = LOSS) -> Reached | None:
    """Return the first evaluation at which `of` is at or below the target, or None.

    There is no interpolation between evaluations. If the tuning does not reach the target, and a
    refit that was chosen does, the cost is that of its best evaluation, the tuning included.
    """
    below = np.flatnonzero(run.column(of) <= target)
    if not below.size:
        return _reached_by_refit(run, target, of)
    return Reached(*(float(run.column(column)[below[0]]) for column in AXES.values()))


def _reached_by_refit(run: Run, target: float, of: str) -> Reached | None:
    if run.refit is None or (value := run.at_best(of)) is None or value > target:
        return None
    names = list(run.candidates)
    before = names[: names.index(run.refit)]
    parts = [finite((run.candidates[name].get("last") or {}).get("epoch")) for name in before]
    epochs = sum(part or 0.0 for part in parts) + (run.at_best("epoch") or 0.0)
    seconds, examples = run.at_best("seconds"), run.at_best("examples")
    return None if seconds is None or examples is None else Reached(epochs, seconds, examples)


def common_target(groups: Mapping[str, Sequence[Run]]) -> float | None:
    """Return the highest of the groups' mean best validation losses.

    It is the hardest target that each group reaches on average. Diverged runs are left out as long
    as there are others.
    """
    sound = {
        label: [run for run in runs if run.status != "diverged"] for label, runs in groups.items()
    }
    means = []
    for runs in (sound if any(sound.values()) else groups).values():
        best = [loss for run in runs if (loss := run.at_best(LOSS)) is not None]
        if best:
            means.append(math.fsum(best) / len(best))
    return max(means, default=None)


def spans_decades(values: Iterable[Array], decades: float = 0.7) -> bool:
    """Return whether a logarithmic axis suits the values.

    All must be positive, and they must differ by orders of magnitude.
    """
    known = [array[np.isfinite(array)] for array in values]
    joined = np.concatenate([array for array in known if array.size] or [np.empty(0)])
    return bool(joined.size and joined.min() > 0 and joined.max() > 10**decades * joined.min())


def _curve(
    run: Run, y: str, x: str, best_so_far: bool, entry: int | None
) -> tuple[Array, Array] | None:
    """Return the finite points of a run, with ascending x."""
    values = run.column(y)
    if entry is not None and values.ndim == 2:
        values = values[:, entry]
    elif values.ndim == 2:
        values = values.mean(axis=1)
    at = run.column(AXES[x])
    kept = np.isfinite(values) & np.isfinite(at)
    if not kept.any():
        return None
    at, values = at[kept], values[kept]
    return at, np.minimum.accumulate(values) if best_so_far else values
