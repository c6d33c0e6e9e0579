"""Standard data sets of small images: digits, MNIST, FashionMNIST, CIFAR-10 and CIFAR-100."""

from typing import Literal

import torch

from bilevel import BilevelError
from bilevel.problems.datasets import jpeg_archive
from bilevel.problems.datasets.image_files import Labelled
from bilevel.problems.datasets.labelled_images import Images, moments
from bilevel.problems.datasets.torchvision_sets import published
from bilevel.problems.datasets.validation_split import Split, split
from bilevel.text import near

Normalization = Literal["paper", "own"]


def load_digits(split_seed: int = 0) -> Images:
    """scikit-learn's 1797 handwritten digits, [n, 1, 8, 8] with values 0…16, shuffled and split 60/20/20.

    Example:
        >>> load_digits().train[0].shape
        torch.Size([1078, 1, 8, 8])
    """
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    images, labels = (
        torch.from_numpy(bunch.images).to(torch.uint8)[:, None],
        torch.from_numpy(bunch.target).long(),
    )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(split_seed))
    train, valid, test = (
        (images[i], labels[i])
        for i in order.tensor_split([int(0.6 * len(labels)), int(0.8 * len(labels))])
    )
    pixels = train[0].double()
    return Images(train, valid, test, mean=pixels.mean().item(), std=pixels.std().item())


def load_mnist(
    root: str = "data",
    download: bool = True,
    valid_fraction: float = 0.15,
    split: Split = "tail",
    split_seed: int = 0,
) -> Images:
    """MNIST, [n, 1, 28, 28] with values 0…255, normalized by the usual (0.1307, 0.3081).

    Args:
        root: the folder that holds, or shall hold, `MNIST/raw`.
        download: fetch what is missing.
        valid_fraction: of the 60,000 training images (the paper: 0.15).
        split: which of them, as `bilevel.problems.datasets.validation_split.split` says; the paper: the last ones.
        split_seed: of the others.

    Raises:
        BilevelError: the files are missing and cannot be fetched, one is damaged, or a split would be empty.
    """
    _check_fraction(valid_fraction)
    parts = divided(*published("MNIST", root, download), valid_fraction, split, split_seed)
    return Images(*parts, mean=0.1307 * 255, std=0.3081 * 255, white=255.0, classes=10)


def load_fashion_mnist(
    root: str = "data",
    download: bool = True,
    valid_fraction: float = 0.15,
    split: Split = "tail",
    split_seed: int = 0,
) -> Images:
    """FashionMNIST, [n, 1, 28, 28]; a network sees pixel / 255, as in the paper's code. Arguments as of `load_mnist`.

    Raises:
        BilevelError: as `load_mnist`.
    """
    _check_fraction(valid_fraction)
    parts = divided(*published("FashionMNIST", root, download), valid_fraction, split, split_seed)
    return Images(*parts, mean=0.0, std=255.0, white=255.0, classes=10)


def load_cifar10(
    root: str = "data",
    download: bool = True,
    archive: str | None = None,
    valid_fraction: float = 0.2,
    split: Split = "tail",
    split_seed: int = 0,
    normalization: Normalization = "paper",
) -> Images:
    """CIFAR-10, [n, 3, 32, 32].

    Args:
        root: the folder that holds, or shall hold, `cifar-10-batches-py`.
        download: fetch what is missing.
        archive: an .npz file that holds the images as JPEG, to be read in place of these (`bilevel.problems.datasets.jpeg_archive.read` says
            which arrays).
        valid_fraction: of the 50,000 training images (the paper: 0.2).
        split: which of them, as `bilevel.problems.datasets.validation_split.split` says; the paper: the last ones.
        split_seed: of the others.
        normalization: `paper`: mean (125.3, 123, 113.9) and standard deviation (63, 62.1, 66.7); `own`: the training images'.

    Raises:
        BilevelError: the files are missing and cannot be fetched, one is damaged, a split would be empty, or an unknown
            normalization.
    """
    return _cifar(
        "CIFAR10", root, download, archive, valid_fraction, split, split_seed, normalization
    )


def load_cifar100(
    root: str = "data",
    download: bool = True,
    archive: str | None = None,
    valid_fraction: float = 0.2,
    split: Split = "tail",
    split_seed: int = 0,
    normalization: Normalization = "own",
) -> Images:
    """CIFAR-100, [n, 3, 32, 32]. Arguments as of `load_cifar10`, with `cifar-100-python` for the folder.

    Raises:
        BilevelError: as `load_cifar10`.
    """
    return _cifar(
        "CIFAR100", root, download, archive, valid_fraction, split, split_seed, normalization
    )


def _cifar(
    name: Literal["CIFAR10", "CIFAR100"],
    root: str,
    download: bool,
    archive: str | None,
    valid_fraction: float,
    how: Split,
    split_seed: int,
    normalization: Normalization,
) -> Images:
    _check_fraction(valid_fraction)
    if normalization not in (known := ("paper", "own")):
        raise BilevelError(
            f"normalization={normalization!r}{near(str(normalization), known)} is neither paper nor own"
        )
    whole = published(name, root, download) if archive is None else jpeg_archive.read(archive)
    parts = divided(*whole, valid_fraction, how, split_seed)
    mean, std = (
        moments(parts[0][0])
        if normalization == "own"
        else ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    )
    return Images(*parts, mean=mean, std=std, white=255.0, classes=10 if name == "CIFAR10" else 100)


def divided(
    whole: Labelled, test: Labelled, fraction: float, how: Split, seed: int
) -> tuple[Labelled, Labelled, Labelled]:
    """Train, valid and test, with validation images set aside from `whole`.

    Raises:
        BilevelError: as `split`, or the test images are of another shape or have a class that training has not.
    """
    (images, labels), (others, classes) = whole, test
    if images.shape[1:] != others.shape[1:]:
        raise BilevelError(
            f"training images are {list(images.shape[1:])} and test images {list(others.shape[1:])}; bring all to one shape"
        )
    if unknown := sorted(set(classes.unique().tolist()) - set(labels.unique().tolist())):
        raise BilevelError(
            f"the test images have class {unknown[0]}, of which there is no training image; give both the same"
        )
    kept, aside = split(labels, fraction, how, seed)
    return (images[kept], labels[kept]), (images[aside], labels[aside]), test


def _check_fraction(valid_fraction: float) -> None:
    """Before anything is read or fetched."""
    if not 0 < valid_fraction < 1:
        raise BilevelError(
            f"valid_fraction={valid_fraction} leaves a split without images; give one between 0 and 1"
        )
