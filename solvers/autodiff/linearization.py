"""The prediction linearized at w₀: y₀ + ẏ with y₀ = f(w₀) and ẏ = J_w f · Θε, in forward mode or by double backward."""

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
    Decomposed,
)

Predict: TypeAlias = Callable[[Params], tuple[Prediction, Carry]]
Weights: TypeAlias = Callable[..., Params]
"""`Response.weights` at given Θ and w₀: called with an offset, and whether its duals are wanted."""


def forward_mode(
    predict: Predict, weights: Weights, offset: Tensor, functions: set[Any]
) -> tuple[Prediction, Carry]:
    """y₀ + ẏ in one forward-mode pass, for w₀ held constant.

    The primal carries no graph then, so that the backward pass costs two multiplications by the weights, not four. Were w₀
    trained through y₀ and ẏ, PyTorch's forward-mode formulas would give it a wrong gradient, silently, for norms among others.

    Args:
        predict: f, from weights to a prediction and carry.
        weights: from an offset to duals (w₀, Θ·offset).
        offset: ε, [h] or [B, h].
        functions: what f calls; those without a forward-mode derivative are decomposed.
    """
    decomposed: AbstractContextManager[Any] = (
        nullcontext()
        if functions.isdisjoint(FORWARD_MODE.keys() | ATTENTION)
        else Decomposed(FORWARD_MODE)
    )
    with forward_ad.dual_level(), decomposed:
        dual, carry = predict(weights(offset, tangent=True))
        return pytree.tree_map(_linear_value, dual), {
            name: forward_ad.unpack_dual(t).primal for name, t in carry.items()
        }


def double_backward(predict: Predict, weights: Weights, offset: Tensor) -> tuple[Prediction, Carry]:
    """y₀ + ẏ, differentiable in w₀ too: with δ = 0 in w₀ + Θδ and any v,  ẏ = ∂/∂v ⟨∂(vᵀ f(w₀ + Θδ))/∂δ, ε⟩.

    Args:
        predict: f, from weights to a prediction and carry.
        weights: from an offset δ to w₀ + Θδ.
        offset: ε, [h] or [B, h].
    """
    zero = torch.zeros_like(offset, requires_grad=True)
    with Decomposed(DOUBLE_BACKWARD):
        y, carry = predict(weights(zero, tangent=False))
    leaves, spec = pytree.tree_flatten(y)
    moved = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    v = [torch.zeros_like(leaf, requires_grad=True) for leaf in moved]
    (pulled,) = torch.autograd.grad(moved, zero, v, create_graph=True)
    dots = dict(
        zip(
            map(id, moved),
            torch.autograd.grad(pulled, v, offset, create_graph=True, allow_unused=True),
            strict=True,
        )
    )
    linear = [leaf if dots.get(id(leaf)) is None else leaf + dots[id(leaf)] for leaf in leaves]
    return pytree.tree_unflatten(linear, spec), detached(carry)


def _linear_value(y: Any) -> Any:
    """y₀ + ẏ of a dual tensor; anything else as it is."""
    if not isinstance(y, Tensor):
        return y
    value, dot = forward_ad.unpack_dual(y)
    return value if dot is None else value + dot
