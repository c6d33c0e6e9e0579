"""Learn augmentation: operations and benefit of tuning; see docs/problems/augmentation.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.experiments.harness import Context, Experiment, Sweep
from benchmarks.experiments.report import spread, table
from bilevel import Space
from bilevel.comparison import curve_plots, plot_style
from bilevel.comparison.runs import Run
from bilevel.problems.classification.augmentation import OPERATIONS, Augmentation, strengths
from bilevel.problems.datasets import standard_images
from bilevel.problems.datasets.labelled_images import Images

PAGE = "problems/augmentation.md"
SETTINGS = {
    "fixed, no augmentation": ("solver=fixed", "problem.augment=[]"),
    "fixed, initial strengths": ("solver=fixed",),
    "Δ-STN, dropout alone": ("solver=delta_stn", "problem.augment=[]"),
    "STN": ("solver=stn",),
    "Δ-STN": ("solver=delta_stn",),
}
TUNED = ("STN", "Δ-STN")


def sweeps(problem: str, *quick: str) -> dict[str, Sweep]:
    """Return the five settings, each a sweep over seeds."""
    reduced = ("seed=100", *quick)
    return {
        name: Sweep((f"problem={problem}", *setting, "seed=0,1,2"), reduced)
        for name, setting in SETTINGS.items()
    }


def comparison(context: Context, name: str) -> str:
    """Return the tables of the five settings and the picture `NAME.png` of the strengths' paths."""
    groups = {setting: context.runs(setting) for setting in SETTINGS}
    rows = [_row(setting, runs) for setting, runs in groups.items()]
    head = ["", "n", "validation loss", "test loss", "test accuracy", "training, s"]
    scores = table(head, rows, best={2: min, 3: min, 4: max})
    tuned = {setting: groups[setting] for setting in TUNED if groups[setting]}
    panels = _paths(tuned, context.figures / f"{name}.png")
    values = {
        panel: [
            spread([run.at_best(f"hypers.{panel}") for run in runs], ".3g")
            for runs in tuned.values()
        ]
        for panel in panels
    }
    reached = table(
        ["at the lowest validation loss", *tuned],
        [[panel.replace("_", " "), *cells] for panel, cells in values.items()],
    )
    difference = _difference(groups["fixed, initial strengths"], groups["Δ-STN"])
    return f"{scores}\n\n{difference}\n\n{reached}\n\n![Strengths along training]({name}.png)"


def _row(setting: str, runs: Sequence[Run]) -> list[str]:
    losses = [
        spread([run.at_best(score) for run in runs], ".4f") for score in ("valid_loss", "test_loss")
    ]
    accuracy = spread([run.at_best("test_accuracy") for run in runs], "%")
    return [
        setting,
        str(len(runs)),
        *losses,
        accuracy,
        spread([run.total("seconds") for run in runs], ".3g"),
    ]


def _difference(fixed: Sequence[Run], tuned: Sequence[Run]) -> str:
    """Return Δ-STN's test scores minus those at the initial strengths, paired by seed."""
    by_seed = {run.seed: run for run in fixed}
    pairs = [(by_seed[run.seed], run) for run in tuned if run.seed in by_seed]
    gains = []
    for score, form, scale in (("test_loss", "+.4f", 1), ("test_accuracy", "+.2f", 100)):
        values = [(a.at_best(score), b.at_best(score)) for a, b in pairs]
        less = [None if a is None or b is None else scale * (b - a) for a, b in values]
        gains.append(spread(less, form).replace("± +", "± "))
    gain = f"test loss {gains[0]}, test accuracy {gains[1]} points (n = {len(pairs)})"
    return f"Δ-STN minus training at the initial strengths, paired by seed: {gain}."


