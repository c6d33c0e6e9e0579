"""The plot of a run: its losses and accuracies, and the paths of its hyperparameters."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel.files import write_atomically
from bilevel.loggers.logger import Logger, RunInfo
from bilevel.loggers.plot_texts import fit_texts, plain_names, without_glyph_warnings
from bilevel.loggers.records import METRICS, Record, own_results, read_metrics
from bilevel.space import Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "curves.png"
# Okabe and Ito's palette: distinct for colour-blind readers, and in grey
TRAIN, VALID, TEST, PATH = "#E69F00", "#0072B2", "#D55E00", "#009E73"
PATHS = (PATH, "#CC79A7", "#56B4E9", "#D55E00")


class CurvesPlot(Logger):
    """Writes `curves.png` when a run ends."""

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        self.run = run

    def log(self, record: Record) -> None:
        pass

    def finish(self, summary: Record) -> None:
        records = read_metrics(self.run.directory / METRICS)
        own = own_results(summary)
        for record in records:
            record["best"] = record["step"] == own["best"].get("step")
            for measured in (own["best"], own["last"]):  # the test split comes last
                if record["step"] == measured.get("step"):
                    record.update({k: v for k, v in measured.items() if k.startswith("test_")})
        title = f"{self.run.problem} · {self.run.solver} · seed {self.run.seed}"
        draw(
            records,
            self.run.directory / PICTURE,
            space=self.run.space,
            warmup_epochs=self.run.warmup_epochs,
            tuned_epochs=self.run.tuned_epochs,
            title=title,
        )


def draw(
    metrics: str | Path | Sequence[Record],
    picture: str | Path,
    *,
    space: Space | None = None,
    warmup_epochs: float = 0,
    tuned_epochs: float | None = None,
    title: str = "",
) -> None:
    """Write the curves of a `metrics.jsonl`, or of its records, as an image.

    Args:
        metrics: the file with the records, or the records; `test_loss` in some of them is a marker.
        picture: the file to write; its ending chooses the format.
        space: with it, the band λ(u ± σ) is drawn around the path of each perturbed hyperparameter.
        warmup_epochs: length of the shaded part before λ is tuned.
        tuned_epochs: begin of the shaded part in which λ is frozen; None for no such part.
        title: title above all panels.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics) if isinstance(metrics, (str, Path)) else list(metrics)
    scores = _scores(records)
    names = [name for name in (records[0] if records else {}) if name.startswith("hypers.")]
    panels = len(scores) + len(names)
    columns = max(1, min(3, panels))
    rows = max(1, math.ceil(panels / columns))
    with rc_context(STYLE):
        figure = Figure(figsize=(3.4 * columns, 2.5 * rows + 0.4), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten().tolist()
        for ax, score in zip(axes, scores, strict=False):
            _draw_score(ax, records, score)
        for ax, name in zip(axes[len(scores) :], names, strict=False):
            _draw_path(ax, records, name.removeprefix("hypers."), space)
        for ax in axes[panels:]:
            ax.set_visible(False)
        for index, ax in enumerate(axes[:panels]):
            _mark(ax, records, warmup_epochs, tuned_epochs, with_labels=index == 0)
            if index + columns >= panels:
                ax.set_xlabel("epoch")
                ax.xaxis.set_tick_params(labelbottom=True)
        explained: set[str] = set()
        for ax in axes[:panels]:  # one legend per kind of panel
            if not explained.issuperset(labels := ax.get_legend_handles_labels()[1]):
                ax.legend(loc="best")
            explained |= set(labels)
        if title:
            figure.suptitle(title)
        fit_texts(figure)
        plain_names(figure)
        path = Path(picture)
        kind = path.suffix.lstrip(".") or "png"
        with without_glyph_warnings():
            write_atomically(path, lambda file: figure.savefig(file, format=kind), mode="wb")


def _scores(records: Sequence[Record]) -> list[str]:
    """Return the scores that both splits have, the loss first."""
    first = records[0] if records else {}
    measured = [name.removeprefix("valid_") for name in first if name.startswith("valid_")]
    return sorted(measured, key=lambda name: (name != "loss", name != "accuracy"))


def _draw_score(ax: "Axes", records: Sequence[Record], score: str) -> None:
    shown: list[float] = []
    for split, color in (("train", TRAIN), ("valid", VALID)):
        known = [r for r in records if r.get(f"{split}_{score}") is not None]
        values = [r[f"{split}_{score}"] for r in known]
        ax.plot([r["epoch"] for r in known], values, color=color, label=split)
        shown += values
    if tested := [r for r in records if r.get(f"test_{score}") is not None]:
        values = [r[f"test_{score}"] for r in tested]
        # an open marker, which does not hide the one of the best evaluation
        style: Any = {"markersize": 7, "markerfacecolor": "none", "markeredgewidth": 1.3}
        at = [r["epoch"] for r in tested]
        ax.plot(at, values, "D", color=TEST, label="test", clip_on=False, zorder=4, **style)
        shown += values
    _mark_best_point(ax, records, f"valid_{score}", VALID)
    _logarithmic_if_wide(ax, shown)
    ax.set_title(score)


def _draw_path(ax: "Axes", records: Sequence[Record], name: str, space: Space | None) -> None:
    """Draw the path of a hyperparameter in its own units.

    For a large one, draw its mean within its range.
    """
    points = [r for r in records if r.get(f"hypers.{name}") is not None]
    values = [_with_nan(r[f"hypers.{name}"]) for r in points]
    epochs = [r["epoch"] for r in points]
    ax.set_title(name.replace("_", " "))
    if not values:
        return
    if isinstance(values[0], dict):
        ax.fill_between(
            epochs,
            [v["min"] for v in values],
            [v["max"] for v in values],
            color=PATH,
            alpha=0.2,
            linewidth=0,
            label="min to max",
        )
        ax.plot(epochs, [v["mean"] for v in values], color=PATH, label="mean of λ")
        return
    path = torch.tensor(values, dtype=torch.float64)
    band = sigma_band(space, name, path, [r.get(f"scales.{name}") for r in points])
    entries = path.reshape(len(values), -1).unbind(1)
    for index, entry in enumerate(entries):
        color = PATHS[index % len(PATHS)]
        few = 1 < len(entries) <= len(PATHS)
        label = f"λ[{index}]" if few else "λ" if index == 0 else None
        ax.plot(epochs, entry.tolist(), color=color, label=label)
        # bands of many entries would hide one another
        if band is not None and len(entries) <= len(PATHS):
            low, high = (edge.reshape(len(values), -1)[:, index].tolist() for edge in band)
            ax.fill_between(
                epochs,
                low,
                high,
                color=color,
                alpha=0.2,
                linewidth=0,
                label="u ± σ" if index == 0 else None,
            )
    if len(entries) == 1:
        _mark_best_point(ax, records, f"hypers.{name}", PATH)
    _logarithmic_if_wide(ax, path.flatten().tolist())


def sigma_band(
    space: Space | None, name: str, path: Tensor, scales: Sequence[Any]
) -> tuple[Tensor, Tensor] | None:
    """Return λ(u − σ) and λ(u + σ) along the path; None without a finite band."""
    if space is None or name not in space or any(scale is None for scale in scales):
        return None
    u, sigma = space[name].unconstrain(path), torch.tensor(_with_nan(scales), dtype=torch.float64)
    low, high = (space[name].constrain(edge, None) for edge in (u - sigma, u + sigma))
    return (low, high) if bool(torch.isfinite(low).all() and torch.isfinite(high).all()) else None


def _with_nan(value: Any) -> Any:
    """Return the value with NaN for null, which JSON holds where a hyperparameter diverged."""
    if isinstance(value, dict):
        return {name: _with_nan(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_nan(entry) for entry in value]
    return math.nan if value is None else value


def _mark(
    ax: "Axes",
    records: Sequence[Record],
    warmup_epochs: float,
    tuned_epochs: float | None,
    *,
    with_labels: bool,
) -> None:
    """Shade the parts in which λ does not move, and mark the best evaluation."""
    from matplotlib.ticker import MaxNLocator

    end = records[-1]["epoch"] if records else 0
    if warmup_epochs > 0 and end > 0:
        ax.axvspan(
            0,
            min(warmup_epochs, end),
            color="0.93",
            zorder=0,
            label="warm-up" if with_labels else None,
        )
    if tuned_epochs is not None and tuned_epochs < end:
        label = "λ is frozen" if with_labels else None
        ax.axvspan(tuned_epochs, end, color="0.86", zorder=0, label=label)
    if best := _best(records):
        ax.axvline(
            best["epoch"],
            color="0.4",
            linestyle=":",
            linewidth=1,
            zorder=1,
            label="best" if with_labels else None,
        )
    if end > 0:
        ax.set_xlim(0, end)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=end >= 4))


def _best(records: Sequence[Record]) -> Record:
    if (marked := next((r for r in records if r.get("best")), None)) is not None:
        return marked
    known = [r for r in records if r.get("valid_loss") is not None]
    return min(known, key=lambda r: r["valid_loss"], default={})


def _mark_best_point(ax: "Axes", records: Sequence[Record], name: str, color: str) -> None:
    """Mark the best evaluation on its curve."""
    best = _best(records)
    if isinstance(best.get(name), (int, float)):
        ax.plot(
            best["epoch"],
            best[name],
            "o",
            color=color,
            markersize=5,
            markeredgecolor="white",
            clip_on=False,
            zorder=3,
        )


def _logarithmic_if_wide(ax: "Axes", values: Sequence[float]) -> None:
    """Use a logarithmic axis where the values span orders of magnitude."""
    if values and min(values) > 0 and max(values) > 30 * min(values):
        ax.set_yscale("log")


STYLE: Any = {
    "font.size": 8,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.useoffset": False,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
}
