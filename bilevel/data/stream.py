"""What a stream of batches is, and a user's own stream in the hands of a run."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from bilevel.params import Batch, to_device


class Stream(ABC):
    """One split of the data.

    Attributes:
        examples: how many examples `next` has handed out.
        size: examples in the split.
        steps_per_epoch: batches that `next` hands out per epoch (of tensors, a last, smaller batch is dropped: shapes stay
            static; a loader's `drop_last` is its own).
    """

    examples: int
    size: int
    steps_per_epoch: int

    # Where a `StreamView` found this stream, and which one has it now.
    _start: dict[str, Any] | None = None
    _holder: "StreamView | None" = None

    @abstractmethod
    def next(self) -> Batch:
        """The next training batch, without end."""

    def count(self, examples: int) -> None:
        """Count examples that a solver looks at beside `next`: a batch used again, a pass over the split."""
        self.examples += examples

    @abstractmethod
    def peek(self) -> Batch:
        """A batch to look at: nothing is counted, and the order of the batches stays as it is."""

    @abstractmethod
    def once(self, limit: int | None = None) -> Iterator[Batch]:
        """Every example once, in a fixed order, for evaluation; stops after `limit` examples.

        Where the batches come ready-made, it stops after the batch with which `limit` is reached.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position, such that the batches after `load_state_dict` are the ones that would have come."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of `state`."""


class StreamView(Stream):
    """A user's stream for one run: from where it stood when it was first handed over, with its batches on `device`.

    One stream may serve many runs, and more than one split. Each has a position and a count of its own, and the stream is moved
    to the one that draws, so that no run continues another's.
    """

    def __init__(self, stream: Stream, device: torch.device | str) -> None:
        if stream._start is None:
            stream._start = copy.deepcopy(stream.state_dict())
        self.stream, self.device = stream, device
        self.size, self.steps_per_epoch = stream.size, stream.steps_per_epoch
        self._state = stream._start
        self.examples = self._at_own_position().examples

    def next(self) -> Batch:
        stream = self._at_own_position()
        batch = to_device(stream.next(), self.device)
        self.examples = stream.examples
        return batch

    def count(self, examples: int) -> None:
        stream = self._at_own_position()
        stream.count(examples)
        self.examples = stream.examples

    def peek(self) -> Batch:
        return to_device(self.stream.peek(), self.device)

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        for batch in self.stream.once(limit):
            yield to_device(batch, self.device)

    def state_dict(self) -> dict[str, Any]:
        return self._at_own_position().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        stream = self._at_own_position()
        stream.load_state_dict(state)
        self.examples = stream.examples

    def _at_own_position(self) -> Stream:
        """The stream, at this run's position."""
        stream, other = self.stream, self.stream._holder
        if other is not self:
            if other is not None:
                other._state = copy.deepcopy(stream.state_dict())
            stream.load_state_dict(
                copy.deepcopy(self._state)
            )  # a copy: a stream may keep what it is given
            stream._holder = self
        return stream
