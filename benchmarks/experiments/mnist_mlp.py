"""MNIST with the paper's MLP, five epochs of warm-up and five of tuning; the protocol is in docs/experiments/mnist.md."""

from collections.abc import Mapping, Sequence

from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.report import by_solver, counted, spread, table
from bilevel.comparison import drawing
from bilevel.comparison.curves import LOSS
from bilevel.comparison.runs import Run
from bilevel.comparison.statistics import paired

SCORES = {LOSS: ".4f", "valid_accuracy": "%", "test_loss": ".4f", "test_accuracy": "%"}
RATES = ("input_dropout", "dropout1", "dropout2")
QUICK = ("seed=100,101", "problem.hidden=[64,64]", "problem.train_size=2000", "problem.valid_size=1000")


def report(context: Context) -> str:
    """The table, what the pairs of runs of one seed say, and the picture."""
    groups = by_solver(context.runs("runs"))
    return f"{_table(groups)}\n\n{_paired(groups)}\n\n{_picture(context, groups)}"


def _table(groups: Mapping[str, Sequence[Run]]) -> str:
    rows = []
    for solver, runs in groups.items():
        cells = [spread([run.column(LOSS)[-1] for run in runs], ".4f")]
        cells += [spread([run.at_best(name) for run in runs], form) for name, form in SCORES.items()]
        cells += [spread([run.column(f"hypers.{name}")[-1] for run in runs], ".3f") for name in RATES]
        steps = [1e3 * run.column("seconds")[-1] / run.column("step")[-1] for run in runs]
        rows.append([f"`{solver}`", counted(runs), *cells, spread(steps, ".3g")])
    scores = [f"{drawing.spoken(name)} at its lowest" for name in SCORES]
    return table(
        ["", "n", "validation loss at the end", *scores, *(f"`{name}` at the end" for name in RATES), "ms a step"], rows
    )


def _paired(groups: Mapping[str, Sequence[Run]]) -> str:
    """How the lowest validation losses of Δ-STN differ from those of the others, seed by seed."""
    lines = []
    for pair in paired(groups, lambda run: run.at_best(LOSS))[0]:
        if "delta_stn" in (pair.first, pair.second):
            p = "" if pair.adjusted is None else f", p = {pair.adjusted:.2g} (paired t, Holm)"
            lines.append(f"- `{pair.first}` less `{pair.second}`: {pair.difference:+.4f} ± {pair.std:.4f}, n = {pair.n}{p}")
    return "\n".join(lines)


def _picture(context: Context, groups: Mapping[str, Sequence[Run]]) -> str:
    """Validation loss and the three rates against epochs."""
    path = context.figures / "mnist-mlp.png"
    shown = {solver: runs for solver, runs in groups.items() if runs}
    looks = drawing.styles(list(shown))
    with drawing.figure(path, rows=1, columns=1 + len(RATES), size=(3.0, 2.7)) as axes:
        for ax, y in zip(axes[0], (LOSS, *(f"hypers.{name}" for name in RATES)), strict=True):
            drawing.draw_bands(ax, shown, y, "epochs", looks=looks, n_in_label=False)
            ax.axvline(5, color="0.8", linewidth=0.8, zorder=0)
            ax.set_title(drawing.spoken(y))
        axes[0][0].set_ylim(0.05, 0.2)
        axes[0][-1].legend()
    n = min((len(runs) for runs in shown.values()), default=0)
    told = f"MNIST: validation loss and dropout rates, mean ± standard deviation over n = {n} seeds"
    return f"![{told}; warm-up ends at the line]({path.name})"


EXPERIMENT = Experiment(
    page="experiments/mnist.md",
    sweeps={"runs": Sweep(("+experiment=mnist_mlp", "solver=fixed,stn,delta_stn", "seed=0,1,2", "runner.epochs=10"), QUICK)},
    report=report,
)
