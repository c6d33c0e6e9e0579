"""Compare one weight decay with one per weight; see docs/problems/per-weight-decay.md."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.experiments.cleaning import gain, seconds
from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.report import by_solver, spread, table
from bilevel import Refused, problems
from bilevel.checkpoint.checkpoints import best_solution
from bilevel.cli.targets import build
from bilevel.comparison import plot_style
from bilevel.comparison.runs import Run
from bilevel.solvers import Structured, delta_stn
from bilevel.solvers.base.dry_run import MANY_COORDINATES, MOST_RESPONSE_BYTES
from bilevel.text import byte_size

COLUMNS = {"valid_loss": ".4f", "test_loss": ".4f", "valid_accuracy": "%", "test_accuracy": "%"}
HEAD = [
    "",
    "λ",
    "validation loss",
    "test loss",
    "change of test loss",
    "validation accuracy",
    "test accuracy",
    "seconds",
]


def report(context: Context) -> str:
    """Return losses, the size of a self-tuning response, and the picture."""
    fixed = context.runs("fixed")
    rows = [["none tuned (`fixed`)", "0", *measured(fixed, fixed)]]
    for name, label in (("one", "one decay"), ("each", "one per weight")):
        for solver, runs in by_solver(context.runs(name)).items():
            rows.append(
                [f"{label}, `{solver}`", f"{coordinates(runs[0]):,}", *measured(runs, fixed)]
            )
    _picture(context, by_solver(context.runs("each"))["implicit_cg"])
    return "\n\n".join(
        [
            table(HEAD, rows),
            f"n = {len(fixed)} each; the change is against `fixed`, paired by seed.",
            "The size of Δ-STN's structured response to every decay, in float32:",
            table(
                ["hidden layers", "weights = decays", "Θ", "numbers per weight", "Δ-STN"],
                [*map(response, SIZES)],
            ),
            "![learned decay of each pixel's weights, and of each layer's](per_weight_decay.png)",
        ]
    )


def measured(runs: Sequence[Run], fixed: Sequence[Run]) -> list[str]:
    """Return the columns of the table, at the lowest validation loss."""
    scores = [spread((run.at_best(name) for run in runs), form) for name, form in COLUMNS.items()]
    changed = "" if runs is fixed else gain(runs, fixed, "test_loss", ".4f")
    return [*scores[:2], changed, *scores[2:], seconds(runs)]


def coordinates(run: Run) -> int:
    """Return h."""
    return build(run.config["problem"], "problem").space.numel


SIZES = ([16], [64], [256, 256], [1000, 1000])


def response(hidden: list[int]) -> list[str]:
    """Return a row of the size of a response, with Δ-STN's error if it refuses."""
    frozen = {
        name: {"init": 0.0, "frozen": True}
        for name in ("input_dropout", *(f"dropout{i + 1}" for i in range(len(hidden))))
    }
    problem = problems.digits(hidden=hidden, weight_decay="per_weight", space=frozen)
    params, _ = problem.init(torch.Generator())
    h, weights = problem.space.numel, sum(p.numel() for p in params.values())
    numbers = Structured().size(params, h)
    verdict = "runs, with a warning" if h > MANY_COORDINATES else "runs"
    if 2 * 4 * numbers > MOST_RESPONSE_BYTES:
        device = torch.device("cpu")
        try:
            delta_stn().check(problem, problem.data(device, torch.Generator()), device)
        except Refused as refusal:
            verdict = f"refuses: “{refusal}”"
    return [
        " × ".join(map(str, hidden)),
        f"{weights:,}",
        byte_size(4 * numbers),
        f"{numbers / weights:,.0f}",
        verdict,
    ]


def decays(run: Run) -> dict[str, Tensor]:
    """Return the learned decays of a run in the shapes of the weights."""
    solution = best_solution(run.directory)
    sizes = [p.numel() for p in solution.params.values()]
    parts = solution.hypers["weight_decay"].split(sizes)
    return {
        name: part.reshape(p.shape)
        for (name, p), part in zip(solution.params.items(), parts, strict=True)
    }


def _picture(context: Context, runs: Sequence[Run]) -> None:
    learned = [decays(run) for run in runs]
    by_pixel = (
        torch.stack([one["layers.0.weight"].log10().mean(0) for one in learned])
        .mean(0)
        .reshape(8, 8)
    )
    pixels = (
        build(runs[0].config["problem"], "problem")
        .data(torch.device("cpu"), torch.Generator())
        .train.tensors[0]
        .float()
    )
    with plot_style.figure(
        context.figures / "per_weight_decay.png", columns=3, size=(3.6, 2.9)
    ) as axes:
        left, middle, right = axes[0]
        n = f"n = {len(runs)} seeds"
        for ax, image, label, title in (
            (left, pixels.std(0)[0], "standard deviation (0…16)", "pixels of the training images"),
            (middle, by_pixel, "mean log₁₀ decay", f"decay of a pixel's weights ({n})"),
        ):
            shown = ax.imshow(image.numpy(), cmap="viridis")
            ax.set(title=title, xticks=[], yticks=[])
            ax.grid(visible=False)
            ax.figure.colorbar(shown, ax=ax, label=label)
        parts = {
            "weights of the first layer": ["layers.0.weight"],
            "weights of the second": ["layers.1.weight"],
            "biases": ["layers.0.bias", "layers.1.bias"],
        }
        logs = {
            label: torch.cat(
                [one[name].log10().reshape(-1) for one in learned for name in names]
            ).numpy()
            for label, names in parts.items()
        }
        bins = np.linspace(
            min(v.min() for v in logs.values()), max(v.max() for v in logs.values()), 40
        ).tolist()
        for (label, values), color in zip(logs.items(), plot_style.COLORS, strict=False):
            right.hist(values, bins=bins, density=True, histtype="step", color=color, label=label)
        right.axvline(-4, color="black", linewidth=0.8, linestyle=":")
        right.set(
            xlabel="log₁₀ decay (dotted: where all start)",
            ylabel="density",
            title=f"all decays, implicit_cg ({n})",
        )
        right.legend(fontsize="x-small")


BASE, REDUCED = "+experiment=per_weight_decay", ("seed=100,101", "runner.epochs=25")

EXPERIMENT = Experiment(
    page="problems/per-weight-decay.md",
    sweeps={
        "fixed": Sweep((BASE, "solver=fixed"), REDUCED),
        "one": Sweep((BASE, "solver=implicit_cg,sama,delta_stn"), (*REDUCED, "solver=implicit_cg")),
        "each": Sweep(
            (
                BASE,
                "problem.weight_decay=per_weight",
                "solver=implicit_cg,implicit_identity,sama,soba,penalty,unrolled",
            ),
            (*REDUCED, "solver=implicit_cg,sama"),
        ),
    },
    report=report,
)
