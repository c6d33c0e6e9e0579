"""Curves of groups of runs on matplotlib axes: bands over seeds and paths of hyperparameters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bilevel.comparison.curves import AXES, LOSS, POINTS, Band, band, spans_decades
from bilevel.comparison.plot_style import Looks, cost_axis, logarithmic, readable_name, styles
from bilevel.comparison.runs import Array, Run
from bilevel.loggers.plot import sigma_band
from bilevel.loggers.space_json import space_from_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Groups = Mapping[str, Sequence[Run]]
"""Runs by label, one per seed."""
FEW = 4
"""Number of entries above which a hyperparameter is drawn by their mean."""
SEEDS = 8
"""Largest number of runs of a group whose own paths are drawn."""


def draw_bands(
    ax: "Axes",
    groups: Groups,
    y: str = LOSS,
    x: str = "epochs",
    *,
    best_so_far: bool = False,
    looks: Looks | None = None,
    entry: int | None = None,
    n_in_label: bool = True,
    log: bool | None = None,
) -> None:
    """Draw mean ± standard deviation over the seeds of each group.

    Beyond the end of a group's shortest run, each remaining run is a thin, pale line, since a mean
    over fewer runs would jump there. A diverged run ends in a cross. The axis is logarithmic where
    the bands span orders of magnitude; mean and deviation are then geometric.

    Args:
        ax: the axes.
        groups: runs by label.
        y: a column of numbers, for example `valid_loss` or `hypers.decay`.
        x: `epochs`, `seconds` or `examples`.
        best_so_far: draw the running minimum instead of the value.
        looks: colour, dash and marker of each label; by default those of `styles`.
        entry: the entry of a hyperparameter with several.
        n_in_label: add the number of seeds to the legend.
        log: whether the vertical axis is logarithmic; None where the numbers suit one.
    """
    looks = looks or styles(list(groups))
    drawn: dict[str, Band] = {}
    for label, runs in groups.items():
        over = band(runs, y, x, best_so_far=best_so_far, entry=entry)
        if over.x.size:
            drawn[label] = over
    if log is None:
        log = "accuracy" not in y and _suits_log(drawn.values())
    most = 1.0 if "accuracy" in y else np.inf
    for number, (label, over) in enumerate(drawn.items()):
        look = {name: looks[label][name] for name in ("color", "linestyle", "linewidth")}
        whole = over.whole()
        middle, low, high = whole.edges(log=log, most=most)
        if whole.x.size > 1:
            ax.fill_between(whole.x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        ax.plot(
            whole.x,
            middle,
            label=f"{label} (n = {len(groups[label])})" if n_in_label else label,
            marker=looks[label]["marker"],
            markersize=3.5,
            markevery=(0.04 + 0.05 * (number % 4), 0.2),  # parts of the diagonal
            **look,
        )
        for run in groups[label]:
            _draw_rest(
                ax, run, band([run], y, x, best_so_far=best_so_far, entry=entry), over.whole(), look
            )
    if log:
        logarithmic(ax)
    cost_axis(ax, x)
    ax.set_ylabel(f"best {readable_name(y)} so far" if best_so_far else readable_name(y))


def draw_paths(
    ax: "Axes",
    groups: Groups,
    name: str,
    x: str = "epochs",
    *,
    entry: int | None = None,
    sigma: bool = False,
    looks: Looks | None = None,
) -> None:
    """Draw the paths of one hyperparameter: mean ± standard deviation, or each seed with λ(u ± σ).

    Args:
        ax: the axes.
        groups: runs by label.
        name: name of the hyperparameter, without `hypers.`.
        x: `epochs`, `seconds` or `examples`.
        entry: the entry of a hyperparameter with several; None for their mean.
        sigma: draw every run in the range of its perturbation, λ(u − σ) to λ(u + σ), where it is
            known.
        looks: colour and dash of each label; by default those of `styles`.
    """
    looks = looks or styles(list(groups))
    if not sigma:
        draw_bands(ax, groups, f"hypers.{name}", x, looks=looks, entry=entry)
    shown: list[Array] = []
    for label, runs in groups.items() if sigma else ():
        for number, run in enumerate(runs[:SEEDS]):
            thin = slice(None, None, max(1, run.evaluations // POINTS))
            at, path = run.column(AXES[x])[thin], _entry(run.column(f"hypers.{name}"), entry)[thin]
            edges = perturbation_band(run, name)
            if edges is not None:
                low, high = (_entry(edge, entry)[thin] for edge in edges)
                shown += [low, high]
                ax.fill_between(
                    at,
                    low,
                    high,
                    color=looks[label]["color"],
                    alpha=0.35 / max(2, len(runs)),
                    linewidth=0,
                )
            text = f"{label} ({seeds_label(runs)})" if number == 0 else None
            ax.plot(
                at,
                path,
                color=looks[label]["color"],
                linestyle=looks[label]["linestyle"],
                linewidth=0.9,
                label=text,
            )
            shown.append(path)
    if spans_decades(shown):
        logarithmic(ax)
    cost_axis(ax, x)
    several = entry is None and any(
        run.column(f"hypers.{name}").ndim == 2 for runs in groups.values() for run in runs
    )
    ax.set_ylabel(
        f"mean of {readable_name(name)}"
        if several
        else readable_name(name) + ("" if entry is None else f"[{entry}]")
    )


def seeds_label(runs: Sequence[Run]) -> str:
    """Return the number of runs whose own path is drawn, as text.

    Example:
        >>> seeds_label([])
        'n = 0'
    """
    return f"n = {len(runs)}" if len(runs) <= SEEDS else f"{SEEDS} of {len(runs)} runs"


def perturbation_band(run: Run, name: str) -> tuple[Array, Array] | None:
    """Return λ(u − σ) and λ(u + σ) along a run, in the shape of its column.

    Returns None where the run has no σ, or its domain is unknown.
    """
    space = space_from_json(run.description.get("space"))
    values, scales = run.column(f"hypers.{name}"), run.column(f"scales.{name}")
    if name not in space or not np.isfinite(scales).any() or values.shape != scales.shape:
        return None
    shape = (len(values), *space[name].shape)
    if values.size != int(np.prod(shape)):
        return None
    sigma: Any = scales.reshape(shape).tolist()
    edges = sigma_band(space, name, torch.from_numpy(values).reshape(shape), sigma)
    return (
        None
        if edges is None
        else (edges[0].reshape(values.shape).numpy(), edges[1].reshape(values.shape).numpy())
    )


def hyper_panels(runs: Sequence[Run]) -> list[tuple[str, int | None]]:
    """Return names of the hyperparameters that move in any of the runs.

    Each comes with an entry, or with None for a number or a large hyperparameter.
    """
    panels: list[tuple[str, int | None]] = []
    for name in dict.fromkeys(name for run in runs for name in run.part("hypers.")):
        columns = [run.column(f"hypers.{name}") for run in runs if f"hypers.{name}" in run.columns]
        if not any(_moves(column) for column in columns):
            continue
        width = max(column.shape[1] if column.ndim == 2 else 1 for column in columns)
        panels += (
            [(name, None)]
            if width == 1 or width > FEW
            else [(name, entry) for entry in range(width)]
        )
    return panels


def _suits_log(bands: Iterable[Band]) -> bool:
    """Return whether all means are positive, and the bands span orders of magnitude."""
    bands = list(bands)
    positive = all((over.mean > 0).all() for over in bands)
    return positive and spans_decades(over.geometric[1:] for over in bands)


def _draw_rest(ax: "Axes", run: Run, own: Band, whole: Band, look: Mapping[str, Any]) -> None:
    """Draw a run beyond the end of the shortest of its group, and a cross where it diverged."""
    if not own.x.size:
        return
    rest = own.x >= (whole.x[-1] if whole.x.size else 0.0)
    if rest.sum() > 1:
        ax.plot(own.x[rest], own.mean[rest], **{**look, "linewidth": 0.8, "alpha": 0.5})
    if run.status == "diverged":
        ax.plot(
            own.x[-1],
            own.mean[-1],
            "x",
            color=look["color"],
            markersize=6,
            markeredgewidth=1.5,
            clip_on=False,
            zorder=4,
        )


def _moves(column: Array) -> bool:
    known = column[np.isfinite(column).reshape(len(column), -1).all(axis=1)]
    return len(known) > 1 and bool(np.ptp(known, axis=0).max(initial=0) > 0)


def _entry(values: Array, entry: int | None) -> Array:
    if values.ndim == 1:
        return values
    picked: Array = values.mean(axis=1) if entry is None else values[:, entry]
    return picked
