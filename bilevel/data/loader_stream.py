"""Batches from a DataLoader or another iterable: reproducible, resumable, and not disturbed by evaluation."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from bilevel.data.stream import Stream
from bilevel.errors import BilevelError
from bilevel.params import Batch, count_examples

DEAD_WORKER = re.compile(r"DataLoader worker \(pid.*(exited unexpectedly|is killed by signal)")
"""What PyTorch says of a worker that is gone."""
DEATHS = (RuntimeError, ConnectionError, EOFError)
"""What it raises then: the latter two where the worker was to hand a batch over."""


class LoaderStream(Stream):
    """Batches from a `torch.utils.data.DataLoader`, or from any iterable with a length that starts anew at every `iter`.

    Each epoch has a seed, drawn from `generator`. What the loader then draws from PyTorch's generators on the CPU (the order,
    its workers' seeds, transforms in this process) follows from the seed, whether the loader has a generator of its own or
    not, and those generators are left as they were. A resumed run replays the batches of the epoch that was cut off. Two things
    are not reproduced: draws from Python's and NumPy's global generators in this process, and random transforms with
    `persistent_workers`, which seed themselves once (their order of examples is reproduced).

    Evaluation never iterates the loader that training is in the middle of. For a DataLoader it is a second one, without
    workers, over the examples that the sampler may hand out: in the order of the dataset, whatever `shuffle` says, and without
    loss, whatever `drop_last` says. Examples that only a sampler of one's own knows come in the order of one pass of it. Any
    other iterable is iterated afresh, in the order that it has.

    Args:
        loader: what hands out the batches; leaves of a batch that are not tensors stay as they are.
        generator: on the CPU; seeds every epoch.
        name: what errors call this split.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.arange(5)), batch_size=2, shuffle=True, drop_last=True)
        >>> stream = LoaderStream(loader, torch.Generator().manual_seed(0))
        >>> stream.steps_per_epoch, [x.tolist() for (x,) in stream.once()]
        (2, [[0, 1], [2, 3], [4]])

    Raises:
        BilevelError: the loader has no length, no batch, or cannot be iterated a second time.
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
            self.steps_per_epoch = len(loader)  # type: ignore[arg-type]  # checked just here
        except TypeError:
            raise BilevelError(
                f"the {name} loader has no length; wrap it so that len() tells its batches per epoch"
            ) from None
        if self.steps_per_epoch == 0:
            raise BilevelError(
                f"the {name} split is empty: its loader has no batch; lower the batch size or give it examples"
            )
        self.loader, self.generator, self.device, self.name = (
            loader,
            generator,
            torch.device(device),
            name,
        )
        self._own = _generators(loader)
        # a subclass may do more to a batch in its __iter__ than a second DataLoader would
        plain = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
        self._ordered = _Ordered(loader, self._own) if plain else None  # type: ignore[arg-type]  # it is a DataLoader
        if self._ordered is None and iter(loader) is iter(loader):
            raise BilevelError(
                f"the {name} loader gives the same iterator at every iter(), so an evaluation would disturb training; "
                "let __iter__ return a new one"
            )
        first = next(self.once(), None)
        if first is None:
            raise self._ended(0)
        self._first = first
        known = None if self._ordered is None else self._ordered.size
        self.size = self.steps_per_epoch * count_examples(first) if known is None else known
        self.examples = 0
        self._seed = 0
        self._began = False
        self._position = self.steps_per_epoch
        self._batches: Iterator[Batch] = iter(())

    def next(self) -> Batch:
        if self._position == self.steps_per_epoch:
            self._begin(int(torch.randint(2**62, (), generator=self.generator)))
        batch = self._moved(self._draw())
        self.examples += count_examples(batch)
        return batch

    def peek(self) -> Batch:
        return self._first

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        seen = 0
        batches = _apart(
            self.loader if self._ordered is None else self._ordered.loader(limit), self._own, 0
        )
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except DEATHS as error:
                self._blame(error)
                raise
            yield self._moved(batch)
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
                f"the checkpoint's {self.name} split has {state['size']} examples, this one has {self.size}: the data changed"
            )
        self._begin(state["seed"])
        if (
            state["position"] == self.steps_per_epoch
        ):  # nothing to replay: the next batch begins an epoch
            self._position = self.steps_per_epoch
        while self._position < state["position"]:
            self._draw()
        self.examples = state["examples"]
        self.generator.set_state(state["generator"])

    def _begin(self, seed: int) -> None:
        if not self._began and getattr(self.loader, "persistent_workers", False):
            # the pass that starts these workers draws their seed before the order, later passes do not: let none of ours be it
            next(_apart(self.loader, self._own, seed), None)
        self._began = True
        self._seed, self._position, self._batches = seed, 0, _apart(self.loader, self._own, seed)

    def _draw(self) -> Batch:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise self._ended(self._position) from None
        except DEATHS as error:
            self._blame(error)
            raise
        self._position += 1
        return batch

    def _blame(self, error: Exception) -> None:
        """Raise, of a worker that died, what it was and what to do."""
        gone = (
            not isinstance(error, RuntimeError)
            and getattr(self.loader, "num_workers", False)
            and "Caught" not in str(error)
        )
        if gone or DEAD_WORKER.search(str(error)):
            said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
            raise BilevelError(
                f"a worker of the {self.name} loader died ({said}); most often the machine's memory ran out: lower the "
                "loader's num_workers, prefetch_factor or batch_size; resume=… goes on from the last checkpoint"
            ) from error

    def _ended(self, position: int) -> BilevelError:
        return BilevelError(
            f"the {self.name} loader ended after {position} batches, and its length says {self.steps_per_epoch}; "
            "let len() tell the batches that it gives in every epoch"
        )

    def _moved(self, batch: Batch) -> Batch:
        # the copy of a pinned batch need not be waited for; `is True`: an iterable of one's own may mean something else by it
        pinned = getattr(self.loader, "pin_memory", False) is True
        return pytree.tree_map(
            lambda x: x.to(self.device, non_blocking=pinned) if isinstance(x, Tensor) else x, batch
        )


