"""Augmentation with tuned strengths: the hyperparameters, and the random draws that they scale."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel import BilevelError, Domain, Hypers, Integer, Interval, Space
from bilevel.problems.classification import image_transforms
from bilevel.problems.datasets.image_files import ImageFiles
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.standardize import PerChannel
from bilevel.problems.space_checks import require_within
from bilevel.validate import one_of, wrong

Operation: TypeAlias = Literal["affine", "colour", "cutout"]

OPERATIONS: Mapping[str, tuple[str, ...]] = {
    "affine": ("degrees", "translate", "scale", "shear"),
    "colour": ("brightness", "contrast", "saturation", "hue"),
    "cutout": ("cutout_holes", "cutout_length"),
}
"""The operations in the order of their application, with the names of their strengths."""

STRENGTHS = {
    "degrees": (45.0, 5.0, 180.0),
    "translate": (0.5, 0.05, 1.0),
    "scale": (0.5, 0.05, 0.9),
    "shear": (45.0, 5.0, 80.0),
    "brightness": (1.0, 0.05, 1.0),
    "contrast": (1.0, 0.05, 1.0),
    "saturation": (1.0, 0.05, 1.0),
    "hue": (0.5, 0.05, 0.5),
}
"""Upper end and initial value of each interval, as in the paper, and the largest valid strength."""

MOST_HOLES = 100


def strengths(images: Images | ImageFiles, operations: Sequence[Operation]) -> dict[str, Domain]:
    """Return the strengths of the operations by name.

    Ranges and initial values are those of the experiments of the paper. Images of one channel have
    no saturation and no hue. For images of 28 to 32 pixels, the side of a cutout goes from 2 to 24
    and starts at 4; other images have sides in proportion. The strengths of cutout are rounded and
    have no derivative. The other strengths scale draws that do not depend on them, so they have a
    derivative.

    Args:
        images: images whose shape is read.
        operations: any of `affine`, `colour` and `cutout`.

    Example:
        >>> from bilevel.problems.datasets import load_digits
        >>> list(strengths(load_digits(), ["colour", "cutout"]))
        ['brightness', 'contrast', 'cutout_holes', 'cutout_length']

    Raises:
        BilevelError: an operation is unknown, or the images do not allow it.

    Source: Bae & Grosse, NeurIPS 2020, the CIFAR-10 experiments of the official code.
    """
    if isinstance(operations, str) or not isinstance(operations, Sequence):
        remedy = f"choose from augment=[{', '.join(OPERATIONS)}]"
        raise wrong("augment", operations, "must be a list of operations", remedy)
    for operation in operations:
        one_of(OPERATIONS, augment=operation)
    channels, *size = images.shape
    if "colour" in operations and channels not in (1, 3):
        raise BilevelError(
            f"augment=[colour] needs images of 1 or 3 channels, and these have {channels}; "
            "remove colour from augment"
        )
    if "cutout" in operations and min(size) < 4:
        raise BilevelError(
            f"augment=[cutout] would cover most of {size[0]} × {size[1]} pixels; "
            "remove cutout from augment"
        )
    domains: dict[str, Domain] = {
        name: Interval(low=0.0, high=STRENGTHS[name][0], init=STRENGTHS[name][1])
        for operation in OPERATIONS
        for name in OPERATIONS[operation]
        if operation in operations
        and name in STRENGTHS
        and not (channels == 1 and name in ("saturation", "hue"))
    }
    if "cutout" in operations:
        ratio = min(1, min(size) / 28) * max(1, min(size) / 32)
        domains["cutout_holes"] = Integer(low=0, high=5, init=1.0)
        domains["cutout_length"] = Integer(
            low=int(2 * ratio), high=round(24 * ratio), init=4 * ratio
        )
    return domains


@final
class Augmentation:
    """Augment images at strengths λ.

    The draws v are uniform on (−1, 1), independent of λ, and separate for every image and
    parameter. The operations, in this order:

    - rotate by degrees · v, move by translate · v of the width and of the height, scale by
      1 + scale · v, and shear along x by shear · v;
    - multiply brightness, contrast and saturation by 1 + λ v, and move the hue by hue · v turns;
    - cut out holes, and fill them with the mean color.

    `RandomAffine` and `ColorJitter` of torchvision draw in the same way, with two differences: they
    move by whole pixels, and the order of the color operations is random.

    Args:
        space: space with the strengths of the operations that are used.
        images: images whose shape, mean color and brightest value are read.
        flip: whether half of the images are mirrored left to right first.

    Raises:
        BilevelError: a strength is out of its range, or a hole is longer than the images.
    """

    def __init__(self, space: Space, images: Images | ImageFiles, *, flip: bool = False) -> None:
        self.flip = flip
        self._affine, self._colour, self._cutout = (
            OPERATIONS[name][0] in space for name in OPERATIONS
        )
        self._mean = PerChannel(images.mean)
        self._white = images.brightest
        limits = {name: (0.0, limit) for name, (_, _, limit) in STRENGTHS.items()}
        limits["cutout_holes"] = (0.0, MOST_HOLES)
        if self._cutout:
            limits["cutout_length"] = (0.0, min(images.shape[1:]))
        size = " × ".join(map(str, images.shape[1:]))
        require_within(space, limits, f"for images of {size} pixels")
        if self._cutout:
            holes = space["cutout_holes"]
            assert isinstance(holes, Interval)  # an override changes fields, not the class
            self._holes = int(holes.high)

    def __call__(self, hypers: Hypers, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return augmented images.

        Args:
            hypers: λ by name; strengths are [] or [B].
            x: images [B, C, H, W] with pixels as they are stored.
            generator: generator on the device of x; the number of draws does not depend on λ.
        """
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())

        def uniform(*shape: int) -> Tensor:
            return torch.rand((len(x), *shape), generator=generator, device=x.device, dtype=x.dtype)

        def drawn(name: str) -> Tensor:
            return hypers[name] * (2 * uniform() - 1)

        if self.flip:
            x = image_transforms.flip(x, uniform() < 0.5)
        if self._affine:
            shift = torch.stack([drawn("translate"), drawn("translate")], dim=1)
            x = image_transforms.affine(
                x, drawn("degrees"), shift, 1 + drawn("scale"), drawn("shear")
            )
        if self._colour:
            x = image_transforms.brightness(x, 1 + drawn("brightness"), self._white)
            x = image_transforms.contrast(x, 1 + drawn("contrast"), self._white)
            if x.shape[1] == 3:
                x = image_transforms.saturation(x, 1 + drawn("saturation"), self._white)
                x = image_transforms.hue(x, drawn("hue"))
        if self._cutout:
            centres = uniform(self._holes, 2)
            x = image_transforms.cutout(
                x, hypers["cutout_holes"], hypers["cutout_length"], centres, self._mean.like(x)
            )
        return x
