"""The pictures of a report as PNG: curves, paths, perturbations, and quality against cost."""

import io
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bilevel.comparison.cost_plot import draw_cost
from bilevel.comparison.curve_plots import (
    Groups,
    draw_bands,
    draw_paths,
    hyper_panels,
    perturbation_band,
    seeds_label,
)
from bilevel.comparison.curves import LOSS
from bilevel.comparison.plot_style import (
    Looks,
    figure,
    legend,
    legend_columns,
    logarithmic,
    readable_name,
    styles,
)
from bilevel.comparison.runs import Run
from bilevel.comparison.statistics import mean_std

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN = 12
"""Largest number of groups in a picture; of more, those of lowest mean loss are drawn."""
PERTURBED = 6
"""Largest number of groups whose perturbation is drawn, with a row of panels each."""
WIDTH = 3
"""Panels in a row."""


class Picture(NamedTuple):
    """A picture: the end of its file name, its PNG bytes and its caption."""

    name: str
    png: bytes
    caption: str


def pictures(groups: Groups, x: str, *, best_so_far: bool = False) -> list[Picture]:
    """Return all pictures of the runs on one problem; those without content are left out."""
    drawn, left = _selected(groups)
    looks = styles(list(drawn))
    made = [
        _curves(drawn, x, looks, best_so_far),
        _paths(drawn, x, looks),
        _perturbations(drawn, x, looks),
        _pareto(drawn, looks),
    ]
    more = (
        (
            f" The picture has the {len(drawn)} groups of lowest mean loss; the tables have {left} "
            "more."
        )
        if left
        else ""
    )
    return [
        picture._replace(caption=picture.caption + more) for picture in made if picture is not None
    ]


def _selected(groups: Groups) -> tuple[Groups, int]:
    """Return the groups to draw, in their order, and the number of the others."""
    kept = sorted(groups, key=lambda label: _loss(groups[label]))[:DRAWN]
    return {label: groups[label] for label in groups if label in kept}, len(groups) - len(kept)


def _loss(runs: Sequence[Run]) -> float:
    """Return the mean best validation loss; infinity where no run has one."""
    value = mean_std(run.at_best(LOSS) for run in runs)
    return math.inf if value is None else value.mean


def _is_perturbed(runs: Sequence[Run], name: str) -> bool:
    return any(perturbation_band(run, name) is not None for run in runs)


def _grid(
    panels: Sequence[Callable[["Axes"], None]],
    *,
    width: int = WIDTH,
    labels: Sequence[str] = (),
    alike: Sequence[Hashable] = (),
) -> bytes:
    """Draw one panel for each function, with the legend of `labels` above all.

    Panels with equal `alike` get the same limits.
    """
    columns = min(width, len(panels))
    rows = math.ceil(len(panels) / columns)
    file = io.BytesIO()
    # a legend of several solvers does not fit above a narrow panel
    each = 5.0 if columns == 1 else 3.2
    numbered = [f"{label} (n = 10)" for label in labels]
    extra = (
        0.17 * math.ceil(len(labels) / legend_columns(numbered, each * columns)) if labels else 0.0
    )
    with figure(file, rows, columns, (each, 2.4 + extra / rows)) as axes:
        flat = axes.flatten().tolist()
        for draw, ax in zip(panels, flat, strict=False):
            draw(ax)
        for ax in flat[len(panels) :]:
            ax.set_visible(False)
        for kind in dict.fromkeys(alike):
            _equalize([ax for other, ax in zip(alike, flat, strict=False) if other == kind])
        if labels:
            legend(axes[0, 0].figure, flat[: len(panels)])
    return file.getvalue()


def _equalize(axes: Sequence["Axes"]) -> None:
    """Give all axes the same limits; all are logarithmic if one is."""
    if any(ax.get_yscale() == "log" for ax in axes):
        for ax in axes:
            logarithmic(ax)
    x, y = ([getattr(ax, f"get_{axis}lim")() for ax in axes] for axis in "xy")
    for ax in axes:
        ax.set(xlim=(min(low for low, _ in x), max(high for _, high in x)))
        ax.set(ylim=(min(low for low, _ in y), max(high for _, high in y)))


