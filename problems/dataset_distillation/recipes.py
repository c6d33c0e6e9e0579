"""Dataset distillation of digits and MNIST."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from bilevel.problems.dataset_distillation.problem import Distillation
from bilevel.problems.datasets.standard_images import load_digits, load_mnist
from bilevel.problems.networks.mlp import MLP
from bilevel.validate import one_of


def distillation(
    dataset: Literal["digits", "mnist"] = "digits",
    root: str = "data",
    download: bool = True,
    hidden: Sequence[int] = (),
    **options: Any,
) -> Distillation:
    """Distill digits or MNIST for an MLP; without hidden layers, for logistic regression.

    Args:
        dataset: `digits` or `mnist`.
        root: folder of MNIST.
        download: whether missing files of MNIST are downloaded.
        hidden: widths of the hidden layers.
        options: other arguments of `Distillation`.

    Example:
        >>> distillation(per_class=2).space["images"].shape
        (20, 1, 8, 8)

    Raises:
        BilevelError: the data set is unknown, or `Distillation` raises it.
    """
    one_of(("digits", "mnist"), dataset=dataset)
    images = load_digits() if dataset == "digits" else load_mnist(root, download)
    return Distillation(partial(MLP, [images.train[0][0].numel(), *hidden, 10]), images, **options)
