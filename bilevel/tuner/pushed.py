"""A stream of the batches that a caller pushes."""

from collections.abc import Iterator
from typing import Any

import torch

from bilevel.data.batches import open_batch, require_examples
from bilevel.data.stream import Stream
from bilevel.errors import BilevelError
from bilevel.params import Batch, count_examples, to_device


class Pushed(Stream):
    """The split of a caller: it holds the last batch that was pushed, and counts the examples.

    Args:
        device: where solvers need the batches.
        name: the name of the split in errors.
    """

    steps_per_epoch = 1

    def __init__(self, device: torch.device, name: str) -> None:
        self.device = device
        self.name = name
        self.examples = 0
        self.batch: Batch = None

    def show(self, batch: Batch) -> Batch:
        """Hold a batch as an example, and return it on the device.

        Raises:
            BilevelError: it is no batch.
        """
        open_batch(batch, self.name)
        require_examples(batch, self.name)
        if (size := count_examples(batch)) == 0:
            raise BilevelError(
                f"the {self.name} batch has no example, so its mean loss would be NaN; leave such "
                "a batch out"
            )
        self.batch, self.size = to_device(batch, self.device), size
        return self.batch

    def push(self, batch: Batch) -> Batch:
        """Return the next batch on the device, and count its examples."""
        held = self.show(batch)
        self.count(self.size)
        return held

    def next(self) -> Batch:
        raise BilevelError(
            f"the solver asks for a further {self.name} batch, and the caller hands the batches "
            "out; use a Runner for this call"
        )

    def peek(self) -> Batch:
        return self.batch

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        yield self.batch

    def state_dict(self) -> dict[str, Any]:
        return {"examples": self.examples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.examples = state["examples"]
