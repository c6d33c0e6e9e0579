"""Report the cost of a step on images for each network, from `benchmarks.images`."""

from typing import Any

import torch

from benchmarks import images
from benchmarks.experiments.harness import Context, Experiment
from benchmarks.experiments.report import table

SETTING = images.Setting(
    batch=32, width=0.25, norm=None, precision="fp32", channels_last=False, capture=False
)
NAMES = {"plain": "plain", "stn": "STN", "centered_stn": "centered STN", "delta_stn": "Δ-STN"}


def measured(seconds: float) -> dict[str, Any]:
    """Measure all networks on one thread."""
    torch.set_num_threads(1)
    return {
        name: images.measured(name, SETTING, seconds, torch.device("cpu")) for name in images.SHAPES
    }


def report(context: Context) -> str:
    """Return a table of the networks and variants."""
    (results,) = context.map(measured, [1.0 if context.quick else 10.0])
    rows = []
    for network, result in results.items():
        part = result["augmentation"]["part_of_step"]
        for variant, row in result["steps"].items():
            phases = [
                f"{row['phases'][name]:.1f}" if name in row["phases"] else ""
                for name in images.PHASES
            ]
            rows.append(
                [
                    f"{network}, h = {result['hyperparameters']}, n = {result['rounds']}"
                    if variant == "plain"
                    else "",
                    NAMES[variant],
                    f"{row['units_of_plain']:.2f}",
                    f"{row['milliseconds']:.1f}",
                    f"{row['of_plain']:.2f}",
                    f"{row['images_per_second']:,.0f}",
                    *phases,
                    f"{part[variant]:.0%}",
                ]
            )
    head = ["network", "", "multiplications × plain", "ms", "time × plain", "images/s"]
    head += ["data ms", "w₀ ms", "response ms", "outer ms", "augmentation"]
    return table(head, rows)


EXPERIMENT = Experiment(page="speed.md", report=report)
