"""How sure a difference between solvers is: paired tests over the seeds that both have."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from bilevel.comparison.runs import Run

MANY = 10
"""Groups beyond which each is compared with the best alone: pairs would fill pages, and Holm's correction would eat them."""


class MeanStd(NamedTuple):
    """Mean and standard deviation (0 of a single value) of the `n` values that are known `of` so many."""

    mean: float
    std: float
    n: int
    of: int


class Paired(NamedTuple):
    """A paired comparison of two groups.

    Attributes:
        first, second: their labels.
        n: seeds that both have.
        difference: the mean of first − second over these seeds, below zero where the first is lower.
        std: of the differences.
        t: difference / (std / √n); None for n < 2, and where the differences do not differ.
        p: two-sided, of Student's t with n − 1 degrees of freedom.
        adjusted: p after Holm's correction for all the pairs that were tested together.
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
    """Mean and sample standard deviation of the values that are known; None where none is.

    Example:
        >>> mean_std([1.0, 3.0, None])
        MeanStd(mean=2.0, std=1.4142135623730951, n=2, of=3)
    """
    given = list(values)
    known = [value for value in given if value is not None]
    if not known:
        return None
    return MeanStd(
        statistics.fmean(known),
        statistics.stdev(known) if len(known) > 1 else 0.0,
        len(known),
        len(given),
    )


def paired(
    groups: Mapping[str, Sequence[Run]], of: Callable[[Run], float | None], *, many: int = MANY
) -> tuple[list[Paired], bool]:
    """Each pair of groups, or each against that of the lowest mean where there are more than `many`.

    t = d̄ / (s_d / √n) over the seeds that both groups have (several runs of one seed count with their mean), two-sided, with
    Holm's correction over all the pairs.

    Args:
        groups: runs by label.
        of: the number that is compared, lower is better; a run without it takes no part.
        many: the number of groups beyond which not all pairs are made.

    Returns:
        The comparisons, and whether they are all pairs.
    """
    values = {label: by_seed(runs, of) for label, runs in groups.items()}
    values = {label: seeds for label, seeds in values.items() if seeds}
    everyone = len(values) <= many
    if everyone:
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
    ], everyone


def by_seed(runs: Iterable[Run], of: Callable[[Run], float | None]) -> dict[int, float]:
    """The number of each seed; the mean where several runs have the same one."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if run.seed is not None and (value := of(run)) is not None:
            found.setdefault(run.seed, []).append(value)
    return {seed: statistics.fmean(values) for seed, values in found.items()}


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of m is multiplied by m − i + 1, and none is below a smaller one's.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, floor = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = floor
    return adjusted


def _compare(first: str, second: str, a: Mapping[int, float], b: Mapping[int, float]) -> Paired:
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    told = mean_std(differences)
    if told is None:
        return Paired(first, second, 0, math.nan, math.nan, None, None)
    # differences that agree to rounding have no spread to hold their mean against
    if told.n < 2 or told.std <= 1e-12 * max(abs(value) for value in (*a.values(), *b.values())):
        return Paired(first, second, told.n, told.mean, told.std, None, None)
    from scipy.stats import t as student

    t = told.mean / (told.std / math.sqrt(told.n))
    return Paired(
        first, second, told.n, told.mean, told.std, t, float(2 * student.sf(abs(t), told.n - 1))
    )
