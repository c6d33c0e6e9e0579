"""Sentences for errors of the machine: no memory left, a dead worker, no deterministic form."""

import gc
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import torch

from bilevel.data.loader_errors import DEAD_WORKER
from bilevel.data.tensor_stream import Data
from bilevel.errors import BilevelError
from bilevel.problem import Problem
from bilevel.solver import Solver
from bilevel.text import byte_size, first_line

NO_DETERMINISTIC_FORM = re.compile(r"(\S+) does not have a deterministic implementation")


class OutOfMemory(BilevelError):
    """The device or the machine has too little memory."""


def ran_out(error: BaseException) -> bool:
    """Return whether an error means that a device or the machine has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and "can't allocate memory" in str(error)  # the CPU allocator has no class for it
    )


class ExplainedErrors:
    """Turn an error of the machine into a sentence, and free what the failed work held.

    Args:
        problem: the problem of the run.
        solver: the solver of the run.
        device: the device of the run.
        precision: the precision of the run.
        data: returns the streams once the solver is set up, and None before.

    Raises:
        OutOfMemory: no memory is left. The message has what is in use, and the settings of this
            problem and solver that lower it.
        BilevelError: a worker of a DataLoader died, or an operation has no deterministic form.
    """

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        device: torch.device,
        precision: str = "fp32",
        *,
        data: Callable[[], Data | None] = lambda: None,
    ) -> None:
        self.problem = problem
        self.solver = solver
        self.device = device
        self.precision = precision
        self.data = data

    def __enter__(self) -> "ExplainedErrors":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, (RuntimeError, MemoryError)):
            return
        explained: BilevelError | None = None
        if ran_out(error):
            explained = OutOfMemory(self._sentence(error))
        elif DEAD_WORKER.search(str(error)):
            explained = BilevelError(
                f"a worker of a DataLoader died ({first_line(error).rstrip('.')}), most often "
                "because the memory of the machine ran out; lower num_workers, prefetch_factor or "
                "batch_size of that loader, and continue from the last checkpoint with resume=…"
            )
        elif found := NO_DETERMINISTIC_FORM.match(str(error)):
            explained = BilevelError(
                f"runner.deterministic=true does not allow {found[1]}, which has no deterministic "
                f"form on {self.device.type}; use another operation, another device, or "
                "runner.deterministic=false"
            )
        if explained is not None:
            free(error, self.device)
            raise explained from None

    def _sentence(self, error: BaseException) -> str:
        data = self.data()
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        wanted = f" ({asked[1]} more were requested)" if asked else ""
        where = "at set-up" if data is None else f"at inner step {self.solver.inner_count}"
        lower = memory_settings(self.problem, self.solver, data, self.device, self.precision)
        later = "" if data is None else "; continue from the last checkpoint with resume=…"
        return (
            f"out of memory {where}{wanted}: {in_use(self.device)}; "
            f"to need less, choose {', '.join(lower)}{later}"
        )


def free(error: BaseException, device: torch.device) -> None:
    """Free what the frames of a failed computation hold, for the next run of a sweep."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_use(device: torch.device) -> str:
    """Return what the device (on the CPU: this process) holds, and how much memory is free."""
    if device.type == "cuda":
        free_bytes, total = torch.cuda.mem_get_info(device)
        parts = {
            "in tensors": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "at most so far in tensors": torch.cuda.max_memory_allocated(device),
        }
        held = ", ".join(f"{byte_size(size)} {what}" for what, size in parts.items())
        name = torch.cuda.get_device_name(device)
        return f"{held}, {byte_size(free_bytes)} free of {byte_size(total)} on {name}"
    with suppress(ImportError, OSError, LookupError):  # Windows has none of this, macOS no /proc
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        with open("/proc/meminfo") as file:
            known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
        return (
            f"this process held {byte_size(peak)} at most, {byte_size(known['MemAvailable'])} "
            f"are free of {byte_size(known['MemTotal'])}"
        )
    return "the machine does not report its memory"


def memory_settings(
    problem: Problem,
    solver: Solver,
    data: Data | None,
    device: torch.device,
    precision: str = "fp32",
) -> list[str]:
    """Return what lowers the memory of this solver on this problem, each with its present value."""
    batch = None if data is None else getattr(data.train, "batch_size", None)
    lower = ["smaller batches" if batch is None else f"a smaller problem.batch_size (now {batch})"]
    if data is not None and batch is None and data.train.steps_per_epoch == 1:
        lower = [f"minibatches (now all {data.train.size} examples at once)"]
    lower += solver.memory_settings(problem.space)
    if data is not None:
        weights = sum(p.numel() for p in solver.solution().params.values())
        lower.append(f"a smaller network (now {weights:,} weights)")
    if device.type == "cuda":
        lower += [*(["runner.precision=bf16"] if precision != "bf16" else []), "runner.device=cpu"]
    return lower
