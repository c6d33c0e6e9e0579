"""Which matrix stands for the curvature of L_T in w: its Hessian, or the Gauss–Newton matrix, damped."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel import Batch, BilevelError, Prediction
from bilevel.solvers.autodiff.pullback import Pullback, flatten_and_free, gradient_edges, vjp
from bilevel.solvers.linear_solve.base import Product


class Curvature(ABC):
    """A symmetric matrix in the space of w, known by its products."""

    @abstractmethod
    def at(self, pullback: Pullback) -> Product:
        """The products at the point, on the batches and under the masks of `pullback`."""


@final
@dataclass(frozen=True)
class Hessian(Curvature):
    """∂²L_T/∂w² + damping · I.

    Args:
        damping: added to every eigenvalue; against negative curvature, at the price of a bias.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        _check(self.damping)

    def at(self, pullback: Pullback) -> Product:
        return _damped(pullback.hessian, self.damping)


@final
@dataclass(frozen=True)
class GaussNewton(Curvature):
    """The Hessian of L_T with its prediction linearized at w₀, + damping · I: positive semi-definite if L_T is convex in it.

        ∂²/∂w² inner_objective(λ, w, y₀ + J (w − w₀)) = Jᵀ ∂²ℓ/∂y² J + the second derivatives of the penalties on w

    Equal to the Hessian where the network is linear in w, or where it fits perfectly.

    Args:
        damping: added to every eigenvalue.

    Source: Martens, "New insights and perspectives on the natural gradient method", JMLR 2020, section 6; as the curvature of
        a best response: Bae & Grosse, NeurIPS 2020, section 4.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        _check(self.damping)

    def at(self, pullback: Pullback) -> Product:
        parts = [
            _GaussNewtonBatch(pullback, batch, prediction) for batch, prediction in pullback.passes
        ]

        def product(q: Tensor) -> Tensor:
            products = [part.product(q) for part in parts]
            return sum(products[1:], start=products[0]) / len(products)

        return _damped(product, self.damping)


class _GaussNewtonBatch:
    """One batch: q ↦ the Hessian of q ↦ inner_objective(λ, w₀ + q, y₀ + J q) at 0, times q.

    J q comes of double backward, since not every layer has a forward mode: p(v) = Jᵀv is linear in v, and (∂p/∂v)ᵀ q = J q.
    """

    def __init__(self, pullback: Pullback, batch: Batch, prediction: Prediction) -> None:
        leaves, spec = pytree.tree_flatten(prediction)
        self.w, self.unflat = list(pullback.params.values()), pullback.unflat
        moved = [
            i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        self.y: list[Tensor] = [leaves[i] for i in moved]
        constants: list[Any] = [
            leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        with torch.enable_grad():
            self.v = [torch.zeros_like(y, requires_grad=True) for y in self.y]
            p = (
                torch.autograd.grad(
                    self.y, self.w, self.v, create_graph=True, materialize_grads=True
                )
                if moved
                else ()
            )
            at = [y.detach().requires_grad_() for y in self.y]
            for i, y in zip(moved, at, strict=True):
                constants[i] = y
            self.inputs = [*self.w, *at]
            hypers = {name: leaf.detach() for name, leaf in pullback.hypers.items()}
            with pullback.differentiable_twice():
                objective = pullback.problem.inner_objective
                loss = objective(
                    hypers, pullback.params, pytree.tree_unflatten(constants, spec), batch
                )
            slopes = torch.autograd.grad(
                loss, self.inputs, create_graph=True, materialize_grads=True
            )
        self.p, self.slopes = gradient_edges(p), gradient_edges(slopes)

    def product(self, q: Tensor) -> Float[Tensor, " m"]:
        """The Gauss–Newton matrix of this batch times q."""
        parts = self.unflat(q)
        tangents = vjp(self.p, self.v, parts) if self.y else []
        curved = vjp(self.slopes, self.inputs, [*parts, *tangents])
        own, through = list(curved[: len(self.w)]), curved[len(self.w) :]
        del curved
        if self.y:
            for i, part in enumerate(vjp(self.y, self.w, through)):
                own[i] = (
                    own[i] + part
                )  # not in place: what autograd returns may be expanded, or q itself
        return flatten_and_free(own)


def _damped(product: Product, damping: float) -> Product:
    return product if damping == 0 else lambda q: product(q).add_(q, alpha=damping)


def _check(damping: float) -> None:
    if not 0 <= damping < math.inf:
        raise BilevelError(
            f"damping={damping} adds no curvature; choose a finite number, 0 or more"
        )
