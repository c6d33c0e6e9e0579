"""Data sets of labelled images."""

from bilevel.problems.datasets.image_files import ImageFiles
from bilevel.problems.datasets.image_folder import load_image_folder
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.standard_images import (
    load_cifar10,
    load_cifar100,
    load_digits,
    load_fashion_mnist,
    load_mnist,
)

__all__ = [
    "ImageFiles",
    "Images",
    "load_cifar10",
    "load_cifar100",
    "load_digits",
    "load_fashion_mnist",
    "load_image_folder",
    "load_mnist",
]
