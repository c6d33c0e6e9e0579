"""Image classification whose dropout rates and weight decay are tuned."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel import Batch, Hypers, Interval, Metrics, ModuleProblem, Params, Positive, Prediction, Space, squared_norm
from problems import datasets
from problems.datasets import Images
from problems.dropout import dropout
from problems.networks import MLP

Changes: TypeAlias = Mapping[str, Mapping[str, Any]]


@final
class Classification(ModuleProblem):
    """Cross-entropy, with a dropout rate for each dropout site of the network and a weight decay.

        L_T = mean over examples of CE(f(x; λ, w), y) + ½ weight_decay ‖w‖²,    L_V = mean of CE(f(x; w), y)

    The rates are `input_dropout`, `dropout1`, `dropout2`, … in (0, 0.95).

    Args:
        network: makes a module with `forward(x, drop)`, as in `problems.networks`.
        images: the data.
        sites: how many dropout sites the network has.
        weight_decay: whether there is one.
        batch_size: of training and of validation.
        space: changes to the space, as in `Space.override`.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        images: Images,
        *,
        sites: int,
        weight_decay: bool = True,
        batch_size: int | None = 128,
        space: Changes | None = None,
    ) -> None:
        self._rates = ["input_dropout", *(f"dropout{site}" for site in range(1, sites))][:sites]
        self._mean, self._std = images.mean, images.std
        full = Space(
            **{name: Interval(low=0.0, high=0.95, init=0.05, differentiable=False) for name in self._rates},
            **({"weight_decay": Positive(init=1e-4)} if weight_decay else {}),
        )
        super().__init__(network, full.override(space or {}), images.train, images.valid, images.test, batch_size=batch_size)

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = (batch[0] - self._mean) / self._std

        def drop(site: int, x: Tensor) -> Tensor:
            return dropout(x, hypers[self._rates[site]], generator)

        return (x, drop) if train else (x,), {}

    def inner_objective(self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch) -> Tensor:
        loss = F.cross_entropy(prediction, batch[1])
        if "weight_decay" not in hypers:
            return loss
        return loss + 0.5 * (hypers["weight_decay"] * squared_norm(params)).mean()

    def outer_objective(self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch) -> Tensor:
        return F.cross_entropy(prediction, batch[1])

    def metrics(self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch) -> Metrics:
        """Cross-entropy `loss` [B] and `accuracy` [B]."""
        correct = prediction.argmax(-1) == batch[1]
        return {"loss": F.cross_entropy(prediction, batch[1], reduction="none"), "accuracy": correct.to(prediction.dtype)}


def digits(
    hidden: Sequence[int] = (256, 256), batch_size: int = 64, split_seed: int = 0, space: Changes | None = None
) -> Classification:
    """scikit-learn's digits with an MLP; tuned: a dropout rate per layer, and weight decay.

    Example:
        >>> list(digits(hidden=[32]).space)
        ['input_dropout', 'dropout1', 'weight_decay']
    """
    sizes = [64, *hidden, 10]
    return Classification(
        partial(MLP, sizes), datasets.digits(split_seed), sites=len(sizes) - 1, batch_size=batch_size, space=space
    )


def mnist(
    root: str = "data",
    download: bool = True,
    hidden: Sequence[int] = (1200, 1200),
    batch_size: int = 128,
    valid_fraction: float = 0.15,
    space: Changes | None = None,
) -> Classification:
    """MNIST with the MLP 784-1200-1200-10 and three tuned dropout rates, without weight decay.

    Source: Bae & Grosse, NeurIPS 2020, the MNIST experiment of the official code.
    """
    sizes = [784, *hidden, 10]
    images = datasets.mnist(root, download, valid_fraction)
    return Classification(
        partial(MLP, sizes), images, sites=len(sizes) - 1, weight_decay=False, batch_size=batch_size, space=space
    )
