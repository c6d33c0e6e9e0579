"""Building blocks of the networks: dropout sites, normalization layers, widths and initial values."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

from jaxtyping import Float
from torch import Tensor, nn

from bilevel import BilevelError
from bilevel.text import near

Norm: TypeAlias = Literal["none", "batch", "group"]

Drop: TypeAlias = Callable[[int, Tensor], Tensor]
"""What happens to the activations x [B, …] at dropout site i: drop(i, x)."""


def keep(site: int, x: Tensor) -> Tensor:
    """No dropout at any site."""
    return x


def check_widths(**widths: Sequence[Any]) -> None:
    """Raise where a layer would have no unit: PyTorch makes such layers, and nothing comes through.

    Raises:
        BilevelError: a width that is no whole number, or below 1.
    """
    for name, given in widths.items():
        if not all(type(width) is int and width >= 1 for width in given):
            raise BilevelError(
                f"{name}={list(given)} makes no network; give whole numbers, 1 or more"
            )


def drop_channels(
    drop: Drop, site: int, x: Float[Tensor, "batch channels *shape"]
) -> Float[Tensor, "batch channels *shape"]:
    """Dropout of whole channels: what `drop` makes of ones, [B, C, 1, …], times x."""
    return x if drop is keep else x * drop(site, x.new_ones(*x.shape[:2], *[1] * (x.ndim - 2)))


def normalization(norm: Norm, channels: int) -> nn.Module:
    """The norm layer called `norm` of so many channels; nothing for `none`.

    Group norm has 32 groups, as in the paper, and fewer where there would be less than two channels to a group, or a remainder.

    Source: Wu & He, ECCV 2018, section 4.1.

    Example:
        >>> normalization("group", 64).num_groups, normalization("group", 24).num_groups
        (32, 12)

    Raises:
        BilevelError: there is no such norm.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        most = max(1, min(32, channels // 2))
        return nn.GroupNorm(max(n for n in range(1, most + 1) if channels % n == 0), channels)
    check_norm(norm)
    return nn.Identity()


def check_norm(norm: str) -> None:
    """Raise where there is no such norm.

    Raises:
        BilevelError: naming those that there are.
    """
    if norm not in (known := get_args(Norm)):
        raise BilevelError(
            f"norm={norm!r}{near(str(norm), known)} is none of {', '.join(known)}; choose one of these"
        )


def scaled(widths: Iterable[int], factor: float) -> list[int]:
    """Widths times a factor, rounded, and one at least."""
    return [max(1, round(factor * width)) for width in widths]


def he_(convolution: nn.Module) -> None:
    """Weights N(0, 2/(k·k·out)) and no bias, for a k × k convolution: activations keep their size through ReLUs.

    Source: He et al., ICCV 2015, section 2.2, backward case.
    """
    if isinstance(convolution, nn.Conv2d):
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
