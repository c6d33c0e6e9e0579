"""Dropout whose rate may differ from example to example: sampled, and in two forms with a derivative in the rate.

All three have E[x ∘ m] = x (the concrete one in the limit of a low temperature) and draw the same numbers for a rate given
once, [], as for one per example, [B].
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import BilevelError, along_examples
from bilevel.text import near

Dropout: TypeAlias = Callable[[Tensor, Tensor, torch.Generator | None], Tensor]
"""X [B, …] after dropout at rates [] or [B], with noise from the generator."""

Kind: TypeAlias = Literal["bernoulli", "gaussian", "concrete"]


def dropout(
    x: Float[Tensor, "batch *shape"],
    rate: Float[Tensor, ""] | Float[Tensor, " batch"],
    generator: torch.Generator | None,
) -> Float[Tensor, "batch *shape"]:
    """X ∘ m with m = Bernoulli(1 − rate)/(1 − rate), elementwise: E[x ∘ m] = x.

    The mask is a sample, so nothing is differentiated with respect to `rate`; one mask serves x and its tangent alike.

    Args:
        x: activations.
        rate: in [0, 1), one for all or one per example.
        generator: on the device of x.

    Example:
        >>> dropout(torch.ones(1, 4), torch.tensor(0.5), torch.Generator().manual_seed(1))
        tensor([[0., 2., 2., 0.]])
    """
    keep = 1 - along_examples(rate.detach(), x)
    mask = (torch.rand(x.shape, generator=generator, device=x.device) < keep) / keep
    return x * mask.to(x.dtype)


def gaussian_dropout(
    x: Float[Tensor, "batch *shape"],
    rate: Float[Tensor, ""] | Float[Tensor, " batch"],
    generator: torch.Generator | None,
) -> Float[Tensor, "batch *shape"]:
    """X ∘ (1 + √(rate/(1 − rate)) n) with n ~ N(0, 1): mean and variance of Bernoulli dropout, differentiable in the rate.

    Source: Srivastava et al., JMLR 2014, section 10; Kingma et al., NeurIPS 2015, section 3.

    Args:
        x: activations.
        rate: in [0, 1), one for all or one per example.
        generator: on the device of x.

    Example:
        >>> rate = torch.tensor(0.5, requires_grad=True)
        >>> gaussian_dropout(torch.ones(2, 3), rate, torch.Generator().manual_seed(0)).requires_grad
        True
    """
    rate = along_examples(rate, x)
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x * (1 + _root(rate / (1 - rate)).to(x.dtype) * noise)


def concrete_dropout(
    x: Float[Tensor, "batch *shape"],
    rate: Float[Tensor, ""] | Float[Tensor, " batch"],
    generator: torch.Generator | None,
    temperature: float = 0.1,
) -> Float[Tensor, "batch *shape"]:
    """X ∘ (1 − z)/(1 − rate) with z from the binary concrete distribution, which is near 0 or 1 at a low temperature.

        z = sigmoid((log rate − log(1 − rate) + log v − log(1 − v)) / temperature),    v ~ U(0, 1)

    P(z > ½) = rate at any temperature, and z → Bernoulli(rate) as it falls; E[z] is nearer ½ than the rate until then.

    Source: Gal, Hron & Kendall, NeurIPS 2017, section 3 (their code: 0.1).

    Args:
        x: activations.
        rate: in [0, 1), one for all or one per example.
        generator: on the device of x.
        temperature: above zero; derivatives in the rate grow as its inverse.

    Example:
        >>> concrete_dropout(torch.ones(1, 4), torch.tensor(0.5), torch.Generator().manual_seed(1), temperature=0.01).round()
        tensor([[0., 2., 2., 0.]])
    """
    # Where the rate is below eps², z underflows anyway, and 1/rate² would overflow in a second derivative.
    rate = along_examples(rate, x).clamp_min(torch.finfo(rate.dtype).eps ** 2)
    wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has 256 numbers between 0 and 1
    half = torch.finfo(wide).eps / 2
    v = torch.rand(x.shape, generator=generator, device=x.device, dtype=wide).clamp(half, 1 - half)
    z = torch.sigmoid(
        ((rate.log() - (-rate).log1p()).to(wide) + v.log() - (-v).log1p()) / temperature
    )
    return x * ((1 - z) / (1 - rate)).to(x.dtype)


def named(kind: Kind, temperature: float | None = None) -> Dropout:
    """The dropout called `kind`; `temperature` is that of the concrete one, 0.1 where it is None.

    Raises:
        BilevelError: an unknown name, or a temperature that is not above zero or not concrete dropout's.
    """
    if kind not in (
        known := {"bernoulli": dropout, "gaussian": gaussian_dropout, "concrete": concrete_dropout}
    ):
        raise BilevelError(
            f"dropout={kind!r}{near(str(kind), known)} is none of {', '.join(known)}; choose one of these"
        )
    if temperature is None:
        return known[kind]
    if kind != "concrete":
        raise BilevelError(
            f"{kind} dropout has no temperature; leave it out, or use dropout=concrete"
        )
    if not temperature > 0:
        raise BilevelError(
            f"temperature={temperature} is not above zero, where z would have no derivative; 0.1 is usual"
        )
    return partial(concrete_dropout, temperature=temperature)


def _root(variance: Tensor) -> Tensor:
    """√variance, and a straight line below eps², where the noise is lost beside 1 in rounding.

    √ has an infinite slope at zero, which would meet the vanishing slope of the rate as inf · 0.
    """
    least = torch.finfo(variance.dtype).eps ** 2
    return torch.where(variance > least, variance.clamp_min(least).sqrt(), variance / least**0.5)
