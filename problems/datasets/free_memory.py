"""Free memory of a device, and whether images fit into it."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bilevel import BilevelError
from bilevel.problems.datasets.image_files import ImageFileDataset
from bilevel.text import byte_size
from bilevel.validate import one_of

SHARE = 0.5
"""Fraction of the free memory that images may take; training needs the rest."""

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Return the number of free bytes of a device, or None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [_free_in_container(CGROUP)]
    with suppress(OSError):  # only Linux has this file
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return min((number for number in found if number is not None), default=None)


def fits(needed: int, free: int | None) -> bool:
    """Return whether `needed` bytes leave enough memory; True if the free memory is unknown."""
    return free is None or needed <= SHARE * free


def decode_at_once(splits: Sequence[ImageFileDataset | None], in_memory: Any, source: str) -> bool:
    """Return whether image files are decoded into the memory of the host before training.

    Args:
        splits: image files of each split.
        in_memory: true, false, or `auto`: true if the images fit.
        source: name of the images in an error.

    Raises:
        BilevelError: `in_memory` is true and the images do not fit, or it has another value.
    """
    one_of(("auto", True, False), in_memory=in_memory)
    needed = sum(split.nbytes for split in splits if split is not None)
    free = free_bytes(torch.device("cpu"))
    if in_memory is True and not fits(needed, free):
        raise BilevelError(
            f"in_memory=true needs {byte_size(needed)} for the images of {source}, and images may "
            f"take half of the {byte_size(free or 0)} that are free; lower size, or set "
            "in_memory=false"
        )
    return in_memory is True or (in_memory == "auto" and fits(needed, free))


def _free_in_container(cgroup: Path) -> int | None:
    """Return the bytes below the limit of a container, or None without a limit.

    The kernel drops cached files when memory is short, so they count as free.
    """
    try:
        limit, used = (
            int((cgroup / f"memory.{name}").read_text(encoding="ascii"))
            for name in ("max", "current")
        )
        stat = dict(
            line.split()
            for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
        )
        return max(0, limit - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # there is no such limit
        return None
