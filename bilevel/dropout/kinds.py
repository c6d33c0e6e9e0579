"""Dropout with one rate per example: a sampled form, and two forms with a derivative in the rate.

All three have E[x ∘ m] = x; concrete dropout has it in the limit of a low temperature. They draw
the same numbers for one rate, [], and for one rate per example, [B].
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel.params import along_examples
from bilevel.validate import one_of, positive, wrong

Dropout: TypeAlias = Callable[[Tensor, Tensor, torch.Generator | None], Tensor]
"""Maps x [B, …], a rate [] or [B] and a generator to x after dropout."""

DropoutKind: TypeAlias = Literal["bernoulli", "gaussian", "concrete"]


def dropout(
    x: Float[Tensor, "#batch *shape"],
    rate: Float[Tensor, ""] | Float[Tensor, " batch"],
    generator: torch.Generator | None,
) -> Float[Tensor, "#batch *shape"]:
    """Return x ∘ m with m = Bernoulli(1 − rate)/(1 − rate), elementwise: E[x ∘ m] = x.

    The mask is a sample, so there is no derivative in `rate`. One mask serves x and its tangent.

    Args:
        x: activations.
        rate: in [0, 1), one for all or one per example.
        generator: generator on the device of x.

    Example:
        >>> dropout(torch.ones(1, 4), torch.tensor(0.5), torch.Generator().manual_seed(1))
        tensor([[0., 2., 2., 0.]])
    """
    keep = 1 - along_examples(rate.detach(), x)
    mask = (torch.rand(x.shape, generator=generator, device=x.device) < keep) / keep
    return x * mask.to(x.dtype)


def gaussian_dropout(
    x: Float[Tensor, "#batch *shape"],
    rate: Float[Tensor, ""] | Float[Tensor, " batch"],
    generator: torch.Generator | None,
) -> Float[Tensor, "#batch *shape"]:
    """Return x ∘ (1 + √(rate/(1 − rate)) n) with n ~ N(0, 1).

    It has the mean and the variance of Bernoulli dropout, and a derivative in the rate.

    Source: Srivastava et al., JMLR 2014, section 10; Kingma et al., NeurIPS 2015, section 3.

    Args:
        x: activations.
        rate: in [0, 1), one for all or one per example.
        generator: generator on the device of x.

    Example:
        >>> rate = torch.tensor(0.5, requires_grad=True)
        >>> gaussian_dropout(torch.ones(2, 3), rate, torch.Generator().manual_seed(0)).requires_grad
        True
    """
    rate = along_examples(rate, x)
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x * (1 + _root(rate / (1 - rate)).to(x.dtype) * noise)


def concrete_dropout(
    x: Float[Tensor, "#batch *shape"],
    rate: Float[Tensor, ""] | Float[Tensor, " batch"],
    generator: torch.Generator | None,
    temperature: float = 0.1,
) -> Float[Tensor, "#batch *shape"]:
    """Return x ∘ (1 − z)/(1 − rate) with z from the binary concrete distribution.

        z = sigmoid((log rate − log(1 − rate) + log v − log(1 − v)) / temperature),    v ~ U(0, 1)

    At a low temperature z is near 0 or 1. P(z > ½) = rate at any temperature. As the temperature
    falls, z → Bernoulli(rate); before the limit, E[z] is nearer to ½ than the rate.

    Source: Gal, Hron & Kendall, NeurIPS 2017, section 3 (their code: temperature 0.1).

    Args:
        x: activations.
        rate: in [0, 1), one for all or one per example.
        generator: generator on the device of x.
        temperature: positive; derivatives in the rate grow as its inverse.

    Example:
        >>> x, rate, draws = torch.ones(1, 4), torch.tensor(0.5), torch.Generator().manual_seed(1)
        >>> concrete_dropout(x, rate, draws, temperature=0.01).round()
        tensor([[0., 2., 2., 0.]])
    """
    # Below eps², z underflows anyway, and 1/rate² would overflow in a second derivative.
    rate = along_examples(rate, x).clamp_min(torch.finfo(rate.dtype).eps ** 2)
    wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has 256 numbers between 0 and 1
    half = torch.finfo(wide).eps / 2
    v = torch.rand(x.shape, generator=generator, device=x.device, dtype=wide).clamp(half, 1 - half)
    z = torch.sigmoid(
        ((rate.log() - (-rate).log1p()).to(wide) + v.log() - (-v).log1p()) / temperature
    )
    return x * ((1 - z) / (1 - rate)).to(x.dtype)


def dropout_by_name(kind: DropoutKind, temperature: float | None = None) -> Dropout:
    """Return the dropout function called `kind`.

    Args:
        kind: `bernoulli`, `gaussian` or `concrete`.
        temperature: temperature of concrete dropout; None takes 0.1.

    Raises:
        BilevelError: the name is unknown, the temperature is not positive, or the dropout has none.
    """
    known: dict[str, Dropout] = {
        "bernoulli": dropout,
        "gaussian": gaussian_dropout,
        "concrete": concrete_dropout,
    }
    one_of(known, dropout=kind)
    if temperature is None:
        return known[kind]
    if kind != "concrete":
        remedy = "set it to null, or set dropout=concrete"
        raise wrong("temperature", temperature, f"does not apply to {kind} dropout", remedy)
    positive("choose for example 0.1", temperature=temperature)
    return partial(concrete_dropout, temperature=temperature)


def _root(variance: Tensor) -> Tensor:
    """Return √variance, and a straight line below eps², where rounding removes the noise anyway.

    √ has an infinite slope at zero; its product with the vanishing slope of the rate is inf · 0.
    """
    least = torch.finfo(variance.dtype).eps ** 2
    return torch.where(variance > least, variance.clamp_min(least).sqrt(), variance / least**0.5)
