"""Building blocks of the networks: dropout sites, normalization, widths and initial values."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

from jaxtyping import Float
from torch import Tensor, nn

from bilevel.validate import one_of, wrong

Norm: TypeAlias = Literal["none", "batch", "group"]

Drop: TypeAlias = Callable[[int, Tensor], Tensor]
"""Maps a dropout site i and its activations x [B, …] to the activations after dropout."""


def keep(site: int, x: Tensor) -> Tensor:
    """Return x: no dropout at any site."""
    return x


def check_widths(**widths: Sequence[Any]) -> None:
    """Raise an error if a layer has no unit; PyTorch accepts such layers, and their output is zero.

    Raises:
        BilevelError: a width is not a whole number of at least 1.
    """
    for name, given in widths.items():
        if not all(type(width) is int and width >= 1 for width in given):
            remedy = "choose 1, 2, … for each"
            raise wrong(name, list(given), "must be whole numbers of at least 1", remedy)


def drop_channels(
    drop: Drop, site: int, x: Float[Tensor, "batch channels *shape"]
) -> Float[Tensor, "batch channels *shape"]:
    """Drop whole channels: multiply x by the dropout of ones [B, C, 1, …]."""
    return x if drop is keep else x * drop(site, x.new_ones(*x.shape[:2], *[1] * (x.ndim - 2)))


def normalization(norm: Norm, channels: int) -> nn.Module:
    """Return the normalization layer called `norm`; the identity for `none`.

    Group norm has 32 groups, as in the paper. It has fewer if a group would have less than two
    channels, or if the division leaves a remainder.

    Source: Wu & He, ECCV 2018, section 4.1.

    Example:
        >>> normalization("group", 64).num_groups, normalization("group", 24).num_groups
        (32, 12)

    Raises:
        BilevelError: the norm is unknown.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        most = max(1, min(32, channels // 2))
        return nn.GroupNorm(max(n for n in range(1, most + 1) if channels % n == 0), channels)
    one_of(get_args(Norm), norm=norm)
    return nn.Identity()


def scaled(widths: Iterable[int], factor: float) -> list[int]:
    """Return widths times a factor, rounded, and at least 1."""
    return [max(1, round(factor * width)) for width in widths]


def he_(convolution: nn.Module) -> None:
    """Initialize a k × k convolution with weights N(0, 2/(k·k·out)) and no bias.

    Activations then keep their size through ReLUs.

    Source: He et al., ICCV 2015, section 2.2, backward case.
    """
    if isinstance(convolution, nn.Conv2d):
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
