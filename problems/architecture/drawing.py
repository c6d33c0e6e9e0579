"""Draw an architecture search: the path of α on each edge, and the derived cell.

python -m bilevel.problems.architecture.drawing RUN
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel import BilevelError
from bilevel.loggers.records import METRICS, SUMMARY, read_metrics
from bilevel.problems.architecture.genotype import Genotype, derive
from bilevel.problems.architecture.operations import NONE
from bilevel.untrusted_files import read_bytes, read_yaml

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "architecture.png"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
"""Colors of Okabe and Ito; `none` is grey."""


def colors(operations: Sequence[str]) -> dict[str, str]:
    """Return a color for each operation, the same one in every picture."""
    real = [name for name in operations if name != NONE]
    return {NONE: "0.7", **{name: COLORS[place % len(COLORS)] for place, name in enumerate(real)}}


def draw_path(
    ax: "Axes", records: Sequence[Mapping[str, Any]], name: str, operations: Sequence[str]
) -> None:
    """Plot α of one edge against epochs; the strongest operation except `none` has a thick line."""
    epochs = [r["epoch"] for r in records]
    path = [r[f"hypers.{name}"] for r in records]
    last = {place: value for place, value in enumerate(path[-1]) if operations[place] != NONE}
    strongest = max(last, key=last.__getitem__)
    for place, operation in enumerate(operations):
        width = 2.4 if place == strongest else 1.0
        dashes = "--" if operation == NONE else "-"
        color = colors(operations)[operation]
        ax.plot(
            epochs,
            [row[place] for row in path],
            dashes,
            color=color,
            linewidth=width,
            label=operation,
        )
    ax.set_title(name.replace("edge_", "edge ").replace("_", " → "))


def draw_cell(ax: "Axes", cell: Genotype, operations: Sequence[str]) -> None:
    """Draw the derived cell: nodes in a row, and an arc with the operation's name for each edge."""
    from matplotlib.patches import FancyArrowPatch

    shades = colors(operations)
    for source, node, operation in cell:
        span = node - source
        # Arcs lie above and below the row, so that few of them cross.
        bend = 0.0 if span == 1 else -0.4 if source % 2 else 0.4
        ends = (float(source), 0.0), (float(node), 0.0)
        arrow = FancyArrowPatch(
            *ends,
            connectionstyle=f"arc3,rad={-bend}",
            arrowstyle="-|>",
            mutation_scale=12,
            shrinkA=13,
            shrinkB=13,
            linewidth=2,
            color=shades[operation],
        )
        ax.add_patch(arrow)
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
        # arc3 puts its control point at rad · length, and the arc at half of that.
        height = bend * span / 2 if span > 1 else 0.0
        ax.text(
            (source + node) / 2,
            height,
            operation,
            color=shades[operation],
            fontsize=8,
            ha="center",
            va="center",
            bbox=box,
        )
    for node in range(cell.nodes + 1):
        ax.plot(node, 0, "o", markersize=20, color="white", markeredgecolor="0.2", zorder=3)
        ax.text(
            node,
            0,
            "in" if node == 0 else str(node),
            ha="center",
            va="center",
            fontsize=8,
            zorder=4,
        )
    deepest = {
        side: max([0.25, *(0.2 * (e.node - e.source) + 0.15 for e in cell if e.source % 2 == side)])
        for side in (0, 1)
    }
    ax.set_aspect("equal")  # then an arc has the same height in the picture
    ax.set_xlim(-0.3, cell.nodes + 0.3)
    ax.set_ylim(-deepest[1], deepest[0])
    ax.set_axis_off()


def draw_search(run: str | Path, picture: str | Path | None = None) -> Path:
    """Write the picture of a search: the paths of α, and the cell that the last α give.

    Args:
        run: the directory of a run of `problem=architecture_images` or `architecture_tabular`.
        picture: the file to write; by default `architecture.png` in that directory.

    Raises:
        BilevelError: the directory holds no search, or the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run = Path(run)
    try:
        records = read_metrics(run / METRICS)
        summary = json.loads(read_bytes(run / SUMMARY))
        settings = read_yaml(run / "config.yaml")["problem"]
        weights = {
            name: leaf for name, leaf in summary["hypers"].items() if name.startswith("edge_")
        }
    except OSError as error:
        raise BilevelError(
            f"run={run} cannot be read: {error.strerror or error}; give the directory of a run"
        ) from None
    except Exception:  # damaged files raise many classes
        raise BilevelError(
            f"run={run} is damaged or not the directory of a run; give another one"
        ) from None
    if not (weights and records and isinstance(settings, dict) and settings.get("operations")):
        raise BilevelError(
            f"run={run} holds no architecture search; give a run of problem=architecture_images or "
            "architecture_tabular"
        )
    operations = list(settings["operations"])
    cell = derive(weights, operations, settings["nodes"], settings["keep"])
    rows, columns = -(-len(weights) // 3), min(3, len(weights))
    figure = Figure(figsize=(3.2 * columns, 2.1 * rows + 2.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    paths, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.1 * rows + 0.3, 2.3])[
        :, 0
    ]
    axes = paths.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for ax, name in zip(axes, weights, strict=False):
        draw_path(ax, records, name, operations)
    for ax in axes[len(weights) :]:
        ax.set_visible(False)
    for ax in axes[::columns]:
        ax.set_ylabel("α")
    for ax in axes[max(0, len(weights) - columns) : len(weights)]:
        ax.set_xlabel("epoch")
    paths.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(operations),
        frameon=False,
        fontsize=8,
    )
    draw_cell(below.subplots(), cell, operations)
    below.suptitle(
        f"derived cell: {summary['problem']} · {summary['solver']} · seed {summary['seed']}",
        fontsize=9,
    )
    picture = run / PICTURE if picture is None else Path(picture)
    try:
        figure.savefig(picture)
    except OSError as error:
        raise BilevelError(
            f"--out={picture} cannot be written: {error.strerror or error}; choose another place"
        ) from None
    except ValueError as error:  # matplotlib does not support this file format
        raise BilevelError(
            f"--out={picture} cannot be written: {error}; choose a name that ends in .png or .pdf"
        ) from None
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m bilevel.problems.architecture.drawing RUN [--out FILE]`."""
    parser = argparse.ArgumentParser(
        prog="python -m bilevel.problems.architecture.drawing", description="Draw a search."
    )
    parser.add_argument("run", help="the directory of a search")
    parser.add_argument("--out", help=f"the file to write; by default {PICTURE} in that directory")
    given = parser.parse_args(arguments)
    try:
        print(draw_search(given.run, given.out))
    except BilevelError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
