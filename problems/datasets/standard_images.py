"""Standard data sets of small images: digits, MNIST, FashionMNIST, CIFAR-10 and CIFAR-100."""

from typing import Literal

import torch

from bilevel import BilevelError
from bilevel.problems.datasets.image_files import Labelled
from bilevel.problems.datasets.jpeg_archive import read_archive
from bilevel.problems.datasets.labelled_images import Images, channel_moments
from bilevel.problems.datasets.torchvision_sets import read_torchvision_set
from bilevel.problems.datasets.validation_split import (
    SplitMethod,
    require_fraction,
    split_indices,
)
from bilevel.validate import one_of

Normalization = Literal["paper", "own"]


def load_digits(split_seed: int = 0) -> Images:
    """Load scikit-learn's 1797 handwritten digits, shuffled and split 60/20/20.

    Images are [n, 1, 8, 8] with values 0…16.

    Example:
        >>> load_digits().train[0].shape
        torch.Size([1078, 1, 8, 8])
    """
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
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
    split: SplitMethod = "tail",
    split_seed: int = 0,
) -> Images:
    """Load MNIST, standardized by the usual mean 0.1307 and standard deviation 0.3081.

    Images are [n, 1, 28, 28] with values 0…255.

    Args:
        root: folder that holds `MNIST/raw`, or that receives it.
        download: whether missing files are downloaded.
        valid_fraction: fraction of the 60,000 training images that is set aside (paper: 0.15).
        split: method of `bilevel.problems.datasets.validation_split.split_indices`; the paper sets
            the last images aside.
        split_seed: seed of the other methods.

    Raises:
        BilevelError: the files are missing and cannot be downloaded, a file is damaged, or a split
            is empty.
    """
    require_fraction(valid_fraction, "valid_fraction")
    whole, test = read_torchvision_set("MNIST", root, download)
    splits = _three_splits(whole, test, valid_fraction, split, split_seed)
    return Images(*splits, mean=0.1307 * 255, std=0.3081 * 255, white=255.0, classes=10)


def load_fashion_mnist(
    root: str = "data",
    download: bool = True,
    valid_fraction: float = 0.15,
    split: SplitMethod = "tail",
    split_seed: int = 0,
) -> Images:
    """Load FashionMNIST; a network sees pixel / 255, as in the code of the paper.

    Images are [n, 1, 28, 28] with values 0…255. Arguments and errors are those of `load_mnist`.
    """
    require_fraction(valid_fraction, "valid_fraction")
    whole, test = read_torchvision_set("FashionMNIST", root, download)
    splits = _three_splits(whole, test, valid_fraction, split, split_seed)
    return Images(*splits, mean=0.0, std=255.0, white=255.0, classes=10)


def load_cifar10(
    root: str = "data",
    download: bool = True,
    archive: str | None = None,
    valid_fraction: float = 0.2,
    split: SplitMethod = "tail",
    split_seed: int = 0,
    normalization: Normalization = "paper",
) -> Images:
    """Load CIFAR-10.

    Images are [n, 3, 32, 32] with values 0…255.

    Args:
        root: folder that holds `cifar-10-batches-py`, or that receives it.
        download: whether missing files are downloaded.
        archive: .npz file of JPEG images that replaces these files;
            `bilevel.problems.datasets.jpeg_archive.read_archive` describes its arrays.
        valid_fraction: fraction of the 50,000 training images that is set aside (paper: 0.2).
        split: method of `bilevel.problems.datasets.validation_split.split_indices`; the paper sets
            the last images aside.
        split_seed: seed of the other methods.
        normalization: `paper` uses the mean (125.3, 123, 113.9) and the standard deviation
            (63, 62.1, 66.7); `own` uses those of the training images.

    Raises:
        BilevelError: the files are missing and cannot be downloaded, a file is damaged, a split is
            empty, or the normalization is unknown.
    """
    return _cifar(
        "CIFAR10", root, download, archive, valid_fraction, split, split_seed, normalization
    )


def load_cifar100(
    root: str = "data",
    download: bool = True,
    archive: str | None = None,
    valid_fraction: float = 0.2,
    split: SplitMethod = "tail",
    split_seed: int = 0,
    normalization: Normalization = "own",
) -> Images:
    """Load CIFAR-100.

    Images are [n, 3, 32, 32] with values 0…255. The folder is `cifar-100-python`. Other arguments
    and errors are those of `load_cifar10`.
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
    split: SplitMethod,
    split_seed: int,
    normalization: Normalization,
) -> Images:
    require_fraction(valid_fraction, "valid_fraction")
    one_of(("paper", "own"), normalization=normalization)
    whole, test = (
        read_torchvision_set(name, root, download) if archive is None else read_archive(archive)
    )
    splits = _three_splits(whole, test, valid_fraction, split, split_seed)
    mean, std = (
        channel_moments(splits[0][0])
        if normalization == "own"
        else ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    )
    classes = 10 if name == "CIFAR10" else 100
    return Images(*splits, mean=mean, std=std, white=255.0, classes=classes)


def _three_splits(
    whole: Labelled, test: Labelled, fraction: float, split: SplitMethod, seed: int
) -> tuple[Labelled, Labelled, Labelled]:
    """Return train, valid and test, with validation images set aside from `whole`."""
    (images, labels), (others, classes) = whole, test
    if images.shape[1:] != others.shape[1:]:
        raise BilevelError(
            f"training images have shape {list(images.shape[1:])}, and test images have shape "
            f"{list(others.shape[1:])}; bring all images to one shape"
        )
    if unknown := sorted(set(classes.unique().tolist()) - set(labels.unique().tolist())):
        raise BilevelError(
            f"the test images have class {unknown[0]}, and the training images do not; "
            "give both the same classes"
        )
    kept, aside = split_indices(labels, fraction, split, seed)
    return (images[kept], labels[kept]), (images[aside], labels[aside]), test
