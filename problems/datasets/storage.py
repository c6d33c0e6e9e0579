"""Where images lie while training goes on: on the device, in the host's memory, or in their files."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bilevel import BilevelError
from bilevel.checks.check_problem import ProblemWarning
from bilevel.problems.datasets.image_files import Files

SHARE = 0.5
"""Of the free memory, what images may take: training wants the rest."""


def placed(splits: Sequence[Any], batch_size: int | None, device: torch.device) -> list[Any]:
    """Train, valid and test as `bilevel.data.tensor_stream.streams` takes them: tensors, which it moves to the device once, or loaders.

    Files are read by a loader's workers; tensors that are too many for the device are handed over batch by batch, from pinned
    memory. Either way the device gets bytes, and what training does to a batch is done there.

    Args:
        splits: tensors or `Files`, or None for test.
        batch_size: of the loaders.
        device: that trains.

    Raises:
        BilevelError: a loader without a batch size, or a batch larger than its split.

    Warns:
        ProblemWarning: the images do not fit on the device.
    """
    tensors = [t for split in splits if isinstance(split, tuple) for t in split]
    needed, there = sum(t.nbytes for t in tensors), free(device)
    on_device = device.type == "cpu" or fits(needed, there)
    if not on_device:
        warnings.warn(
            f"the images take {said(needed)} and {device} has {said(there)} free, of which they may take half, so each batch "
            "is moved when it is wanted; lower problem.train_size or the size of the images to have them there at once",
            ProblemWarning,
            stacklevel=2,
        )
    made: list[Any] = []
    for split, name in zip(splits, ("train", "valid", "test"), strict=True):
        if split is None or (isinstance(split, tuple) and on_device):
            made.append(split)
        else:
            made.append(_loader(split, batch_size, name))
    return made


def in_memory(splits: Sequence[Files | None], choice: Any, what: str) -> bool:
    """Whether images are to be decoded into the host's memory at once: `auto` where they fit.

    Raises:
        BilevelError: `true` where they do not fit, or none of `auto`, true and false.
    """
    if choice not in ("auto", True, False):
        raise BilevelError(
            f"in_memory={choice!r} is none of auto, true and false; choose one of these"
        )
    needed, there = (
        sum(split.nbytes for split in splits if split is not None),
        free(torch.device("cpu")),
    )
    if choice is True and not fits(needed, there):
        raise BilevelError(
            f"the images of {what} take {said(needed)} in memory and {said(there)} are free, of which they may take half; "
            "lower size, or give in_memory=false"
        )
    return choice is True or (choice == "auto" and fits(needed, there))


def fits(needed: int, there: int | None) -> bool:
    """Whether images of so many bytes leave enough; True where the free memory is not known."""
    return there is None or needed <= SHARE * there


CGROUP = Path("/sys/fs/cgroup")


def free(device: torch.device) -> int | None:
    """Bytes that are free on the device, None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [_left_in(CGROUP)]
    with suppress(OSError):  # of Linux alone
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return min((number for number in found if number is not None), default=None)


def said(count: int | None) -> str:
    """Bytes in words.

    Example:
        >>> said(3 * 2**30), said(5_000_000)
        ('3.0 GiB', '4.8 MiB')
    """
    number = float(count or 0)
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


@final
class Rows(Dataset):
    """Tensors whose rows are taken a batch at a time."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in self.tensors)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        chosen = torch.tensor(indices)
        return tuple(t[chosen] for t in self.tensors)


def first(split: Any, count: int) -> UInt8[Tensor, "n channels height width"]:
    """The first images of a split."""
    if isinstance(split, Files):
        return split.taken(range(min(count, len(split)))).decoded()[0]
    return split[0][:count]


def _loader(split: Any, batch_size: int | None, name: str) -> DataLoader:
    size = len(split if isinstance(split, Files) else split[0])
    if batch_size is None:
        raise BilevelError(
            "batch_size=null takes all images at every step, and they do not lie in memory; give batch_size=128"
        )
    shuffled = name != "test"
    if shuffled and not 1 <= batch_size <= size:
        raise BilevelError(
            f"a batch of {batch_size} cannot be drawn from the {name} split, which has {size} examples; "
            f"choose a batch size between 1 and {size}"
        )
    workers = split.workers if isinstance(split, Files) else 0
    return DataLoader(
        split if isinstance(split, Files) else Rows(*split),
        batch_size=batch_size,
        shuffle=shuffled,
        drop_last=shuffled,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=None if isinstance(split, Files) else _together,
    )


def _together(batch: Any) -> Any:
    """`Rows` has put it together."""
    return batch


def _left_in(cgroup: Path) -> int | None:
    """What a container's limit leaves, where it has one; files that the kernel caches give way, and count as free."""
    try:
        most, used = (
            int((cgroup / f"memory.{name}").read_text(encoding="ascii"))
            for name in ("max", "current")
        )
        stat = dict(
            line.split()
            for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
        )
        return max(0, most - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such limit
        return None
