"""The fingerprint of the data of a run, so that a resumed run notices other data."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from bilevel.checkpoint.checkpoints import CheckpointWarning
from bilevel.data.fields import dtype_of, tensors
from bilevel.data.stream import Stream
from bilevel.data.tensor_stream import Data, FullBatch, TensorStream
from bilevel.errors import BilevelError
from bilevel.parallel.process_group import bits

ROWS = 32
"""Rows of a field, evenly spaced, whose sums are kept."""
ROUNDING = 1e-4
"""Relative difference of such a sum up to which it is the same number, computed elsewhere."""
REMEDY = "resume it with the data that it was started with, or start a new run"
FEW_VALUES = "differs in a few values or in rounding"

Fingerprint = dict[str, dict[str, dict[str, Any]]]
"""For each split and field: type and shape; of tensors in memory also sums."""


def fingerprint(data: Data) -> Fingerprint:
    """Return the fingerprint of the data; it draws nothing and moves no stream.

    Of tensors in memory it holds the sums of a few rows, and the sum of all bits. Reading 1 GiB
    takes about 0.2 s. Of a loader or another stream it holds types and shapes of the first batch.

    Example:
        >>> data = Data(FullBatch((torch.ones(4, 2),)), FullBatch((torch.ones(1),)))
        >>> found = fingerprint(data)["train"]["field 0"]
        >>> found["dtype"], found["shape"], found["rows"]
        ('float32', [4, 2], [2.0, 2.0, 2.0, 2.0])
    """
    streams = {name: stream for name, stream in data._asdict().items() if stream is not None}
    return {name: _of_stream(stream) for name, stream in streams.items()}


def check_fingerprint(before: Fingerprint, now: Fingerprint) -> None:
    """Compare the data of a resumed run with those of its start.

    Raises:
        BilevelError: a field of training or validation tensors in memory has another type, another
            shape or other rows.

    Warns:
        CheckpointWarning: some of its bits differ, or the test split or the first batch of a loader
            is another one.
    """
    certain: list[str] = []
    possible: list[str] = []
    for split, ours in now.items():
        theirs = before.get(split, {})  # a checkpoint of an older version has none
        for field, new in ours.items() if theirs else ():
            if (differ := _difference(theirs.get(field), new)) is None:
                continue
            # a corrected test split changes no training
            known = split != "test" and "rows" in new and differ != FEW_VALUES
            (certain if known else possible).append(f"{split} data, {field} {differ}; {REMEDY}")
    if certain:
        raise BilevelError(f"the checkpoint belongs to other data: {certain[0]}")
    if possible:
        warnings.warn(
            f"the checkpoint may belong to other data: {possible[0]}",
            CheckpointWarning,
            stacklevel=3,
        )


def _difference(old: dict[str, Any] | None, new: dict[str, Any]) -> str | None:
    """Return the difference of a field from that of the checkpoint, in words."""
    if old is None:
        return "is new in this run"
    for part in ("dtype", "shape"):
        if old[part] != new[part]:
            return f"had the {part} {old[part]}, not {new[part]}"
    if not ("rows" in old and "rows" in new):
        return None
    if not _same(old["rows"], new["rows"]):
        return "holds other values than at the start"
    return FEW_VALUES if old["bits"] != new["bits"] else None


def _of_stream(stream: Stream) -> dict[str, dict[str, Any]]:
    if isinstance(stream, TensorStream):
        return {name: _of_tensor(t) for name, t in tensors(stream.tensors).items()}
    if isinstance(stream, FullBatch):
        return {name: _of_tensor(t) for name, t in tensors(stream.batch).items()}
    # the first axis of a batch may differ from pass to pass
    return {
        name: {"dtype": dtype_of(t), "shape": list(t.shape[1:])}
        for name, t in tensors(stream.peek()).items()
    }


def _of_tensor(t: Tensor) -> dict[str, Any]:
    t = t.detach()
    whole = t.reshape(1) if t.ndim == 0 else t
    at = torch.linspace(0, len(whole) - 1, min(ROWS, len(whole)), device=t.device).long()
    rows = whole[at].reshape(len(at), -1).cpu()
    sums = rows.to(torch.complex128 if t.is_complex() else torch.float64).sum(1).abs()
    signed = sums if t.is_complex() else rows.to(torch.float64).sum(1)
    return {
        "dtype": dtype_of(t),
        "shape": list(t.shape),
        "rows": signed.tolist(),
        "bits": int(bits(t)),
    }


def _same(old: list[float], new: list[float]) -> bool:
    """Return whether the sums of rows agree up to rounding."""
    known = [abs(x) for x in old if math.isfinite(x)]
    size = max(known, default=0.0)
    return len(old) == len(new) and all(
        x == y or (math.isnan(x) and math.isnan(y)) or abs(x - y) <= ROUNDING * size
        for x, y in zip(old, new, strict=True)
    )