def _paths(groups: Mapping[str, Sequence[Run]], path: Path) -> list[str]:
    """Draw every tuned hyperparameter against epochs; return the names."""
    names = list(
        dict.fromkeys(
            name for runs in groups.values() for run in runs for name in run.part("hypers.")
        )
    )
    columns = 4
    with plot_style.figure(path, -(-len(names) // columns), columns, size=(2.3, 1.8)) as axes:
        for ax, name in zip(axes.flat, names, strict=False):
            curve_plots.draw_paths(ax, groups, name)
        for ax in axes.flat[len(names) :]:
            ax.set_axis_off()
        plot_style.legend(axes.flat[0].figure, [axes.flat[0]])
    return names


# --- what the operations do ---

PANELS: dict[str, tuple[float, ...]] = {
    "degrees": (5, 15, 30, 45),
    "translate": (0.05, 0.15, 0.3, 0.5),
    "scale": (0.05, 0.15, 0.3, 0.5),
    "shear": (5, 15, 30, 45),
    "brightness": (0.05, 0.3, 0.6, 1),
    "contrast": (0.05, 0.3, 0.6, 1),
    "saturation": (0.05, 0.3, 0.6, 1),
    "hue": (0.05, 0.15, 0.3, 0.5),
    "cutout_holes": (1, 2, 3, 5),
    "cutout_length": (4, 8, 16, 24),
}
"""Strengths to show: the initial value first, the end of its interval last."""

DRAW = 5
"""Seed of the picture's draws; with it, every operation has a visible effect."""


def pictures(path: Path, photograph: Tensor, digit: Images) -> None:
    """Draw each strength alone, with the same draws: on a photograph and on a digit."""
    mean = photograph.float().mean().item()
    photographs = Images(
        (photograph, torch.zeros(1, dtype=torch.long)), digit.valid, digit.test, mean=mean, std=1.0
    )
    with plot_style.figure(path, len(PANELS) // 2, 16, size=(0.62, 0.72)) as axes:
        for number, (name, values) in enumerate(PANELS.items()):
            row, left = number % 5, 8 * (number // 5)
            for column, value in enumerate(values):
                _show(axes[row, left + column], photographs, name, value)
                _show(axes[row, left + 4 + column], digit, name, value)
            axes[row, left].set_ylabel(name.replace("_", "\n"), fontsize=6)


def _show(ax: Any, images: Images, name: str, value: float) -> None:
    space = Space(**strengths(images, list(OPERATIONS)))
    ax.set_xticks([])
    ax.set_yticks([])
    if name not in space:
        ax.set_axis_off()
        return
    side = min(images.train[0].shape[2:])
    strength = dict.fromkeys(space, 0.0) | {
        "cutout_length": 8.0,
        "cutout_holes": float(name == "cutout_length"),
        name: value,
    }
    strength["cutout_length"] = round(strength["cutout_length"] * side / 32)  # in proportion
    hypers = {other: torch.tensor(float(number)) for other, number in strength.items()}
    x = (
        Augmentation(space, images)(
            hypers, images.train[0][:1], torch.Generator().manual_seed(DRAW)
        )[0]
        / images.train[0].max()
    )
    ax.imshow(x.clamp(0, 1).permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
    ax.set_title(f"{hypers[name].item():g}", fontsize=6, pad=2)


def photograph(size: int = 32) -> Tensor:
    """Return scikit-learn's picture of a flower, [1, 3, size, size], as bytes."""
    from sklearn.datasets import load_sample_image

    x = (
        torch.from_numpy(load_sample_image("flower.jpg").copy())
        .permute(2, 0, 1)[None, :, 60:400, 190:530]
        .float()
    )
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True).round().to(torch.uint8)


def report(context: Context) -> str:
    """Make the picture of the operations, the five tables, and the picture of the paths."""
    pictures(context.figures / "augmentations.png", photograph(), standard_images.load_digits())
    return "![Every operation at four strengths](augmentations.png)\n\n" + comparison(
        context, "augmentation_digits"
    )


EXPERIMENT = Experiment(
    page=PAGE, sweeps=sweeps("digits_augmented", "runner.epochs=20"), report=report
)
