"""The images at which distillation begins."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import (
    BilevelError,
)
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.standardize import Standardize

Start: TypeAlias = Literal["real", "mean", "noise"]


def starting_images(
    images: Images, per_class: int, start: Start, generator: torch.Generator
) -> Float[Tensor, "n channels height width"]:
    """The images where λ begins, class by class, in float64 and as the network sees them.

    Raises:
        BilevelError: more images per class than a class has.
    """
    pixels, labels = images.train
    if start == "noise":
        count = per_class * (int(labels.max()) + 1)
        return torch.randn(count, *pixels.shape[1:], generator=generator, dtype=torch.float64)
    chosen = []
    for label in range(int(labels.max()) + 1):
        own = pixels[labels == label].double()
        if len(own) < per_class:
            raise BilevelError(
                f"per_class={per_class} real images of class {label} cannot be drawn from {len(own)}; lower it, or start=noise"
            )
        own = own[torch.randperm(len(own), generator=generator)]
        parts = own[:per_class].split(1) if start == "real" else own.tensor_split(per_class)
        chosen += [part.mean(0) for part in parts]
    return Standardize(images.mean, images.std)(torch.stack(chosen))
