"""Report the growth of a Δ-STN step with h and with the width, from `benchmarks.growth`."""

import torch

from benchmarks import growth
from benchmarks.experiments.harness import Context, Experiment


def both(seconds: float) -> growth.Report:
    """Measure both sweeps on one thread."""
    torch.set_num_threads(1)
    return growth.both(seconds, torch.device("cpu"))


def report(context: Context) -> str:
    """Return two tables, a picture, and the slopes."""
    (sweeps,) = context.map(both, [2.0 if context.quick else 15.0])
    growth.draw(sweeps, context.figures / "growth.png")
    slopes = sweeps["slopes"]
    return "\n\n".join(
        [
            growth.table(sweeps["hypers"]),
            growth.table(sweeps["width"]),
            "![Time, multiplications and the size of the response of a step "
            "over h and over the width]"
            "(growth.png)",
            f"- **h**: least squares give {slopes['gigaflops_slope'] * 1e3:.3f} MFLOP per "
            "hyperparameter, and "
            f"6 B · 2 · (all units) = {slopes['counted_per_hyper'] * 1e3:.3f}.\n"
            f"  This is {slopes['gigaflops_per_hyper']:.3%} of the step's own multiplications and "
            f"{slopes['milliseconds_per_hyper']:.3%} of the time.\n"
            f"- **Width**: exponents over ×1–×8 are {slopes['milliseconds_by_width']:.2f} of time, "
            f"{slopes['gigaflops_by_width']:.2f} of multiplications,\n  "
            f"{slopes['weights_by_width']:.2f} of the number of weights and"
            f" {slopes['response_by_width']:.2f} of the numbers in Θ.",
        ]
    )


EXPERIMENT = Experiment(page="speed.md", report=report)
