"""The tables of paired comparisons over the seeds that two groups both have."""

from collections.abc import Mapping, Sequence

from bilevel.comparison.part import Part
from bilevel.comparison.statistics import Paired
from bilevel.comparison.table import Rows, plus_minus

PAIRS = (
    "A negative difference means that the first is lower. n is the number of seeds that both "
    "have; t = mean / (std / √n); p is two-sided with n − 1 degrees of freedom. The last column "
    "has Holm's correction for the pairs of its table. t is missing for one seed, and for equal "
    "differences."
)
MANY_GROUPS = (
    "There are many groups, so each is compared with the group of lowest mean alone. "
    "That group was chosen by these same numbers, so p is too small."
)


def paired_tables(pairs: Mapping[str, Sequence[Paired]], *, all_pairs: bool) -> list[Part]:
    """Return a table for each compared quantity; the last one explains all of them."""
    note = f"{'All pairs.' if all_pairs else MANY_GROUPS} {PAIRS}"
    return [
        Part(
            f"Paired over seeds: {words}",
            pair_rows(of),
            note if number == len(pairs) else "",
            fixed=2,
            words=(0, 1),
        )
        for number, (words, of) in enumerate(pairs.items(), start=1)
    ]


def pair_rows(pairs: Sequence[Paired]) -> Rows:
    """Return a row for each paired comparison."""
    titles = ["", "", "n", "mean difference ± std", "t", "p", "p (Holm)"]
    return Rows(
        titles,
        [
            [
                pair.first,
                f"− {pair.second}",
                str(pair.n),
                plus_minus(pair.difference, pair.std if pair.n > 1 else None),
                "" if pair.t is None else f"{pair.t:.2f}",
                _probability(pair.p),
                _probability(pair.adjusted),
            ]
            for pair in pairs
        ],
    )


def _probability(p: float | None) -> str:
    if p is None:
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"
