"""Response rules of linear maps, convolutions, embeddings, elementwise products and squared norms.

A function f(x, W) that is linear in W satisfies f(x, W₀ + diag(s) W₁) = f(x, W₀) + s ∘ f(x, W₁) if
s scales its output units, and f(x, W₀) + f(s ∘ x, W₁) if s scales its inputs. Linearized at W₀,
with the dual input (x, ẋ), the tangent of the output is f(ẋ, W₀) + s ∘ f(x, W₁): with the primal
f(x, W₀) these are three multiplications. W₁ẋ is never computed.
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
    """Return W₀ of a per-example weight; return anything else unchanged."""
    return weight.base if isinstance(weight, ResponseWeight) else weight


def apply_base(
    f: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return f(x, W₀, b₀) with the tangent f(ẋ, W₀).

    PyTorch's own forward-mode formula would also multiply zeros for Ẇ by x.
    """
    dx = tangent(x)
    if dx is None:
        return f(x, weight, bias)
    return forward_ad.make_dual(f(primal(x), weight, bias), f(dx, weight, None))


def linear_in_weight(
    f: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, unit_axis: int
) -> Tensor:
    """Return f(x, W, b) for a function f that is linear in W and in b.

    Args:
        f: the function.
        x: its input, with the example axis first.
        weight: W, plain or per example.
        bias: b, plain or per example.
        unit_axis: the axis of the output units in the output.
    """
    out = apply_base(f, x, base_of(weight), base_of(bias))
    if isinstance(weight, ResponseWeight):
        weight.check_examples(x)
        if weight.axis == 0:
            units = f(primal(x) if weight.tangent else x, weight.response, None)
            out = weight.add_response(out, units, weight.broadcast_scale(out.ndim, unit_axis))
        else:  # s scales the inputs: a decoder that is tied to an embedding
            scale = weight.broadcast_scale(x.ndim, unit_axis)
            inputs = scale * (primal(x) if weight.tangent else x)
            out = weight.add_response(out, f(inputs, weight.response, None))
    if isinstance(bias, ResponseWeight):
        bias.check_examples(x)
        shape = [1] * out.ndim
        shape[unit_axis] = -1
        scale = bias.broadcast_scale(out.ndim, unit_axis)
        out = bias.add_response(out, scale * bias.response.reshape(shape))
    return out


@rule(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return X Wᵀ + b."""
    return linear_in_weight(F.linear, input, weight, bias, -1)


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(input: Tensor, other: ResponseWeight) -> Tensor:
    """Return X W for a per-example matrix W, or X w for a per-example vector w."""
    if isinstance(input, ResponseWeight):
        raise BilevelError(
            f"`{input.label}` is on the left of a matrix product, where the examples must be; "
            "write X @ W.T or F.linear(X, W)"
        )
    if other.ndim == 1:  # w is the only row of a linear map, and s scales the inputs
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
    """Return Wᵀ; the scale moves to the other axis."""
    return weight.transposed()


def _convolution(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the rule of a convolution."""

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
    """Return E₀[input] + s ∘ E₁[input], with one scale per embedding column."""
    if weight.axis != 1:
        raise BilevelError(
            f"embedding `{weight.label}` is scaled along its rows, but its response needs one "
            "scale per column; create the weight with axis=1"
        )
    weight.check_examples(input)
    out = F.embedding(input, weight.base, *args, **kwargs)
    units = F.embedding(input, weight.response, *args, **kwargs)
    return weight.add_response(out, units, weight.broadcast_scale(out.ndim, -1))


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(input: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
    """Return X + b, where the per-example b has fewer axes: a bias that is written out."""
    if alpha != 1:
        raise BilevelError(f"alpha={alpha} of `add` has no response rule; write x + alpha * y")
    return _elementwise(torch.add, input, other)


@rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def mul(input: Tensor, other: Tensor) -> Tensor:
    """Return X ∘ g, where the per-example g has fewer axes, or M ∘ W for a mask M.

    X ∘ g is a gain that is written out. A mask has the shape of W.
    """
    weight, mask = (input, other) if isinstance(input, ResponseWeight) else (other, input)
    if isinstance(weight, ResponseWeight) and _is_mask(mask, weight):
        return weight.masked(mask)
    return _elementwise(torch.mul, input, other)


def _is_mask(mask: Any, weight: ResponseWeight) -> bool:
    """Return whether `mask` is a constant of the shape of a weight with two or more axes."""
    plain = (
        isinstance(mask, Tensor) and not isinstance(mask, ResponseWeight) and tangent(mask) is None
    )
    return plain and weight.ndim >= 2 and mask.shape == weight.shape


def _elementwise(f: Callable[[Tensor, Tensor], Tensor], x: Any, y: Any) -> Tensor:
    """Return f of an input and of a per-example weight with fewer axes."""
    weight: ResponseWeight = x if isinstance(x, ResponseWeight) else y
    other = y if weight is x else x
    is_plain = isinstance(other, Tensor) and not isinstance(other, ResponseWeight)
    if not is_plain or other.ndim <= weight.ndim:
        raise BilevelError(
            f"`{f.__name__}` combines `{weight.label}`, which varies per example, with "
            f"{type(other).__name__}, but only an input with an example axis has a response rule; "
            "use bilevel.squared_norm for a penalty, or set per_example=False on every "
            "hyperparameter"
        )
    weight.check_examples(other)
    dense = weight.dense()
    between = [1] * (other.ndim - dense.ndim)
    return f(other, dense.reshape(dense.shape[0], *between, *dense.shape[1:]))


@rule(squared_norm_of)
def squared_norm_per_example(weight: ResponseWeight, weights: Tensor | None = None) -> Tensor:
    """Return ‖W₀ + diag(s_b) W₁‖² of every example b, [B].

        ‖W₀ + diag(s_b) W₁‖² = ‖W₀‖² + 2 s_b·⟨W₀, W₁⟩_rows + s_b²·‖W₁‖²_rows

    Args:
        weight: W.
        weights: one factor for each entry of W, which multiplies every product.
    """

    def rows(p: Tensor) -> Tensor:
        if not p.ndim:
            return p.reshape(1, 1)
        return p.movedim(weight.axis, 0).reshape(p.shape[weight.axis], -1)

    base, response = rows(weight.base), rows(weight.response)
    weighted = response if weights is None else rows(weights.view(weight.base.shape)) * response
    cross, square = (base * weighted).sum(1), (response * weighted).sum(1)
    return (
        squared_norm({"base": weight.base}, weights)
        + torch.mv(weight.scale, 2 * cross)
        + torch.mv(weight.scale**2, square)
    )
