"""Learn loss weights, offsets and smoothing on a long tail; see docs/problems/loss-weights.md."""

from collections.abc import Sequence

import numpy as np

from benchmarks.experiments.cleaning import gain, seconds
from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.report import by_solver, spread, table
from bilevel.cli.targets import build
from bilevel.comparison import plot_style
from bilevel.comparison.runs import Run

RATIO, CLASSES = 20.0, 10
BALANCED = "test_balanced_accuracy"
COLUMNS = {"valid_loss": ".3f", "test_loss": ".3f", "test_accuracy": "%", BALANCED: "%"}
HEAD = [
    "",
    "validation loss",
    "test loss",
    "test accuracy",
    "balanced",
    "gain in balanced",
    "worst class",
    "seconds",
]


def report(context: Context) -> str:
    """Return the table and the picture."""
    named = {
        "plain cross-entropy": context.runs("plain"),
        "weights 1/n_c, fixed": context.runs("inverse"),
        "offsets log n_c, fixed": context.runs("adjusted"),
    }
    plain = named["plain cross-entropy"]
    rows = [[name, *measured(runs, plain)] for name, runs in named.items()]
    for sweep, label in (
        ("weights", "weights and smoothing"),
        ("offsets", "weights, smoothing and offsets"),
    ):
        for solver, runs in by_solver(context.runs(sweep)).items():
            rows.append([f"{label} tuned by `{solver}`", *measured(runs, plain)])
    _picture(context)
    return "\n\n".join(
        [
            table(HEAD, rows),
            f"n = {len(plain)} each; the gain is over plain cross-entropy, paired by seed.",
            "![learned weights and offsets against the number of images, and accuracy by class]"
            "(loss_weights.png)",
        ]
    )


def measured(runs: Sequence[Run], plain: Sequence[Run]) -> list[str]:
    """Return the columns of the table, at the lowest validation loss."""
    scores = [spread((run.at_best(name) for run in runs), form) for name, form in COLUMNS.items()]
    gained = "" if runs is plain else gain(runs, plain, BALANCED, "%")
    return [
        *scores,
        gained,
        spread((run.at_best("test_worst_accuracy") for run in runs), "%"),
        seconds(runs),
    ]


def _picture(context: Context) -> None:
    tuned = by_solver(context.runs("offsets"))
    looks = plot_style.styles(list(tuned))
    with plot_style.figure(
        context.figures / "loss_weights.png", columns=3, size=(3.6, 2.9)
    ) as axes:
        left, middle, right = axes[0]
        for solver, runs in tuned.items():
            counts = np.stack(
                [build(run.config["problem"], "problem").counts.numpy() for run in runs]
            )
            look = {name: looks[solver][name] for name in ("color", "marker", "linestyle")} | {
                "markersize": 3,
                "linewidth": 0.9,
            }
            for ax, name in ((left, "class_weight"), (middle, "logit_offset")):
                learned = np.stack([run.column(f"hypers.{name}")[run.best] for run in runs])
                if name == "logit_offset":  # only differences between offsets matter
                    learned = learned - learned.mean(1, keepdims=True)
                label = f"{solver} (n = {len(runs)})"
                ax.errorbar(
                    counts.mean(0),
                    learned.mean(0),
                    learned.std(0),
                    label=label,
                    capsize=1.5,
                    **look,
                )
        log_counts = np.log(counts.mean(0))
        middle.plot(
            counts.mean(0),
            log_counts - log_counts.mean(),
            color="black",
            linestyle=":",
            label="log n_c",
        )
        left.axhline(1, color="black", linewidth=0.8, linestyle=":")
        for ax, label in (
            (left, "learned class weight"),
            (middle, "learned offset, its mean removed"),
        ):
            ax.set(xscale="log", xlabel="training images of the class", ylabel=label)
            ax.legend(fontsize="x-small")
        for name, runs in {"plain cross-entropy": context.runs("plain"), **tuned}.items():
            each = np.array(
                [[run.at_best(f"test_accuracy_{c}") for c in range(CLASSES)] for run in runs],
                dtype=float,
            )
            look = (
                {"color": looks[name]["color"], "marker": looks[name]["marker"]}
                if name in looks
                else {"color": "0.5", "marker": "x"}
            )
            label = f"{name} (n = {len(runs)})"
            right.plot(
                range(CLASSES), 100 * each.mean(0), markersize=3, linewidth=0.9, label=label, **look
            )
        right.set(
            xlabel="class, from common to rare", ylabel="test accuracy (%)", xticks=range(CLASSES)
        )
        right.legend(fontsize="x-small", loc="lower left")


def _fixed(**hypers: list[float]) -> str:
    """Return the override for fixed weights or offsets."""
    parts = [
        f"{name}: {{init: [{', '.join(f'{v:.4f}' for v in values)}], frozen: true}}"
        for name, values in hypers.items()
    ]
    return f"problem.space={{{', '.join(parts)}}}"


BASE, REDUCED = "+experiment=loss_weights", ("seed=100,101", "runner.epochs=60")
SHARES = RATIO ** (-np.arange(CLASSES) / (CLASSES - 1))  # n_c up to a factor
INVERSE, LOG = (1 / SHARES / np.mean(1 / SHARES)).tolist(), np.log(SHARES).tolist()
SOLVERS = "solver=sama,implicit_cg,soba,penalty,delta_stn"

EXPERIMENT = Experiment(
    page="problems/loss-weights.md",
    sweeps={
        "plain": Sweep(
            (BASE, "solver=fixed", "problem.class_weight=false", "problem.smoothing=false"), REDUCED
        ),
        "inverse": Sweep(
            (BASE, "solver=fixed", "problem.smoothing=false", _fixed(class_weight=INVERSE)), REDUCED
        ),
        "adjusted": Sweep(
            (
                BASE,
                "solver=fixed",
                "problem.class_weight=false",
                "problem.smoothing=false",
                "problem.logit_offset=true",
                _fixed(logit_offset=LOG),
            ),
            REDUCED,
        ),
        "weights": Sweep((BASE, SOLVERS), (*REDUCED, "solver=implicit_cg,delta_stn")),
        "offsets": Sweep(
            (BASE, SOLVERS, "problem.logit_offset=true"), (*REDUCED, "solver=implicit_cg,delta_stn")
        ),
    },
    report=report,
)
