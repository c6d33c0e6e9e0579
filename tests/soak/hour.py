"""Run Δ-STN and an implicit solver for an hour each; memory and time per step must stay flat."""

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

EVERY = 2.0
"""Seconds between two samples."""
SETTINGS = (
    *(
        "problem=digits",
        "problem.dropout=gaussian",
        "runner.epochs=1000000",
        "runner.warmup_epochs=5",
        "runner.progress=none",
    ),
    *("runner.checkpoint_every=2", "runner.device=cpu", "logger=[wandb,tensorboard]"),
)
SOLVERS = ("delta_stn", "implicit_nystrom")

MEMORY = 0.03
"""Flat: the last quarter's memory is above the second's by at most this part, or by `ROOM` MiB."""
ROOM = 16.0
SPEED = 0.15
"""Flat: the last quarter's processor time per step is above the second's by at most this part."""


class Sample(NamedTuple):
    """Seconds since the start, MiB, MiB of W&B's process, processor seconds, and steps."""

    seconds: float
    memory: float
    memory_of_wandb: float
    processor: float
    step: int


def resident(pid: int) -> float:
    """Return the MiB that a process holds in memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def processor(pid: int) -> float:
    """Return the processor seconds of one process, without those of others."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Return all descendants of a process; W&B's is among them."""
    try:
        direct = [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []
    return [descendant for child in direct for descendant in (child, *children(child))]


def last_step(metrics: Path) -> int:
    """Return the step of the last whole line."""
    if not metrics.exists():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def watch(solver: str, minutes: float, place: Path) -> list[Sample]:
    """Sample a run every two seconds, and write the samples to `<solver>.csv`."""
    directory = place / solver
    command = [
        sys.executable,
        "-m",
        "bilevel",
        *SETTINGS,
        f"solver={solver}",
        f"hydra.run.dir={directory}",
    ]
    process = subprocess.Popen(
        [*command, f"runner.seconds={60 * minutes:g}"], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    began, samples = time.monotonic(), []
    with open(place / f"{solver}.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(Sample._fields)
        while process.poll() is None:
            with suppress(OSError):  # a process has just ended
                of_wandb = sum(map(resident, children(process.pid)))
                own, used = resident(process.pid), processor(process.pid)
                samples.append(
                    Sample(
                        time.monotonic() - began,
                        own,
                        of_wandb,
                        used,
                        last_step(directory / "metrics.jsonl"),
                    )
                )
                rows.writerow([f"{value:.2f}" for value in samples[-1]])
                file.flush()
            time.sleep(EVERY)
    if process.wait() != 0:
        raise SystemExit(f"{solver}: status {process.returncode}")
    return while_training(samples)


def while_training(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples between the first step and the last, without imports and pictures."""
    return [sample for sample in samples if 0 < sample.step < samples[-1].step]


def judge(solver: str, samples: Sequence[Sample]) -> bool:
    """Print the measurements, and return whether all of them are flat.

    The last quarter is compared with the second. The first has the growth of imports, of the
    allocator and of W&B's buffers. Slopes are over the last three quarters.
    """
    size = max(1, len(samples) // 4)
    quarters = [samples[number * size : (number + 1) * size + 1] for number in range(4)]
    rest, flat = samples[size:], True
    for what in ("memory", "memory_of_wandb"):
        second, last = (
            statistics.median(getattr(sample, what) for sample in quarters[number])
            for number in (1, 3)
        )
        line = statistics.linear_regression(
            [s.seconds for s in rest], [getattr(s, what) for s in rest]
        )
        good = last <= max(second * (1 + MEMORY), second + ROOM)
        flat &= good
        said = f"{second:.1f} MiB, then {last:.1f} MiB; {3600 * line.slope:+.1f} MiB an hour"
        print(f"{solver}: {what}: {said}: {'flat' if good else 'NOT FLAT'}")
    each = [
        1000 * (q[-1].processor - q[0].processor) / max(1, q[-1].step - q[0].step) for q in quarters
    ]
    good = each[3] <= each[1] * (1 + SPEED)
    said = ", ".join(f"{value:.3f}" for value in each)
    print(
        f"{solver}: ms of processor per step, by quarter: {said}: {'flat' if good else 'NOT FLAT'}"
    )
    print(f"{solver}: {samples[-1].step:,} steps in {samples[-1].seconds:,.0f} s", flush=True)
    return flat and good


def main(minutes: float, place: Path) -> int:
    """Run both, one after the other; return 1 if one of them is not flat."""
    flat = [judge(solver, watch(solver, minutes, place)) for solver in SOLVERS]
    return 0 if all(flat) else 1
