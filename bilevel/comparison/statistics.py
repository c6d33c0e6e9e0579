"""Means over seeds, and paired tests of solvers over the seeds that both have."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from bilevel.comparison.runs import Run

MANY = 10
"""Number of groups above which each is compared with the best one alone.

All pairs would fill pages, and Holm's correction would leave little significance.
"""


class MeanStd(NamedTuple):
    """Mean and standard deviation (0 for one value) of the `n` known values among `of` values."""

    mean: float
    std: float
    n: int
    of: int


class Spread(NamedTuple):
    """A mean with the ends of one standard deviation, arithmetic or geometric."""

    mean: float
    low: float
    high: float


class Paired(NamedTuple):
    """A paired comparison of two groups.

    Attributes:
        first, second: labels of the groups.
        n: number of seeds that both have.
        difference: mean of first − second over these seeds; negative where the first is lower.
        std: standard deviation of the differences.
        t: difference / (std / √n); None for n < 2, and for equal differences.
        p: two-sided p-value of Student's t with n − 1 degrees of freedom.
        adjusted: p after Holm's correction for all pairs that were tested together.
    """

    first: str
    second: str
    n: int
    difference: float
    std: float
    t: float | None
    p: float | None
    adjusted: float | None = None


def mean_std(values: Iterable[float | None]) -> MeanStd | None:
    """Return mean and sample standard deviation of the known values, or None without any.

    Example:
        >>> mean_std([1.0, 3.0, None])
        MeanStd(mean=2.0, std=1.4142135623730951, n=2, of=3)
    """
    values_of_all = list(values)
    known = [value for value in values_of_all if value is not None]
    if not known:
        return None
    return MeanStd(
        statistics.fmean(known),
        statistics.stdev(known) if len(known) > 1 else 0.0,
        len(known),
        len(values_of_all),
    )


def spread(values: Iterable[float | None], *, geometric: bool = False) -> Spread | None:
    """Return mean and mean ± std of the known values, or None without any.

    Geometric ones are exp(mean ± std) of the logarithms, so they are positive. They need positive
    values.

    Example:
        >>> spread([1.0, 3.0]).mean, round(spread([1.0, 4.0], geometric=True).mean, 6)
        (2.0, 2.0)
    """
    known = [value for value in values if value is not None]
    found = mean_std(map(math.log, known) if geometric else known)
    if found is None:
        return None
    edges = Spread(found.mean, found.mean - found.std, found.mean + found.std)
    return Spread(*map(math.exp, edges)) if geometric else edges


def paired(
    groups: Mapping[str, Sequence[Run]], of: Callable[[Run], float | None], *, many: int = MANY
) -> tuple[list[Paired], bool]:
    """Compare each pair of groups; above `many` groups, compare each with the lowest mean.

    t = d̄ / (s_d / √n) over the seeds that both groups have, two-sided, with Holm's correction over
    all pairs. Several runs of one seed count with their mean.

    Args:
        groups: runs by label.
        of: the compared number, lower is better; runs without it are left out.
        many: largest number of groups of which all pairs are compared.

    Returns:
        The comparisons, and True where they are all pairs.
    """
    values = {label: by_seed(runs, of) for label, runs in groups.items()}
    values = {label: seeds for label, seeds in values.items() if seeds}
    all_pairs = len(values) <= many
    if all_pairs:
        pairs = list(combinations(values, 2))
    else:
        best = min(values, key=lambda label: statistics.fmean(values[label].values()))
        pairs = [(best, label) for label in values if label != best]
    made = [_compare(first, second, values[first], values[second]) for first, second in pairs]
    made = [pair for pair in made if pair.n]
    tested = [pair.p for pair in made if pair.p is not None]
    adjusted = iter(holm(tested))
    return [
        pair if pair.p is None else pair._replace(adjusted=next(adjusted)) for pair in made
    ], all_pairs


def by_seed(runs: Iterable[Run], of: Callable[[Run], float | None]) -> dict[int, float]:
    """Return the number of each seed; the mean where several runs have the same seed."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if run.seed is not None and (value := of(run)) is not None:
            found.setdefault(run.seed, []).append(value)
    return {seed: statistics.fmean(values) for seed, values in found.items()}


def holm(ps: Sequence[float]) -> list[float]:
    """Apply Holm's step-down correction.

    The i-th smallest of m values is multiplied by m − i + 1, and none is below that of a smaller
    one.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of
    Statistics 6 (1979).
    """
    adjusted, floor = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = floor
    return adjusted


def _compare(first: str, second: str, a: Mapping[int, float], b: Mapping[int, float]) -> Paired:
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    summary = mean_std(differences)
    if summary is None:
        return Paired(first, second, 0, math.nan, math.nan, None, None)
    # t is undefined for differences that agree up to rounding
    if summary.n < 2 or summary.std <= 1e-12 * max(
        abs(value) for value in (*a.values(), *b.values())
    ):
        return Paired(first, second, summary.n, summary.mean, summary.std, None, None)
    from scipy.stats import t as student

    t = summary.mean / (summary.std / math.sqrt(summary.n))
    return Paired(
        first,
        second,
        summary.n,
        summary.mean,
        summary.std,
        t,
        float(2 * student.sf(abs(t), summary.n - 1)),
    )
