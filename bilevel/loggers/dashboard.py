"""Entries of dashboards: a section per kind of number, and pictures in a grid."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel.loggers.records import Record

SECTIONS = ("train", "valid", "hypers", "scales", "exact", "hypergradient", "seconds", "solver")
AXES = ("step", "epoch", "seconds", "examples", "peak_memory_bytes")
"""Entries without a section: the horizontal axes, and the memory."""
COLUMNS = 8
"""Pictures in a row of a grid."""
SIDE = 64
"""Side in pixels to which smaller pictures are magnified."""


def sections(record: Record) -> dict[str, Any]:
    """Return the numbers of a record as `section/name`; missing values are left out.

    Example:
        >>> record = {"step": 3, "valid_loss": 0.5, "hypers.rates": [0.1, 0.2], "loss": 0.7}
        >>> list(sections(record))
        ['step', 'valid/loss', 'hypers/rates/0', 'hypers/rates/1', 'solver/loss']
    """
    return {
        entry: number
        for name, value in record.items()
        for entry, number in _entries(_title(name), value)
    }


def comparison_metrics(record: Record) -> dict[str, Any]:
    """Return the numbers that compare solvers at equal cost: validation scores and exact values.

    Example:
        >>> comparison_metrics({"step": 3, "valid_loss": 0.5, "exact.regret": 0.1})
        {'valid_loss': 0.5, 'regret': 0.1}
    """
    return {
        entry: number
        for name, value in record.items()
        if name.startswith(("valid_", "exact."))
        for entry, number in _entries(name.removeprefix("exact."), value)
    }


def flat_summary(summary: Record) -> dict[str, Any]:
    """Return a summary on one level: `best/valid_loss`, `best/test_loss`, `last/…`, `examples`, ….

    Example:
        >>> summary = {"best": {"valid_loss": 0.5, "exact.regret": 0.1}, "seconds": 2.0}
        >>> flat_summary(summary)
        {'best/valid_loss': 0.5, 'best/regret': 0.1, 'seconds': 2.0}
    """
    entries: dict[str, Any] = {}
    for name, value in summary.items():
        for entry, number in _entries(name, value):
            entries[entry.replace("/exact.", "/")] = number
    return entries


def picture_grid(pictures: Tensor) -> Tensor:
    """Return pictures [n, C, H, W] in [0, 1] as one image of bytes, [3, height, width].

    Eight stand in a row, and small ones are magnified.
    """
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
