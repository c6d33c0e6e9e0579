"""Ticks of logarithmic axes: few enough that no two labels collide."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import Formatter, Locator, LogLocator, MaxNLocator, NullFormatter

from bilevel.text import short_count

DIGITS = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))
"""First digits of the labels, from coarse to fine."""


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` round values between two positive limits.

    Example:
        >>> log_ticks(0.07, 0.2, 4), log_ticks(1.5, 300.0, 4), log_ticks(1e-9, 10.0, 4)
        ([0.07, 0.1, 0.2], [10.0, 100.0], [1e-09, 1e-06, 0.001, 1.0])
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [low * (1 - 1e-9), high * (1 + 1e-9)]
    for digits in reversed(DIGITS):
        values = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        ticks = [value for value in values if inside[0] <= value <= inside[1]]
        if len(ticks) <= most:
            ticks = _apart(ticks, math.log(high / low) / (most + 1))
            # below a factor of two, round values of a linear axis are closer together
            return ticks if len(ticks) > 1 else _linear(low, high, most)
    step = math.ceil(len(ticks) / most)
    return ticks[::step]


def _apart(ticks: Sequence[float], least: float) -> list[float]:
    """Return the ticks without those that are closer than `least` to the one before, in ln."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or math.log(tick / kept[-1]) >= least:
            kept.append(tick)
    return kept


def _linear(low: float, high: float, most: int) -> list[float]:
    values = MaxNLocator(nbins=max(2, most - 1), steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(f"{value:.6g}") for value in values if low <= value <= high]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    r"""Return the labels of ticks: plain numbers, or powers of ten where they would be long.

    Example:
        >>> tick_texts([0.02, 0.05]), tick_texts([1e4, 2e4]), tick_texts([2e-6])
        (['0.02', '0.05'], ['10k', '20k'], ['$\\mathdefault{2{\\times}10^{-6}}$'])
    """
    if all(1e-3 <= abs(tick) < 1e12 for tick in ticks):
        return [short_count(tick) for tick in ticks]
    return [_power(tick) for tick in ticks]


def _power(tick: float) -> str:
    exponent = math.floor(math.log10(tick) + 1e-9)
    digit = tick / 10.0**exponent
    first = "" if math.isclose(digit, 1) else rf"{digit:g}{{\times}}"
    return rf"$\mathdefault{{{first}10^{{{exponent}}}}}$"


def set_ticks(axis: Any, most: int) -> None:
    """Give an axis of matplotlib, whose scale is logarithmic, at most `most` labels."""
    axis.set_major_locator(_Few(most))
    axis.set_major_formatter(_Texts())
    axis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=99))
    axis.set_minor_formatter(NullFormatter())


class _Few(Locator):
    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self) -> Any:
        assert self.axis is not None
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Any:
        low, high = sorted((vmin, vmax))
        return np.array(log_ticks(low, high, self.most) if low > 0 else [])


class _Texts(Formatter):
    def __call__(self, x: float, pos: int | None = None) -> str:
        return tick_texts([x])[0]

    def format_ticks(self, values: Any) -> list[str]:
        return tick_texts([float(value) for value in values])
