"""The interface of a stream of batches, and the view that a run has of a user's own stream."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from bilevel.data.batches import open_batch
from bilevel.params import Batch, to_device


class Stream(ABC):
    """A source of batches from one split of the data.

    Attributes:
        examples: number of examples that `next` has returned so far.
        size: number of examples in the split.
        steps_per_epoch: number of batches that `next` returns per epoch. Streams of tensors drop a
            last, smaller batch, so that shapes stay static; a loader follows its own `drop_last`.
    """

    examples: int
    size: int
    steps_per_epoch: int

    # the position at which a `StreamView` first found this stream, and the view that drew last
    _start: dict[str, Any] | None = None
    _holder: "StreamView | None" = None

    @abstractmethod
    def next(self) -> Batch:
        """Return the next training batch; the stream never ends."""

    def count(self, examples: int) -> None:
        """Count examples that a solver uses without `next`, for instance a repeated batch."""
        self.examples += examples

    @abstractmethod
    def peek(self) -> Batch:
        """Return a batch without counting it and without moving the stream."""

    @abstractmethod
    def once(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield every example once, in a fixed order, for evaluation.

        Stops after `limit` examples. A stream with ready-made batches stops after the batch in
        which `limit` is reached.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the position; after `load_state_dict` the same batches follow."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of `state`."""


class StreamView(Stream):
    """The view that one run has of a user's stream.

    It starts at the position that the stream had when it was first passed, and moves batches to
    `device`. One stream may serve several runs and several splits. Each view has its own position
    and its own count. The stream is moved to the position of the view that draws, so no run
    continues another one.
    """

    def __init__(self, stream: Stream, device: torch.device | str, name: str = "train") -> None:
        if stream._start is None:
            stream._start = copy.deepcopy(stream.state_dict())
        self.stream = stream
        self.device = device
        self.name = name
        self.size = stream.size
        self.steps_per_epoch = stream.steps_per_epoch
        self._state = stream._start
        self.examples = self._at_own_position().examples

    def next(self) -> Batch:
        stream = self._at_own_position()
        batch = self._opened(stream.next())
        self.examples = stream.examples
        return batch

    def count(self, examples: int) -> None:
        stream = self._at_own_position()
        stream.count(examples)
        self.examples = stream.examples

    def peek(self) -> Batch:
        return self._opened(self.stream.peek())

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        for batch in self.stream.once(limit):
            yield self._opened(batch)

    def state_dict(self) -> dict[str, Any]:
        return self._at_own_position().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        stream = self._at_own_position()
        stream.load_state_dict(state)
        self.examples = stream.examples

    def _opened(self, batch: Batch) -> Batch:
        open_batch(batch, self.name)
        return to_device(batch, self.device)

    def _at_own_position(self) -> Stream:
        """Return the stream, at the position of this view."""
        stream, other = self.stream, self.stream._holder
        if other is not self:
            if other is not None:
                other._state = copy.deepcopy(stream.state_dict())
            # a copy, since a stream may keep the object
            stream.load_state_dict(copy.deepcopy(self._state))
            stream._holder = self
        return stream
