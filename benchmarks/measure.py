"""Measure time, memory and multiplications of a step."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workloads import prepared
from bilevel.device.device import Meter

Step = Callable[[], object]
Work = Callable[[torch.device], object]

MEMORY_STEPS = 3
FEWEST_ROUNDS = 5


def alternating(
    steps: dict[str, Step], seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of every step; a round takes each once, for about `seconds` in all."""
    for step in steps.values():  # fills momentum, and libraries choose their algorithms
        step()
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < FEWEST_ROUNDS or time.perf_counter() < end:
        rounds += 1
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            taken[name].append(time.perf_counter() - start)
    return taken


def median_ratio(taken: list[float], other: list[float]) -> float:
    """Return the median over rounds of taken / other, so that a slow moment affects both."""
    return statistics.median(a / b for a, b in zip(taken, other, strict=True))


def multiplications(step: Step) -> int:
    """Return the exact number of operations in matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def target_lines(targets: list[dict[str, Any]]) -> list[str]:
    """Return a line for each target: the measured ratio, the aim, and whether it is reached."""
    return [
        f"{target['name']}: {target['measured']:.2f}, wanted ≤ {target['at_most']:g}: "
        + ("reached" if target["measured"] <= target["at_most"] else "missed")
        for target in targets
    ]


def peak_memory(network: str, variant: str, device: torch.device) -> int:
    """Return the bytes by which set-up and three training steps raise the peak."""
    return peak_growth(partial(_train, network, variant), _warm, device)


def peak_growth(work: Work, warm: Work, device: torch.device) -> int:
    """Return the bytes by which `work` raises the peak after `warm`.

    On CUDA this is the peak of the tensors, on the CPU that of a new process. `warm` takes each
    kind of step on a tiny scale first, so that memory of libraries does not count.
    """
    if device.type == "cuda":
        return _growth(work, warm, device)
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth, (work, warm, device))


def _growth(work: Work, warm: Work, device: torch.device) -> int:
    warm(device)
    before, after = Meter(device), Meter(device)
    before.start()
    before.stop()
    after.start()
    work(device)
    after.stop()
    return (after.peak_memory or 0) - (before.peak_memory or 0)


def _warm(device: torch.device) -> None:
    for kind in ("plain", "delta_stn", "double_backward"):
        _train("tiny", kind, device)


def _train(network: str, variant: str, device: torch.device) -> None:
    solver = prepared(network, variant, device)
    for _ in range(MEMORY_STEPS):
        solver.step(warmup=True, limit=1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
