"""Batch normalization with the statistics of the whole batch, of which each rank has a shard."""

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from bilevel.norm_statistics import moments_of
from bilevel.parallel.collectives import enter, leave
from bilevel.parallel.process_group import ProcessGroup
from bilevel.parallel.shards import Shard


class BatchStatistics:
    """`F.batch_norm` over all ranks, in elementary operations.

        mean = Σ_ranks (b_r/B) mean_r,    var = Σ_ranks (b_r/B) (var_r + mean_r²) − mean²

    It has every derivative in either mode. It costs one all-reduce of two numbers per channel, and
    one in the backward pass. The sums are in float64, where the difference keeps all digits of
    float32. Running statistics are equal on all ranks.
    """

    def __init__(self, ranks: ProcessGroup) -> None:
        self.ranks = ranks

    def __call__(
        self,
        shard: Shard,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(
                input, running_mean, running_var, weight, bias, False, momentum, eps
            )
        items = items_of(shard, input)
        if items <= 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{input.shape}"
            )
        x, tail = at_least_float32(input), [1] * (input.ndim - 2)
        mean, var = self._moments(shard, x)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(_value(mean).to(running_mean.dtype), momentum)
                running_var.lerp_(
                    _value(var).to(running_var.dtype) * (items / (items - 1)), momentum
                )
        normalized = (x - mean.reshape(-1, *tail)) * torch.rsqrt(var + eps).reshape(-1, *tail)
        return scaled(normalized, weight, bias).to(input.dtype)

    def moments(
        self, shard: Shard, input: Tensor, *, per_example: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the mean and the unbiased variance of every channel over all ranks, [C] each.

        With `per_example` they are the rank's own, which the mean over ranks completes.
        """
        if per_example:
            return moments_of(input, per_example=True)
        items = items_of(shard, input)
        mean, var = self._moments(shard, at_least_float32(input))
        return mean, var * (items / (items - 1))

    def _moments(self, shard: Shard, x: Tensor) -> list[Tensor]:
        """Return the mean and the biased variance over all ranks, for use on this rank."""
        axes = [0, *range(2, x.ndim)]
        own_mean = x.mean(axes, keepdim=True)
        own_var = (x - own_mean).square().mean(axes)
        own_mean = own_mean.reshape(-1).double()
        moments = shard.weight * torch.stack([own_mean, own_var.double() + own_mean.square()])
        mean, square = leave(self.ranks, [moments])[0]
        return enter(self.ranks, [mean.to(x.dtype), (square - mean.square()).to(x.dtype)])


def items_of(shard: Shard, input: Tensor) -> float:
    """Return the number of values of each channel over all ranks."""
    return input.numel() // input.shape[1] * shard.whole / shard.size


def at_least_float32(input: Tensor) -> Tensor:
    """Return the input in float32 or float64."""
    return input if input.dtype in (torch.float32, torch.float64) else input.float()


def without_statistics(
    shard: Shard,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *options: Any,
    **named: Any,
) -> Tensor:
    """Apply the scale and the shift alone, which depend on no other example."""
    return scaled(input, weight, bias)


def scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return x times `weight` plus `bias`, channel by channel.

    Either may vary from example to example, so the channel axis is moved to the end.
    """
    x = x.movedim(1, -1)
    x = x if weight is None else x * weight
    x = x if bias is None else x + bias
    return x.movedim(-1, 1)


def _value(x: Tensor) -> Tensor:
    return forward_ad.unpack_dual(x).primal.detach()