def _curves(groups: Groups, x: str, looks: Looks, best_so_far: bool) -> Picture | None:
    runs = [run for members in groups.values() for run in members]
    names = [LOSS, "valid_accuracy", "exact.regret"]
    names = [name for name in names if any(np.isfinite(run.column(name)).any() for run in runs)]
    if not names:
        return None

    def panel(name: str) -> Callable[["Axes"], None]:
        falls = best_so_far and name != "valid_accuracy"
        return lambda ax: draw_bands(ax, groups, name, x, best_so_far=falls, looks=looks)

    png = _grid([panel(name) for name in names], labels=list(groups))
    caption = (
        f"{_list(readable_name(name) for name in names)} against "
        f"{_axis(x)}{', the best so far' if best_so_far else ''}. Lines are means over "
        "seeds, and bands are one standard deviation on either side; both are geometric on a "
        "logarithmic axis. They last as long as all runs of a group continue. Beyond that, each "
        "remaining run is a thin line. A cross ends a diverged run."
    )
    return Picture("curves", png, caption[0].upper() + caption[1:])


def _paths(groups: Groups, x: str, looks: Looks) -> Picture | None:
    panels = hyper_panels([run for runs in groups.values() for run in runs])
    if not panels:
        return None

    def panel(name: str, entry: int | None) -> Callable[["Axes"], None]:
        return lambda ax: draw_paths(ax, groups, name, x, entry=entry, looks=looks)

    png = _grid([panel(*place) for place in panels], labels=list(groups))
    return Picture(
        "paths",
        png,
        "Hyperparameters in their own units: mean ± one standard deviation over seeds, geometric "
        "ones on a logarithmic axis.",
    )


def _perturbations(groups: Groups, x: str, looks: Looks) -> Picture | None:
    """Draw a row of panels for each group whose runs are perturbed."""
    runs = [run for members in groups.values() for run in members]
    panels = hyper_panels(runs)
    known = [
        (label, *panel)
        for label, members in groups.items()
        for panel in panels
        if _is_perturbed(members, panel[0])
    ]
    if not known:
        return None
    labels = list(dict.fromkeys(label for label, _, _ in known))
    best = sorted(labels, key=lambda label: _loss(groups[label]))[:PERTURBED]
    shown = [place for place in known if place[0] in best]

    def panel(label: str, name: str, entry: int | None) -> Callable[["Axes"], None]:
        def draw(ax: "Axes") -> None:
            draw_paths(ax, {label: groups[label]}, name, x, entry=entry, sigma=True, looks=looks)
            ax.set_title(fill(f"{label} ({seeds_label(groups[label])})", 36))

        return draw

    together = len(panels) if 1 < len(panels) <= 4 else WIDTH
    alike = [(name, entry) for _, name, entry in shown]
    png = _grid([panel(*place) for place in shown], width=together, alike=alike)
    caption = (
        "Hyperparameters of each run, in the range of their perturbation, λ(u − σ) to λ(u + σ)."
    )
    if len(labels) > len(best):
        caption += (
            f" The picture has the {len(best)} perturbed solvers of lowest mean loss, of "
            f"{len(labels)}."
        )
    return Picture("perturbation", png, caption)


def _pareto(groups: Groups, looks: Looks) -> Picture | None:
    costs = {"total training time (s)": "seconds", "total examples": "examples"}

    def panel(title: str, name: str) -> Callable[["Axes"], None]:
        def draw(ax: "Axes") -> None:
            draw_cost(ax, groups, looks, name)
            ax.set_xlabel(title)
            ax.set_ylabel("best validation loss")

        return draw

    if all(_loss(runs) == math.inf for runs in groups.values()):
        return None
    png = _grid([panel(*cost) for cost in costs.items()], labels=list(groups))
    caption = (
        "Quality against cost: the best validation loss of a run against the cost of the "
        "whole run. Means have one standard deviation; both are geometric on a logarithmic axis. "
        "Each run is a pale dot, or a cross where it diverged. Lower and further left is better. "
        "The grey steps join the groups without diverged runs that no other group beats in both."
    )
    return Picture("pareto", png, caption)


def _axis(x: str) -> str:
    return "training time" if x == "seconds" else x


def _list(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
