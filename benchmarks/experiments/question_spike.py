"""Compare a smaller rate on λ with centering as a remedy for the spike."""

from benchmarks.experiments.harness import Context, Experiment
from benchmarks.experiments.report import table
from benchmarks.experiments.reviewers import (
    PAGE,
    TITLES,
    grouped,
    overshoot,
    path,
    score,
    spike,
    sweeps,
)
from bilevel.comparison.curve_plots import draw_paths
from bilevel.comparison.plot_style import figure, styles
from bilevel.comparison.runs import Run

COMPARED = ("stn", "centered_only", "delta_stn")
RIDGE = (
    *(
        "problem=ridge",
        "problem.space.log_decay.init=1.0",
        "lr.inner=0.002",
        "lr.outer=0.003,0.01,0.03,0.1",
    ),
    *("runner.warmup_epochs=0", "runner.evaluate_every=10", "seed=0,1,2,3,4"),
)
DIGITS = ("+experiment=questions", "lr.outer=0.003,0.01,0.03,0.1")


def rate(config: object) -> float:
    """Return α₃."""
    assert isinstance(config, dict)
    return float(config["lr"]["outer"])


def report(context: Context) -> str:
    """Return spike and overshoot of each method at each rate, and the paths on ridge."""
    sections = []
    for problem, name in (("ridge", "Ridge"), ("digits", "Digits")):
        rows = []
        for method in COMPARED:
            for alpha, runs in grouped(context.runs(f"{problem}_{method}"), rate).items():
                end = (
                    score(runs, lambda run: run.at_end("exact.regret"))
                    if problem == "ridge"
                    else score(runs, lambda run: run.at_best("valid_loss"))
                )
                strayed = [score(runs, of) for of in (_behind, _beyond, _spike, _steps)]
                rows.append([TITLES[method], f"{alpha:g}", str(len(runs)), *strayed, end])
        titles = [
            *(
                "",
                "α₃",
                "n",
                "behind the start",
                "beyond the end",
                "max_t \\|u_t − u_end\\|",
                "overshoot / α₃",
            ),
            "regret of the last λ" if problem == "ridge" else "best validation loss",
        ]
        sections.append(f"{name}:\n\n{table(titles, rows)}")
    draw(context)
    return "\n\n".join(
        [*sections, "![Paths of log decay on ridge at four rates](question_spike.png)"]
    )


def draw(context: Context) -> None:
    """Draw a panel for each method on ridge, with a line for each rate."""
    with figure(context.figures / "question_spike.png", 1, len(COMPARED), size=(2.9, 2.6)) as axes:
        for ax, method in zip(axes[0], COMPARED, strict=True):
            ax.sharey(axes[0, 0])
            groups = {
                f"α₃ = {alpha:g}": runs
                for alpha, runs in grouped(context.runs(f"ridge_{method}"), rate).items()
            }
            draw_paths(ax, groups, "log_decay", looks=styles(list(groups)))
            ax.axhline(1.0, color="0.5", linewidth=0.6)
            ax.set_title(TITLES[method])
        handles, labels = axes[0, 0].get_legend_handles_labels()
        axes[0, 0].figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))


def _behind(run: Run) -> float:
    return overshoot(path(run))[0]


def _beyond(run: Run) -> float:
    return overshoot(path(run))[1]


def _steps(run: Run) -> float:
    return max(overshoot(path(run))) / rate(run.config)


def _spike(run: Run) -> float:
    return spike(path(run))


EXPERIMENT = Experiment(
    page=PAGE,
    sweeps={
        **sweeps(
            COMPARED,
            *RIDGE,
            prefix="ridge_",
            quick=("runner.epochs=1000", "seed=100,101", "lr.outer=0.01,0.1"),
        ),
        **sweeps(
            COMPARED,
            *DIGITS,
            prefix="digits_",
            quick=("runner.epochs=12", "seed=100", "lr.outer=0.01,0.1"),
        ),
    },
    report=report,
)
