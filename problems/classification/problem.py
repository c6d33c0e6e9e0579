"""Image classification with tuned dropout rates, weight decay and augmentation."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel import (
    Batch,
    Data,
    Domain,
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
from bilevel.data.tensor_stream import streams
from bilevel.dropout.kinds import DropoutKind, dropout_by_name
from bilevel.problems.classification.augmentation import Augmentation, Operation, strengths
from bilevel.problems.datasets.image_files import ImageFiles
from bilevel.problems.datasets.image_loaders import first_images, tensors_or_loaders
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.standardize import Standardize
from bilevel.problems.space_checks import SpaceChanges, require_within
from bilevel.validate import one_of

WeightDecay: TypeAlias = bool | Literal["per_weight"]


@final
class Classification(ModuleProblem):
    """Cross-entropy, with a dropout rate for each dropout site of the network and a weight decay.

        L_T = mean over examples of CE(f(x; λ, w), y) + ½ weight_decay ‖w‖²
        L_V = mean over examples of CE(f(x; w), y)

    The rates are `input_dropout`, `dropout1`, `dropout2`, … in (0, 0.95). A Bernoulli mask is
    sampled, so ∂L_T/∂λ exists for Gaussian and concrete dropout only. Augmentation acts in training
    only; x is then the augmented image. Every pass draws its own augmentation, so the two passes of
    Δ-STN augment a batch differently, as in the code of the paper.

    Args:
        network: makes a module with `forward(x, drop)`, as in `bilevel.problems.networks.mlp`.
        images: the data, in memory or in files.
        sites: number of dropout sites of the network.
        weight_decay: true: one weight decay; false: none; `per_weight`: ½ Σ_i weight_decay_i w_i²
            with the hyperparameter [m], flat in the order of the parameters.
        dropout: `bernoulli`, `gaussian` or `concrete`, as in `bilevel.dropout.kinds`.
        temperature: temperature of concrete dropout, 0.1 by default.
        augment: operations with tuned strengths, as in
            `bilevel.problems.classification.augmentation`.
        flip: whether half of the training images are mirrored left to right.
        channels_last: whether the channels of a pixel are neighbors in memory; convolutions on
            recent GPUs are faster on this layout.
        batch_size: number of examples in a batch of training and of validation.
        space: changes of the space, as in `Space.override`.

    Raises:
        BilevelError: `weight_decay`, `dropout` or an operation is unknown, the temperature does not
            fit the dropout, or a strength is out of its range.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        images: Images | ImageFiles,
        *,
        sites: int,
        weight_decay: WeightDecay = True,
        dropout: DropoutKind = "bernoulli",
        temperature: float | None = None,
        augment: Sequence[Operation] = (),
        flip: bool = False,
        channels_last: bool = False,
        batch_size: int | None = 128,
        space: SpaceChanges | None = None,
    ) -> None:
        one_of((True, False, "per_weight"), weight_decay=weight_decay)
        self._drop = dropout_by_name(dropout, temperature)
        self._per_weight = weight_decay == "per_weight"
        self._rates = ["input_dropout", *(f"dropout{site}" for site in range(1, sites))][:sites]
        self._standardize = Standardize(images.mean, images.std)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        super().__init__(
            network, Space(), images.train, images.valid, images.test, batch_size=batch_size
        )
        rate = Interval(low=0.0, high=0.95, init=0.05, differentiable=dropout != "bernoulli")
        domains: dict[str, Domain] = dict.fromkeys(self._rates, rate)
        if self._per_weight:
            size = sum(p.numel() for p in self._module.parameters() if p.requires_grad)
            domains["weight_decay"] = Positive(init=1e-4, shape=(size,), per_example=False)
        elif weight_decay:
            domains["weight_decay"] = Positive(init=1e-4)
        tuned = Space(**domains, **strengths(images, augment)).override(space or {})
        self.space = require_within(tuned, dict.fromkeys(self._rates, (0.0, 1.0)))
        self._augment = Augmentation(self.space, images, flip=flip)
        self._augments = bool(augment) or flip
        self._white = images.brightest

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        splits = tensors_or_loaders(self._splits, self.batch_size, device)
        return streams(*splits, batch_size=self.batch_size, device=device, generator=generator)

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = self._augment(hypers, batch[0], generator) if train else batch[0]
        x = self._standardize(x).contiguous(memory_format=self._layout)

        def drop(site: int, x: Tensor) -> Tensor:
            return self._drop(x, hypers[self._rates[site]], generator)

        return (x, drop) if train else (x,), {}

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        loss = F.cross_entropy(prediction, batch[1])
        if (decay := hypers.get("weight_decay")) is None:
            return loss
        penalty = squared_norm(params, decay) if self._per_weight else decay * squared_norm(params)
        return loss + 0.5 * penalty.mean()

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return F.cross_entropy(prediction, batch[1])

    def pictures(self, hypers: Hypers, generator: torch.Generator) -> dict[str, Tensor]:
        """Return `augmented`: a row of training images, and three rows of the same ones augmented.

        Without augmentation the result is {}.
        """
        if not self._augments:
            return {}
        x = first_images(self._splits[0], 8).to(generator.device)
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        rows = torch.cat([x, *(self._augment(hypers, x, generator) for _ in range(3))])
        return {"augmented": rows / self._white}

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        """Return cross-entropy `loss` [B] and `accuracy` [B]."""
        correct = prediction.argmax(-1) == batch[1]
        return {
            "loss": F.cross_entropy(prediction, batch[1], reduction="none"),
            "accuracy": correct.to(prediction.dtype),
        }
