"""Streams of tensors in memory, and the three splits of the data."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.containers import open_containers
from bilevel.data import fields
from bilevel.data.batches import count_rows
from bilevel.data.in_memory import in_memory, is_list_of_batches
from bilevel.data.loader_stream import LoaderStream
from bilevel.data.stream import Stream, StreamView
from bilevel.errors import BilevelError
from bilevel.params import Batch, count_examples, to_device


class Data(NamedTuple):
    """The three splits as streams; the runner uses `test` only at the end of a run."""

    train: Stream
    valid: Stream
    test: Stream | None = None


class TensorStream(Stream):
    """A stream of examples that lie in memory.

    The examples are a pytree of tensors on one device, indexed along their first axis.

    Args:
        tensors: a pytree of tensors of equal length.
        batch_size: examples per batch; None for the whole split at every step, in its own order.
        generator: on the CPU; shuffles the examples at every epoch.
        name: name of the split in errors.

    Raises:
        BilevelError: the split is empty, its tensors differ in length or have no rows that can be
            drawn, or `batch_size` is too large.

    Example:
        >>> stream = TensorStream((torch.arange(6.0),), 2, torch.Generator().manual_seed(0))
        >>> (x,) = stream.next()
        >>> x.shape, stream.examples, stream.steps_per_epoch
        (torch.Size([2]), 2, 3)
    """

    def __init__(
        self,
        tensors: Any,
        batch_size: int | None,
        generator: torch.Generator,
        *,
        device: torch.device | str = "cpu",
        name: str = "train",
        evaluation_batch_size: int = 1024,
    ) -> None:
        open_containers(tensors, f"the {name} split", "give a tuple of tensors")
        lengths = {
            field: count_rows(leaf, fields.within(field, f"the {name} split"))
            for field, leaf in fields.tensors(tensors).items()
        }
        if len(set(lengths.values())) != 1:
            found = " and ".join(f"{field} has {n:,}" for field, n in lengths.items())
            raise BilevelError(
                f"the {name} split has tensors of different lengths: {found or 'no tensor'}; give "
                "one row per example in each"
            )
        self.size = next(iter(lengths.values()))
        if self.size == 0:
            raise BilevelError(
                f"the {name} split is empty; give at least one example (a larger data set or "
                "another split)"
            )
        if batch_size is not None and not _is_count(batch_size):
            raise BilevelError(
                f"batch_size={batch_size!r} must be a whole number of at least 1; choose one, or "
                "None for the whole split"
            )
        if batch_size is not None and batch_size > self.size:
            raise BilevelError(
                f"batch_size={batch_size} must be between 1 and the {self.size} examples of the "
                f"{name} split; choose another batch size"
            )
        self.tensors = to_device(tensors, device)
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.generator = generator
        self.steps_per_epoch = 1 if batch_size is None else self.size // batch_size
        self.examples = 0
        self._order: Tensor | None = None  # on the device: one transfer per epoch
        self._position = 0

    def next(self) -> Batch:
        if self.batch_size is None:
            self.examples += self.size
            return self.tensors
        if self._order is None or self._position == self.steps_per_epoch:
            order = torch.randperm(self.size, generator=self.generator)
            if self.device.type == "cuda":  # only a copy from pinned memory does not wait
                self._order = order.pin_memory().to(self.device, non_blocking=True)
            else:
                self._order = order.to(self.device)
            self._position = 0
        start = self._position * self.batch_size
        self._position += 1
        self.examples += self.batch_size
        return self._take(self._order[start : start + self.batch_size])

    def peek(self) -> Batch:
        return self._slice(0, self.batch_size or self.size)

    def telling(self, least: int = 1) -> Batch:
        """Return a batch for a check, of at least `least` rows if there are so many.

        It holds rows that are not finite, and the extremes of whole numbers (a class that is out of
        range lies there), and the first rows of the split.
        """
        if self.batch_size is None:
            return self.tensors
        count = min(self.size, max(self.batch_size, least))
        rows = fields.telling_rows(self.tensors)[: max(1, count // 2)]
        first = torch.arange(count, device=rows.device)
        others = first[~torch.isin(first, rows)]
        return self._take(torch.cat([rows, others])[:count].to(self.device))

    def spread(self, least: int, most: int) -> Iterator[Batch]:
        """Yield batches without drawing, each with rows from all over the split.

        Together they hold each row once, unless that takes more than `most` batches.

        Args:
            least: the number of batches, as far as they have two rows each.
            most: the largest number of batches.
        """
        rows = self.size if self.batch_size is None else self.batch_size
        count = max(-(-self.size // rows), min(least, max(1, self.size // 2)))
        kept = range(count) if count <= most else [k * count // most for k in range(most)]
        for first in kept:
            yield pytree.tree_map(
                lambda x, first=first: x[first::count] if isinstance(x, Tensor) else x, self.tensors
            )

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        stop = self.size if limit is None else min(limit, self.size)
        step = self.size if self.batch_size is None else self.evaluation_batch_size
        for start in range(0, stop, step):
            yield self._slice(start, min(start + step, stop))

    def state_dict(self) -> dict[str, Any]:
        order = None if self._order is None else self._order.cpu()
        return {
            "examples": self.examples,
            "position": self._position,
            "order": order,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["order"] is not None and len(state["order"]) != self.size:
            raise BilevelError(
                f"the checkpoint has a split of {len(state['order'])} examples, but this one has "
                f"{self.size}; use the same data as before"
            )
        self.examples, self._position = state["examples"], state["position"]
        self._order = None if state["order"] is None else state["order"].to(self.device)
        self.generator.set_state(state["generator"])

    def _take(self, index: Tensor) -> Batch:
        return pytree.tree_map(lambda x: x[index] if isinstance(x, Tensor) else x, self.tensors)

    def _slice(self, start: int, stop: int) -> Batch:
        return pytree.tree_map(
            lambda x: x[start:stop] if isinstance(x, Tensor) else x, self.tensors
        )


class FullBatch(Stream):
    """A stream for a problem without examples, such as a closed form: always the same batch."""

    def __init__(self, batch: Batch = (), *, device: torch.device | str = "cpu") -> None:
        open_containers(batch, "the batch", "convert it")
        self.batch = to_device(batch, device)
        self.size = count_examples(self.batch)
        self.steps_per_epoch = 1
        self.examples = 0

    def next(self) -> Batch:
        self.examples += self.size
        return self.batch

    def peek(self) -> Batch:
        return self.batch

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        yield self.batch

    def state_dict(self) -> dict[str, Any]:
        return {"examples": self.examples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.examples = state["examples"]


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def stream(
    split: Any,
    batch_size: int | None,
    generator: torch.Generator,
    *,
    device: torch.device | str = "cpu",
    name: str = "train",
) -> Stream:
    """Return the stream of a split: tensors or arrays, a loader, or a user's own `Stream`.

    Tensors and NumPy arrays may stand in a tuple, list, dict or other pytree; `in_memory` has the
    types of the converted arrays. A `TensorDataset` stands for the tuple of its tensors, also as a
    part of `random_split`. A list of tuples, lists or mappings is a list of batches.

    A `Stream` keeps its own order and ignores `generator`. Every call starts it at the position
    that it had when it was first passed, so a second run on the same problem sees the same batches.
    Its batches are moved to `device`.

    Raises:
        BilevelError: the split is empty, its rows cannot be drawn, the batch is larger than the
            split, an array holds no numbers, or the type is none of these.
    """
    if isinstance(split, Stream):
        return StreamView(split, device, name)
    split = in_memory(split, name)
    holds = isinstance(split, (Mapping, tuple)) or (
        is_dataclass(split) and not isinstance(split, Iterable)
    )
    if holds:
        open_containers(split, f"the {name} split", "give a tuple of tensors")
    leaves = pytree.tree_leaves(split)
    batches = is_list_of_batches(split)
    if leaves and not batches and all(isinstance(leaf, Tensor) for leaf in leaves):
        return TensorStream(split, batch_size, generator, device=device, name=name)
    if isinstance(split, Iterable) and not isinstance(split, (str, bytes)) and not holds:
        return LoaderStream(split, generator, device=device, name=name)
    others = fields.strangers(split) if holds else {}
    held = ", ".join(f"{what} ({field})" for what, field in others.items())
    held = f" that holds {held}" if others else ""
    raise BilevelError(
        f"the {name} split is a {type(split).__name__}{held}, which cannot be read; give a tuple "
        "of tensors or NumPy arrays, a TensorDataset, a DataLoader or a bilevel Stream"
    )


def streams(
    train: Any,
    valid: Any,
    test: Any = None,
    *,
    batch_size: int | None,
    device: torch.device | str,
    generator: torch.Generator,
) -> Data:
    """Return one `stream` per split, each shuffled by its own generator.

    The seeds come from `generator`. The number of validation batches that a solver draws then
    leaves the order of its training batches as it is, so all solvers are compared on the same
    order.

    Raises:
        BilevelError: `valid` is None, or a split is invalid; see `stream`.
    """
    if valid is None:
        raise BilevelError(
            "valid=None leaves no examples on which λ is fitted; set some of the training "
            "examples aside"
        )
    own = [
        torch.Generator().manual_seed(int(seed))
        for seed in torch.randint(2**62, (3,), generator=generator)
    ]
    # nothing is drawn from the test split, so it may be smaller than a batch
    once = None if batch_size is None else 1
    return Data(
        stream(train, batch_size, own[0], device=device, name="train"),
        stream(valid, batch_size, own[1], device=device, name="valid"),
        None if test is None else stream(test, once, own[2], device=device, name="test"),
    )
