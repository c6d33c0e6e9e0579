"""Architecture search on images and on tables."""

from typing import Any, Literal

from bilevel.problems.architecture.operations import IMAGE, TABLE
from bilevel.problems.architecture.problem import Architecture
from bilevel.problems.architecture.tabular_data import load_table
from bilevel.problems.datasets.standard_images import load_digits, load_mnist
from bilevel.validate import one_of


def architecture_images(
    data: Literal["digits", "mnist"] = "digits",
    root: str = "data",
    download: bool = True,
    *,
    channels: int = 8,
    split_seed: int = 0,
    valid_fraction: float = 0.15,
    **options: Any,
) -> Architecture:
    """Return a search for convolutional cells on scikit-learn's digits or on MNIST.

    Args:
        data: `digits` or `mnist`.
        root: folder of MNIST.
        download: whether missing files of MNIST are downloaded.
        channels: number of channels of every node.
        split_seed: seed of the data split of the digits.
        valid_fraction: fraction of MNIST's training images that are used for validation.
        options: other arguments of `Architecture`.

    Example:
        >>> problem = architecture_images(nodes=2, operations=["none", "skip", "conv3x3"])
        >>> list(problem.space), problem.space.numel
        (['edge_0_1', 'edge_0_2', 'edge_1_2', 'weight_decay'], 9)
        >>> list(architecture_images(nodes=2, genotype="0-1:conv3x3 1-2:skip").space)
        ['weight_decay']

    Raises:
        BilevelError: the data are unknown, or `Architecture` raises it.
    """
    one_of(("digits", "mnist"), data=data)
    images = (
        load_digits(split_seed) if data == "digits" else load_mnist(root, download, valid_fraction)
    )
    return Architecture(
        IMAGE,
        images[:3],
        inputs=1,
        classes=10,
        width=channels,
        mean=images.mean,
        std=images.std,
        **options,
    )


def architecture_tabular(
    data: str = "interactions",
    *,
    cells: int = 1,
    width: int = 16,
    split_seed: int = 0,
    **options: Any,
) -> Architecture:
    """Return a search for cells of linear maps and nonlinearities on a table.

    Args:
        data: as in `bilevel.problems.architecture.tabular_data.load_table`.
        cells: number of cells.
        width: number of features of every node.
        split_seed: seed of the data split.
        options: other arguments of `Architecture`.

    Example:
        >>> architecture_tabular().operations
        ['none', 'skip', 'linear', 'relu', 'tanh', 'gate']
    """
    table = load_table(data, split_seed)
    return Architecture(
        TABLE,
        table[:3],
        inputs=table.train[0].shape[1],
        classes=table.classes,
        cells=cells,
        width=width,
        **options,
    )
