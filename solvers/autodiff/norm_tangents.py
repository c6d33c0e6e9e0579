"""Forward-mode normalizations by PyTorch's fused backward kernels.

A normalization x̂ = (x − mean)/std over n entries has the symmetric Jacobian

    J = (1/std) (I − 11ᵀ/n − x̂x̂ᵀ/n).

So its tangent Jẋ is one call of the fused backward kernel, with ẋ in place of the gradient and
without a gain. The derivative of that call in ẋ is the same kernel again. PyTorch's own forward
mode composes both of many operations. `docs/speed.md` has the times.

The trick holds only while x is a constant and ẋ alone carries a graph, as in `forward_mode`: the
derivative of Jẋ in x is left out. A gain and a shift are applied outside (`norm_rules`).
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[[Tensor], Tensor]
"""A symmetric linear map, ẋ ↦ Jẋ."""

INPUT_ALONE = [True, False, False]
"""The mask of a backward kernel that returns the gradient of its input, and of no parameter."""


class _Symmetric(torch.autograd.Function):
    """The map ẋ ↦ Jẋ of a symmetric J, which is its own derivative."""

    @staticmethod
    def forward(ctx: Any, dot: Tensor, kernel: Kernel) -> Tensor:
        ctx.kernel = kernel
        return kernel(dot)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return apply_symmetric(ctx.kernel, gradients[0]), None


def apply_symmetric(kernel: Kernel, dot: Tensor) -> Tensor:
    """Return Jẋ, differentiable in ẋ any number of times."""
    return cast(Tensor, _Symmetric.apply(dot, kernel))


def split(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return x and ẋ; ẋ has the type of x.

    Raises:
        RuntimeError: x carries a graph, in which this tangent has no derivative.
    """
    value, dot = forward_ad.unpack_dual(x)
    if dot is None:
        return x, None
    if value.requires_grad:
        raise RuntimeError("the primal of a normalization needs no gradient in forward mode")
    return value, dot.to(value.dtype)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    _weight: None,
    _bias: None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Return the batch norm of a dual; only `training` decides between the statistics."""
    value, dot = split(x)
    if dot is None:
        return F.batch_norm(x, running_mean, running_var, None, None, training, momentum, eps)
    if not training:
        if running_mean is None or running_var is None:
            raise RuntimeError("batch norm in evaluation mode needs running statistics")
        y = F.batch_norm(value, running_mean, running_var, None, None, False, momentum, eps)
        scale = torch.rsqrt(running_var + eps).reshape(-1, *[1] * (x.ndim - 2))
        return forward_ad.make_dual(y, dot * scale.to(dot.dtype))
    y, mean, inverse = torch.native_batch_norm(
        value, None, None, running_mean, running_var, True, momentum, eps
    )

    def kernel(dot: Tensor) -> Tensor:
        return torch.ops.aten.native_batch_norm_backward(
            *(dot, value, None, running_mean, running_var, mean, inverse, True, eps, INPUT_ALONE)
        )[0]

    return forward_ad.make_dual(y, apply_symmetric(kernel, dot))


def layer_norm(x: Tensor, shape: Sequence[int], _weight: None, _bias: None, eps: float) -> Tensor:
    """Return the layer norm of a dual over its last axes."""
    value, dot = split(x)
    if dot is None:
        return F.layer_norm(x, shape, None, None, eps)
    y, mean, inverse = torch.native_layer_norm(value, shape, None, None, eps)

    def kernel(dot: Tensor) -> Tensor:
        return torch.ops.aten.native_layer_norm_backward(
            dot.contiguous(), value, shape, mean, inverse, None, None, INPUT_ALONE
        )[0]

    return forward_ad.make_dual(y, apply_symmetric(kernel, dot))


def group_norm(x: Tensor, groups: int, _weight: None, _bias: None, eps: float) -> Tensor:
    """Return the group norm of a dual [B, C, …]."""
    value, dot = split(x)
    if dot is None:
        return F.group_norm(x, groups, None, None, eps)
    examples, channels = value.shape[:2]
    value = value.contiguous()
    sizes = (examples, channels, value.numel() // max(1, examples * channels), groups)
    y, mean, inverse = torch.native_group_norm(value, None, None, *sizes, eps)

    def kernel(dot: Tensor) -> Tensor:
        return torch.ops.aten.native_group_norm_backward(
            dot.contiguous(), value, mean, inverse, None, *sizes, INPUT_ALONE
        )[0]

    return forward_ad.make_dual(y, apply_symmetric(kernel, dot))


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    _weight: None,
    _bias: None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return the instance norm of a dual [B, C, …].

    With statistics of the input alone it is a group norm with one group for each channel. With
    running statistics it has PyTorch's own forward mode.
    """
    if forward_ad.unpack_dual(x).tangent is not None and running_mean is None and use_input_stats:
        return group_norm(x, x.shape[1], None, None, eps)
    return F.instance_norm(x, running_mean, running_var, None, None, use_input_stats, momentum, eps)
