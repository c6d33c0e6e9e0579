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
        size: number of examples, or None where the dataset returns ready-made batches.
    """

    def __init__(self, loader: DataLoader, generators: Sequence[torch.Generator]) -> None:
        self._loader = loader
        self._examples: Sequence[Any] | None = None
        self._batches: Sequence[Any] = []
        self._streamed = isinstance(loader.dataset, IterableDataset)
        self.size: int | None = None
        if self._streamed:
            sized: Any = loader.dataset
            self.size = None if loader.batch_size is None else len(sized)
            return
        sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        if type(sampler) is BatchSampler:
            self._per_batch = sampler.batch_size
            self._examples = _examples(sampler.sampler, generators)
            self.size = len(self._examples)
        else:
            self._batches = list(islice(isolated(sampler, generators, 0), len(loader)))
            self.size = None if loader.batch_sampler is None else sum(map(len, self._batches))

    def loader(self, limit: int | None) -> DataLoader:
        """Return a separate loader.

        It stops at `limit` examples where the batches are put together here.
        """
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
    """Return the examples that a sampler may return, each once."""
    if type(sampler) in (RandomSampler, SequentialSampler):
        return range(len(sampler.data_source))
    if isinstance(sampler, SubsetRandomSampler):
        return [int(i) for i in sampler.indices]
    if isinstance(sampler, WeightedRandomSampler):
        return sampler.weights.nonzero().flatten().tolist()
    return list(dict.fromkeys(islice(isolated(sampler, generators, 0), len(sampler))))
