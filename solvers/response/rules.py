"""Response rules: what each layer's function does with weights W₀ + diag(s) W₁ that vary per example.

A function f(x, W) that is linear in W obeys f(x, W₀ + diag(s) W₁) = f(x, W₀) + s ∘ f(x, W₁) when s scales its output units, and
f(x, W₀) + f(s ∘ x, W₁) when s scales its inputs. Linearized at W₀, with x = (x, ẋ), the tangent of the output is f(ẋ, W₀) + s
∘ f(x, W₁): three multiplications, never W₁ẋ.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from bilevel import BilevelError, squared_norm
from bilevel.params import squared_norm_of
from bilevel.solvers.response.per_example_weight import (
    ResponseWeight,
    getters,
    primal,
    rule,
    tangent,
)


def base_of(weight: Any) -> Any:
    """W₀ of a responding weight; anything else as it is."""
    return weight.base if isinstance(weight, ResponseWeight) else weight


def apply_base(
    f: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """f(x, W₀, b₀), with the tangent f(ẋ, W₀) written out: PyTorch's own formula would multiply zeros by W₀ for Ẇ."""
    dx = tangent(x)
    if dx is None:
        return f(x, weight, bias)
    return forward_ad.make_dual(f(primal(x), weight, bias), f(dx, weight, None))


def linear_in_weight(
    f: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, unit_axis: int
) -> Tensor:
    """f(x, W, b) for f linear in W and in b, either or both responding; the output units lie at `unit_axis` of the output."""
    out = apply_base(f, x, base_of(weight), base_of(bias))
    if isinstance(weight, ResponseWeight):
        weight.check_examples(x)
        if weight.axis == 0:
            units = f(primal(x) if weight.tangent else x, weight.response, None)
            out = weight.add_response(out, units, weight.broadcast_scale(out.ndim, unit_axis))
        else:  # the scale lies on the inputs: a decoder tied to an embedding
            inputs = weight.broadcast_scale(x.ndim, unit_axis) * (
                primal(x) if weight.tangent else x
            )
            out = weight.add_response(out, f(inputs, weight.response, None))
    if isinstance(bias, ResponseWeight):
        bias.check_examples(x)
        shape = [1] * out.ndim
        shape[unit_axis] = -1
        out = bias.add_response(
            out, bias.broadcast_scale(out.ndim, unit_axis) * bias.response.reshape(shape)
        )
    return out


