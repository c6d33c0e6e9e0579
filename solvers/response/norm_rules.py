"""Response rules of normalizations: a plain normalization, then a per-example scale and shift.

The argument `normalize` replaces the fused normalization by one in elementary operations, which
`bilevel.solvers.autodiff.decompositions` needs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel.solvers.response.per_example_weight import ResponseWeight, rule


def affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, view: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return x ∘ weight + bias for a normalized x.

    Args:
        x: the normalized input, [B, …].
        weight: the gain, plain, per example, or None.
        bias: the shift, plain, per example, or None.
        view: makes [B or 1, *shape] broadcast against x.
    """
    for p, combine in ((weight, torch.mul), (bias, torch.add)):
        if isinstance(p, ResponseWeight):
            k = p.check_examples(x)
            x = combine(x, view(p.dense(k)).to(x.dtype))
        elif p is not None:
            x = combine(x, view(p[None]).to(x.dtype))
    return x


def per_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return `affine` with one gain and one shift for each channel, axis 1 of x."""
    return affine(x, weight, bias, lambda p: p.reshape(*p.shape, *[1] * (x.ndim - 2)))


@rule(F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    normalize: Callable[..., Tensor] = F.batch_norm,
) -> Tensor:
    """Normalize by the statistics of the batch or the running ones, then scale and shift."""
    normalized = normalize(input, running_mean, running_var, None, None, training, momentum, eps)
    return per_channel(normalized, weight, bias)


@rule(F.instance_norm)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *options: Any,
    normalize: Callable[..., Tensor] = F.instance_norm,
    **named: Any,
) -> Tensor:
    """Normalize every channel of every example, then scale and shift."""
    normalized = normalize(input, running_mean, running_var, None, None, *options, **named)
    return per_channel(normalized, weight, bias)


@rule(F.group_norm)
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    normalize: Callable[..., Tensor] = F.group_norm,
) -> Tensor:
    """Normalize over groups of channels, then scale and shift every channel."""
    return per_channel(normalize(input, num_groups, None, None, eps), weight, bias)


@rule(F.layer_norm)
def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    normalize: Callable[..., Tensor] = F.layer_norm,
) -> Tensor:
    """Normalize over the last axes, then scale and shift every entry."""
    between = [1] * (input.ndim - 1 - len(normalized_shape))
    normalized = normalize(input, normalized_shape, None, None, eps)
    return affine(normalized, weight, bias, lambda p: p.reshape(p.shape[0], *between, *p.shape[1:]))


@rule(F.rms_norm)
def rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Divide by the root of the mean square over the last axes, then scale every entry."""
    between = [1] * (input.ndim - 1 - len(normalized_shape))
    normalized = F.rms_norm(input, normalized_shape, None, eps)
    return affine(normalized, weight, None, lambda p: p.reshape(p.shape[0], *between, *p.shape[1:]))
