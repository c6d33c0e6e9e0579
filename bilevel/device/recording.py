"""Recordings of a device's work, and what must not happen while one is made."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch


class Graph(Protocol):
    """Work of the device that is recorded once, on tensors that keep their memory."""

    def record(self, work: Callable[[], None]) -> None:
        """Record what `work` launches; nothing is computed."""

    def replay(self) -> None:
        """Launch the recorded work."""


class CudaGraph:
    """PyTorch's graph; a replay draws anew from `generator` and the device's global generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._device = generator.device
        self._graph.register_generator_state(generator)

    def record(self, work: Callable[[], None]) -> None:
        with torch.cuda.device(self._device), torch.cuda.graph(self._graph):
            work()

    def replay(self) -> None:
        self._graph.replay()


def count_on_device(optimizers: Sequence[torch.optim.Optimizer]) -> str | None:
    """Let the optimizers count their steps on the device; return the reason if one cannot."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
            elif not isinstance(optimizer, torch.optim.SGD):  # which counts no steps
                return f"{type(optimizer).__name__} has no capturable form"
        for state in optimizer.state.values():
            if "step" in state:  # of a resumed run that was not captured
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(
                    optimizer.param_groups[0]["params"][0].device
                )
    return None


@contextmanager
def device_waits() -> Iterator[list[str]]:
    """Collect the warnings of CUDA about waits for the device; pass other warnings on."""
    waits: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            waits.append(str(warning.message))
        elif "debug mode is a prototype" not in str(
            warning.message
        ):  # PyTorch's own warning about the mode
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
