"""Dataset distillation: learn a few training images that replace the real ones."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bilevel import (
    Batch,
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
from bilevel.problems.dataset_distillation.initial_images import Start, initial_images
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.standardize import Standardize
from bilevel.problems.space_checks import SpaceChanges, require_per_batch
from bilevel.validate import one_of, whole

Loss: TypeAlias = Literal["cross_entropy", "squared"]

CONFIDENCE = 0.9
"""Initial probability of the class of an image in a learned label; at 1, u would be infinite."""


@final
class Distillation(ModuleProblem):
    """Learn k images per class, such that a network trained on them performs well on real ones.

        L_T(λ, w) = mean over learned images x̃_i of ℓ(f(x̃_i; w), ỹ_i) + ½ weight_decay ‖w‖²
        L_V(w)    = mean over real images of ℓ(f(x; w), y)

    λ holds `images` [k·C, channels, height, width], in the units that the network sees,
    (pixel − mean)/std. With `soft_labels` it also holds `labels` [k·C, C]. `weight_decay` is frozen
    unless `space` changes it. With weight decay, the inner problem of a network without hidden
    layers has one minimum, so w*(λ) is a function.

    A training batch is all learned images, given by their indices; they count as k·C examples. L_V
    is descended on the real training images. It is evaluated, and the best step is chosen, on the
    real validation images.

    Args:
        network: makes a module from images to C outputs.
        images: the real data.
        per_class: k.
        start: initial λ: random `real` images of each class, the `mean` of k random parts of each
            class, or `noise` N(0, 1).
        start_seed: seed of those draws.
        soft_labels: whether labels are learned too, as distributions; they start at 0.9 for the
            class of the image.
        loss: ℓ: `cross_entropy`, or `squared`: ½ ‖f − ỹ‖². With `squared`, a network without hidden
            layers has w*(λ) in closed form.
        weight_decay: value of the weight decay.
        batch_size: number of real images in a batch; None takes all.
        space: changes of the space, as in `Space.override`.

    Source: Wang, Zhu, Torralba & Efros, 2018 (arXiv 1811.10959); by implicit differentiation:
    Lorraine, Vicol & Duvenaud, AISTATS 2020, section 5.3.

    Raises:
        BilevelError: `start` or `loss` is unknown, or `per_class` exceeds the number of images of a
            class.
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
        space: SpaceChanges | None = None,
    ) -> None:
        one_of(("real", "mean", "noise"), start=start)
        one_of(("cross_entropy", "squared"), loss=loss)
        whole(1, per_class=per_class)
        self.standardize = Standardize(images.mean, images.std)
        self.soft_labels = soft_labels
        self.classes = int(images.train[1].max()) + 1
        self.labels = torch.arange(self.classes).repeat_interleave(per_class)
        self._loss = loss
        super().__init__(network, Space(), *images[:3], batch_size=batch_size)
        first = initial_images(images, per_class, start, torch.Generator().manual_seed(start_seed))
        domains: dict[str, Domain] = {
            "images": Real(init=first.tolist(), shape=tuple(first.shape), per_example=False)
        }
        if soft_labels:
            rest = (1 - CONFIDENCE) / (self.classes - 1)
            labels = rest + (CONFIDENCE - rest) * F.one_hot(self.labels, self.classes).double()
            domains["labels"] = Simplex(init=labels.tolist(), shape=tuple(labels.shape))
        domains["weight_decay"] = Positive(init=weight_decay, per_example=False, frozen=True)
        tuned = Space(**domains).override(space or {})
        self.space = require_per_batch(tuned, {"images": "holds the training data"})

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        train, valid, test = (
            None if s is None else {"image": s[0], "label": s[1]} for s in self._splits
        )
        return Data(
            TensorStream(self._learned_batch(), None, generator, device=device),
            HeldOutStream(train, self.batch_size, generator, valid, device=device),
            None if test is None else TensorStream(test, 1, generator, device=device, name="test"),
        )

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return learned images if the batch holds indices, otherwise its real images."""
        images = hypers["images"]
        if "index" in batch:
            return (images[batch["index"]],), {}
        return (self.standardize(batch["image"]).to(images.dtype),), {}

    def pixels(self, hypers: Hypers) -> Float[Tensor, "n channels height width"]:
        """Return the learned images in the units of the stored ones."""
        return self.standardize.inverse(hypers["images"])

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
        """Return ℓ as `loss` [B], and `accuracy` [B]; learned images use their learned labels."""
        correct = prediction.argmax(-1) == batch["label"]
        return {
            "loss": self._losses(prediction, self._targets(hypers, batch)),
            "accuracy": correct.to(prediction.dtype),
        }

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
        """Train a fresh network on the learned images only, on the device of λ.

        Its quality is the quality of λ, because the w of a run depends on the path of λ.

        Args:
            hypers: λ.
            generator: source of the initial w and of the draws in training; on the CPU.
            on: a batch to train on instead, such as {"image", "label"} of real images.
            steps: number of gradient steps on the whole set.
            lr: step size.
            momentum: momentum of the steps.
        """
        device = hypers["images"].device
        params, carry = to_device(self.init(generator), device)
        batch = to_device(self._learned_batch() if on is None else on, device)
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

    def _learned_batch(self) -> dict[str, Tensor]:
        return {"index": torch.arange(len(self.labels)), "label": self.labels}

    def _targets(self, hypers: Hypers, batch: Batch) -> Tensor:
        if self.soft_labels and "index" in batch:
            return hypers["labels"][batch["index"]]
        return batch["label"]

    def _losses(self, prediction: Tensor, targets: Tensor) -> Float[Tensor, " batch"]:
        """Return ℓ of each example, against classes [B] or distributions [B, C]."""
        if self._loss == "cross_entropy":
            return F.cross_entropy(prediction, targets, reduction="none")
        if targets.ndim == 1:
            targets = F.one_hot(targets, self.classes)
        return 0.5 * (prediction - targets).square().sum(-1)


class HeldOutStream(TensorStream):
    """Batches of one set of examples for training, and another set for evaluation."""

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
