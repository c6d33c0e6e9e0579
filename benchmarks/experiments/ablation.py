"""Turn Δ-STN's three parts on and off, on ridge and digits; see docs/experiments/ablation.md."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.report import counted, never, spread, table
from benchmarks.experiments.reviewers import spike
from bilevel.comparison import curve_plots, plot_style
from bilevel.comparison.curves import LOSS, common_target, reached
from bilevel.comparison.runs import Run
from bilevel.comparison.statistics import paired
from bilevel.loggers.space_json import space_from_json

NAMES = {  # centered, regularized_w0, linearize
    (False, False, False): "STN",
    (False, True, False): "STN + regularized w₀",
    (True, False, False): "centered",
    (True, True, False): "centered STN",
    (True, False, True): "linearized, joint w₀",
    (True, True, True): "Δ-STN",
}
FLAGS = ("centered", "regularized_w0", "linearize")


def sweeps(problem: str, *quick: str) -> dict[str, Sweep]:
    """Return the six valid combinations; linearization needs a centered response."""
    base = (f"+experiment=ablation_{problem}", "solver.regularized_w0=true,false")
    reduced = ("seed=100,101", *quick)
    return {
        f"{problem}_centered": Sweep((*base, "solver.linearize=true,false"), reduced),
        f"{problem}_uncentered": Sweep(
            (*base, "solver.centered=false", "solver.linearize=false"), reduced
        ),
    }


def section(context: Context, problem: str) -> str:
    """Return the tables and the picture of one problem."""
    runs = [run for name in sweeps(problem) for run in context.runs(name)]
    named = {name: [run for run in runs if flags(run) == those] for those, name in NAMES.items()}
    groups = {name: members for name, members in named.items() if members}
    return f"{_table(groups)}\n\n{_paths(groups)}\n\n{_picture(context, groups, problem)}"


def flags(run: Run) -> tuple[bool, ...]:
    """Return the settings of the three parts."""
    return tuple(run.config["solver"][flag] for flag in FLAGS)


def unconstrained(run: Run, name: str) -> np.ndarray:
    """Return the path of one hyperparameter in the coordinates u, [evaluations, entries]."""
    domain = space_from_json(run.description["space"])[name]
    path = torch.from_numpy(run.column(f"hypers.{name}").reshape(run.evaluations, -1))
    return domain.unconstrain(path).numpy()


def _table(groups: Mapping[str, Sequence[Run]]) -> str:
    target = common_target(groups)
    assert target is not None
    scores = [
        name
        for name in ("valid_accuracy", "test_loss", "test_accuracy", "exact.regret")
        if _known(groups, name)
    ]
    plain = _step(groups.get("STN", ()))
    rows = []
    for name, runs in groups.items():
        times = [reached(run, target) for run in runs]
        cost = _step(runs)
        rows.append(
            [
                name,
                counted(runs),
                spread([run.at_best(LOSS) for run in runs], ".4f"),
                _against(groups, name),
                *(spread([run.at_best(score) for run in runs], _form(score)) for score in scores),
                never([time and time.epochs for time in times], ".3g"),
                never([time and time.seconds for time in times], ".2g"),
                f"{1e3 * cost:.2f}" + (f" ({cost / plain:.2f} ×)" if plain else ""),
            ]
        )
    titles = [
        "",
        "n",
        "valid loss",
        "minus STN's, paired",
        *(plot_style.readable_name(score).replace("validation", "valid") for score in scores),
    ]
    head = [*titles, f"epochs to {target:.4g}", f"seconds to {target:.4g}", "ms a training step"]
    return table(head, rows)


def _against(groups: Mapping[str, Sequence[Run]], name: str) -> str:
    """Return the difference of the lowest validation loss to STN's, with Student's p."""
    if name == "STN" or "STN" not in groups:
        return ""
    (pair,), _ = paired({name: groups[name], "STN": groups["STN"]}, lambda run: run.at_best(LOSS))
    return f"{pair.difference:+.4f} ± {pair.std:.4f}" + (
        f" (p = {pair.p:.2g})" if pair.p is not None else ""
    )


def _paths(groups: Mapping[str, Sequence[Run]]) -> str:
    """Return the spike and the distance of every hyperparameter, in u and in its own units."""
    names = next(iter(groups.values()))[0].part("hypers.")
    inside, own = [], []
    for label, runs in groups.items():
        us = {name: [unconstrained(run, name) for run in runs] for name in names}
        values = {
            name: [run.column(f"hypers.{name}").reshape(run.evaluations, -1) for run in runs]
            for name in names
        }
        inside.append([label, *(_travel(paths, ".2f") for paths in us.values())])
        ends = (
            spread([float(path[-1].mean()) for path in paths], ".2g") for paths in values.values()
        )
        own.append(
            [
                label,
                *(
                    f"{_travel(paths, '.2g')} → {end}"
                    for paths, end in zip(values.values(), ends, strict=True)
                ),
            ]
        )
    spoken = [plot_style.readable_name(name) for name in names]
    return (
        "The spike max_t \\|u_t − u_end\\|, and in brackets the distance \\|u_0 − u_end\\|:\n\n"
        + table(["", *(f"{name}, in u" for name in spoken)], inside)
        + "\n\nThe same in the units of λ, and λ at the end:\n\n"
        + table(["", *spoken], own)
    )


def _travel(paths: Sequence[np.ndarray], form: str) -> str:
    start = spread([float(np.abs(path[0] - path[-1]).max()) for path in paths], form)
    return f"{spread([spike(path) for path in paths], form)} ({start})"


def _picture(context: Context, groups: Mapping[str, Sequence[Run]], problem: str) -> str:
    """Draw the validation loss and every path, over epochs and over seconds."""
    panels = curve_plots.hyper_panels([run for runs in groups.values() for run in runs])
    path = context.figures / f"ablation-{problem}.png"
    with plot_style.figure(path, rows=1 + len(panels), columns=2, size=(3.5, 1.9)) as axes:
        for column, x in zip(axes.T, ("epochs", "seconds"), strict=True):
            curve_plots.draw_bands(column[0], groups, LOSS, x, n_in_label=False)
            for ax, (name, entry) in zip(column[1:], panels, strict=True):
                curve_plots.draw_paths(ax, groups, name, x, entry=entry)
        plot_style.legend(axes[0][0].figure, [axes[0][0]])
    n = min(len(runs) for runs in groups.values())
    caption = (
        f"{problem}: validation loss and λ along training, "
        f"mean ± standard deviation over n = {n} seeds"
    )
    return f"![{caption}, over epochs and over seconds]({path.name})"


def _step(runs: Sequence[Run]) -> float:
    """Return the median seconds of training per inner step, outer steps included."""
    totals = [(run.total("seconds"), run.total("steps")) for run in runs]
    costs = [seconds / steps for seconds, steps in totals if seconds and steps]
    return float(np.median(costs)) if costs else 0.0


def _form(score: str) -> str:
    return "%" if "accuracy" in score else ".2g" if "regret" in score else ".4f"


def _known(groups: Mapping[str, Sequence[Run]], score: str) -> bool:
    return any(run.at_best(score) is not None for runs in groups.values() for run in runs)


def report(context: Context) -> str:
    """Return the block: ridge, then digits."""
    ridge, digits = section(context, "ridge"), section(context, "digits")
    return f"## Ridge regression\n\n{ridge}\n\n## Digits\n\n{digits}"


EXPERIMENT = Experiment(
    page="experiments/ablation.md",
    sweeps=sweeps("ridge", "runner.epochs=500") | sweeps("digits", "runner.epochs=12"),
    report=report,
)
