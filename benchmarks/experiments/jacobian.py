"""Compare ∂ŵ/∂λ of STN, centered STN and Δ-STN with the exact Jacobian along training."""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypeAlias

from benchmarks.experiments.harness import Context, Experiment
from benchmarks.toys import NAMES, RECIPES, RESPONSES, Job, spread, watch
from bilevel.comparison.plot_style import COLORS, figure

ROUNDS, FEATURES = 200, 5
STARTS = {
    "ridge": 1.0,
    "linear network": 1.0,
    "ridge per feature": 1.0,
    "input dropout per feature": -1.0,
}
TITLES = {
    "ridge": "ridge, 1 λ",
    "linear network": "linear network, 1 λ",
    "ridge per feature": "ridge, 5 λ",
    "input dropout per feature": "input dropout, 5 λ",
}
LOOKS: dict[str, dict[str, Any]] = {
    "stn": {"color": COLORS[1]},
    "centered_stn": {"color": COLORS[2], "linewidth": 4, "alpha": 0.5},  # Δ-STN may cover it
    "delta_stn": {"color": COLORS[0]},
}
DASHES = {"dense": "-", "structured": "--"}
Group: TypeAlias = tuple[str, str, str]
Run: TypeAlias = dict[str, Any]


def report(context: Context) -> str:
    """Return the table at the end of training, and the figure along training."""
    seeds, rounds = (range(100, 101), ROUNDS // 2) if context.quick else (range(5), ROUNDS)
    jobs = [
        Job(
            kind,
            "synthetic",
            seed,
            recipe,
            response,
            seed,
            rounds,
            rounds * 3 // 10,
            0.01,
            0.01,
            FEATURES,
            STARTS[kind],
        )
        for kind in STARTS
        for response in RESPONSES
        for recipe in RECIPES
        for seed in seeds
    ]
    runs: dict[Group, list[Run]] = defaultdict(list)
    for run in context.map(watch, jobs):
        runs[run["job"].kind, run["job"].response, run["job"].recipe].append(run)
    draw(runs, context)
    return (
        f"After {rounds * 5} inner steps, mean ± standard deviation over {len(seeds)} seeds.\n\n"
        f"{table(runs)}\n\n"
        "![Cosine and relative error of the response Jacobian along training](jacobian.png)"
    )


def table(runs: Mapping[Group, list[Run]]) -> str:
    """Return one row for each problem, response and recipe."""
    lines = [
        "| problem | response | solver | cosine with ∂w\\*/∂λ | relative error "
        "| error of the best structured Θ | distance from it | error of ŵ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (kind, response, recipe), seeds in runs.items():
        cells = [spread(at_end(seeds, key)) for key in ("response_cosine", "response_error")]
        structured = response == "structured"
        cells += [
            spread(at_end(seeds, key)) if structured else "–"
            for key in ("floor", "projected_error")
        ]
        cells += [spread(at_end(seeds, "weight_error"))]
        lines.append(f"| {TITLES[kind]} | {response} | {NAMES[recipe]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def at_end(seeds: list[Run], key: str) -> list[float]:
    """Return one value per seed; NaN for a run that diverged."""
    return [
        run["points"][-1][key] if len(run["points"]) == len(run["steps"]) else math.nan
        for run in seeds
    ]


def draw(runs: Mapping[Group, list[Run]], context: Context) -> None:
    """Draw cosines above and errors below, a column for each problem."""
    from matplotlib.ticker import LogLocator, NullFormatter

    with figure(context.figures / "jacobian.png", 2, len(STARTS), size=(2.6, 2.2)) as axes:
        for column, kind in enumerate(STARTS):
            for row, key in enumerate(("response_cosine", "response_error")):
                ax = axes[row, column]
                for response, recipe in itertools.product(RESPONSES, RECIPES):
                    label = NAMES[recipe] + (", structured" if response == "structured" else "")
                    band(
                        ax,
                        runs[kind, response, recipe],
                        key,
                        label=label,
                        linestyle=DASHES[response],
                        **LOOKS[recipe],
                    )
                ax.axvspan(
                    5, 5 * runs[kind, "dense", "stn"][0]["job"].warmup, color="0.93", zorder=0
                )
                ax.set_xscale("log")
            axes[0, column].set_title(TITLES[kind])
            axes[0, column].set_ylim(top=1.05)
            if (
                max(
                    floor
                    for run in runs[kind, "structured", "delta_stn"]
                    for floor in of(run, "floor")
                )
                > 1e-6
            ):
                look = {"color": "0.2", "linestyle": ":", "label": "best structured Θ"}
                band(axes[1, column], runs[kind, "structured", "delta_stn"], "floor", **look)
            axes[1, column].set_yscale("log")
            axes[1, column].set_ylim(
                top=min(20, axes[1, column].get_ylim()[1])
            )  # diverging runs reach any value
            axes[1, column].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes[1, column].yaxis.set_major_formatter("{x:g}")
            axes[1, column].yaxis.set_minor_formatter(NullFormatter())
            axes[1, column].set_xlabel("inner step")
        axes[0, 0].set_ylabel("cosine with ∂w*/∂λ")
        axes[1, 0].set_ylabel("relative error of ∂ŵ/∂λ")
        handles, labels = axes[1, -1].get_legend_handles_labels()
        axes[0, 0].figure.legend(handles, labels, loc="outside lower center", ncols=4)


def band(ax: Any, seeds: list[Run], key: str, *, color: str, **look: Any) -> None:
    """Draw the mean over seeds within their range, up to the length of the shortest run."""
    each = list(zip(*(of(run, key) for run in seeds), strict=False))
    steps = seeds[0]["steps"][: len(each)]
    ax.plot(steps, [statistics.mean(values) for values in each], color=color, **look)
    low, high = [min(values) for values in each], [max(values) for values in each]
    ax.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)


def of(run: Run, key: str) -> list[float]:
    """Return the values along a run."""
    return [point[key] for point in run["points"]]


EXPERIMENT = Experiment(page="experiments/best-response-jacobian.md", report=report)
