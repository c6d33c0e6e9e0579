"""Dataset distillation: the hyperparameters are a few images that a network learns from instead of the real ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bilevel import (
    Batch,
    BilevelError,
    Data,
    Domain,
    Hypers,
    Metrics,
    ModuleProblem,
    Params,
    Positive,
    Prediction,
    Real,
    Simplex,
    Solution,
    Space,
    TensorStream,
    squared_norm,
)
from bilevel.params import to_device
from bilevel.problems.dataset_distillation.initial_images import Start, starting_images
from bilevel.problems.datasets import standard_images
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.standardize import Standardize
from bilevel.problems.networks.mlp import MLP
from bilevel.problems.space_checks import shared
from bilevel.text import near

Loss: TypeAlias = Literal["cross_entropy", "squared"]

CONFIDENCE = 0.9
"""What a learned label gives its own class at the start; inside the simplex, where its coordinates are finite."""


@final
class Distillation(ModuleProblem):
    """A network that is trained on k learned images per class shall do well on real ones.

        L_T(λ, w) = mean over learned images x̃_i of ℓ(f(x̃_i; w), ỹ_i) + ½ weight_decay ‖w‖²
        L_V(w)    = mean over real images of ℓ(f(x; w), y)

    `images` [k·C, channels, height, width] are λ, in the units that the network sees, (pixel − mean)/std. `labels` [k·C, C] are
    part of it too where `soft_labels`. `weight_decay` is frozen, unless `space` thaws it: with it, the inner problem of a
    network without hidden layers has one minimum, and w*(λ) is a function.

    A training batch is all learned images, which it names by their index; k·C of them are counted as examples. L_V is descended
    on the real training images, and evaluated (and the best step chosen) on the real validation images.

    Args:
        network: makes a module from images to C outputs.
        images: the real data.
        per_class: k.
        start: where λ begins: `real` images of each class, drawn at random, the `mean` of k random parts of each class, or
            `noise` N(0, 1).
        start_seed: of those draws.
        soft_labels: whether labels are learned as well, as distributions; they begin at 0.9 for the class of the image.
        loss: ℓ: `cross_entropy`, or `squared`: ½ ‖f − ỹ‖², by which a network without hidden layers has w*(λ) in closed form.
        weight_decay: its value.
        batch_size: of real images; None takes all.
        space: changes to the space, as in `Space.override`.

    Source: Wang, Zhu, Torralba & Efros, 2018 (arXiv 1811.10959); by implicit differentiation: Lorraine, Vicol & Duvenaud,
    AISTATS 2020, section 5.3.

    Raises:
        BilevelError: an unknown `start` or `loss`, or more images per class than a class has.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        images: Images,
        *,
        per_class: int = 1,
        start: Start = "real",
        start_seed: int = 0,
        soft_labels: bool = False,
        loss: Loss = "cross_entropy",
        weight_decay: float = 0.01,
        batch_size: int | None = 256,
        space: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        _check("start", start, ("real", "mean", "noise"))
        _check("loss", loss, ("cross_entropy", "squared"))
        self.seen, self._loss, self.soft_labels = (
            Standardize(images.mean, images.std),
            loss,
            soft_labels,
        )
        self.classes = int(images.train[1].max()) + 1
        self.labels = torch.arange(self.classes).repeat_interleave(_at_least_one(per_class))
        super().__init__(network, Space(), *images[:3], batch_size=batch_size)
        first = starting_images(images, per_class, start, torch.Generator().manual_seed(start_seed))
        domains: dict[str, Domain] = {
            "images": Real(init=first.tolist(), shape=tuple(first.shape), per_example=False)
        }
        if soft_labels:
            rest = (1 - CONFIDENCE) / (self.classes - 1)
            labels = rest + (CONFIDENCE - rest) * F.one_hot(self.labels, self.classes).double()
            domains["labels"] = Simplex(init=labels.tolist(), shape=tuple(labels.shape))
        domains["weight_decay"] = Positive(init=weight_decay, per_example=False, frozen=True)
        self.space = shared(
            Space(**domains).override(space or {}), {"images": "are the training data"}
        )

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        train, valid, test = (
            None if s is None else {"image": s[0], "label": s[1]} for s in self._splits
        )
        learned = {"index": torch.arange(len(self.labels)), "label": self.labels}
        return Data(
            TensorStream(learned, None, generator, device=device),
            Apart(train, self.batch_size, generator, valid, device=device),
            None if test is None else TensorStream(test, 1, generator, device=device, name="test"),
        )

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Learned images where the batch names them, else its real ones."""
        images = hypers["images"]
        return (
            images[batch["index"]]
            if "index" in batch
            else self.seen(batch["image"]).to(images.dtype),
        ), {}

    def pixels(self, hypers: Hypers) -> Float[Tensor, "n channels height width"]:
        """The learned images, in the units of the stored ones."""
        return self.seen.inverse(hypers["images"])

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        penalty = 0.5 * hypers["weight_decay"] * squared_norm(params)
        return self._losses(prediction, self._targets(hypers, batch)).mean() + penalty

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return self._losses(prediction, batch["label"]).mean()

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        """ℓ as `loss` [B], against the learned labels on learned images, and `accuracy` [B]."""
        correct = prediction.argmax(-1) == batch["label"]
        return {
            "loss": self._losses(prediction, self._targets(hypers, batch)),
            "accuracy": correct.to(prediction.dtype),
        }

    def _targets(self, hypers: Hypers, batch: Batch) -> Tensor:
        return (
            hypers["labels"][batch["index"]]
            if self.soft_labels and "index" in batch
            else batch["label"]
        )

    def _losses(self, prediction: Tensor, targets: Tensor) -> Float[Tensor, " batch"]:
        """The loss ℓ of each, against classes [B] or distributions [B, C]."""
        if self._loss == "cross_entropy":
            return F.cross_entropy(prediction, targets, reduction="none")
        if targets.ndim == 1:
            targets = F.one_hot(targets, self.classes)
        return 0.5 * (prediction - targets).square().sum(-1)

    def retrained(
        self,
        hypers: Hypers,
        generator: torch.Generator,
        *,
        on: Batch | None = None,
        steps: int = 1000,
        lr: float = 0.05,
        momentum: float = 0.9,
    ) -> Solution:
        """What is learned of λ is worth what a fresh network learns of it: another w, trained on it alone, on its device.

        Args:
            hypers: λ.
            generator: draws the initial w, and what the network draws in training; on the CPU.
            on: a batch to train on instead: {"image", "label"} of real images is training on them.
            steps: of gradient descent on the whole set.
            lr: its step size.
            momentum: its momentum.
        """
        device = hypers["images"].device
        params, carry = to_device(self.init(generator), device)
        learned = {"index": torch.arange(len(self.labels)), "label": self.labels}
        batch = to_device(learned if on is None else on, device)
        draws = torch.Generator(device).manual_seed(generator.initial_seed())
        leaves = [p.requires_grad_() for p in params.values()]
        optimizer = torch.optim.SGD(leaves, lr=lr, momentum=momentum)
        constants = {name: leaf.detach() for name, leaf in hypers.items()}
        for _ in range(steps):
            loss, carry = self.inner_loss(constants, params, carry, batch, draws)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            carry = {name: t.detach() for name, t in carry.items()}
        return Solution(constants, {name: p.detach() for name, p in params.items()}, carry)


class Apart(TensorStream):
    """Batches of one set of examples to descend on, and another set to be evaluated on."""

    def __init__(
        self,
        tensors: Any,
        batch_size: int | None,
        generator: torch.Generator,
        held_out: Any,
        **options: Any,
    ) -> None:
        super().__init__(tensors, batch_size, generator, name="real train", **options)
        self.held_out = TensorStream(held_out, 1, generator, name="valid", **options)

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        return self.held_out.once(limit)


def distillation(
    dataset: Literal["digits", "mnist"] = "digits",
    root: str = "data",
    download: bool = True,
    hidden: Sequence[int] = (),
    **options: Any,
) -> Distillation:
    """Digits or MNIST, distilled for an MLP of the given hidden layers; without any, for logistic regression.

    Example:
        >>> distillation(per_class=2).space["images"].shape
        (20, 1, 8, 8)

    Raises:
        BilevelError: an unknown data set, or as `Distillation`.
    """
    _check("dataset", dataset, ("digits", "mnist"))
    images = (
        standard_images.load_digits()
        if dataset == "digits"
        else standard_images.load_mnist(root, download)
    )
    return Distillation(partial(MLP, [images.train[0][0].numel(), *hidden, 10]), images, **options)


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise BilevelError(
            f"{name}={value!r}{near(str(value), known)} is none of {', '.join(known)}; choose one of these"
        )


def _at_least_one(per_class: int) -> int:
    if type(per_class) is not int or per_class < 1:
        raise BilevelError(
            f"per_class={per_class!r} leaves a class without an image; give a whole number, 1 or more"
        )
    return per_class
