"""Response rules of linear maps, convolutions and squared norms.

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
from bilevel.solvers.response.dense_weight import is_per_example
from bilevel.solvers.response.per_example_weight import (
    ResponseWeight,
    getters,
    missing,
    primal,
    rule,
    tangent,
)
from bilevel.solvers.response.row_counts import PER_BATCH


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
    if is_per_example(x):
        raise missing(f, [x], {})
    out = apply_base(f, x, base_of(weight), base_of(bias))
    if isinstance(weight, ResponseWeight):
        weight.check_examples(x)
        if weight.axis == 0:
            units = f(primal(x) if weight.tangent else x, weight.response, None)
            out = weight.add_response(out, units, weight.broadcast_scale(out.ndim, unit_axis))
        elif weight.axis == 1:  # s scales the inputs: a decoder that is tied to an embedding
            inputs = weight.scale_inputs(primal(x) if weight.tangent else x, unit_axis)
            out = weight.add_response(out, f(inputs, weight.response, None))
        else:
            raise BilevelError(
                f"`{weight.label}` is scaled along axis {weight.axis}, which `{f.__name__}` does "
                f"not take; {PER_BATCH}"
            )
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
        return linear(input, other.as_row()).squeeze(-1)
    return linear(input, other.transposed())


@rule(torch.addmm, Tensor.addmm)
def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """Return X W + b: the linear layer of GPT-2, whose rows are the tokens of all examples."""
    if beta != 1 or alpha != 1:
        raise BilevelError(f"beta={beta}, alpha={alpha} of `addmm` have no response rule; set 1")
    if input.ndim != 1 or isinstance(mat1, ResponseWeight):
        return input + torch.matmul(mat1, mat2)
    return linear(mat1, mat2.t(), input)


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
