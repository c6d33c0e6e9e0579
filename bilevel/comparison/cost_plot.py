"""The plot of quality against cost, with the groups that no other beats in both."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bilevel.comparison.curve_plots import Groups
from bilevel.comparison.curves import LOSS, spans_decades
from bilevel.comparison.plot_style import Looks, logarithmic
from bilevel.comparison.runs import Run
from bilevel.comparison.statistics import Spread, spread
from bilevel.text import short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_cost(ax: "Axes", groups: Groups, looks: Looks, name: str) -> None:
    """Draw the best losses of the groups against their cost, and every run as a pale dot.

    The grey steps join the groups without diverged runs that no other beats in both. An axis is
    logarithmic where the runs span orders of magnitude; mean and deviation are then geometric.
    `name` is the column of the cost.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    points = {label: _points(runs, name) for label, runs in groups.items()}
    points = {label: known for label, known in points.items() if known}
    if not points:
        return
    log = [
        spans_decades([np.array([point[axis] for known in points.values() for point in known])])
        for axis in (0, 1)
    ]
    at: dict[str, tuple[Spread, Spread]] = {}
    for label, known in points.items():
        for run, (spent, loss) in zip(_measured(groups[label], name), known, strict=True):
            _draw_run(ax, spent, loss, looks[label]["color"], diverged=run.status == "diverged")
        cost, quality = (
            spread([point[axis] for point in known], geometric=log[axis]) for axis in (0, 1)
        )
        if cost is not None and quality is not None:
            at[label] = cost, quality
            text = f"{label} (n = {len(groups[label])})"
            _draw_group(ax, cost, quality, looks[label], text)
    sound = [label for label in at if not any(run.status == "diverged" for run in groups[label])]
    best = sorted((at[label][0].mean, at[label][1].mean) for label in sound)
    front = [
        point for i, point in enumerate(best) if all(point[1] < other[1] for other in best[:i])
    ]
    costs, losses = [cost for cost, _ in front], [loss for _, loss in front]
    ax.step(costs, losses, where="post", color="0.6", linewidth=1, zorder=1)
    for axis in (0, 1):
        if log[axis]:
            logarithmic(ax, horizontal=axis == 0)
    if not log[0]:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
        if name == "examples":
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


def _measured(runs: Sequence[Run], name: str) -> list[Run]:
    return [run for run in runs if run.total(name) is not None and run.at_best(LOSS) is not None]


def _points(runs: Sequence[Run], name: str) -> list[tuple[float, float]]:
    """Return cost and best loss of each run that has both."""
    pairs = [(run.total(name), run.at_best(LOSS)) for run in runs]
    return [(cost, loss) for cost, loss in pairs if cost is not None and loss is not None]


def _draw_run(ax: "Axes", spent: float, loss: float, color: str, *, diverged: bool) -> None:
    width = float(diverged)
    mark = "x" if diverged else "."
    ax.plot(spent, loss, mark, color=color, alpha=0.4, markersize=5, markeredgewidth=width)


def _draw_group(
    ax: "Axes", cost: Spread, quality: Spread, look: Mapping[str, Any], text: str
) -> None:
    ax.errorbar(
        cost.mean,
        quality.mean,
        xerr=[[cost.mean - cost.low], [cost.high - cost.mean]],
        yerr=[[quality.mean - quality.low], [quality.high - quality.mean]],
        label=text,
        fmt=look["marker"],
        color=look["color"],
        markersize=5.5,
        elinewidth=1,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=3,
    )
