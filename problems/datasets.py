"""Labelled images, split into train, valid and test."""

import os
from typing import NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from bilevel import BilevelError

Labelled = tuple[UInt8[Tensor, "n channels height width"], Int[Tensor, " n"]]


class Images(NamedTuple):
    """Images as stored, one byte a pixel, with their labels; a network sees (image − mean) / std."""

    train: Labelled
    valid: Labelled
    test: Labelled
    mean: float
    std: float


def digits(split_seed: int = 0) -> Images:
    """scikit-learn's 1797 handwritten digits, [n, 1, 8, 8] with values 0…16, shuffled and split 60/20/20.

    Example:
        >>> digits().train[0].shape
        torch.Size([1078, 1, 8, 8])
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = torch.from_numpy(bunch.images).to(torch.uint8)[:, None], torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(split_seed))
    train, valid, test = ((images[i], labels[i]) for i in order.tensor_split([int(0.6 * len(labels)), int(0.8 * len(labels))]))
    pixels = train[0].double()
    return Images(train, valid, test, mean=pixels.mean().item(), std=pixels.std().item())


def mnist(root: str = "data", download: bool = True, valid_fraction: float = 0.15) -> Images:
    """MNIST, [n, 1, 28, 28] with values 0…255, normalized by the usual (0.1307, 0.3081); valid is the tail of the training set.

    Args:
        root: the folder that holds, or shall hold, `MNIST/raw`.
        download: fetch what is missing.
        valid_fraction: of the 60,000 training images (the paper: 0.15).

    Raises:
        BilevelError: the files are missing and cannot be fetched, or a split would be empty.
    """
    if not 0 < valid_fraction < 1:
        raise BilevelError(f"valid_fraction={valid_fraction} leaves a split without images; give one between 0 and 1")
    from torchvision.datasets import MNIST

    try:
        sets = [MNIST(root, train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        reason = f"could not be downloaded ({error})" if download else "download is off"
        raise BilevelError(
            f"MNIST is not in {os.path.join(root, 'MNIST', 'raw')} and {' '.join(reason.split())}; "
            "give data.root=PATH of a folder that holds MNIST/raw, or run once with data.download=true where there is a network"
        ) from error
    (images, labels), test = ((s.data[:, None], s.targets) for s in sets)
    cut = len(labels) - round(valid_fraction * len(labels))
    if cut in (0, len(labels)):
        raise BilevelError(
            f"valid_fraction={valid_fraction} of {len(labels)} images leaves a split empty; give one further inside"
        )
    return Images((images[:cut], labels[:cut]), (images[cut:], labels[cut:]), test, mean=0.1307 * 255, std=0.3081 * 255)


def few(images: Images, train_size: int | None = None, valid_size: int | None = None) -> Images:
    """The same images with the first `train_size` of train and the first `valid_size` of valid alone; None keeps all.

    Example:
        >>> few(digits(), train_size=100).train[1].shape
        torch.Size([100])

    Raises:
        BilevelError: a size beyond what there is.
    """
    parts = {"train": (images.train, train_size), "valid": (images.valid, valid_size)}
    for name, ((_, labels), size) in parts.items():
        if size is not None and not 1 <= size <= len(labels):
            raise BilevelError(f"{name}_size={size} of {len(labels)} images cannot be taken; give 1 to {len(labels)}")
    train, valid = ((x[:size], labels[:size]) for (x, labels), size in parts.values())
    return images._replace(train=train, valid=valid)
