"""The examples of a DataLoader in a fixed order, for evaluation."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from bilevel.data.isolated_draws import isolated


class FixedOrder:
    """The examples of a DataLoader's split in a fixed order.

    Attributes:
        streamed: whether the dataset is an `IterableDataset`.
        size: number of examples, or None where the dataset returns ready-made batches.
        first_size: number of examples of the first batch, or None if it is unknown.
        last_size: number of examples of the last batch in training, or None if it is unknown.
    """

    def __init__(self, loader: DataLoader, generators: Sequence[torch.Generator]) -> None:
        self._loader = loader
        self._examples: Sequence[Any] | None = None
        self._batches: Sequence[Any] = []
        self.streamed = isinstance(loader.dataset, IterableDataset)
        self.size: int | None = None
        self.first_size: int | None = None
        self.last_size: int | None = None
        if self.streamed:
            sized: Any = loader.dataset
            self.size = None if loader.batch_size is None else len(sized)
            self.first_size = self._first(loader.batch_size)
            return
        sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        if type(sampler) is BatchSampler:
            self._per_batch = sampler.batch_size
            self._examples = _examples(sampler.sampler, generators)
            self.size = len(self._examples)
            self.first_size = self._first(self._per_batch)
            rest = len(sampler.sampler) % self._per_batch  # type: ignore[arg-type]
            self.last_size = self._per_batch if sampler.drop_last or not rest else rest
        else:
            self._batches = list(islice(isolated(sampler, generators, 0), len(loader)))
            if loader.batch_sampler is not None:
                self.size = sum(map(len, self._batches))
                self.first_size = len(self._batches[0]) if self._batches else None

    def _first(self, batch_size: int | None) -> int | None:
        return None if batch_size is None or self.size is None else min(batch_size, self.size)

    def loader(self, limit: int | None) -> DataLoader:
        """Return a separate loader.

        It stops at `limit` examples where the batches are put together here.
        """
        dataset, collate = self._loader.dataset, self._loader.collate_fn
        if self.streamed:
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
    """Return the examples that a sampler may return, each once."""
    if type(sampler) in (RandomSampler, SequentialSampler):
        return range(len(sampler.data_source))
    if isinstance(sampler, SubsetRandomSampler):
        return [int(i) for i in sampler.indices]
    if isinstance(sampler, WeightedRandomSampler):
        return sampler.weights.nonzero().flatten().tolist()
    return list(dict.fromkeys(islice(isolated(sampler, generators, 0), len(sampler))))
