"""Warnings about a loader at its start: rows that are not its examples, and parts of a split."""

import warnings
from typing import Any

from torch.utils.data import DistributedSampler

from bilevel.errors import DataWarning


def check_rows(name: str, expected: int | None, rows: int) -> None:
    """Warn where a batch has other rows than the loader puts together.

    Args:
        name: name of the split.
        expected: number of examples that the loader puts into the batch; None if unknown.
        rows: number of rows of its tensors.

    Warns:
        DataWarning: the numbers differ.
    """
    if expected is not None and expected != rows:
        warnings.warn(
            f"the {name} loader puts {expected} examples into its first batch, but the tensors "
            f"have {rows} rows, which count as the examples; put the examples into the first axis "
            "(batch_first=True in pad_sequence)",
            DataWarning,
            stacklevel=4,
        )


def check_parts(name: str, loader: Any) -> None:
    """Warn where a sampler leaves a part of the split to other processes.

    Warns:
        DataWarning: the loader has a `DistributedSampler` of several replicas.
    """
    batches = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), getattr(batches, "sampler", None)):
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            warnings.warn(
                f"the sampler of the {name} loader returns one of {sampler.num_replicas} parts of "
                "its examples; leave DistributedSampler out, since a run with several processes "
                "divides every batch itself",
                DataWarning,
                stacklevel=4,
            )
            return
