"""Timers: the seconds of training by phase."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class Timers:
    """Seconds by phase; a phase within another one stops the timer of the outer phase.

    So no second counts twice. On CUDA the clock of the device is read: events are recorded where a
    phase begins and ends, and read after the device has passed them, so that nothing waits. On
    a device with neither events nor steps that finish on the host, nothing is measured.

    Args:
        device: the device that computes.

    Example:
        >>> timers = Timers(torch.device("cpu"))
        >>> with timers("inner"):
        ...     with timers("response"):
        ...         pass
        >>> sorted(timers.read())
        ['inner', 'response']
    """

    MOST = 512
    """Events that may wait before the first of them are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since: Any = None
        self._pending: deque[tuple[str, Any, Any]] = deque()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of the block as that of the phase `name`."""
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """Return the seconds so far by phase; waits for the device, so call it at evaluations."""
        while self._pending:
            self._pending[0][2].synchronize()
            self._count(*self._pending.popleft())
        return dict(self._seconds)

    def restore(self, seconds: Mapping[str, float]) -> None:
        """Continue from the result of `read`."""
        self._seconds = dict(seconds)

    def _mark(self) -> None:
        """Count the time since the last mark for the innermost phase."""
        if self.device.type == "cpu":
            now: Any = time.perf_counter()
            if self._open:
                self._seconds[self._open[-1]] = (
                    self._seconds.get(self._open[-1], 0.0) + now - self._since
                )
        elif self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self.device))
            if self._open:
                self._pending.append((self._open[-1], self._since, now))
            while len(self._pending) > self.MOST and self._pending[0][2].query():
                self._count(*self._pending.popleft())
        else:
            return
        self._since = now

    def _count(self, name: str, start: Any, end: Any) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + 1e-3 * start.elapsed_time(end)
