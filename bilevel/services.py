"""Services of a run for its solver: timers, a watch for non-finite losses, captured steps."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.data.stream import Stream
from bilevel.params import Batch, Metrics, Params
from bilevel.timers import Timers

UNTIMED = nullcontext()
NEVER = torch.iinfo(torch.int64).max
MOST_UNTESTED = 64
"""Losses that wait to be tested together; they keep their memory so long."""


class Capturable(NamedTuple):
    """The state that a step may change when it is replayed as a graph of the device.

    Attributes:
        optimizers: their settings and their memory are part of a recording.
        owners: the objects that a step works on. With each of them stand the names of the
            attributes, tensors or dictionaries of tensors, that a step binds anew.
    """

    optimizers: Sequence[torch.optim.Optimizer]
    owners: Sequence[tuple[object, tuple[str, ...]]]


class Services:
    """Timers, a watch for losses that are not finite, and captured steps; all off by default.

    The runner makes one and passes it to `Solver.setup`. The dry run of a set-up takes a fresh one.

    Attributes:
        timers: count the seconds of each phase; None measures nothing.
        capture: takes steps as replayed graphs; None takes them one by one.
        device_count: [] on the device: the number of the inner step, where steps are captured.
        first_bad_step: [] on the device: the inner step of the first loss that was not finite.
        leaves: the tensors of a caller that are w, to be trained in place; None trains copies.

    Example:
        >>> services = Services()
        >>> services.watch(torch.tensor(1.0), 1)
        >>> services.watch(torch.tensor(float("nan")), 2)
        >>> services.bad_step()
        2
    """

    def __init__(self, timers: Timers | None = None) -> None:
        self.timers = timers
        self.capture: Callable[..., Metrics] | None = None
        self.device_count: Tensor | None = None
        self.first_bad_step: Tensor | None = None
        self.leaves: Params | None = None
        self._untested: list[Tensor] = []
        self._first_untested = 0

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Count the time of a block as that of one phase, and not of a phase around it.

        The phases are `data`: the next batch; `inner`: the training of w; `response`: the work on ŵ
        beyond that (a response network, a linear solve, particles); `outer`: the steps of λ.
        """
        return UNTIMED if self.timers is None else self.timers(name)

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far by phase; waits for the device."""
        return {} if self.timers is None else self.timers.read()

    def restore(self, seconds: Mapping[str, float]) -> None:
        """Continue from the result of `seconds`."""
        if self.timers is not None:
            self.timers.restore(seconds)

    def next_batch(self, stream: Stream) -> Batch:
        """Return `stream.next()`; its time counts as `data`."""
        with self.phase("data"):
            return stream.next()

    def take(self, step: Callable[..., Metrics], *batches: Batch) -> Metrics:
        """Return `step(*batches)`, taken as a replayed graph where the run captures steps."""
        return step(*batches) if self.capture is None else self.capture(step, *batches)

    def watch(self, loss: Tensor, count: int) -> None:
        """Note the inner step `count` if `loss` is not finite; only the first counts.

        Nothing waits for the device here. The runner reads the note at its next evaluation. Losses
        of shape [] are tested together, because a test takes more operations than a small layer.
        """
        loss = loss.detach() if loss.requires_grad else loss
        if loss.ndim or self.capture is not None or self.device_count is not None:
            now = count if self.device_count is None else self.device_count
            self._note(torch.where(torch.isfinite(loss).all(), NEVER, now))
            return
        if count != self._first_untested + len(self._untested):
            self._test()
        if not self._untested:
            self._first_untested = count
        self._untested.append(loss)
        if len(self._untested) == MOST_UNTESTED:
            self._test()

    def _test(self) -> None:
        """Note the first bad step among the losses that wait, which are of consecutive steps."""
        if self._untested:
            finite = torch.isfinite(torch.stack(self._untested))
            first = self._first_untested
            counts = torch.arange(first, first + len(self._untested), device=finite.device)
            self._note(torch.where(finite, NEVER, counts).min())
            self._untested = []

    def _note(self, step: Tensor) -> None:
        if self.first_bad_step is None:
            self.first_bad_step = torch.full((), NEVER, device=step.device)
        self.first_bad_step = torch.minimum(self.first_bad_step, step)

    def bad_step(self) -> int | None:
        """Return the first inner step whose loss was not finite, or None; waits for the device."""
        self._test()
        step = NEVER if self.first_bad_step is None else int(self.first_bad_step)
        return None if step == NEVER else step
