"""Times of several calls in turn, and the median of their paired ratios with a lower bound."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

FEWEST_ROUNDS = 5
BELIEF = 0.975
"""Probability that the median lies above its lower bound."""


class Ratio(NamedTuple):
    """The median of n paired ratios.

    Attributes:
        median: the median.
        low: its one-sided lower bound.
        quartiles: the first and the third quartile of the ratios.
        rounds: n.
    """

    median: float
    low: float
    quartiles: tuple[float, float]
    rounds: int


def in_turn(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Return the CPU seconds of every call in every round, for about `seconds` in all.

    The time of other processes on the core does not count. A round takes each call once, in an
    order that is drawn anew. Garbage is collected between rounds and not during a call, so no call
    pays for the objects of another.
    """
    for call in calls.values():  # libraries choose their algorithms, JAX compiles
        call()
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, draws = list(calls), random.Random(0)
    end, rounds = time.perf_counter() + seconds, 0
    gc.collect()
    gc.freeze()  # what exists now need not be looked at again
    gc.disable()
    try:
        while rounds < FEWEST_ROUNDS or time.perf_counter() < end:
            rounds += 1
            draws.shuffle(order)
            for name in order:
                start = time.process_time()
                calls[name]()
                taken[name].append(time.process_time() - start)
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return taken


def paired_ratio(taken: Sequence[float], other: Sequence[float]) -> Ratio:
    """Return the median over rounds of taken / other, so that a slow moment affects both.

    The lower bound is an order statistic. It holds for every distribution of the ratios.
    """
    ratios = sorted(a / b for a, b in zip(taken, other, strict=True))
    n = len(ratios)
    quartiles = statistics.quantiles(ratios, n=4) if n > 1 else [ratios[0]] * 3
    return Ratio(statistics.median(ratios), ratios[rank_below(n)], (quartiles[0], quartiles[2]), n)


def rank_below(n: int) -> int:
    """Return the largest i with P(ratio i of n, from 0 in order, ≤ median) ≥ `BELIEF`, or 0.

    P is the probability that more than i of n fair coins show heads.
    """
    below = 0.0
    for k in range(n):
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        below += math.exp(ways - n * math.log(2))
        if below > 1 - BELIEF:
            return max(k - 1, 0)
    return 0
