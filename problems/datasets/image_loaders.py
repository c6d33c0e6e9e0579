"""Images as tensors on the device, or as DataLoaders that move each batch there."""

import warnings
from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bilevel import BilevelError
from bilevel.checks.check_problem import ProblemWarning
from bilevel.problems.datasets import free_memory
from bilevel.problems.datasets.image_files import ImageFileDataset
from bilevel.text import byte_size
from bilevel.validate import between


def tensors_or_loaders(
    splits: Sequence[Any], batch_size: int | None, device: torch.device
) -> list[Any]:
    """Return train, valid and test as `bilevel.data.tensor_stream.streams` accepts them.

    Tensors that fit on the device are returned as they are; the stream moves them there once.
    The workers of a loader read image files.
    Tensors that do not fit become a loader, which moves each batch from pinned memory.
    In every case the device receives bytes, and training transforms the batch there.

    Args:
        splits: tensors or `ImageFileDataset` of train, valid and test; test may be None.
        batch_size: number of images in a batch of a loader.
        device: device that trains.

    Raises:
        BilevelError: a loader has no batch size, or a batch exceeds its split.

    Warns:
        ProblemWarning: the images do not fit on the device.
    """
    tensors = [t for split in splits if isinstance(split, tuple) for t in split]
    needed, free = sum(t.nbytes for t in tensors), free_memory.free_bytes(device)
    on_device = device.type == "cpu" or free_memory.fits(needed, free)
    if not on_device:
        warnings.warn(
            f"the images take {byte_size(needed)}, more than half of the {byte_size(free or 0)} "
            f"that are free on {device}, so each batch is moved there separately; lower "
            "problem.train_size or the size of the images to keep them on the device",
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


def first_images(split: Any, count: int) -> UInt8[Tensor, "n channels height width"]:
    """Return the first images of a split."""
    if isinstance(split, ImageFileDataset):
        return split.subset(range(min(count, len(split)))).decode()[0]
    return split[0][:count]


@final
class TensorRows(Dataset):
    """A data set of tensors that returns the rows of a whole batch by one index operation."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in self.tensors)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        chosen = torch.tensor(indices)
        return tuple(t[chosen] for t in self.tensors)


def _loader(split: Any, batch_size: int | None, name: str) -> DataLoader:
    size = len(split if isinstance(split, ImageFileDataset) else split[0])
    if batch_size is None:
        raise BilevelError(
            "batch_size=null needs all images in memory, and they are not there; "
            "give a number, for example batch_size=128"
        )
    shuffled = name != "test"
    if shuffled:
        remedy = f"choose a number up to the {size} examples of the {name} split"
        between(1, size, remedy, batch_size=batch_size)
    workers = split.workers if isinstance(split, ImageFileDataset) else 0
    return DataLoader(
        split if isinstance(split, ImageFileDataset) else TensorRows(*split),
        batch_size=batch_size,
        shuffle=shuffled,
        drop_last=shuffled,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=None if isinstance(split, ImageFileDataset) else _unchanged,
    )


def _unchanged(batch: Any) -> Any:
    """Return a batch as `TensorRows` made it; a loader's workers need a named function."""
    return batch
