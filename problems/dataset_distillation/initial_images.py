"""Initial values of the learned images."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.standardize import Standardize
from bilevel.validate import wrong

Start: TypeAlias = Literal["real", "mean", "noise"]


def initial_images(
    images: Images, per_class: int, start: Start, generator: torch.Generator
) -> Float[Tensor, "n channels height width"]:
    """Return the initial learned images, class by class, standardized, in float64.

    Args:
        images: the real data.
        per_class: number of images per class.
        start: `real`: random training images of each class; `mean`: means of random parts of each
            class; `noise`: N(0, 1).
        generator: source of the draws.

    Raises:
        BilevelError: `per_class` exceeds the number of images of a class.
    """
    pixels, labels = images.train
    if start == "noise":
        count = per_class * (int(labels.max()) + 1)
        return torch.randn(count, *pixels.shape[1:], generator=generator, dtype=torch.float64)
    chosen = []
    for label in range(int(labels.max()) + 1):
        own = pixels[labels == label].double()
        if len(own) < per_class:
            reason = f"exceeds the {len(own)} images of class {label}"
            raise wrong("per_class", per_class, reason, "lower it, or set start=noise")
        own = own[torch.randperm(len(own), generator=generator)]
        parts = own[:per_class].split(1) if start == "real" else own.tensor_split(per_class)
        chosen += [part.mean(0) for part in parts]
    return Standardize(images.mean, images.std)(torch.stack(chosen))
