"""The plot of quality against cost, with the groups that no other beats in both."""

from typing import TYPE_CHECKING, Any

import numpy as np

from bilevel.comparison.curve_plots import Groups
from bilevel.comparison.curves import LOSS, spans_decades
from bilevel.comparison.plot_style import Looks, short_count
from bilevel.comparison.statistics import MeanStd

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_cost(
    ax: "Axes",
    groups: Groups,
    cost: dict[str, MeanStd],
    quality: dict[str, MeanStd],
    looks: Looks,
    name: str,
) -> None:
    """Draw the best losses of the groups against their cost, and every run as a pale dot.

    The grey steps join the groups without diverged runs that no other beats in both. `name` is the
    column of the cost.
    """
    from matplotlib.ticker import FuncFormatter

    if not cost:
        return
    for label, spent in cost.items():
        look, reached = looks[label], quality[label]
        for run in groups[label]:
            mark, at, loss = (
                "x" if run.status == "diverged" else ".",
                run.total(name),
                run.at_best(LOSS),
            )
            if at is not None and loss is not None:
                ax.plot(
                    at,
                    loss,
                    mark,
                    color=look["color"],
                    alpha=0.4,
                    markersize=5,
                    markeredgewidth=float(mark == "x"),
                )
        point: dict[str, Any] = {
            "fmt": look["marker"],
            "color": look["color"],
            "markersize": 5.5,
            "elinewidth": 1,
        }
        rim: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.6, "zorder": 3}
        text = f"{label} (n = {len(groups[label])})"
        ax.errorbar(
            spent.mean, reached.mean, xerr=spent.std, yerr=reached.std, label=text, **point, **rim
        )
    sound = [label for label in cost if not any(run.status == "diverged" for run in groups[label])]
    best = sorted((cost[label].mean, quality[label].mean) for label in sound)
    front = [
        point for i, point in enumerate(best) if all(point[1] < other[1] for other in best[:i])
    ]
    ax.step(
        [spent for spent, _ in front],
        [loss for _, loss in front],
        where="post",
        color="0.6",
        linewidth=1,
        zorder=1,
    )
    values = [
        np.array([spent.mean for spent in cost.values()]),
        np.array([value.mean for value in quality.values()]),
    ]
    for scale, numbers in zip((ax.set_xscale, ax.set_yscale), values, strict=True):
        if spans_decades([numbers]):
            scale("log")
    if name == "examples":
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
