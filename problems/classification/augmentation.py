"""Tuned augmentation: the strengths, which are hyperparameters, and the draws that they scale."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from bilevel import BilevelError, Domain, Hypers, Integer, Interval, Space
from bilevel.problems.classification import image_transforms
from bilevel.problems.datasets.image_files import ImageFiles
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.standardize import PerChannel
from bilevel.problems.space_checks import within
from bilevel.text import near

Operation: TypeAlias = Literal["affine", "colour", "cutout"]

OPERATIONS: Mapping[str, tuple[str, ...]] = {
    "affine": ("degrees", "translate", "scale", "shear"),
    "colour": ("brightness", "contrast", "saturation", "hue"),
    "cutout": ("cutout_holes", "cutout_length"),
}
"""The operations, in the order in which they are applied, and their strengths."""

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
"""Upper end of the interval and initial value (the paper's), and the greatest strength that means something."""

MOST_HOLES = 100


def strengths(images: Images | ImageFiles, operations: Sequence[Operation]) -> dict[str, Domain]:
    """The strengths of the operations by name, with the ranges and initial values of the paper's experiments.

    Images of one channel have no saturation and no hue. The side of a cutout is 2 to 24, from 4, for images of 28 to 32 pixels,
    and in proportion for others. A strength of cutout is rounded and has no derivative; the others scale draws that do not
    depend on them, and have one.

    Args:
        images: of which the shape is read.
        operations: any of `affine`, `colour` and `cutout`.

    Example:
        >>> from bilevel.problems.datasets import standard_images
        >>> list(strengths(standard_images.load_digits(), ["colour", "cutout"]))
        ['brightness', 'contrast', 'cutout_holes', 'cutout_length']

    Raises:
        BilevelError: an unknown operation, or images that an operation cannot work on.

    Source: Bae & Grosse, NeurIPS 2020, the CIFAR-10 experiments of the official code.
    """
    if isinstance(operations, str) or not isinstance(operations, Sequence):
        raise BilevelError(
            f"augment={operations!r} is no list of operations; write augment=[{', '.join(OPERATIONS)}], or fewer"
        )
    for operation in operations:
        if operation not in OPERATIONS:
            raise BilevelError(
                f"augment={operation!r}{near(str(operation), OPERATIONS)} is none of {', '.join(OPERATIONS)}; choose of these"
            )
    channels, *size = images.shape
    if "colour" in operations and channels not in (1, 3):
        raise BilevelError(
            f"images of {channels} channels have no known colours; leave colour out of augment"
        )
    if "cutout" in operations and min(size) < 4:
        raise BilevelError(
            f"holes would cover most of {size[0]} × {size[1]} pixels; leave cutout out of augment"
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
    """Images at strengths λ: every image with draws of its own, none of which depends on λ.

    With v uniform on (−1, 1), drawn anew for every image and parameter: turned by degrees · v, moved by translate · v of the
    width and of the height, scaled by 1 + scale · v, sheared along x by shear · v; brightness, contrast and saturation by a
    factor 1 + λ v, in this order, the hue by hue · v turns; then holes of the mean colour. torchvision's `RandomAffine` and
    `ColorJitter` draw alike, but for whole pixels of translation and a random order of the colour operations.

    Args:
        space: with those of the strengths that are wanted.
        images: what they are of.
        flip: whether half of the images are mirrored left to right beforehand.

    Raises:
        BilevelError: strengths that mean nothing, or a hole longer than the images.
    """

    def __init__(self, space: Space, images: Images | ImageFiles, *, flip: bool = False) -> None:
        self.flip = flip
        self._affine, self._colour, self._cutout = (
            OPERATIONS[name][0] in space for name in OPERATIONS
        )
        self._mean, self._white = PerChannel(images.mean), images.brightest
        most = {name: limit for name, (_, _, limit) in STRENGTHS.items()} | {
            "cutout_holes": MOST_HOLES
        }
        if self._cutout:
            most["cutout_length"] = min(images.shape[1:])
        size = " × ".join(map(str, images.shape[1:]))
        within(space, {name: (0.0, high) for name, high in most.items()}, f"with {size} pixels")
        if self._cutout:
            holes = space["cutout_holes"]
            assert isinstance(
                holes, Interval
            )  # `strengths` made it, and no change of a field makes another
            self._holes = int(holes.high)

    def __call__(self, hypers: Hypers, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """X [B, C, H, W], pixels as they are stored, after all of it; strengths are [] or [B].

        Args:
            hypers: λ by name.
            x: images.
            generator: on the device of x; it is drawn from alike whatever the strengths are.
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
