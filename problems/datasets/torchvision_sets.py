"""The published sets of small images as torchvision reads them, and what is wrong with their files where it cannot."""

import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from bilevel import BilevelError
from bilevel.problems.datasets.image_files import Labelled

Name: TypeAlias = Literal["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"]

UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, AssertionError, EOFError)
"""What torchvision raises on files that are missing, cut off or something else."""


def published(name: Name, root: str, download: bool) -> tuple[Labelled, Labelled]:
    """The training and the test set, in their own order.

    Args:
        name: of `torchvision.datasets`.
        root: the folder that holds, or shall hold, the set's own folder.
        download: fetch what is missing.

    Raises:
        BilevelError: the files are missing and cannot be fetched, or one is damaged (which one is said).
    """
    import torchvision

    make = getattr(torchvision.datasets, name)
    idx = name in ("MNIST", "FashionMNIST")
    folder = Path(root, name, "raw") if idx else Path(root, make.base_folder)
    named = f"data.root=PATH of a folder that holds {folder.relative_to(root)}"
    if idx:
        _check_idx(name, folder)  # torchvision takes a file that is there for a file that is whole
    try:
        sets = [make(root, train=train, download=download) for train in (True, False)]
    except UNREADABLE as error:
        reason = (
            f"could not be downloaded ({' '.join(str(error).split())})"
            if download
            else "download is off"
        )
        if not idx and (damaged := _damaged(make, folder)) is not None:
            raise BilevelError(
                f"{name}: {damaged} is cut off or changed (its MD5 is another) and {reason}; delete {folder} and run once with "
                f"data.download=true where there is a network, or give {named}"
            ) from error
        raise BilevelError(
            f"{name} is not in {folder} and {reason}; "
            f"give {named}, or run once with data.download=true where there is a network"
        ) from error
    train, test = (_tensors(s, idx) for s in sets)
    return train, test


def _tensors(read: Any, idx: bool) -> Labelled:
    if idx:
        return read.data[:, None], read.targets
    return torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(read.targets)


def _check_idx(name: str, folder: Path) -> None:
    """Hold the size of every IDX file that is there against its own header: a magic number, then the length of each axis.

    Raises:
        BilevelError: one is cut off, or no IDX file, or there are not as many labels as images.
    """
    for part in ("train", "t10k"):
        rows = {}
        for kind, axes in (("images-idx3", 3), ("labels-idx1", 1)):
            path = folder / f"{part}-{kind}-ubyte"
            if not path.is_file():
                continue
            size = path.stat().st_size
            with open(path, "rb") as file:
                header = file.read(4 * (axes + 1))
            magic, *lengths = [
                int.from_bytes(header[i : i + 4], "big") for i in range(0, len(header), 4)
            ] or [0]
            wanted = 4 * (axes + 1) + torch.Size(lengths).numel()
            if magic != 0x800 + axes or len(lengths) != axes or size != wanted:
                told = (
                    f"{size:,} bytes where its header says {wanted:,}"
                    if magic == 0x800 + axes
                    else "no IDX header"
                )
                raise BilevelError(
                    f"{name}: {path} is cut off or something else ({told}); delete it and run once with data.download=true, "
                    "or give data.root=PATH of a folder that has it whole"
                )
            rows[kind] = lengths[0]
        if len(set(rows.values())) > 1:
            images, labels = rows.values()
            raise BilevelError(
                f"{name}: {folder} holds {images:,} {part} images and {labels:,} labels, so they are of two sets; "
                "delete both files and run once with data.download=true"
            )


def _damaged(make: Any, folder: Path) -> str | None:
    """The first file that is there and is not the published one."""
    from torchvision.datasets.utils import check_md5

    listed = [*make.train_list, *make.test_list, (make.meta["filename"], make.meta["md5"])]
    paths = ((folder / name, md5) for name, md5 in listed)
    return next(
        (str(path) for path, md5 in paths if os.path.isfile(path) and not check_md5(path, md5)),
        None,
    )
