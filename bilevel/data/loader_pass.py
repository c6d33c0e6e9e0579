"""One pass over a loader in training: its position, its end, and batches beyond its length."""

import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from bilevel.data.isolated_draws import isolated
from bilevel.data.loader_errors import explained
from bilevel.errors import BilevelError, DataWarning
from bilevel.params import Batch

COUNTED = (
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
)
"""Samplers whose length is the number of examples that they return."""


class LoaderPass:
    """The passes of training over a loader, one after the other.

    A pass has `length` batches. It may have more where several workers share an `IterableDataset`;
    then it goes on to its end. A pass that ends early is an error.

    Attributes:
        position: number of batches of this pass that were drawn.
        over: whether the pass is at its end.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        generators: Sequence[torch.Generator],
        length: int,
        name: str,
    ) -> None:
        self.loader = loader
        self.length = length
        self.name = name
        self.position = length
        self.over = True
        self._generators = generators
        self._longest = _longest_pass(loader, length)
        self._looks = not _exact_length(loader)
        self._warned = self._started = False
        self._ahead: list[Batch] = []  # a batch beyond the length, drawn to see if there is one
        self._batches: Iterator[Batch] = iter(())

    def begin(self, seed: int) -> None:
        """Begin a pass whose draws follow from `seed`."""
        if not self._started and getattr(self.loader, "persistent_workers", False):
            # the first pass, which starts these workers, also draws their seed; drop that pass
            next(isolated(self.loader, self._generators, seed), None)
        self._started = True
        self.position = 0
        self.over = False
        self._ahead = []
        self._batches = isolated(self.loader, self._generators, seed)

    def finish(self, position: int) -> None:
        """Go to the end of the pass without drawing."""
        self.position, self.over = position, True

    def draw(self) -> Batch:
        """Return the next batch.

        Raises:
            BilevelError: the pass ended before its length.

        Warns:
            DataWarning: the pass has more batches than its length.
        """
        drawn = self._ahead or self._pull()
        if not drawn:
            raise self.ended(self.position)
        self._ahead = []
        self.position += 1
        if self.position >= self.length:
            self._look_ahead()
        return drawn[0]

    def ended(self, position: int) -> BilevelError:
        """Return the error about a pass that ended early."""
        return BilevelError(
            f"the {self.name} loader ended after {position} batches, but its length is "
            f"{self.length}; return from len() the number of batches of every epoch"
        )

    def _pull(self) -> list[Batch]:
        """Return the next batch of the loader in a list, which is empty at the end."""
        with explained(self.loader, self.name):
            for batch in self._batches:
                return [batch]
        return []

    def _look_ahead(self) -> None:
        """Find out if the pass is over; warn once of a batch beyond the length."""
        self.over = True
        if not self._looks or not (ahead := self._pull()):
            return
        goes_on = self.position < self._longest
        if goes_on:
            self._ahead, self.over = ahead, False
        if not self._warned:
            self._warned = True
            self._looks = goes_on
            fate = "are drawn before the next pass begins" if goes_on else "are never used"
            warnings.warn(
                f"the {self.name} loader returns more batches than its length {self.length}; the "
                f"others {fate}, and an epoch counts as {self.length} batches; return from len() "
                "the number of batches of a pass, and give every worker its own examples",
                DataWarning,
                stacklevel=2,
            )


def _exact_length(loader: Iterable[Batch]) -> bool:
    """Return whether a pass has `len(loader)` batches for certain."""
    if type(loader) in (list, tuple):
        return True
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return False
    if isinstance(loader.dataset, IterableDataset):
        return False
    batches = loader.batch_sampler
    if batches is None:
        sampler = loader.sampler
        return type(sampler) in (*COUNTED, list) or (
            type(sampler) is BatchSampler and type(sampler.sampler) in COUNTED
        )
    return type(batches) is list or (
        type(batches) is BatchSampler and type(batches.sampler) in (*COUNTED, list, range)
    )


def _longest_pass(loader: Iterable[Batch], length: int) -> int:
    """Return the number of batches after which a pass ends in any case.

    Workers that share a dataset end with a smaller batch each. Workers that do not share it return
    all examples each.
    """
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        return max(1, loader.num_workers) * (length + 1)
    return length
