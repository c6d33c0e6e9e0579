"""Data hyper-cleaning: labels are corrupted, and a weight per training example, tuned, shall find out which."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bilevel import (
    Batch,
    Hypers,
    Interval,
    Metrics,
    ModuleProblem,
    Params,
    Positive,
    Prediction,
    Space,
    squared_norm,
)
from bilevel.problems.datasets import labelled_images, standard_images
from bilevel.problems.datasets.label_noise import Noise, corrupt
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.standardize import Standardize
from bilevel.problems.networks.mlp import MLP
from bilevel.problems.space_checks import shared, within


@final
class HyperCleaning(ModuleProblem):
    """Cross-entropy with a weight per training example, on labels of which a known part is wrong.

        L_T(λ, w) = mean over training examples of λ_i CE(f(x_i; w), ỹ_i) + ½ weight_decay ‖w‖²,    λ_i in (0, 1)
        L_V(w)    = mean over validation examples of CE(f(x; w), y)

    Validation labels are right. A training batch is (images, labels ỹ, indices i), so that each example meets its own weight.
    The hyperparameter `example_weight` is [n], perturbed per batch; `weight_decay` is frozen unless `space` says otherwise.

    Weights go from ½, where the sigmoid is steepest, and the source's bound on their sum, Σ_i λ_i ≤ R, is left out: R is one
    more hyperparameter, and u has no constraint to project on.

    Args:
        network: makes a module that maps images to logits.
        images: clean data; the training labels are corrupted here.
        rate: the part of the training labels that is made wrong, exactly round(rate · n) of them.
        noise: `uniform` puts any other class, `pairwise` the next one (c + 1, after the last the first).
        noise_seed: which examples, and which classes.
        train_size: how many training examples to keep, the first ones; None for all.
        valid_size: the same of validation.
        oracle: fix the weights at the truth, 1 for right labels and 0 for wrong ones: training on the right ones alone.
        batch_size: of training and of validation; None takes a whole split.
        space: changes to the space, as in `Space.override`.

    Attributes:
        corrupted: [n], which training labels are wrong.

    Source: Franceschi, Donini, Frasconi & Pontil, ICML 2017, section 5.1; pairwise noise: Han et al., NeurIPS 2018.

    Example:
        >>> problem = HyperCleaning.digits(rate=0.5)
        >>> problem.space["example_weight"].shape, int(problem.corrupted.sum())
        ((1078,), 539)

    Raises:
        BilevelError: a rate outside [0, 1), an unknown noise, or more examples than there are.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        images: Images,
        *,
        rate: float = 0.5,
        noise: Noise = "uniform",
        noise_seed: int = 0,
        train_size: int | None = None,
        valid_size: int | None = None,
        oracle: bool = False,
        batch_size: int | None = None,
        space: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        (x, labels), valid, test, *_ = labelled_images.few(images, train_size, valid_size)
        given, self.corrupted = corrupt(
            labels, rate, noise, torch.Generator().manual_seed(noise_seed)
        )
        self._seen = Standardize(images.mean, images.std)
        train = (x, given, torch.arange(len(labels)))
        super().__init__(network, Space(), train, valid, test, batch_size=batch_size)
        truth = (~self.corrupted).double().tolist() if oracle else 0.5
        weight = Interval(
            low=0.0, high=1.0, init=truth, shape=(len(labels),), per_example=False, frozen=oracle
        )
        tuned = Space(
            example_weight=weight, weight_decay=Positive(init=1e-3, frozen=True)
        ).override(space or {})
        self.space = shared(
            within(tuned, {"example_weight": (0.0, 1.0)}),
            {"example_weight": "is a weight for each example"},
        )

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self._seen(batch[0]),), {}

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        _, given, index = batch
        losses = hypers["example_weight"][index] * F.cross_entropy(
            prediction, given, reduction="none"
        )
        return losses.mean() + 0.5 * (hypers["weight_decay"] * squared_norm(params)).mean()

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return F.cross_entropy(prediction, batch[1])

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        """Cross-entropy `loss` [B] and `accuracy` [B], unweighted; those of the training split are of the labels as given."""
        correct = prediction.argmax(-1) == batch[1]
        return {
            "loss": F.cross_entropy(prediction, batch[1], reduction="none"),
            "accuracy": correct.to(prediction.dtype),
        }

    def exact(self, hypers: Hypers) -> Metrics:
        """How well the weights tell wrong labels from right ones, `detection`; {} where none is wrong, or all are."""
        weight, corrupted = (
            hypers["example_weight"].detach(),
            self.corrupted.to(hypers["example_weight"].device),
        )
        return (
            detection(-weight, corrupted, weight < 0.5)
            if 0 < int(self.corrupted.sum()) < len(weight)
            else {}
        )

    @classmethod
    def digits(
        cls,
        hidden: Sequence[int] = (),
        split_seed: int = 0,
        *,
        batch_size: int | None = None,
        **options: Any,
    ) -> "HyperCleaning":
        """scikit-learn's digits and an MLP, by default without hidden layers: softmax regression, as in the source.

        Args:
            hidden: widths of hidden layers.
            split_seed: of the data.
            batch_size: None takes whole splits.
            options: as of the class.
        """
        return cls(
            partial(MLP, [64, *hidden, 10]),
            standard_images.load_digits(split_seed),
            batch_size=batch_size,
            **options,
        )

    @classmethod
    def mnist(
        cls,
        root: str = "data",
        download: bool = True,
        hidden: Sequence[int] = (),
        *,
        train_size: int | None = 5000,
        valid_size: int | None = 5000,
        batch_size: int | None = None,
        **options: Any,
    ) -> "HyperCleaning":
        """MNIST with 5,000 training and 5,000 validation images, as in the source; the rest as `digits`."""
        return cls(
            partial(MLP, [784, *hidden, 10]),
            standard_images.load_mnist(root, download),
            train_size=train_size,
            valid_size=valid_size,
            batch_size=batch_size,
            **options,
        )


