"""The prediction linearized at w₀: y₀ + ẏ with y₀ = f(w₀) and ẏ = J_w f · Θε."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel import Carry, Params, Prediction
from bilevel.params import detached
from bilevel.solvers.autodiff.decompositions import (
    ATTENTION,
    DOUBLE_BACKWARD,
    FORWARD_MODE,
    FUSED_NORMS,
    Decomposed,
)

Predict: TypeAlias = Callable[[Params], tuple[Prediction, Carry]]
"""f, from weights to a prediction and a carry."""

Weights: TypeAlias = Callable[..., Params]
"""`Response.weights` at fixed Θ and w₀: `weights(offset, tangent=…)`."""


def forward_mode(
    predict: Predict, weights: Weights, offset: Tensor, functions: set[Any]
) -> tuple[Prediction, Carry]:
    """Return y₀ + ẏ by one forward-mode pass, with w₀ held constant.

    The primal carries no graph. So the backward pass costs two multiplications by the weights, not
    four. If w₀ were trained through y₀ and ẏ, PyTorch's forward-mode formulas of some layers (norms
    among them) would give it a wrong gradient without an error; use `double_backward` there.

    Args:
        predict: f.
        weights: returns the duals (w₀, Θ·offset) for an offset.
        offset: ε, [h] or [B, h].
        functions: the torch functions that f calls; those without a forward-mode derivative are
            decomposed, and norms take fused kernels.
    """
    table = FORWARD_MODE | FUSED_NORMS
    decomposed: AbstractContextManager[Any] = (
        nullcontext() if functions.isdisjoint(table.keys() | ATTENTION) else Decomposed(table)
    )
    with forward_ad.dual_level(), decomposed:
        dual, carry = predict(weights(offset, tangent=True))
        return pytree.tree_map(_linear_value, dual), {
            name: forward_ad.unpack_dual(t).primal for name, t in carry.items()
        }


def double_backward(predict: Predict, weights: Weights, offset: Tensor) -> tuple[Prediction, Carry]:
    """Return y₀ + ẏ by two backward passes; it is differentiable in w₀ too.

    With δ = 0 in w₀ + Θδ and any v:

        ẏ = ∂/∂v ⟨∂(vᵀ f(w₀ + Θδ))/∂δ, ε⟩

    Args:
        predict: f.
        weights: returns w₀ + Θδ for an offset δ.
        offset: ε, [h] or [B, h].
    """
    zero = torch.zeros_like(offset, requires_grad=True)
    with Decomposed(DOUBLE_BACKWARD):
        y, carry = predict(weights(zero, tangent=False))
    leaves, spec = pytree.tree_flatten(y)
    moved = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    v = [torch.zeros_like(leaf, requires_grad=True) for leaf in moved]
    (pulled,) = torch.autograd.grad(moved, zero, v, create_graph=True)
    tangents = torch.autograd.grad(pulled, v, offset, create_graph=True, allow_unused=True)
    dots = dict(zip(map(id, moved), tangents, strict=True))
    linear = [leaf if dots.get(id(leaf)) is None else leaf + dots[id(leaf)] for leaf in leaves]
    return pytree.tree_unflatten(linear, spec), detached(carry)


def _linear_value(y: Any) -> Any:
    """Return y₀ + ẏ of a dual tensor; return anything else unchanged."""
    if not isinstance(y, Tensor):
        return y
    value, dot = forward_ad.unpack_dual(y)
    return value if dot is None else value + dot
