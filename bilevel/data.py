"""Streams of batches: endless for training, once through for evaluation; they count the examples that they hand out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.errors import BilevelError
from bilevel.params import Batch, count_examples, to_device


class Stream(ABC):
    """One split of the data.

    Attributes:
        examples: how many examples `next` has handed out.
        size: examples in the split.
        steps_per_epoch: batches that `next` hands out per epoch (a last, smaller batch is dropped: shapes stay static).
    """

    examples: int
    size: int
    steps_per_epoch: int

    @abstractmethod
    def next(self) -> Batch:
        """The next training batch, without end."""

    @abstractmethod
    def peek(self) -> Batch:
        """A batch to look at: nothing is counted, and the order of the batches stays as it is."""

    @abstractmethod
    def once(self, limit: int | None = None) -> Iterator[Batch]:
        """Every example once, in a fixed order, for evaluation; stops after `limit` examples, to the batch."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position, such that the batches after `load_state_dict` are the ones that would have come."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of `state`."""


class Data(NamedTuple):
    """The three splits. `test` is looked at when a run ends, never before."""

    train: Stream
    valid: Stream
    test: Stream | None = None


class TensorStream(Stream):
    """Examples that lie in memory as a pytree of tensors, all indexed along their first axis on one device.

    Args:
        tensors: a pytree of tensors of equal length.
        batch_size: examples per batch; None for the whole split at every step, in its own order.
        generator: on the CPU; shuffles anew at every epoch.
        name: what errors call this split.

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
        lengths = {leaf.shape[0] for leaf in pytree.tree_leaves(tensors) if isinstance(leaf, Tensor)}
        if len(lengths) != 1:
            raise BilevelError(
                f"the {name} split has tensors of different lengths, {sorted(lengths)}; give one row per example in each"
            )
        self.size = lengths.pop()
        if self.size == 0:
            raise BilevelError(f"the {name} split is empty; give it at least one example (a larger data set or another split)")
        if batch_size is not None and not 1 <= batch_size <= self.size:
            raise BilevelError(
                f"a batch of {batch_size} cannot be drawn from the {name} split, which has {self.size} examples; "
                f"choose a batch size between 1 and {self.size}"
            )
        self.tensors = to_device(tensors, device)
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.generator = generator
        self.steps_per_epoch = 1 if batch_size is None else self.size // batch_size
        self.examples = 0
        self._order: Tensor | None = None  # on the device: one transfer an epoch, none a batch
        self._position = 0

    def next(self) -> Batch:
        if self.batch_size is None:
            self.examples += self.size
            return self.tensors
        if self._order is None or self._position == self.steps_per_epoch:
            self._order = torch.randperm(self.size, generator=self.generator).to(self.device)
            self._position = 0
        start = self._position * self.batch_size
        self._position += 1
        self.examples += self.batch_size
        return self._take(self._order[start : start + self.batch_size])

    def peek(self) -> Batch:
        return self._slice(0, self.batch_size or self.size)

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        stop = self.size if limit is None else min(limit, self.size)
        step = self.size if self.batch_size is None else self.evaluation_batch_size
        for start in range(0, stop, step):
            yield self._slice(start, min(start + step, stop))

    def state_dict(self) -> dict[str, Any]:
        order = None if self._order is None else self._order.cpu()
        return {"examples": self.examples, "position": self._position, "order": order, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["order"] is not None and len(state["order"]) != self.size:
            raise BilevelError(
                f"the checkpoint's split has {len(state['order'])} examples and this one has {self.size}: the data changed"
            )
        self.examples, self._position = state["examples"], state["position"]
        self._order = None if state["order"] is None else state["order"].to(self.device)
        self.generator.set_state(state["generator"])

    def _take(self, index: Tensor) -> Batch:
        return pytree.tree_map(lambda x: x[index] if isinstance(x, Tensor) else x, self.tensors)

    def _slice(self, start: int, stop: int) -> Batch:
        return pytree.tree_map(lambda x: x[start:stop] if isinstance(x, Tensor) else x, self.tensors)


class LoaderStream(Stream):
    """Batches from a `torch.utils.data.DataLoader`, or from any other iterable that can be iterated again.

    The order is reproducible when the loader shuffles with a `generator` of its own: each epoch seeds it from `generator`, and
    a resumed run replays the batches of the epoch that was cut off.
    """

    def __init__(
        self, loader: Iterable[Batch], generator: torch.Generator, *, device: torch.device | str = "cpu", name: str = "train"
    ) -> None:
        try:
            self.steps_per_epoch = len(loader)  # type: ignore[arg-type]  # checked just here
        except TypeError:
            raise BilevelError(f"the {name} loader has no length; wrap it so that len() tells its batches per epoch") from None
        if self.steps_per_epoch == 0:
            raise BilevelError(f"the {name} split is empty: its loader has no batch; lower the batch size or give it examples")
        self.loader, self.generator, self.device = loader, generator, torch.device(device)
        dataset = getattr(loader, "dataset", None)
        self._first = to_device(next(iter(loader)), device)
        self.size = len(dataset) if dataset is not None else self.steps_per_epoch * count_examples(self._first)
        self.examples = 0
        self._seed = 0
        self._position = self.steps_per_epoch
        self._batches: Iterator[Batch] = iter(())

    def next(self) -> Batch:
        if self._position == self.steps_per_epoch:
            self._begin(int(torch.randint(2**62, (), generator=self.generator)))
        batch = to_device(next(self._batches), self.device)
        self._position += 1
        self.examples += count_examples(batch)
        return batch

    def peek(self) -> Batch:
        return self._first

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        own = getattr(self.loader, "generator", None)
        state = own.get_state() if own is not None else None
        seen = 0
        for batch in self.loader:
            yield to_device(batch, self.device)
            seen += count_examples(batch)
            if limit is not None and seen >= limit:
                break
        if own is not None and state is not None:
            own.set_state(state)  # an evaluation leaves the training order as it was

    def state_dict(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "position": self._position,
            "seed": self._seed,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["position"] < self.steps_per_epoch:
            self._begin(state["seed"])
            for _ in range(state["position"]):
                next(self._batches)
        self.examples, self._position, self._seed = state["examples"], state["position"], state["seed"]
        self.generator.set_state(state["generator"])

    def _begin(self, seed: int) -> None:
        own = getattr(self.loader, "generator", None)
        if own is not None:
            own.manual_seed(seed)
        self._seed, self._position, self._batches = seed, 0, iter(self.loader)


class FullBatch(Stream):
    """A problem without examples (a closed form, say): one batch, the same at every step."""

    def __init__(self, batch: Batch = (), *, device: torch.device | str = "cpu") -> None:
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


def stream(
    split: Any, batch_size: int | None, generator: torch.Generator, *, device: torch.device | str = "cpu", name: str = "train"
) -> Stream:
    """The stream for what a user hands over: a `Stream` as it is, a pytree of tensors, or a loader.

    Raises:
        BilevelError: an empty split, a batch larger than it, or something that is none of the three.
    """
    if isinstance(split, Stream):
        return split
    leaves = pytree.tree_leaves(split)
    if leaves and all(isinstance(leaf, Tensor) for leaf in leaves):
        return TensorStream(split, batch_size, generator, device=device, name=name)
    if isinstance(split, Iterable) and not isinstance(split, (str, bytes, dict, tuple)):
        return LoaderStream(split, generator, device=device, name=name)
    raise BilevelError(
        f"the {name} split is a {type(split).__name__}; give a tuple of tensors, a DataLoader or a bilevel Stream"
    )


def streams(
    train: Any, valid: Any, test: Any = None, *, batch_size: int | None, device: torch.device | str, generator: torch.Generator
) -> Data:
    """One `stream` per split, each shuffled by a generator of its own, drawn from `generator`.

    How often a solver looks at validation batches then leaves the order of its training batches as it is, so that solvers
    are compared on the same order.

    Raises:
        BilevelError: as `stream`.
    """
    if valid is None:
        raise BilevelError("there is no valid split, and λ is fitted on it; set some of the training examples aside")
    own = [torch.Generator().manual_seed(int(seed)) for seed in torch.randint(2**62, (3,), generator=generator)]
    once = None if batch_size is None else 1  # nothing is drawn from the test split, so that it may be smaller than a batch
    return Data(
        stream(train, batch_size, own[0], device=device, name="train"),
        stream(valid, batch_size, own[1], device=device, name="valid"),
        None if test is None else stream(test, once, own[2], device=device, name="test"),
    )