def detection(
    score: Float[Tensor, " n"], positive: Bool[Tensor, " n"], found: Bool[Tensor, " n"]
) -> Metrics:
    """Precision, recall and F1 of `found`; and of `score`, which needs no threshold, the areas under two curves, [] each.

        precision = TP/(TP + FP),    recall = TP/(TP + FN),    f1 = 2 TP/(2 TP + FP + FN)
        roc_auc = P(score of a positive > of a negative) + ½ P(equal),    average_precision = Σ_k (R_k − R_{k−1}) P_k

    k goes through the distinct scores from the top. Nothing found counts as precision 0.

    Args:
        score: the higher, the likelier positive.
        positive: the truth; some must be, and some not.
        found: what is declared positive.

    Example:
        >>> score, positive = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([True, False, True, False])
        >>> {name: round(value.item(), 3) for name, value in detection(score, positive, score > 1.5).items()}
        {'precision': 0.5, 'recall': 0.5, 'f1': 0.5, 'roc_auc': 0.75, 'average_precision': 0.833}
    """
    positives, declared = positive.sum().double(), found.sum()
    hits = (found & positive).sum()
    _, level, size = torch.unique(
        -score, return_inverse=True, return_counts=True
    )  # ascending: from the highest score down
    true = torch.zeros(len(size), dtype=torch.float64, device=score.device).index_add(
        0, level, positive.double()
    )
    true_above, all_above = true.cumsum(0), size.cumsum(0)
    false_below = (len(score) - positives) - (all_above - true_above)
    return {
        "precision": hits / declared.clamp_min(1),
        "recall": hits / positives,
        "f1": 2 * hits / (declared + positives),
        "roc_auc": (true * (false_below + 0.5 * (size - true))).sum()
        / (positives * (len(score) - positives)),
        "average_precision": (true / positives * true_above / all_above).sum(),
    }
