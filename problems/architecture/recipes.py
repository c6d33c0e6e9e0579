"""Architecture search on images and on tables."""

from collections.abc import Sequence
from typing import Literal

from bilevel import (
    BilevelError,
)
from bilevel.problems.architecture.operations import IMAGE, TABLE
from bilevel.problems.architecture.problem import Architecture, Changes
from bilevel.problems.architecture.tabular_data import load_table
from bilevel.problems.datasets import standard_images
from bilevel.problems.dtypes import DType
from bilevel.text import near


def architecture_images(
    data: Literal["digits", "mnist"] = "digits",
    root: str = "data",
    download: bool = True,
    operations: Sequence[str] | None = None,
    nodes: int = 3,
    cells: int = 2,
    channels: int = 8,
    keep: int = 2,
    free_price: float = 0.0,
    genotype: str | None = None,
    batch_size: int = 64,
    split_seed: int = 0,
    valid_fraction: float = 0.15,
    dtype: DType = None,
    space: Changes | None = None,
) -> Architecture:
    """Convolutional cells on scikit-learn's digits or on MNIST.

    Example:
        >>> problem = architecture_images(nodes=2, operations=["none", "skip", "conv3x3"])
        >>> list(problem.space), problem.space.numel
        (['edge_0_1', 'edge_0_2', 'edge_1_2', 'weight_decay'], 9)
        >>> list(architecture_images(nodes=2, genotype="0-1:conv3x3 1-2:skip").space)
        ['weight_decay']

    Raises:
        BilevelError: other data, or as `Architecture`.
    """
    if data not in ("digits", "mnist"):
        raise BilevelError(
            f"data={data!r}{near(str(data), ('digits', 'mnist'))} are no images; there are digits and mnist"
        )
    images = (
        standard_images.load_digits(split_seed)
        if data == "digits"
        else standard_images.load_mnist(root, download, valid_fraction)
    )
    return Architecture(
        IMAGE,
        images[:3],
        inputs=1,
        classes=10,
        operations=operations,
        nodes=nodes,
        cells=cells,
        width=channels,
        keep=keep,
        free_price=free_price,
        genotype=genotype,
        mean=images.mean,
        std=images.std,
        batch_size=batch_size,
        dtype=dtype,
        space=space,
    )


def architecture_tabular(
    data: str = "interactions",
    operations: Sequence[str] | None = None,
    nodes: int = 3,
    cells: int = 1,
    width: int = 16,
    keep: int = 2,
    free_price: float = 0.0,
    genotype: str | None = None,
    batch_size: int = 64,
    split_seed: int = 0,
    dtype: DType = None,
    space: Changes | None = None,
) -> Architecture:
    """Cells of linear maps and nonlinearities on a table; `data` as in `bilevel.problems.architecture.tabular_data.load_table`.

    Example:
        >>> architecture_tabular().operations
        ['none', 'skip', 'linear', 'relu', 'tanh', 'gate']
    """
    rows = load_table(data, split_seed)
    return Architecture(
        TABLE,
        rows[:3],
        inputs=rows.train[0].shape[1],
        classes=rows.classes,
        operations=operations,
        nodes=nodes,
        cells=cells,
        width=width,
        keep=keep,
        free_price=free_price,
        genotype=genotype,
        batch_size=batch_size,
        dtype=dtype,
        space=space,
    )
