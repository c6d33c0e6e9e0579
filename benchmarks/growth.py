"""Measure the growth of a Δ-STN step with hyperparameters and width.

python -m benchmarks.growth [--json] [--seconds 20]
"""

import argparse
import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.measure import alternating, median_ratio, multiplications, peak_growth
from benchmarks.step import training_step
from benchmarks.workloads import Timed, set_up
from bilevel import Batch, Hypers, Interval, ModuleProblem, Params, Prediction, Space, solvers
from bilevel.device.device import choose_device
from bilevel.problems import MLP
from bilevel.problems.networks.dropout import dropout

BATCH, PIXELS, CLASSES = 128, 900, 10
HYPERS, WIDTHS = (3, 10, 30, 100, 300), (1, 2, 4, 8)
UNITS, FEW = 256, 10
"""Hidden units of the two layers at width ×1 and at all h; h at all widths."""


Report: TypeAlias = dict[str, Any]
"""Measurements of both sweeps: `hypers` and `width` have a row per point; and `slopes`."""


class Point(NamedTuple):
    """One point of a sweep."""

    hypers: int
    units: int


class Grouped(ModuleProblem):
    """Return a network with input dropout at h rates, which differ within a batch."""

    def __init__(self, point: Point) -> None:
        generator = torch.Generator().manual_seed(0)
        split = (
            torch.randn(4 * BATCH, PIXELS, generator=generator),
            torch.arange(4 * BATCH) % CLASSES,
        )
        rates = Interval(low=0.0, high=0.95, init=0.1, shape=(point.hypers,), differentiable=False)
        network = partial(MLP, [PIXELS, point.units, point.units, CLASSES])
        super().__init__(network, Space(rates=rates), split, split, batch_size=BATCH)

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = batch[0]
        if not train:
            return (x,), {}
        rates = (
            hypers["rates"]
            .expand(len(x), -1)
            .repeat_interleave(PIXELS // hypers["rates"].shape[-1], 1, output_size=PIXELS)
        )
        return (dropout(x.reshape(-1), rates.reshape(-1), generator).view_as(x),), {}

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return F.cross_entropy(prediction, batch[1])

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return F.cross_entropy(prediction, batch[1])


def prepared(point: Point, variant: str, device: torch.device) -> Timed:
    """Return Δ-STN or plain training, set up."""
    problem = Grouped(point)
    solver: Timed = solvers.delta_stn() if variant == "delta_stn" else solvers.Fixed()
    set_up(solver, problem, device)
    return solver


def measured(
    points: list[Point], memory: dict[Point, int], seconds: float, device: torch.device
) -> list[dict[str, Any]]:
    """Measure time, multiplications and memory of a step at every point, and of plain training."""
    ready = {point: prepared(point, "delta_stn", device) for point in points}
    plain = {
        point: prepared(point, "plain", device)
        for point in dict.fromkeys(Point(FEW, point.units) for point in points)
    }
    steps = {f"{point}": training_step(solver) for point, solver in ready.items()}
    steps |= {f"plain {point}": training_step(solver) for point, solver in plain.items()}
    taken = alternating(steps, seconds, device)
    return [
        {
            **point._asdict(),
            "milliseconds": 1e3 * statistics.median(taken[f"{point}"]),
            "of_plain": median_ratio(taken[f"{point}"], taken[f"plain {Point(FEW, point.units)}"]),
            "of_first": median_ratio(taken[f"{point}"], taken[f"{points[0]}"]),
            "gigaflops": multiplications(steps[f"{point}"]) / 1e9,
            "weights": sum(leaf.numel() for leaf in solver.core.weights.leaves),
            "response": _response_size(solver),
            "peak_bytes": memory[point],
            "rounds": len(taken[f"{point}"]),
        }
        for point, solver in ready.items()
    ]


def _response_size(solver: Timed) -> int:
    assert isinstance(solver, solvers.SelfTuning)
    return sum(leaf.numel() for leaf in solver.method.theta.leaves)


def line(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """Return (a, b) of the least-squares line a + b x.

    Example:
        >>> line([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
        (1.0, 2.0)
    """
    x, y = statistics.fmean(xs), statistics.fmean(ys)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )
    return y - slope * x, slope


def slopes(by_hypers: list[dict[str, Any]], by_width: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share that a hyperparameter adds to a step, and the exponents of width.

    A step forms the response of every row from ε, [B, h] by [h, rows], for the penalty and for the
    linearized pass, and the gradient of U and V: 6 B h rows operations, with rows = 2 · units.
    """
    h = [float(row["hypers"]) for row in by_hypers]
    found = {}
    for key in ("milliseconds", "gigaflops", "response"):
        level, slope = line(h, [row[key] for row in by_hypers])
        found[f"{key}_per_hyper"] = slope / level
        _, found[f"{key}_by_width"] = line(
            [math.log(row["units"]) for row in by_width], [math.log(row[key]) for row in by_width]
        )
    rows = 2 * (2 * UNITS + CLASSES)
    found["counted_per_hyper"] = 6 * BATCH * rows / 1e9
    found["gigaflops_slope"] = line(h, [row["gigaflops"] for row in by_hypers])[1]
    _, found["weights_by_width"] = line(
        [math.log(r["units"]) for r in by_width], [math.log(r["weights"]) for r in by_width]
    )
    return found


def both(seconds: float, device: torch.device) -> Report:
    """Return both sweeps and their slopes."""
    at_h, at_width = (
        [Point(h, UNITS) for h in HYPERS],
        [Point(FEW, UNITS * width) for width in WIDTHS],
    )
    # Memory comes first: a new process inherits the peak of its parent.
    memory = {
        point: peak_growth(partial(_train, point), _warm, device)
        for point in dict.fromkeys(at_h + at_width)
    }
    by_hypers, by_width = (
        measured(at_h, memory, seconds, device),
        measured(at_width, memory, seconds, device),
    )
    return {"hypers": by_hypers, "width": by_width, "slopes": slopes(by_hypers, by_width)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return one sweep as a Markdown table."""
    lines = [
        "| h | hidden units | weights | numbers in Θ | GFLOP a step | ms "
        "| × the first | × plain | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['hypers']} | {row['units']} | {row['weights']:,} | {row['response']:,} "
            f"| {row['gigaflops']:.2f} | {row['milliseconds']:.1f} | {row['of_first']:.2f} "
            f"| {row['of_plain']:.2f} | {row['peak_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


def draw(report: Report, path: Path) -> None:
    """Draw time and multiplications over h and over the width, as multiples of the first point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, rows, key, label in (
        (left, report["hypers"], "hypers", "hyperparameters h"),
        (right, report["width"], "units", "hidden units a layer"),
    ):
        x = [row[key] for row in rows]
        axes.plot(x, [row["of_first"] for row in rows], "o-", label="time")
        for name, measure in (("gigaflops", "multiplications"), ("response", "numbers in Θ")):
            axes.plot(x, [row[name] / rows[0][name] for row in rows], "o--", label=measure)
        axes.set(xlabel=label, ylabel="× the first", xscale="log")
        axes.set_xticks(x, labels=map(str, x))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    right.set_yscale("log")
    left.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and print text or JSON; `--picture` also draws."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="seconds of measurement for each of the two sweeps",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--picture", type=Path, help="file of the picture, such as growth.png")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    report = {
        "machine": machine(device),
        "torch": torch.__version__,
        **both(options.seconds, device),
    }
    if options.picture:
        draw(report, options.picture)
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['machine']}, torch {report['torch']}, batch {BATCH}")
    print(f"\n{table(report['hypers'])}\n\n{table(report['width'])}\n")
    print("\n".join(f"{name}: {value:.4g}" for name, value in report["slopes"].items()))


def _train(point: Point, device: torch.device) -> None:
    solver = prepared(point, "delta_stn", device)
    for _ in range(3):
        solver.step(warmup=True, limit=1)


def _warm(device: torch.device) -> None:
    _train(Point(3, 4), device)


if __name__ == "__main__":
    main()
