"""Class weights and label smoothing of the training loss, tuned on a long-tailed set of images."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bilevel import (
    Batch,
    Domain,
    Hypers,
    Interval,
    Metrics,
    ModuleProblem,
    Params,
    Positive,
    Prediction,
    Real,
    Simplex,
    Space,
    squared_norm,
)
from bilevel.problems.datasets.class_balance import balanced, long_tailed
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.standard_images import load_digits, load_mnist
from bilevel.problems.datasets.standardize import Standardize
from bilevel.problems.networks.mlp import MLP
from bilevel.problems.space_checks import SpaceChanges, require_within
from bilevel.validate import one_of

ClassWeights: TypeAlias = Literal["positive", "simplex", False]
Smoothing: TypeAlias = bool | Literal["per_class"]


@final
class LossWeights(ModuleProblem):
    """Cross-entropy with a weight per class, label smoothing and an optional offset per class.

        L_T = mean of c_y [(1 − s) CE(f + a, y) + s (1/C) Σ_k CE(f + a, k)] + ½ weight_decay ‖w‖²
        L_V = mean of CE(f, y)

    The training split is long-tailed; the validation split is balanced. The hyperparameters are
    `class_weight` c [C], `smoothing` s in (0, 0.9), [] or [C], and `logit_offset` a [C]; each can
    be drawn per example. `weight_decay` is frozen unless `space` changes it. A network that fits
    every training label hardly reacts to c. It reacts to a, which shifts margins.

    Args:
        network: makes a module that maps images to logits.
        images: data; `long_tailed` and `balanced` describe the subsets that are used.
        ratio: size of the largest training class divided by the size of the smallest one.
        tail_seed: seed of the images that are kept.
        class_weight: `positive`: each weight is positive and starts at 1; `simplex`: C times a
            point of the simplex, so that the mean stays 1, perturbed per batch; false: no weights.
        smoothing: true: one rate for all classes; `per_class`: one rate per class; false: none.
        logit_offset: whether there are offsets.
        batch_size: number of examples in a batch of training and of validation; None takes a whole
            split.
        space: changes of the space, as in `Space.override`.

    Attributes:
        counts: [C], number of training images of each class.

    Source: Li et al., NeurIPS 2021 (class-wise losses as a bilevel problem); Müller et al., NeurIPS
    2019 (smoothing); Menon et al., ICLR 2021 (offsets).

    Example:
        >>> problem = LossWeights.digits(ratio=20)
        >>> list(problem.space), problem.counts.tolist()
        (['class_weight', 'smoothing', 'weight_decay'], [100, 72, 51, 37, 26, 19, 14, 10, 7, 5])

    Raises:
        BilevelError: `class_weight` or `smoothing` is unknown, or the ratio is below 1 or leaves a
            class without images.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        images: Images,
        *,
        ratio: float = 20.0,
        tail_seed: int = 0,
        class_weight: ClassWeights = "positive",
        smoothing: Smoothing = True,
        logit_offset: bool = False,
        batch_size: int | None = 64,
        space: SpaceChanges | None = None,
    ) -> None:
        one_of(("positive", "simplex", False), class_weight=class_weight)
        one_of((True, False, "per_class"), smoothing=smoothing)
        generator = torch.Generator().manual_seed(tail_seed)
        train = long_tailed(images.train, ratio, generator)
        valid = balanced(images.valid, generator)
        self.counts = train[1].bincount()
        self._classes = len(self.counts)
        self._standardize = Standardize(images.mean, images.std)
        self._simplex = class_weight == "simplex"
        self._per_class = smoothing == "per_class"
        super().__init__(network, Space(), train, valid, images.test, batch_size=batch_size)
        domains = self._domains(bool(class_weight), bool(smoothing), logit_offset)
        tuned = Space(**domains).override(space or {})
        self.space = require_within(tuned, {"smoothing": (0.0, 1.0)})

    def _domains(
        self, class_weight: bool, smoothing: bool, logit_offset: bool
    ) -> dict[str, Domain]:
        each = (self._classes,)
        domains: dict[str, Domain] = {}
        if class_weight:
            simplex = Simplex(init=1 / self._classes, shape=each)
            domains["class_weight"] = simplex if self._simplex else Positive(init=1.0, shape=each)
        if smoothing:
            shape = each if self._per_class else ()
            domains["smoothing"] = Interval(low=0.0, high=0.9, init=0.05, shape=shape)
        if logit_offset:
            domains["logit_offset"] = Real(init=0.0, shape=each)
        return domains | {"weight_decay": Positive(init=1e-3, frozen=True)}

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self._standardize(batch[0]),), {}

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        y = batch[1]
        log_p = torch.log_softmax(prediction + hypers.get("logit_offset", 0.0), -1)
        losses = -at(log_p, y)
        if (s := hypers.get("smoothing")) is not None:
            s = at(s, y) if self._per_class else s
            losses = (1 - s) * losses - s * log_p.mean(-1)
        if (weight := hypers.get("class_weight")) is not None:
            losses = losses * at(self._classes * weight if self._simplex else weight, y)
        return losses.mean() + 0.5 * (hypers["weight_decay"] * squared_norm(params)).mean()

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return F.cross_entropy(prediction, batch[1])

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        """Return `loss` [B], `accuracy` [B], and `accuracy_c` over the examples of each class c."""
        correct = (prediction.argmax(-1) == batch[1]).to(prediction.dtype)
        by_class = {
            f"{PREFIX}{c}": hits
            for c in range(self._classes)
            if len(hits := correct[batch[1] == c])
        }
        return {
            "loss": F.cross_entropy(prediction, batch[1], reduction="none"),
            "accuracy": correct,
        } | by_class

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the mean and the minimum of the accuracies of the classes in a split."""
        each = [value for name, value in means.items() if name.startswith(PREFIX)]
        return {"balanced_accuracy": sum(each) / len(each), "worst_accuracy": min(each)}

    @classmethod
    def digits(
        cls, hidden: Sequence[int] = (64,), split_seed: int = 0, **options: Any
    ) -> "LossWeights":
        """Return the problem on scikit-learn's digits, with an MLP.

        Args:
            hidden: widths of the hidden layers.
            split_seed: seed of the data split.
            options: other arguments of the class.
        """
        return cls(partial(MLP, [64, *hidden, 10]), load_digits(split_seed), **options)

    @classmethod
    def mnist(
        cls,
        root: str = "data",
        download: bool = True,
        hidden: Sequence[int] = (256,),
        valid_fraction: float = 0.15,
        *,
        ratio: float = 100.0,
        **options: Any,
    ) -> "LossWeights":
        """Return the problem on MNIST, with the network of `digits`."""
        images = load_mnist(root, download, valid_fraction)
        return cls(partial(MLP, [784, *hidden, 10]), images, ratio=ratio, **options)


PREFIX = "accuracy_"


def at(leaf: Float[Tensor, "*batch classes"], y: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return the entry of each example's class, from one row for all or from a row per example.

    Example:
        >>> at(torch.tensor([0.5, 2.0]), torch.tensor([1, 1, 0])).tolist()
        [2.0, 2.0, 0.5]
    """
    return leaf[y] if leaf.ndim == 1 else leaf.gather(-1, y[:, None])[:, 0]
