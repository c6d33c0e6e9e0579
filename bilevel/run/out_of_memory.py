"""Memory that runs out, workers that die: named in one sentence, with what lowers the need of this very run."""

import gc
import re
import sys
import traceback
from contextlib import suppress
from types import TracebackType

import torch

from bilevel.data.loader_stream import DEAD_WORKER
from bilevel.data.tensor_stream import Data
from bilevel.errors import BilevelError
from bilevel.problem import Problem
from bilevel.solver import Solver


class OutOfMemory(BilevelError):
    """The memory of the device, or of the machine, did not suffice."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of a device or of the machine."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and "can't allocate memory" in str(error)  # the CPU's allocator has no class for it
    )


class Explained:
    """While entered, an error of the machine's becomes a sentence, and what the failed work held is free again.

    Attributes:
        data: once they are there.

    Raises:
        OutOfMemory: with what was in use, and the settings of this problem and solver that lower it.
        BilevelError: a worker of a DataLoader died, or an operation has no deterministic form.
    """

    def __init__(
        self, problem: Problem, solver: Solver, device: torch.device, precision: str = "fp32"
    ) -> None:
        self.problem, self.solver, self.device, self.precision = problem, solver, device, precision
        self.data: Data | None = None

    def __enter__(self) -> "Explained":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, (RuntimeError, MemoryError)):
            return
        told: BilevelError | None = None
        if ran_out(error):
            told = OutOfMemory(self._sentence(error))
        elif DEAD_WORKER.search(str(error)):
            told = BilevelError(f"a worker of a DataLoader died ({_first_line(error)}); {LESS}")
        elif found := NO_DETERMINISTIC_FORM.match(str(error)):
            told = BilevelError(
                f"runner.deterministic is on, and {found[1]} has no deterministic form on {self.device.type}; use another "
                "operation there, another device, or runner.deterministic=false"
            )
        if told is not None:
            free(error, self.device)
            raise told from None

    def _sentence(self, error: BaseException) -> str:
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        wanted = f" ({asked[1]} more were asked for)" if asked else ""
        where = f"at inner step {self.solver.inner_count}" if self.data is not None else "at set-up"
        lower = settings(self.problem, self.solver, self.data, self.device, self.precision)
        later = "; resume=… goes on from the last checkpoint" if self.data is not None else ""
        return f"out of memory {where}{wanted}: {in_use(self.device)}; to need less: {', '.join(lower)}{later}"


NO_DETERMINISTIC_FORM = re.compile(r"(\S+) does not have a deterministic implementation")
LESS = (
    "most often the machine's memory ran out: lower num_workers, prefetch_factor or batch_size of that loader; "
    "resume=… goes on from the last checkpoint"
)


def free(error: BaseException, device: torch.device) -> None:
    """Let go of what the frames of a failed computation hold, so that the next run of a sweep finds it free."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_use(device: torch.device) -> str:
    """What the device, or the process on the CPU, holds, and what is free of how much."""
    if device.type == "cuda":
        free_bytes, total = torch.cuda.mem_get_info(device)
        parts = {
            "in tensors": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "at most so far in tensors": torch.cuda.max_memory_allocated(device),
        }
        held = ", ".join(f"{_gib(size)} {what}" for what, size in parts.items())
        return f"{held}, {_gib(free_bytes)} free of {_gib(total)} on {torch.cuda.get_device_name(device)}"
    with suppress(ImportError, OSError, LookupError):  # Windows has none of this, macOS no /proc
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
        said = f"this process held {_gib(peak)} at most"
        with open("/proc/meminfo") as file:
            known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
        return f"{said}, {_gib(known['MemAvailable'])} are free of {_gib(known['MemTotal'])}"
    return "the machine does not say how much it has"


def settings(
    problem: Problem,
    solver: Solver,
    data: Data | None,
    device: torch.device,
    precision: str = "fp32",
) -> list[str]:
    """What lowers the memory of this solver on this problem, each with its present value."""
    batch = None if data is None else getattr(data.train, "batch_size", None)
    lower = ["smaller batches" if batch is None else f"a smaller problem.batch_size (now {batch})"]
    if data is not None and batch is None and data.train.steps_per_epoch == 1:
        lower = [f"minibatches (now all {data.train.size} examples at once)"]
    lower += solver.memory_settings(problem.space)
    if data is not None:
        lower.append(
            f"a smaller network (now {sum(p.numel() for p in solver.solution().params.values()):,} weights)"
        )
    if device.type == "cuda":
        lower += [*(["runner.precision=bf16"] if precision != "bf16" else []), "runner.device=cpu"]
    return lower


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
