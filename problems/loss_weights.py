"""What each class counts for in training, and how far its labels are smoothed, tuned on a long-tailed set of images."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bilevel import (
    Batch,
    BilevelError,
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
from bilevel.problems.datasets import standard_images
from bilevel.problems.datasets.class_balance import balanced, long_tailed
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.standardize import Standardize
from bilevel.problems.networks.mlp import MLP
from bilevel.problems.space_checks import within

ClassWeights: TypeAlias = Literal["positive", "simplex", False]
Smoothing: TypeAlias = bool | Literal["per_class"]


@final
class LossWeights(ModuleProblem):
    """Cross-entropy with a weight per class, label smoothing and, where asked for, an offset per class; all tuned.

        L_T = mean over examples of c_y [(1 − s) CE(f + a, y) + s (1/C) Σ_k CE(f + a, k)] + ½ weight_decay ‖w‖²
        L_V = mean over examples of CE(f, y)

    The training split is long-tailed, the validation split balanced. Hyperparameters, each one per example if drawn so:
    `class_weight` c [C], `smoothing` s in (0, 0.9), [] or [C], and `logit_offset` a [C]. `weight_decay` is frozen unless
    `space` says otherwise. A network that fits every training label hardly feels c, but does feel a, which shifts margins.

    Args:
        network: makes a module that maps images to logits.
        images: data; see `long_tailed` and `balanced` for what is made of them here.
        ratio: the images of the commonest class to those of the rarest in training.
        tail_seed: which images are kept.
        class_weight: `positive`, each above zero and 1 at first; `simplex`, C times a point of the simplex, whose mean stays 1
            and which is perturbed per batch; or false for none.
        smoothing: one rate for all (true), `per_class`, or false for none.
        logit_offset: whether there is one.
        batch_size: of training and of validation; None takes a whole split.
        space: changes to the space, as in `Space.override`.

    Attributes:
        counts: [C], the training images of each class.

    Source: Li et al., NeurIPS 2021 (class-wise losses as a bilevel problem); Müller et al., NeurIPS 2019 (smoothing);
        Menon et al., ICLR 2021 (offsets).

    Example:
        >>> problem = LossWeights.digits(ratio=20)
        >>> list(problem.space), problem.counts.tolist()
        (['class_weight', 'smoothing', 'weight_decay'], [100, 72, 51, 37, 26, 19, 14, 10, 7, 5])

    Raises:
        BilevelError: an unknown kind of weights or of smoothing, or a ratio below 1 or that leaves a class without images.
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
        space: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if class_weight not in ("positive", "simplex", False):
            raise BilevelError(
                f"class_weight={class_weight!r} is none of positive, simplex and false; choose one of these"
            )
        if smoothing not in (True, False, "per_class"):
            raise BilevelError(
                f"smoothing={smoothing!r} is none of true, false and per_class; choose one of these"
            )
        generator = torch.Generator().manual_seed(tail_seed)
        train, valid = (
            long_tailed(images.train, ratio, generator),
            balanced(images.valid, generator),
        )
        self.counts = train[1].bincount()
        self._classes, self._seen = len(self.counts), Standardize(images.mean, images.std)
        self._simplex, self._per_class = class_weight == "simplex", smoothing == "per_class"
        super().__init__(network, Space(), train, valid, images.test, batch_size=batch_size)
        each = (self._classes,)
        domains: dict[str, Domain] = {}
        if class_weight:
            simplex = Simplex(init=1 / self._classes, shape=each)
            domains["class_weight"] = simplex if self._simplex else Positive(init=1.0, shape=each)
        if smoothing:
            domains["smoothing"] = Interval(
                low=0.0, high=0.9, init=0.05, shape=each if self._per_class else ()
            )
        if logit_offset:
            domains["logit_offset"] = Real(init=0.0, shape=each)
        domains["weight_decay"] = Positive(init=1e-3, frozen=True)
        self.space = within(Space(**domains).override(space or {}), {"smoothing": (0.0, 1.0)})

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self._seen(batch[0]),), {}

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
        """Cross-entropy `loss` [B], `accuracy` [B], and the latter over the examples of each class, `accuracy_0` and so on."""
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
        """The mean of the classes' accuracies and the least of them, over the classes that the split has."""
        each = [value for name, value in means.items() if name.startswith(PREFIX)]
        return {"balanced_accuracy": sum(each) / len(each), "worst_accuracy": min(each)}

    @classmethod
    def digits(
        cls, hidden: Sequence[int] = (64,), split_seed: int = 0, **options: Any
    ) -> "LossWeights":
        """scikit-learn's digits with a long tail, and an MLP.

        Args:
            hidden: widths of its hidden layers.
            split_seed: of the data.
            options: as of the class.
        """
        return cls(
            partial(MLP, [64, *hidden, 10]), standard_images.load_digits(split_seed), **options
        )

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
        """MNIST with a long tail; the rest as `digits`."""
        return cls(
            partial(MLP, [784, *hidden, 10]),
            standard_images.load_mnist(root, download, valid_fraction),
            ratio=ratio,
            **options,
        )


PREFIX = "accuracy_"


def at(leaf: Float[Tensor, "*batch classes"], y: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The entry of each example's own class, of one row for all or of a row for each.

    Example:
        >>> at(torch.tensor([0.5, 2.0]), torch.tensor([1, 1, 0])).tolist()
        [2.0, 2.0, 0.5]
    """
    return leaf[y] if leaf.ndim == 1 else leaf.gather(-1, y[:, None])[:, 0]
