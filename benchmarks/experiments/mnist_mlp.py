"""Train the paper's MLP on MNIST, five epochs of ten as warm-up; see docs/experiments/mnist.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.report import by_solver, counted, spread, table
from bilevel.comparison import curve_plots, plot_style
from bilevel.comparison.curves import LOSS
from bilevel.comparison.runs import Run
from bilevel.comparison.statistics import paired

SCORES = {LOSS: ".4f", "valid_accuracy": "%", "test_loss": ".4f", "test_accuracy": "%"}
RATES = ("input_dropout", "dropout1", "dropout2")
QUICK = (
    "seed=100,101",
    "problem.hidden=[64,64]",
    "problem.train_size=2000",
    "problem.valid_size=1000",
)


def report(context: Context) -> str:
    """Return the table, the paired differences and the picture."""
    groups = by_solver(context.runs("runs"))
    shown = ((LOSS, "epochs"), *((f"hypers.{name}", "epochs") for name in RATES))
    drawn = picture(
        groups,
        context.figures / "mnist-mlp.png",
        "MNIST, the line is the end of warm-up",
        shown,
        warmup=5,
    )
    return f"{scores(groups, RATES)}\n\n{pairs(groups)}\n\n{drawn}"


def scores(groups: Mapping[str, Sequence[Run]], rates: Sequence[str] = ()) -> str:
    """Return a row per solver: final validation loss, scores at its lowest, and final λ."""
    rows = []
    for solver, runs in groups.items():
        cells = [spread([run.column(LOSS)[-1] for run in runs], ".4f")]
        cells += [
            spread([run.at_best(name) for run in runs], form) for name, form in SCORES.items()
        ]
        cells += [
            spread([run.column(f"hypers.{name}")[-1] for run in runs], ".3f") for name in rates
        ]
        steps = [1e3 * run.column("seconds")[-1] / run.column("step")[-1] for run in runs]
        rows.append([f"`{solver}`", counted(runs), *cells, spread(steps, ".3g")])
    lowest = [f"{plot_style.readable_name(name)} at its lowest" for name in SCORES]
    lowest[1:] = [f"{plot_style.readable_name(name)} there" for name in list(SCORES)[1:]]
    return table(
        [
            "",
            "n",
            "validation loss at the end",
            *lowest,
            *(f"`{name}` at the end" for name in rates),
            "ms a step",
        ],
        rows,
    )


def pairs(groups: Mapping[str, Sequence[Run]]) -> str:
    """Return the paired differences between Δ-STN's lowest validation loss and the others'."""
    lines = []
    for pair in paired(groups, lambda run: run.at_best(LOSS))[0]:
        if "delta_stn" in (pair.first, pair.second):
            p = "" if pair.adjusted is None else f", p = {pair.adjusted:.2g} (paired t, Holm)"
            difference = f"{pair.difference:+.4f} ± {pair.std:.4f}, n = {pair.n}{p}"
            lines.append(f"- `{pair.first}` minus `{pair.second}`: {difference}")
    return "\n".join(lines)


def picture(
    groups: Mapping[str, Sequence[Run]],
    path: Path,
    caption: str,
    shown: Sequence[tuple[str, str]],
    warmup: float | None = None,
) -> str:
    """Draw a panel for each of `shown`: a column against epochs or seconds."""
    looks = plot_style.styles(list(groups))
    with plot_style.figure(path, rows=1, columns=len(shown), size=(3.0, 2.7)) as axes:
        for ax, (y, x) in zip(axes[0], shown, strict=True):
            curve_plots.draw_bands(ax, groups, y, x, looks=looks, n_in_label=False)
            if warmup is not None:
                ax.axvline(warmup, color="0.8", linewidth=0.8, zorder=0)
        losses = [
            loss
            for runs in groups.values()
            for run in runs
            if (loss := run.at_best(LOSS)) is not None
        ]
        if losses:
            axes[0][0].set_ylim(0.9 * min(losses), 2.2 * max(losses))
        axes[0][-1].legend()
    n = min((len(runs) for runs in groups.values()), default=0)
    return f"![{caption}: mean ± standard deviation over n = {n} seeds]({path.name})"


EXPERIMENT = Experiment(
    page="experiments/mnist.md",
    sweeps={
        "runs": Sweep(
            (
                "+experiment=mnist_mlp",
                "solver=fixed,stn,delta_stn",
                "seed=0,1,2",
                "runner.epochs=10",
            ),
            QUICK,
        )
    },
    report=report,
)
