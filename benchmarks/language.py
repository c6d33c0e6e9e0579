"""Measure the cost of self-tuning an LSTM.

python -m benchmarks.language [--json] [--device auto] [--threads 1] [--seconds 30]
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.measure import (
    MEMORY_STEPS,
    Step,
    alternating,
    median_ratio,
    peak_growth,
    target_lines,
)
from benchmarks.workloads import Timed
from bilevel import solvers
from bilevel.device.device import choose_device
from bilevel.problems.language_modeling.corpus import Corpus
from bilevel.problems.language_modeling.problem import Language
from bilevel.solvers.autodiff.decompositions import FORWARD_MODE, Decomposed

SIZES: dict[str, dict[str, int]] = {
    "small": {"words": 1000, "embedding": 64, "hidden": 64, "batch_size": 20, "bptt": 20},
    "medium": {"words": 1000, "embedding": 200, "hidden": 200, "batch_size": 20, "bptt": 35},
    "ptb": {"words": 10_000, "embedding": 650, "hidden": 650, "batch_size": 40, "bptt": 70},
    "tiny": {"words": 10, "embedding": 4, "hidden": 4, "batch_size": 2, "bptt": 2},
}
"""Two tied layers, seven tuned hyperparameters. `ptb` is the STN paper's size, `tiny` warms up."""

UNROLLED = "plain, unrolled cell"
VARIANTS: dict[str, Callable[..., Timed]] = {
    "plain, fused": solvers.Fixed,
    UNROLLED: solvers.Fixed,
    "STN": solvers.stn,
    "centered STN": solvers.centered_stn,
    "Δ-STN": solvers.delta_stn,
}
MOST = 4.0
"""The aim for Δ-STN's time, in multiples of plain training with an unrolled cell."""
SGD = partial(torch.optim.SGD, lr=1.0)


def prepared(size: str, variant: str, device: torch.device) -> Timed:
    """Return the solver `variant`, set up on random tokens."""
    sizes = dict(SIZES[size])
    words, window = sizes.pop("words"), sizes["batch_size"] * sizes["bptt"]
    draws = torch.Generator().manual_seed(0)

    def split(windows: int) -> Tensor:
        return torch.randint(words, (windows * window + 1,), generator=draws)

    vocabulary = tuple(str(word) for word in range(words))
    problem = Language(Corpus(split(8), split(8), split(1), vocabulary), layers=2, **sizes)
    solver = VARIANTS[variant](inner_optimizer=SGD, clip_norm=0.25)
    solver.setup(
        problem,
        problem.data(device, torch.Generator()),
        device,
        torch.Generator(device).manual_seed(2),
    )
    return solver


def training_step(solver: Timed, variant: str) -> Step:
    """Take one inner step, as in a run."""

    def step() -> None:
        solver.step(warmup=True, limit=1)

    return unrolled(step) if variant == UNROLLED else step


def whole_round(solver: Timed, variant: str) -> Step:
    """Take `inner_steps` inner steps and the outer step that follows them."""

    def step() -> None:
        solver.step()

    return unrolled(step) if variant == UNROLLED else step


def unrolled(step: Step) -> Step:
    """Replace every recurrent layer by the step-by-step cell that a perturbed pass uses."""

    def within() -> None:
        with Decomposed(FORWARD_MODE):
            step()

    return within


def work(size: str, variant: str, device: torch.device) -> None:
    """Set up a solver and take a few inner steps, for the measurement of memory."""
    step = training_step(prepared(size, variant, device), variant)
    for _ in range(MEMORY_STEPS):
        step()


def warm(device: torch.device) -> None:
    """Take every kind of step with a tiny network, so that libraries are loaded."""
    for variant in VARIANTS:
        work("tiny", variant, device)


def measured(
    size: str, memory: dict[str, int], seconds: float, device: torch.device
) -> dict[str, Any]:
    """Return tokens per second, time and memory of every variant, and ratios with a target."""
    ready = {variant: prepared(size, variant, device) for variant in VARIANTS}
    steps = alternating(
        {name: training_step(solver, name) for name, solver in ready.items()}, seconds / 2, device
    )
    rounds = alternating(
        {name: whole_round(solver, name) for name, solver in ready.items()}, seconds / 2, device
    )
    tokens = SIZES[size]["batch_size"] * SIZES[size]["bptt"]
    rows = {
        name: {
            "milliseconds": 1e3 * statistics.median(steps[name]),
            "step_of_unrolled": median_ratio(steps[name], steps[UNROLLED]),
            "step_of_fused": median_ratio(steps[name], steps["plain, fused"]),
            "tokens_per_second": tokens * solver.inner_steps / statistics.median(rounds[name]),
            "round_of_unrolled": median_ratio(rounds[name], rounds[UNROLLED]),
            "peak_bytes": memory[name],
            "memory_of_unrolled": memory[name] / memory[UNROLLED],
        }
        for name, solver in ready.items()
    }
    targets = [
        (
            "Δ-STN / plain with an unrolled cell, one training step",
            rows["Δ-STN"]["step_of_unrolled"],
        ),
        (
            "Δ-STN / plain with an unrolled cell, a round with its outer step",
            rows["Δ-STN"]["round_of_unrolled"],
        ),
    ]
    return {
        "sizes": SIZES[size],
        "steps": len(steps[UNROLLED]),
        "rounds": len(rounds[UNROLLED]),
        "variants": rows,
        "targets": [{"name": name, "measured": ratio, "at_most": MOST} for name, ratio in targets],
    }


def table(size: str, result: dict[str, Any]) -> str:
    """Return the result of one size as text."""
    sizes = ", ".join(f"{name} {value}" for name, value in result["sizes"].items())
    lines = [
        f"{size}: LSTM of two layers, {sizes}; {result['steps']} steps and "
        f"{result['rounds']} rounds of 5 + 1 of each",
        f"{'':21} {'ms a step':>10} {'× unrolled':>11} {'× fused':>8} {'tokens/s':>10} "
        f"{'round × unrolled':>17} {'peak MiB':>9} {'× unrolled':>11}",
    ]
    for name, row in result["variants"].items():
        lines.append(
            f"{name:21} {row['milliseconds']:10.2f} {row['step_of_unrolled']:11.2f} "
            f"{row['step_of_fused']:8.2f} {row['tokens_per_second']:10,.0f} "
            f"{row['round_of_unrolled']:17.2f} {row['peak_bytes'] / 2**20:9.1f} "
            f"{row['memory_of_unrolled']:11.2f}"
        )
    return "\n".join([*lines, *target_lines(result["targets"])])


def main() -> None:
    """Measure, and print tables or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language", description="Measure the cost of self-tuning an LSTM."
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=["small", "medium", "ptb"],
        help="small medium, or ptb on CUDA",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="seconds of measurement for each size"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    on_cuda = device.type == "cuda"
    sizes = options.sizes or (["ptb"] if on_cuda else ["small", "medium"])
    # Memory comes first: a new process inherits the peak of its parent.
    memory = {
        size: {name: peak_growth(partial(work, size, name), warm, device) for name in VARIANTS}
        for size in sizes
    }
    report = {size: measured(size, memory[size], options.seconds, device) for size in sizes}
    if options.json:
        print(
            json.dumps(
                {"machine": machine(device), "torch": torch.__version__, "sizes": report}, indent=2
            )
        )
    else:
        print(f"{machine(device)}, torch {torch.__version__}")
        for size, result in report.items():
            print(f"\n{table(size, result)}")


if __name__ == "__main__":
    main()
