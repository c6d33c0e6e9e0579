"""The device of a run: its choice, time and memory, random state, determinism and threads."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bilevel.errors import BilevelError
from bilevel.params import Params

MANY_WEIGHTS = 1_000_000
"""Number of weights from which several CPU threads are faster than one."""


DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG that make cuBLAS deterministic (cuBLAS manual)."""


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is CUDA where it is available, else the CPU.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')

    Raises:
        BilevelError: the device is not available.
    """
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BilevelError(
            f"runner.device={name} is not available here; use runner.device=auto, or "
            "runner.device=cpu"
        ) from None
    return device


class Meter:
    """Seconds and peak memory of training alone.

    Work between `stop` and the next `start` (evaluation, checkpoints) is not counted.

    Attributes:
        seconds: seconds counted up to the last `stop`.
        peak_memory: peak memory in bytes, None where it is unknown. On CUDA it is that of the
            tensors, on the CPU that of the whole process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.peak_memory: int | None = None
        self._since: float | None = None

    def start(self) -> None:
        """Begin to count."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Wait for the device and count the time since `start`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds, self._since = self.elapsed(), None
        memory = _memory(self.device)
        self.peak_memory = max(memory or 0, self.peak_memory or 0) or None

    def elapsed(self) -> float:
        """Return the seconds so far, without waiting for the device."""
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return PyTorch's global random states, from which a user's `nn.Dropout` may draw."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore a state from `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Make PyTorch refuse operations whose bits may differ between runs, if `wanted`.

    cuBLAS reads its environment variable at its first use in a process. A run in a process that
    used cuBLAS before may therefore be refused.
    """
    if not wanted:
        yield
        return
    cudnn, workspace = torch.backends.cudnn, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if workspace not in DETERMINISTIC_WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = DETERMINISTIC_WORKSPACES[0]
    cudnn.deterministic, cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark = before[1:]
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        else:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


def threads_for(threads: int | None, params: Params) -> int:
    """Return the wanted number of CPU threads; by default one for few weights, else the present."""
    few = sum(p.numel() for p in params.values()) < MANY_WEIGHTS
    return threads or (1 if few else torch.get_num_threads())


@contextmanager
def cpu_threads(threads: int | None, params: Params) -> Iterator[None]:
    """Set the number of CPU threads inside; by default one thread for few weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_for(threads, params))
    try:
        yield
    finally:
        torch.set_num_threads(before)
