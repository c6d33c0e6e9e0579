"""Image classification whose dropout rates, weight decay (one, or one per weight) and augmentation are tuned."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel import (
    Batch,
    BilevelError,
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
from bilevel.problems.classification.augmentation import Augmentation, Operation, strengths
from bilevel.problems.datasets import image_loaders
from bilevel.problems.datasets.image_files import ImageFiles
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.standardize import Standardize
from bilevel.problems.networks.dropout import Kind, named
from bilevel.problems.space_checks import within

Changes: TypeAlias = Mapping[str, Mapping[str, Any]]


WeightDecay: TypeAlias = bool | Literal["per_weight"]


@final
class Classification(ModuleProblem):
    """Cross-entropy, with a dropout rate for each dropout site of the network and a weight decay.

        L_T = mean over examples of CE(f(x; λ, w), y) + ½ weight_decay ‖w‖²,    L_V = mean of CE(f(x; w), y)

    The rates are `input_dropout`, `dropout1`, `dropout2`, … in (0, 0.95). Bernoulli's are sampled with, so that ∂L_T/∂λ exists
    for Gaussian and concrete dropout alone. Augmentation is for training too: x is then the augmented image, with a draw of its
    own in every pass, so that the two passes of Δ-STN see the batch differently augmented, as in the paper's code.

    Args:
        network: makes a module with `forward(x, drop)`, as in `bilevel.problems.networks.building_blocks`.
        images: the data, in memory or in files.
        sites: how many dropout sites the network has.
        weight_decay: whether there is one; or `per_weight`, ½ Σ_i weight_decay_i w_i² with the hyperparameter [m], flat in the
            order of the parameters.
        dropout: `bernoulli`, `gaussian` or `concrete`, as in `bilevel.problems.networks.dropout`.
        temperature: of concrete dropout, 0.1 by default.
        augment: operations of which the strengths are tuned, as in `bilevel.problems.classification.augmentation`.
        flip: whether half of the training images are mirrored left to right.
        channels_last: whether images go to the network with the channels of a pixel side by side in memory, which convolutions
            on recent GPUs are quicker on.
        batch_size: of training and of validation.
        space: changes to the space, as in `Space.override`.

    Raises:
        BilevelError: an unknown `weight_decay`, `dropout` or operation, a temperature of a dropout that has none, or strengths
            that mean nothing.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        images: Images | ImageFiles,
        *,
        sites: int,
        weight_decay: WeightDecay = True,
        dropout: Kind = "bernoulli",
        temperature: float | None = None,
        augment: Sequence[Operation] = (),
        flip: bool = False,
        channels_last: bool = False,
        batch_size: int | None = 128,
        space: Changes | None = None,
    ) -> None:
        if weight_decay not in (True, False, "per_weight"):
            raise BilevelError(
                f"weight_decay={weight_decay!r} is none of true, false and per_weight; choose one of these"
            )
        self._drop, self._per_weight = named(dropout, temperature), weight_decay == "per_weight"
        self._rates = ["input_dropout", *(f"dropout{site}" for site in range(1, sites))][:sites]
        self._seen = Standardize(images.mean, images.std)
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
        self.space = within(tuned, dict.fromkeys(self._rates, (0.0, 1.0)))
        self._augment = Augmentation(self.space, images, flip=flip)
        self._augments, self._white = bool(augment) or flip, images.brightest

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        splits = image_loaders.tensors_or_loaders(self._splits, self.batch_size, device)
        return streams(*splits, batch_size=self.batch_size, device=device, generator=generator)

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = self._augment(hypers, batch[0], generator) if train else batch[0]
        x = self._seen(x).contiguous(memory_format=self._layout)

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
        """`augmented`: a row of training images as they are, and three of the same augmented; nothing without augmentation."""
        if not self._augments:
            return {}
        x = image_loaders.first_images(self._splits[0], 8).to(generator.device)
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        rows = torch.cat([x, *(self._augment(hypers, x, generator) for _ in range(3))])
        return {"augmented": rows / self._white}

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        """Cross-entropy `loss` [B] and `accuracy` [B]."""
        correct = prediction.argmax(-1) == batch[1]
        return {
            "loss": F.cross_entropy(prediction, batch[1], reduction="none"),
            "accuracy": correct.to(prediction.dtype),
        }
