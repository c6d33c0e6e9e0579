"""Batches from a DataLoader or another iterable, reproducible and resumable."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    DataLoader,
)

from bilevel.data.fixed_order import FixedOrder
from bilevel.data.isolated_draws import generators_of, isolated
from bilevel.data.stream import Stream
from bilevel.errors import BilevelError
from bilevel.params import Batch, count_examples
from bilevel.text import first_line

DEAD_WORKER = re.compile(r"DataLoader worker .*(exited unexpectedly|is killed by signal)")
"""Matches PyTorch's message about a worker that has ended."""
DEAD_WORKER_ERRORS = (RuntimeError, ConnectionError, EOFError)
"""Errors that PyTorch raises where a worker has ended.

The latter two occur while the worker passes a batch.
"""


class LoaderStream(Stream):
    """Batches from a `torch.utils.data.DataLoader`, or from any iterable with a length.

    Every call of `iter` must start the iterable anew.

    Each epoch has a seed, drawn from `generator`. All draws of the loader from PyTorch's CPU
    generators follow from this seed: the order, the workers' seeds, and transforms in this process.
    That holds with and without a generator of the loader's own, and those generators keep their
    states. A resumed run replays the batches of the unfinished epoch. Two kinds of draws are not
    reproduced: draws from the global generators of Python and NumPy in this process, and random
    transforms with `persistent_workers`, whose workers seed themselves once. The order of their
    examples is reproduced.

    Evaluation never iterates the loader that training uses. For a DataLoader it builds a second
    one, without workers, over the examples that the sampler may return: in the order of the
    dataset, without `shuffle` and without `drop_last`. Examples that only a user's own sampler can
    list come in the order of one pass of it. Any other iterable is iterated anew, in its own order.

    Args:
        loader: source of the batches; leaves of a batch that are not tensors stay as they are.
        generator: on the CPU; seeds every epoch.
        name: name of the split in errors.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> dataset = TensorDataset(torch.arange(5))
        >>> loader = DataLoader(dataset, batch_size=2, shuffle=True, drop_last=True)
        >>> stream = LoaderStream(loader, torch.Generator().manual_seed(0))
        >>> stream.steps_per_epoch, [x.tolist() for (x,) in stream.once()]
        (2, [[0, 1], [2, 3], [4]])

    Raises:
        BilevelError: the loader has no length or no batch, or cannot be iterated a second time.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        generator: torch.Generator,
        *,
        device: torch.device | str = "cpu",
        name: str = "train",
    ) -> None:
        try:
            self.steps_per_epoch = len(loader)  # type: ignore[arg-type]  # the error is caught
        except TypeError:
            raise BilevelError(
                f"the {name} loader has no length; wrap it so that len() returns its batches per "
                "epoch"
            ) from None
        if self.steps_per_epoch == 0:
            raise BilevelError(
                f"the {name} split is empty, since its loader has no batch; lower the batch size "
                "or add examples"
            )
        self.loader = loader
        self.generator = generator
        self.device = torch.device(device)
        self.name = name
        self._generators = generators_of(loader)
        # the __iter__ of a subclass may change batches, which a second DataLoader would not do
        self._ordered: FixedOrder | None = None
        if isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__:
            self._ordered = FixedOrder(loader, self._generators)
        if self._ordered is None and iter(loader) is iter(loader):
            raise BilevelError(
                f"the {name} loader returns the same iterator at every iter(), so an evaluation "
                "would disturb training; return a new one in __iter__"
            )
        first = next(self.once(), None)
        if first is None:
            raise self._ended(0)
        self._first = first
        known = None if self._ordered is None else self._ordered.size
        self.size = self.steps_per_epoch * count_examples(first) if known is None else known
        self.examples = 0
        self._seed = 0
        self._started = False
        self._position = self.steps_per_epoch
        self._batches: Iterator[Batch] = iter(())

    def next(self) -> Batch:
        if self._position == self.steps_per_epoch:
            self._begin(int(torch.randint(2**62, (), generator=self.generator)))
        batch = self._to_device(self._draw())
        self.examples += count_examples(batch)
        return batch

    def peek(self) -> Batch:
        return self._first

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        seen = 0
        loader = self.loader if self._ordered is None else self._ordered.loader(limit)
        batches = isolated(loader, self._generators, 0)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except DEAD_WORKER_ERRORS as error:
                self._raise_if_worker_died(error)
                raise
            yield self._to_device(batch)
            seen += count_examples(batch)
            if limit is not None and seen >= limit:
                break

    def state_dict(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "position": self._position,
            "seed": self._seed,
            "size": self.size,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["size"] != self.size:
            raise BilevelError(
                f"the checkpoint has a {self.name} split of {state['size']} examples, but this one "
                f"has {self.size}; use the same data as before"
            )
        self._begin(state["seed"])
        if state["position"] == self.steps_per_epoch:  # the next batch begins an epoch
            self._position = self.steps_per_epoch
        while self._position < state["position"]:
            self._draw()
        self.examples = state["examples"]
        self.generator.set_state(state["generator"])

    def _begin(self, seed: int) -> None:
        if not self._started and getattr(self.loader, "persistent_workers", False):
            # the first pass, which starts these workers, also draws their seed; drop that pass
            next(isolated(self.loader, self._generators, seed), None)
        self._started = True
        self._seed = seed
        self._position = 0
        self._batches = isolated(self.loader, self._generators, seed)

    def _draw(self) -> Batch:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise self._ended(self._position) from None
        except DEAD_WORKER_ERRORS as error:
            self._raise_if_worker_died(error)
            raise
        self._position += 1
        return batch

    def _raise_if_worker_died(self, error: Exception) -> None:
        """Raise an error with a remedy where a worker of the loader died."""
        gone = (
            not isinstance(error, RuntimeError)
            and getattr(self.loader, "num_workers", False)
            and "Caught" not in str(error)
        )
        if gone or DEAD_WORKER.search(str(error)):
            raise BilevelError(
                f"a worker of the {self.name} loader died ({first_line(error).rstrip('. ')}), most "
                "often for lack of memory; lower num_workers, prefetch_factor or batch_size, and "
                "resume=… continues from the last checkpoint"
            ) from error

    def _ended(self, position: int) -> BilevelError:
        return BilevelError(
            f"the {self.name} loader ended after {position} batches, but its length is "
            f"{self.steps_per_epoch}; return from len() the number of batches of every epoch"
        )

    def _to_device(self, batch: Batch) -> Batch:
        # the copy of a pinned batch need not wait; `is True`, since another iterable may use the
        # name for something else
        pinned = getattr(self.loader, "pin_memory", False) is True
        return pytree.tree_map(
            lambda x: x.to(self.device, non_blocking=pinned) if isinstance(x, Tensor) else x, batch
        )
