"""What dashboards show of a record: a section per kind, an entry per number, and pictures on a sheet."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel.loggers.records import Record

SECTIONS = ("train", "valid", "hypers", "scales", "exact", "hypergradient", "seconds", "solver")
AXES = ("step", "epoch", "seconds", "examples", "peak_memory_bytes")
"""Entries that stand by themselves: what others are drawn against, and the memory."""
COLUMNS = 8
"""Pictures in a row of a sheet."""
SIDE = 64
"""Pixels to which smaller pictures are magnified."""


def sections(record: Record) -> dict[str, Any]:
    """The numbers of a record as `section/name`; what is not known is left out, and so are non-numbers.

    Example:
        >>> sections({"step": 3, "valid_loss": 0.5, "hypers.rates": [0.1, 0.2], "seconds.inner": 1.5, "inner_loss": 0.7})
        {'step': 3, 'valid/loss': 0.5, 'hypers/rates/0': 0.1, 'hypers/rates/1': 0.2, 'seconds/inner': 1.5,
         'solver/inner_loss': 0.7}
    """
    return {
        entry: number
        for name, value in record.items()
        for entry, number in _entries(_title(name), value)
    }


def comparison_metrics(record: Record) -> dict[str, Any]:
    """The numbers by which solvers are compared at equal cost: of the validation split, and the regret and its like.

    Example:
        >>> comparison_metrics({"step": 3, "train_loss": 0.4, "valid_loss": 0.5, "exact.regret": 0.1})
        {'valid_loss': 0.5, 'regret': 0.1}
    """
    return {
        entry: number
        for name, value in record.items()
        if name.startswith(("valid_", "exact."))
        for entry, number in _entries(name.removeprefix("exact."), value)
    }


def flat_summary(summary: Record) -> dict[str, Any]:
    """A summary in one level: `best/valid_loss`, `best/test_loss`, `best/regret`, `last/…`, `examples`, `stopped` and so on.

    Example:
        >>> flat_summary({"best": {"valid_loss": 0.5, "exact.regret": 0.1, "test_loss": None}, "seconds": 2.0})
        {'best/valid_loss': 0.5, 'best/regret': 0.1, 'seconds': 2.0}
    """
    told: dict[str, Any] = {}
    for name, value in summary.items():
        for entry, number in _entries(name, value):
            told[entry.replace("/exact.", "/")] = number
    return told


def picture_grid(pictures: Tensor) -> Tensor:
    """Pictures [n, C, H, W] in [0, 1] side by side, eight to a row, as bytes [3, height, width]; small ones are magnified."""
    from torchvision.utils import make_grid

    factor = max(1, SIDE // max(pictures.shape[-2:]))
    magnified = F.interpolate(pictures, scale_factor=factor, mode="nearest")
    return (255 * make_grid(magnified, nrow=COLUMNS, pad_value=1.0)).round().to(torch.uint8)


def _title(name: str) -> str:
    if name in AXES:
        return name
    kind, dot, rest = (
        name.replace("_", ".", 1).partition(".")
        if name.startswith(("train_", "valid_"))
        else name.partition(".")
    )
    return f"{kind}/{rest}" if dot and kind in SECTIONS else f"solver/{name}"


def _entries(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _entries(f"{name}/{key}", part)
    elif value is not None:
        yield name, value
