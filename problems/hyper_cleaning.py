"""Data hyper-cleaning: find wrong labels by tuning a weight per training example."""

from collections.abc import Callable, Sequence
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
from bilevel.problems.datasets.label_noise import Noise, corrupt
from bilevel.problems.datasets.labelled_images import Images, first_examples
from bilevel.problems.datasets.standard_images import load_digits, load_mnist
from bilevel.problems.datasets.standardize import Standardize
from bilevel.problems.networks.mlp import MLP
from bilevel.problems.space_checks import SpaceChanges, require_per_batch, require_within


@final
class HyperCleaning(ModuleProblem):
    """Cross-entropy with a weight per training example, on labels of which a part is wrong.

        L_T(λ, w) = mean over training examples of λ_i CE(f(x_i; w), ỹ_i) + ½ weight_decay ‖w‖²
        L_V(w)    = mean over validation examples of CE(f(x; w), y)

    with λ_i in (0, 1). Validation labels are right. A training batch is (images, labels ỹ,
    indices i), so each example gets its own weight. The hyperparameter `example_weight` is [n] and
    perturbed per batch; `weight_decay` is frozen unless `space` changes it.

    Weights start at ½, where the sigmoid is steepest. The bound Σ_i λ_i ≤ R of the source is left
    out: R is one more hyperparameter, and u has no constraint to project on.

    Args:
        network: makes a module that maps images to logits.
        images: clean data; this class corrupts the training labels.
        rate: fraction of wrong training labels; exactly round(rate · n) labels are wrong.
        noise: `uniform` draws any other class; `pairwise` takes class c + 1, and class 0 after the
            last one.
        noise_seed: seed of the wrong examples and their classes.
        train_size: number of training examples, the first ones; None keeps all.
        valid_size: number of validation examples, the first ones; None keeps all.
        oracle: fix the weights at the truth, 1 for right and 0 for wrong labels; this trains on the
            right labels only.
        batch_size: number of examples in a batch of training and of validation; None takes a whole
            split.
        space: changes of the space, as in `Space.override`.

    Attributes:
        corrupted: [n], true for wrong training labels.

    Source: Franceschi, Donini, Frasconi & Pontil, ICML 2017, section 5.1; pairwise noise: Han et
    al., NeurIPS 2018.

    Example:
        >>> problem = HyperCleaning.digits(rate=0.5)
        >>> problem.space["example_weight"].shape, int(problem.corrupted.sum())
        ((1078,), 539)

    Raises:
        BilevelError: the rate is outside [0, 1), the noise is unknown, or a size exceeds the number
            of examples.
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
        space: SpaceChanges | None = None,
    ) -> None:
        (x, labels), valid, test, *_ = first_examples(images, train_size, valid_size)
        generator = torch.Generator().manual_seed(noise_seed)
        given, self.corrupted = corrupt(labels, rate, noise, generator)
        self._standardize = Standardize(images.mean, images.std)
        train = (x, given, torch.arange(len(labels)))
        super().__init__(network, Space(), train, valid, test, batch_size=batch_size)
        truth = (~self.corrupted).double().tolist() if oracle else 0.5
        weight = Interval(
            low=0.0, high=1.0, init=truth, shape=(len(labels),), per_example=False, frozen=oracle
        )
        decay = Positive(init=1e-3, frozen=True)
        tuned = Space(example_weight=weight, weight_decay=decay).override(space or {})
        require_within(tuned, {"example_weight": (0.0, 1.0)})
        self.space = require_per_batch(tuned, {"example_weight": "is a vector over all examples"})

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self._standardize(batch[0]),), {}

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
        """Return cross-entropy `loss` [B] and `accuracy` [B], without weights.

        In the training split they refer to the corrupted labels.
        """
        correct = prediction.argmax(-1) == batch[1]
        return {
            "loss": F.cross_entropy(prediction, batch[1], reduction="none"),
            "accuracy": correct.to(prediction.dtype),
        }

    def exact(self, hypers: Hypers) -> Metrics:
        """Return how well the weights separate wrong labels from right ones: see `detection`.

        The result is {} if no label or every label is wrong.
        """
        weight = hypers["example_weight"].detach()
        corrupted = self.corrupted.to(weight.device)
        if not 0 < int(corrupted.sum()) < len(weight):
            return {}
        return detection(-weight, corrupted, weight < 0.5)

    @classmethod
    def digits(
        cls, hidden: Sequence[int] = (), split_seed: int = 0, **options: Any
    ) -> "HyperCleaning":
        """Return the problem on scikit-learn's digits, with an MLP.

        Without hidden layers the MLP is softmax regression, as in the source.

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
        hidden: Sequence[int] = (),
        *,
        train_size: int | None = 5000,
        valid_size: int | None = 5000,
        **options: Any,
    ) -> "HyperCleaning":
        """Return the problem on MNIST with 5,000 training and 5,000 validation images.

        The sizes are those of the source; the network is that of `digits`.
        """
        return cls(
            partial(MLP, [784, *hidden, 10]),
            load_mnist(root, download),
            train_size=train_size,
            valid_size=valid_size,
            **options,
        )


def detection(
    score: Float[Tensor, " n"], positive: Bool[Tensor, " n"], found: Bool[Tensor, " n"]
) -> Metrics:
    """Return measures of a detector, [] each.

        precision = TP/(TP + FP),    recall = TP/(TP + FN),    f1 = 2 TP/(2 TP + FP + FN)
        roc_auc = P(score of a positive > of a negative) + ½ P(equal)
        average_precision = Σ_k (R_k − R_{k−1}) P_k

    The first line rates `found`. The others rate `score` and need no threshold; k goes through the
    distinct scores from the top. If nothing is found, the precision is 0.

    Args:
        score: larger values mean that positive is more likely.
        positive: the truth; some entries must be true, and some false.
        found: entries that the detector declares positive.

    Example:
        >>> score = torch.tensor([3.0, 2.0, 1.0, 0.0])
        >>> positive = torch.tensor([True, False, True, False])
        >>> measures = detection(score, positive, score > 1.5)
        >>> {name: round(value.item(), 3) for name, value in measures.items()}
        {'precision': 0.5, 'recall': 0.5, 'f1': 0.5, 'roc_auc': 0.75, 'average_precision': 0.833}
    """
    positives, declared = positive.sum().double(), found.sum()
    hits = (found & positive).sum()
    # The negated scores ascend, so level 0 is the highest score.
    _, level, size = torch.unique(-score, return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(size), dtype=torch.float64, device=score.device)
    true = zeros.index_add(0, level, positive.double())
    true_above, all_above = true.cumsum(0), size.cumsum(0)
    false_below = (len(score) - positives) - (all_above - true_above)
    ranked = (true * (false_below + 0.5 * (size - true))).sum()
    return {
        "precision": hits / declared.clamp_min(1),
        "recall": hits / positives,
        "f1": 2 * hits / (declared + positives),
        "roc_auc": ranked / (positives * (len(score) - positives)),
        "average_precision": (true / positives * true_above / all_above).sum(),
    }