@rule(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Y = X Wᵀ + b."""
    return linear_in_weight(F.linear, input, weight, bias, -1)


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(input: Tensor, other: ResponseWeight) -> Tensor:
    """X W for a responding matrix, or X w for a responding vector."""
    if isinstance(input, ResponseWeight):
        raise BilevelError(
            f"`{input.label}` stands on the left of a product; write X @ W.T (or F.linear): examples come first"
        )
    if other.ndim == 1:  # w is the single row of a linear map, and its scale lies on the inputs
        row = ResponseWeight.of(
            other.base[None],
            other.response[None],
            other.scale,
            1,
            tangent=other.tangent,
            label=other.label,
        )
        return linear(input, row).squeeze(-1)
    return linear(input, other.transposed())


@rule(Tensor.t, torch.t, *getters("T", "mT"))
def transpose(weight: ResponseWeight) -> ResponseWeight:
    """Wᵀ: the scale moves to the other axis."""
    return weight.transposed()


def _convolution(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        def f(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return convolve(input, weight, bias, stride, padding, dilation, groups)

        return linear_in_weight(f, input, weight, bias, 1)

    return apply


for _convolve in (F.conv1d, F.conv2d, F.conv3d):
    rule(_convolve)(_convolution(_convolve))


@rule(F.embedding)
def embedding(input: Tensor, weight: ResponseWeight, *args: Any, **kwargs: Any) -> Tensor:
    """E₀[input] + s ∘ E₁[input], with one scale per embedding column."""
    if weight.axis != 1:
        raise BilevelError(
            f"embedding `{weight.label}` is scaled along its rows; its response needs axis 1, one scale per column"
        )
    weight.check_examples(input)
    out = F.embedding(input, weight.base, *args, **kwargs)
    return weight.add_response(
        out,
        F.embedding(input, weight.response, *args, **kwargs),
        weight.broadcast_scale(out.ndim, -1),
    )


def affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, view: Callable[[Tensor], Tensor]
) -> Tensor:
    """Normalized x times weight plus bias, each plain or per example; `view` makes [B or 1, *shape] broadcast against x."""
    for p, combine in ((weight, torch.mul), (bias, torch.add)):
        if p is not None:
            if isinstance(p, ResponseWeight):
                p.check_examples(x)
            x = combine(
                x, view(p.dense() if isinstance(p, ResponseWeight) else p[None]).to(x.dtype)
            )
    return x


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
) -> Tensor:
    """Normalization by the statistics of the batch (or the running ones), then a scale and shift per example and channel."""
    normalized = F.batch_norm(input, running_mean, running_var, None, None, training, momentum, eps)
    return affine(normalized, weight, bias, lambda p: p.reshape(*p.shape, *[1] * (input.ndim - 2)))


@rule(F.instance_norm)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *options: Any,
    **named: Any,
) -> Tensor:
    """Normalization of every channel of every example, then a scale and shift per example and channel."""
    normalized = F.instance_norm(input, running_mean, running_var, None, None, *options, **named)
    return affine(normalized, weight, bias, lambda p: p.reshape(*p.shape, *[1] * (input.ndim - 2)))


@rule(F.group_norm)
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalization over groups of channels, then a scale and shift per example and channel."""
    return affine(
        F.group_norm(input, num_groups, None, None, eps),
        weight,
        bias,
        lambda p: p.reshape(*p.shape, *[1] * (input.ndim - 2)),
    )


@rule(F.layer_norm)
def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalization over the last axes, then a scale and shift per example and element."""
    between = input.ndim - 1 - len(normalized_shape)
    normalized = F.layer_norm(input, normalized_shape, None, None, eps)
    return affine(
        normalized, weight, bias, lambda p: p.reshape(p.shape[0], *[1] * between, *p.shape[1:])
    )


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(input: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
    """X + b with a responding b of fewer axes: a bias that is written out."""
    if alpha != 1:
        raise BilevelError("`add` with alpha has no response rule; multiply first")
    return _elementwise(torch.add, input, other)


@rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def mul(input: Tensor, other: Tensor) -> Tensor:
    """X ∘ g with a responding g of fewer axes: a gain that is written out; or M ∘ W with a mask M of the shape of W."""
    weight, mask = (input, other) if isinstance(input, ResponseWeight) else (other, input)
    if isinstance(weight, ResponseWeight) and _is_mask(mask, weight):
        return weight.masked(mask)
    return _elementwise(torch.mul, input, other)


def _is_mask(mask: Any, weight: ResponseWeight) -> bool:
    """Whether it is one for all examples: a constant of the weight's own shape, which is a matrix at least."""
    plain = (
        isinstance(mask, Tensor) and not isinstance(mask, ResponseWeight) and tangent(mask) is None
    )
    return plain and weight.ndim >= 2 and mask.shape == weight.shape


def _elementwise(f: Callable[[Tensor, Tensor], Tensor], x: Any, y: Any) -> Tensor:
    weight: ResponseWeight = x if isinstance(x, ResponseWeight) else y
    other = y if weight is x else x
    if (
        isinstance(other, ResponseWeight)
        or not isinstance(other, Tensor)
        or other.ndim <= weight.ndim
    ):
        raise BilevelError(
            f"`{weight.label}` varies per example and meets {type(other).__name__} in `{f.__name__}`; only an input with an "
            "example axis can be scaled or shifted by it: use bilevel.squared_norm for penalties, or perturb per batch "
            "(per_example=False)"
        )
    weight.check_examples(other)
    dense = weight.dense()
    return f(
        other, dense.reshape(dense.shape[0], *[1] * (other.ndim - dense.ndim), *dense.shape[1:])
    )


@rule(squared_norm_of)
def squared_norm_per_example(weight: ResponseWeight, weights: Tensor | None = None) -> Tensor:
    """‖W₀ + diag(s_b) W₁‖² = ‖W₀‖² + 2 s_b·⟨W₀, W₁⟩_rows + s_b²·‖W₁‖²_rows: [B]; with `weights`, every product is weighted."""

    def rows(p: Tensor) -> Tensor:
        return (
            p.movedim(weight.axis, 0).reshape(p.shape[weight.axis], -1)
            if p.ndim
            else p.reshape(1, 1)
        )

    base, response = rows(weight.base), rows(weight.response)
    weighted = response if weights is None else rows(weights.view(weight.base.shape)) * response
    cross, square = (base * weighted).sum(1), (response * weighted).sum(1)
    return (
        squared_norm({"base": weight.base}, weights)
        + torch.mv(weight.scale, 2 * cross)
        + torch.mv(weight.scale**2, square)
    )