class _Ordered:
    """The examples of a DataLoader's split in a fixed order.

    Attributes:
        size: how many there are, or None where the dataset hands out ready-made batches.
    """

    def __init__(self, loader: DataLoader, generators: Sequence[torch.Generator]) -> None:
        self._loader = loader
        self._examples: Sequence[Any] | None = None
        self._batches: Sequence[Any] = []
        self._streamed = isinstance(loader.dataset, IterableDataset)
        self.size: int | None = None
        if self._streamed:
            self.size = None if loader.batch_size is None else len(loader.dataset)  # type: ignore[arg-type]  # len(loader) had it
            return
        sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        if type(sampler) is BatchSampler:
            self._per_batch = sampler.batch_size
            self._examples = _examples(sampler.sampler, generators)
            self.size = len(self._examples)
        else:
            self._batches = list(islice(_apart(sampler, generators, 0), len(loader)))
            self.size = None if loader.batch_sampler is None else sum(map(len, self._batches))

    def loader(self, limit: int | None) -> DataLoader:
        """A loader of its own; it stops at `limit` examples where the batches are put together here."""
        dataset, collate = self._loader.dataset, self._loader.collate_fn
        if self._streamed:
            return DataLoader(dataset, batch_size=self._loader.batch_size, collate_fn=collate)
        batches = self._batches
        if self._examples is not None:
            chosen = self._examples[:limit]
            batches = [
                list(chosen[i : i + self._per_batch])
                for i in range(0, len(chosen), self._per_batch)
            ]
        if self._loader.batch_sampler is None:
            return DataLoader(dataset, batch_size=None, sampler=batches, collate_fn=collate)
        return DataLoader(dataset, batch_sampler=batches, collate_fn=collate)


def _examples(sampler: Any, generators: Sequence[torch.Generator]) -> Sequence[Any]:
    """What a sampler may hand out, each once: it may know only a part of the dataset, the training examples, say."""
    if type(sampler) in (RandomSampler, SequentialSampler):
        return range(len(sampler.data_source))
    if isinstance(sampler, SubsetRandomSampler):
        return [int(i) for i in sampler.indices]
    if isinstance(sampler, WeightedRandomSampler):
        return sampler.weights.nonzero().flatten().tolist()
    return list(dict.fromkeys(islice(_apart(sampler, generators, 0), len(sampler))))


def _generators(loader: Iterable[Batch]) -> list[torch.Generator]:
    """The generators that iterating `loader` draws from: the global one, its own and its samplers'."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    own = [getattr(owner, "generator", None) for owner in owners]
    return list(
        dict.fromkeys(
            [torch.default_generator, *(g for g in own if isinstance(g, torch.Generator))]
        )
    )


def _apart(
    batches: Iterable[Any], generators: Sequence[torch.Generator], seed: int
) -> Iterator[Any]:
    """The same items, with what they draw from `generators` following from `seed`; between items those are as they were.

    Samplers and workers draw no earlier than at the first item, so the seed has to hold then and not at `iter` alone. Not
    `torch.manual_seed`, which would seed the GPU's generators too.
    """
    states = [torch.Generator(g.device).manual_seed(seed).get_state() for g in generators]
    iterator: Iterator[Any] | None = None
    while True:
        outside = [g.get_state() for g in generators]
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)
        try:
            iterator = iter(batches) if iterator is None else iterator
            item = next(iterator)
        except StopIteration:
            return
        finally:
            states = [g.get_state() for g in generators]
            for g, state in zip(generators, outside, strict=True):
                g.set_state(state)
        yield item
