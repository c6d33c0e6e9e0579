"""Batches from a DataLoader or another iterable, reproducible and resumable."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from bilevel.data.batches import open_batch, require_examples
from bilevel.data.epoch_numbers import EpochNumbers
from bilevel.data.fixed_order import FixedOrder
from bilevel.data.isolated_draws import generators_of, isolated
from bilevel.data.loader_checks import check_parts, check_rows
from bilevel.data.loader_errors import explained
from bilevel.data.loader_pass import LoaderPass
from bilevel.data.stream import Stream
from bilevel.errors import BilevelError, DataWarning
from bilevel.params import Batch, count_examples


class LoaderStream(Stream):
    """Batches from a `torch.utils.data.DataLoader`, or from any iterable with a length.

    Every call of `iter` must start the iterable anew.

    Each epoch has a seed, drawn from `generator`. All draws of the loader from PyTorch's CPU
    generators follow from this seed: the order, the workers' seeds, and transforms in this process.
    That holds with and without a generator of the loader's own, and those generators keep their
    states. Samplers, datasets and loaders with a method `set_epoch` receive the number of every
    epoch. A resumed run replays the batches of the unfinished epoch. Two kinds of draws are not
    reproduced: draws from the global generators of Python and NumPy in this process, and random
    transforms with `persistent_workers`, whose workers seed themselves once. The order of their
    examples is reproduced.

    Evaluation never iterates the loader that training uses. For a DataLoader it builds a second
    one, without workers, over the examples that the sampler may return: in the order of the
    dataset, without `shuffle` and without `drop_last`. Examples that only a user's own sampler can
    list come in the order of one pass of it. Any other iterable is iterated anew, in its own order.

    An epoch has `len(loader)` batches. Where several workers share an `IterableDataset`, a pass may
    have more batches than that. Then a warning is given, and the pass is finished before the next
    one begins.

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
        BilevelError: the loader has no length or no batch, cannot be iterated a second time, or
            returns batches whose examples cannot be counted.

    Warns:
        DataWarning: a pass has more batches than the length, batches have other rows than the
            loader puts together, or a sampler returns a part of the split.
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
        self._epochs = EpochNumbers(loader, name)
        self._pass = LoaderPass(loader, self._generators, self.steps_per_epoch, name)
        # the __iter__ of a subclass may change batches, which a second DataLoader would not do
        self._ordered: FixedOrder | None = None
        if isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__:
            self._ordered = FixedOrder(loader, self._generators)
        if self._ordered is None and iter(loader) is iter(loader):
            raise BilevelError(
                f"the {name} loader returns the same iterator at every iter(), so an evaluation "
                "would disturb training; return a new one in __iter__"
            )
        self._short = False
        try:
            first = next(self.once())
        except NotImplementedError:  # it cannot be moved: a tensor without values
            require_examples(next(isolated(loader, self._generators, 0)), name)
            raise
        require_examples(first, name)
        check_parts(name, loader)
        ordered = self._ordered
        check_rows(name, None if ordered is None else ordered.first_size, count_examples(first))
        self._first = first
        known = None if ordered is None else ordered.size
        self.size = self.steps_per_epoch * count_examples(first) if known is None else known
        self.examples = 0
        self._seed = 0
        self._epoch = -1  # no pass has begun

    def next(self) -> Batch:
        if self._pass.over:
            self._begin(int(torch.randint(2**62, (), generator=self.generator)), self._epoch + 1)
        batch = self._to_device(self._pass.draw())
        if (examples := count_examples(batch)) == 0:
            raise BilevelError(
                f"the {self.name} loader returns a batch without examples; leave such a batch out "
                "in the loader"
            )
        self.examples += examples
        return batch

    @property
    def last_size(self) -> int | None:
        """Return the number of examples of the last batch of an epoch, or None if unknown."""
        return None if self._ordered is None else self._ordered.last_size

    def peek(self) -> Batch:
        return self._first

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        seen = batches = 0
        loader = self.loader if self._ordered is None else self._ordered.loader(limit)
        drawn = isolated(loader, self._generators, 0)
        while limit is None or seen < limit:
            with explained(self.loader, self.name), self._epochs.first():
                batch = next(drawn, self)  # this stream stands for the end
            if batch is self:
                self._check_end(batches)
                return
            batch = self._to_device(batch)
            yield batch
            seen += count_examples(batch)
            batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "position": self._pass.position,
            "over": self._pass.over,
            "seed": self._seed,
            "epoch": self._epoch,
            "size": self.size,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["size"] != self.size:
            raise BilevelError(
                f"the checkpoint has a {self.name} split of {state['size']} examples, but this one "
                f"has {self.size}; use the same data as before"
            )
        self._begin(state["seed"], state.get("epoch", 0))
        if state.get("over", state["position"] == self.steps_per_epoch):
            self._pass.finish(state["position"])
        while self._pass.position < state["position"]:
            self._pass.draw()
        self.examples = state["examples"]
        self.generator.set_state(state["generator"])

    def _begin(self, seed: int, epoch: int) -> None:
        self._seed, self._epoch = seed, epoch
        self._epochs.begin(max(epoch, 0))
        self._pass.begin(seed)

    def _check_end(self, batches: int) -> None:
        """Raise where a pass of an evaluation has no batch; warn once where some are missing."""
        if batches == 0:
            raise self._pass.ended(0)
        if self._ordered is not None and not self._ordered.streamed:
            return  # each example once, however often training draws it
        if batches < self.steps_per_epoch and not self._short:
            self._short = True
            warnings.warn(
                f"an evaluation of the {self.name} split saw {batches} batches, but the length of "
                f"its loader is {self.steps_per_epoch}; return from len() the number of batches",
                DataWarning,
                stacklevel=3,
            )

    def _to_device(self, batch: Batch) -> Batch:
        open_batch(batch, self.name)
        # the copy of a pinned batch need not wait; `is True`, since another iterable may use the
        # name for something else
        pinned = getattr(self.loader, "pin_memory", False) is True
        return pytree.tree_map(
            lambda x: x.to(self.device, non_blocking=pinned) if isinstance(x, Tensor) else x, batch
        )
