"""Measure one step.

python -m benchmarks.step [--json] [--device auto] [--profile] [--seconds 25] [--threads N]
"""

import argparse
import json
import statistics
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import machine
from benchmarks.measure import (
    Step,
    alternating,
    median_ratio,
    multiplications,
    peak_memory,
    target_lines,
)
from benchmarks.workloads import BATCH, VARIANTS, Timed, prepared
from bilevel.device.device import choose_device
from bilevel.solvers import SelfTuning

TITLES = {
    "mlp": "MLP 784-1200-1200-1200-10",
    "convolutions": "conv 5×5 1-16, pool, conv 5×5 16-32, pool, linear 1568-1568-10",
}
MOST = {"mlp": 1.4, "convolutions": 1.5}
"""The aim for Δ-STN's time, in multiples of STN's."""


def main() -> None:
    """Measure both networks, and print a table or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description="Measure time, memory and multiplications of one step.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument(
        "--seconds", type=float, default=25.0, help="seconds of measurement for each network"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="print profiles of a Δ-STN step and an STN step instead",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    if options.profile:
        for network in TITLES:
            for variant in ("stn", "delta_stn"):
                print(f"{TITLES[network]}, {variant}\n{profiled(network, variant, device)}")
        return
    # Memory comes first: a new process inherits the peak of its parent.
    memory = {
        network: {variant: peak_memory(network, variant, device) for variant in VARIANTS}
        for network in TITLES
    }
    networks = {
        network: measured(network, memory[network], options.seconds, device) for network in TITLES
    }
    report = {
        "machine": machine(device),
        "torch": torch.__version__,
        "batch": BATCH,
        "networks": networks,
    }
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"batch {BATCH}, {machine(device)}, torch {torch.__version__}")
        for network, result in networks.items():
            print(f"\n{TITLES[network]}: {result['rounds']} rounds\n{table(result)}")


def measured(
    network: str, memory: dict[str, int], seconds: float, device: torch.device
) -> dict[str, Any]:
    """Return milliseconds, units and peak memory of every step, and ratios with a target."""
    ready = {variant: prepared(network, variant, device) for variant in VARIANTS}
    steps = {variant: training_step(solver) for variant, solver in ready.items()}
    tuned = ready["delta_stn"]
    assert isinstance(tuned, SelfTuning)
    steps["outer step"] = outer_step(tuned)
    taken = alternating(steps, seconds, device)
    unit = multiplications(forward(ready["plain"]))
    rows = {
        name: {
            "milliseconds": 1e3 * statistics.median(taken[name]),
            "fastest_milliseconds": 1e3 * min(taken[name]),
            "of_stn": median_ratio(taken[name], taken["stn"]),
            "units": multiplications(step) / unit,
            "peak_bytes": memory.get(name),
        }
        for name, step in steps.items()
    }
    targets = [
        ("Δ-STN / STN, time", rows["delta_stn"]["of_stn"], MOST[network]),
        (
            "Δ-STN / double backward, time",
            median_ratio(taken["delta_stn"], taken["double_backward"]),
            0.6,
        ),
        ("Δ-STN / STN, peak memory", memory["delta_stn"] / memory["stn"], 1.3),
    ]
    return {
        "rounds": len(taken["stn"]),
        "steps": rows,
        "targets": [
            {"name": name, "measured": value, "at_most": most} for name, value, most in targets
        ],
    }


def training_step(solver: Timed) -> Step:
    """Take one inner step on the next training batch, as in a run."""
    return lambda: solver.step(warmup=True, limit=1)


def outer_step(solver: SelfTuning) -> Step:
    """Take one step of u and σ on the next validation batch, and set u₀ ← u."""

    def step() -> None:
        solver.method.outer_step(solver.core.data.valid.next())
        solver.core.search.recentre()

    return step


def forward(solver: Timed) -> Step:
    """Take one unit: a forward pass with plain weights on one batch."""
    problem, (hypers, params, carry) = solver.core.problem, solver.solution()
    batch = solver.core.data.train.peek()
    return lambda: problem.predict(hypers, params, carry, batch, train=False, generator=None)


def table(result: dict[str, Any]) -> str:
    """Return the result of one network as text."""
    stn = result["steps"]["stn"]["peak_bytes"]
    lines = [
        f"{'':16} {'units':>6} {'ms':>8} {'fastest':>8} {'× STN':>6} {'peak MiB':>9} {'× STN':>6}"
    ]
    for name, row in result["steps"].items():
        line = f"{name:16} {row['units']:6.2f} {row['milliseconds']:8.2f}"
        line += f" {row['fastest_milliseconds']:8.2f} {row['of_stn']:6.2f}"
        if row["peak_bytes"] is not None:
            line += f" {row['peak_bytes'] / 2**20:9.1f} {row['peak_bytes'] / stn:6.2f}"
        lines.append(line)
    return "\n".join([*lines, *target_lines(result["targets"])])


def profiled(network: str, variant: str, device: torch.device, steps: int = 10) -> str:
    """Return PyTorch's table of the most expensive operations of `steps` training steps."""
    step = training_step(prepared(network, variant, device))
    for _ in range(3):
        step()
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities, record_shapes=True) as record:
        for _ in range(steps):
            step()
    order = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    averages = record.key_averages(group_by_input_shape=True)
    return averages.table(
        sort_by=order, row_limit=25, max_name_column_width=40, max_shapes_column_width=60
    )


if __name__ == "__main__":
    main()
