"""The MNIST and CIFAR data sets as torchvision reads them, with errors that name damaged files."""

import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from bilevel import BilevelError
from bilevel.problems.datasets.image_files import Labelled

Name: TypeAlias = Literal["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"]

UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, AssertionError, EOFError)
"""Errors of torchvision about files that are missing, cut off or of another kind."""


def read_torchvision_set(name: Name, root: str, download: bool) -> tuple[Labelled, Labelled]:
    """Return the training set and the test set in their original order.

    Args:
        name: name in `torchvision.datasets`.
        root: folder that holds the set's own folder, or that receives it.
        download: whether missing files are downloaded.

    Raises:
        BilevelError: the files are missing and cannot be downloaded, or a file is damaged.
    """
    import torchvision

    make = getattr(torchvision.datasets, name)
    idx = name in ("MNIST", "FashionMNIST")
    folder = Path(root, name, "raw") if idx else Path(root, make.base_folder)
    where = f"data.root=PATH of a folder that holds {folder.relative_to(root)}"
    if idx:
        _check_idx(name, folder)  # torchvision does not check the length of an existing file
    try:
        sets = [make(root, train=train, download=download) for train in (True, False)]
    except UNREADABLE as error:
        reason = (
            f"could not be downloaded ({' '.join(str(error).split())})"
            if download
            else "download is off"
        )
        if not idx and (damaged := _first_damaged(make, folder)) is not None:
            raise BilevelError(
                f"{name}: {damaged} has another MD5 than the published file, so it is cut off or "
                f"changed, and {reason}; delete {folder} and run once with data.download=true and "
                f"a network, or set {where}"
            ) from error
        raise BilevelError(
            f"{name} is not in {folder} and {reason}; set {where}, or run once with "
            "data.download=true and a network"
        ) from error
    train, test = (_tensors(s, idx) for s in sets)
    return train, test


def _tensors(read: Any, idx: bool) -> Labelled:
    if idx:
        return read.data[:, None], read.targets
    return torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(read.targets)


def _check_idx(name: str, folder: Path) -> None:
    """Compare the size of every existing IDX file with its header.

    The header holds a magic number, and then the length of each axis.

    Raises:
        BilevelError: a file is cut off or not an IDX file, or images and labels differ in number.
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
            words = [int.from_bytes(header[i : i + 4], "big") for i in range(0, len(header), 4)]
            magic, *lengths = words or [0]
            wanted = 4 * (axes + 1) + torch.Size(lengths).numel()
            if magic != 0x800 + axes or len(lengths) != axes or size != wanted:
                reason = (
                    f"{size:,} bytes, and its header says {wanted:,}"
                    if magic == 0x800 + axes
                    else "no IDX header"
                )
                raise BilevelError(
                    f"{name}: {path} is cut off or of another kind ({reason}); delete it and run "
                    "once with data.download=true, or set data.root=PATH of a folder with a "
                    "complete file"
                )
            rows[kind] = lengths[0]
        if len(set(rows.values())) > 1:
            images, labels = rows.values()
            raise BilevelError(
                f"{name}: {folder} holds {images:,} {part} images and {labels:,} labels, so they "
                "belong to two sets; delete both files and run once with data.download=true"
            )


def _first_damaged(make: Any, folder: Path) -> str | None:
    """Return the first existing file that differs from the published one."""
    from torchvision.datasets.utils import check_md5

    listed = [*make.train_list, *make.test_list, (make.meta["filename"], make.meta["md5"])]
    paths = ((folder / name, md5) for name, md5 in listed)
    return next(
        (str(path) for path, md5 in paths if os.path.isfile(path) and not check_md5(path, md5)),
        None,
    )
