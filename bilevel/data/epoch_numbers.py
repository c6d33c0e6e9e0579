"""Samplers, datasets and loaders whose order depends on an epoch number (`set_epoch`)."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from bilevel.errors import DataWarning
from bilevel.params import Batch


class EpochNumbers:
    """The parts of a loader that have a method `set_epoch`, and the epoch of the training pass.

    Examples are `DistributedSampler` and datasets that shuffle by their epoch. Without the call
    every epoch has the same order.

    Args:
        loader: a DataLoader or another iterable.
        name: name of the split in warnings.
    """

    def __init__(self, loader: Iterable[Batch], name: str) -> None:
        batches = getattr(loader, "batch_sampler", None)
        owners = (
            loader,
            getattr(loader, "dataset", None),
            getattr(loader, "sampler", None),
            batches,
            getattr(batches, "sampler", None),
        )
        self._parts: list[Any] = []
        for owner in owners:
            known = any(owner is part for part in self._parts)
            if callable(getattr(owner, "set_epoch", None)) and not known:
                self._parts.append(owner)
        self._epoch = 0
        self._set(0)
        if isinstance(loader, DataLoader) and _unreachable(loader):
            warnings.warn(
                f"the workers of the {name} loader keep copies of the dataset, which set_epoch "
                "does not reach, so every epoch may have the same order; set "
                "persistent_workers=False",
                DataWarning,
                stacklevel=4,
            )

    def begin(self, epoch: int) -> None:
        """Set the epoch of the training pass."""
        self._epoch = epoch
        self._set(epoch)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Set epoch 0 inside, so that an evaluation has one order; restore the pass's own."""
        self._set(0)
        try:
            yield
        finally:
            self._set(self._epoch)

    def _set(self, epoch: int) -> None:
        for part in self._parts:
            part.set_epoch(epoch)


def _unreachable(loader: DataLoader) -> bool:
    """Return whether workers live longer than an epoch and share no epoch number."""
    if not (loader.persistent_workers and hasattr(loader.dataset, "set_epoch")):
        return False
    held = getattr(loader.dataset, "__dict__", {}).values()
    return not any(isinstance(value, Tensor) and value.is_shared() for value in held)
