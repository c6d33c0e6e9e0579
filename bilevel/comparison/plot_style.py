"""The look of comparison plots: colours, figures, names, legends and axes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from bilevel.loggers.plot import STYLE
from bilevel.loggers.plot_texts import fit_texts, plain_names, shortened, without_glyph_warnings
from bilevel.text import short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Looks = Mapping[str, Mapping[str, Any]]
"""Colour, dash and marker of each label."""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette without yellow, which is hard to see on white paper."""
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Markers are one more than colours, so that both do not repeat together."""
DPI = 160
LETTER = 0.055
"""The width of a letter in a legend, in inches."""


def styles(labels: Sequence[str]) -> Looks:
    """Return colour, dash, width and marker of each label.

    Where colours repeat, the dash differs, so that no two lines look alike in print. Later lines
    are thinner, so that both of two equal lines are visible.

    Example:
        >>> styles(["stn", "fixed"])["fixed"]
        {'color': '#D55E00', 'linestyle': '-', 'linewidth': 1.2, 'marker': 's'}
    """
    widths = np.linspace(2.2, 1.2, len(labels)) if len(labels) > 1 else [1.5]
    return {
        label: {
            "color": COLORS[i % len(COLORS)],
            "linestyle": LINES[i // len(COLORS) % len(LINES)],
            "linewidth": round(float(widths[i]), 2),
            "marker": MARKERS[i % len(MARKERS)],
        }
        for i, label in enumerate(labels)
    }


@contextmanager
def figure(
    path: str | Path | IO[bytes],
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = (3.4, 2.5),
) -> Iterator[Any]:
    """Yield the axes [rows, columns] of a new figure, and save it to a path or file at the end.

    `size` is that of a panel, in inches.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        drawn = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=DPI, layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn.subplots(rows, columns, squeeze=False)
        fit_texts(drawn)
        plain_names(drawn)
        with without_glyph_warnings():
            drawn.savefig(path)


def readable_name(name: str) -> str:
    """Return the readable name of a column.

    Example:
        >>> readable_name("valid_loss"), readable_name("exact.regret"), readable_name("hypers.lr")
        ('validation loss', 'regret', 'lr')
    """
    bare = name.removeprefix("exact.").removeprefix("hypers.").removeprefix("scales.")
    return bare.replace("valid_", "validation ").replace("train_", "training ").replace("_", " ")


def legend(drawn: "Figure", axes: Sequence["Axes"]) -> None:
    """Draw one legend for the whole figure, above it; a label may be in one of the axes alone."""
    width = drawn.get_figwidth()
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        drawn.legend(
            list(found.values()),
            [shortened(label, (width - 0.7) / LETTER, tail=10) for label in found],
            loc="outside upper center",
            ncols=legend_columns(list(found), width),
        )


def legend_columns(labels: Sequence[str], width: float) -> int:
    """Return the number of legend columns that fit into a figure of `width` inches.

    Example:
        >>> legend_columns(["stn", "fixed", "delta_stn"], 5.0)
        3
    """
    each = 0.55 + LETTER * max(map(len, labels), default=0)  # handle and gaps, and the letters
    return max(1, min(len(labels), int(width / each)))


def logarithmic(ax: "Axes", *, horizontal: bool = False) -> None:
    """Make the vertical axis logarithmic, or the horizontal one, with ticks that do not collide."""
    from bilevel.comparison.log_axis import set_ticks

    if horizontal:
        ax.set_xscale("log")
        set_ticks(ax.xaxis, 4)
    else:
        ax.set_yscale("log")
        set_ticks(ax.yaxis, 6)


def cost_axis(ax: "Axes", x: str) -> None:
    """Label the horizontal axis by the cost that it shows, and place its ticks."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_xlabel("training time (s)" if x == "seconds" else x)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    if x == "examples":
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
