"""Transforms of a batch of images with separate parameters per image, on the device of the images.

The functions are pure; `bilevel.problems.classification.augmentation` draws the parameters. Images
are [B, C, H, W]; a parameter is [B], or [] for all images. Conventions are those of
`torchvision.transforms.functional`, which takes one number for all images; the functions agree with
it image by image. All functions except `cutout` and `flip` have a derivative in their parameters
almost everywhere.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from bilevel import BilevelError, along_examples

Images = Float[Tensor, "batch channels height width"]
PerImage = Float[Tensor, ""] | Float[Tensor, " batch"]


def affine(
    x: Images, degrees: PerImage, shift: Float[Tensor, "batch 2"], scale: PerImage, shear: PerImage
) -> Images:
    """Shear, scale and rotate images about their center, and then move them.

        M = scale · R(degrees) · [[1, −tan shear], [0, 1]],    out(p) = x(M⁻¹(p − shift))

    p is measured from the center. Interpolation is bilinear; pixels from outside are black.

    Args:
        x: images.
        degrees: angle of the rotation; positive is clockwise.
        shift: (x, y) as fractions of width and height; positive is right and down.
        scale: positive factor.
        shear: angle in degrees, along x.

    Example:
        >>> zero, one, shift = torch.tensor(0.0), torch.tensor(1.0), torch.tensor([[0.5, 0.0]])
        >>> affine(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), zero, shift, one, zero)
        tensor([[[[0., 1.], [0., 3.]]]])
    """
    height, width = x.shape[-2:]
    angle, slope = torch.deg2rad(degrees), torch.tan(torch.deg2rad(shear))
    cos, sin = torch.cos(angle), torch.sin(angle)
    entries = ((cos - sin * slope) / scale, (sin + cos * slope) / scale, -sin / scale, cos / scale)
    a, b, c, d = (entry.expand(len(x)) for entry in entries)
    # grid_sample measures in half widths and half heights.
    b, c = b * (height / width), c * (width / height)
    dx, dy = 2 * shift[:, 0], 2 * shift[:, 1]
    theta = (
        torch.stack([a, b, -(a * dx + b * dy), c, d, -(c * dx + d * dy)], dim=1)
        .view(-1, 2, 3)
        .to(x.dtype)
    )
    return F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False
    )


def brightness(x: Images, factor: PerImage, white: float = 1.0) -> Images:
    """Return factor · x, clamped at `white`."""
    return (along_examples(factor, x).to(x.dtype) * x).clamp(0, white)


def contrast(x: Images, factor: PerImage, white: float = 1.0) -> Images:
    """Return factor · x + (1 − factor) · m with the mean grey m, clamped to [0, `white`]."""
    return _blend(x, grey(x).mean((1, 2, 3), keepdim=True), factor, white)


def saturation(x: Images, factor: PerImage, white: float = 1.0) -> Images:
    """Return factor · x + (1 − factor) · grey(x), clamped to [0, `white`].

    Raises:
        BilevelError: the images have not three channels.
    """
    _three_channels(x, "saturation")
    return _blend(x, grey(x), factor, white)


def hue(x: Images, turns: PerImage) -> Images:
    """Move the hue of every pixel by `turns` of the color circle, at the same value and saturation.

    With value v = max(r, g, b), chroma c = v − min(r, g, b) and the hue h in sixths of the circle,

        channel = v − c · clamp(2 − |k|, 0, 1),    k = h + 6 turns + n

    where k is brought to [−3, 3], and n = 3, 1, −1 for r, g, b.

    Raises:
        BilevelError: the images have not three channels.
    """
    _three_channels(x, "hue")
    r, g, b = x.split(1, dim=1)
    v, least = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    c = v - least
    over = torch.where(c > 0, c, 1).reciprocal()  # grey has no hue, and c = 0 hides this value
    h = torch.where(
        v == r, (g - b) * over, torch.where(v == g, 2 + (b - r) * over, 4 + (r - g) * over)
    )
    k = (
        h
        + 6 * along_examples(turns, x).to(x.dtype)
        + torch.arange(3, -2, -2, device=x.device).view(3, 1, 1)
    )
    k = k - 6 * torch.round(k / 6)
    return v - c * (2 - k.abs()).clamp(0, 1)


def grey(x: Images) -> Float[Tensor, "batch 1 height width"]:
    """Return the luma 0.2989 r + 0.587 g + 0.114 b; images of one channel do not change."""
    if x.shape[1] == 1:
        return x
    _three_channels(x, "grey")
    r, g, b = x.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def cutout(
    x: Images,
    holes: PerImage,
    length: PerImage,
    centres: Float[Tensor, "batch most 2"],
    fill: float | Tensor = 0.0,
) -> Images:
    """Fill the first `holes` of the squares at `centres`, whose sides are `length`, with `fill`.

    A square ends at the border of the image.

    Source: DeVries & Taylor, 2017 (arXiv 1708.04552). A center there is as likely at the border as
    anywhere; the sides there are 2 ⌊length/2⌋.

    Args:
        x: images.
        holes: whole numbers from 0 to `most`.
        length: whole numbers of pixels; 0 leaves no hole.
        centres: (y, x) as fractions of height and width, in [0, 1).
        fill: value of a pixel in a hole.

    Example:
        >>> holes, length = torch.tensor(1.0), torch.tensor(2.0)
        >>> centres = torch.tensor([[[0.5, 0.5], [0.0, 0.0]]])
        >>> cutout(torch.ones(1, 1, 3, 4), holes, length, centres)
        tensor([[[[1., 0., 0., 1.], [1., 0., 0., 1.], [1., 1., 1., 1.]]]])
    """
    side = length.reshape(-1, 1, 1).to(x.dtype)

    def within(size: int, centre: Tensor) -> Tensor:
        first = (centre * size).floor()[..., None] - (side / 2).floor()
        at = torch.arange(size, device=x.device, dtype=x.dtype)
        return ((at >= first) & (at < first + side)).to(x.dtype)

    there = torch.arange(centres.shape[1], device=x.device) < holes.reshape(-1, 1)
    rows = within(x.shape[2], centres[..., 0]) * there[..., None]
    # The number of holes that cover a pixel, which needs less memory than [B, most, H, W].
    hole = rows.mT @ within(x.shape[3], centres[..., 1])
    return torch.where(hole[:, None] > 0, fill, x)


def flip(x: Images, where: Bool[Tensor, " batch"]) -> Images:
    """Mirror the chosen images left to right."""
    return torch.where(along_examples(where, x), x.flip(-1), x)


def _blend(x: Tensor, other: Tensor, factor: Tensor, white: float) -> Tensor:
    return torch.lerp(other, x, along_examples(factor, x).to(x.dtype)).clamp(0, white)


def _three_channels(x: Tensor, what: str) -> None:
    if x.shape[1] != 3:
        raise BilevelError(
            f"{what} needs images with red, green and blue, and these have {x.shape[1]} channels; "
            "remove it"
        )
