"""The curvature of L_T in w: the Hessian or the Gauss–Newton matrix, with damping."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel import Batch, Prediction
from bilevel.solvers.autodiff.pullback import (
    Output,
    Pullback,
    flat,
    flatten_and_free,
    unflat,
    vjp,
    without_value,
)
from bilevel.solvers.linear_solve.base import Product
from bilevel.validate import at_least


class Curvature(ABC):
    """A symmetric matrix in the space of w, given by its products.

    Attributes:
        damping: the part δ of A = H + δI that a residual without damping leaves out.
    """

    damping: float = 0.0

    @abstractmethod
    def at(self, pullback: Pullback) -> Product:
        """Return q ↦ A q at the point, on the batches and with the masks of `pullback`."""


@final
@dataclass(frozen=True)
class Hessian(Curvature):
    """∂²L_T/∂w² + damping · I.

    Args:
        damping: added to every eigenvalue. It removes negative curvature, but it adds a bias.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping)

    def at(self, pullback: Pullback) -> Product:
        return _damped(pullback.hessian, self.damping)


@final
@dataclass(frozen=True)
class GaussNewton(Curvature):
    """The Hessian of L_T with the prediction linearized at w₀, + damping · I.

        ∂²/∂w² inner_objective(λ, w, y₀ + J (w − w₀)) = Jᵀ ∂²ℓ/∂y² J + ∂²penalties/∂w²

    It is positive semi-definite if L_T is convex in the prediction. It equals the Hessian if the
    network is linear in w, or if the network fits perfectly.

    Args:
        damping: added to every eigenvalue.

    Source: Martens, "New insights and perspectives on the natural gradient method", JMLR 2020,
        section 6; as the curvature of a best response: Bae & Grosse, NeurIPS 2020, section 4.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping)

    def at(self, pullback: Pullback) -> Product:
        parts = [
            _GaussNewtonBatch(pullback, batch, prediction) for batch, prediction in pullback.passes
        ]

        def product(q: Tensor) -> Tensor:
            products = [part.product(q) for part in parts]
            return sum(products[1:], start=products[0]) / len(products)

        return _damped(parts[0].product if len(parts) == 1 else product, self.damping)


class _GaussNewtonBatch:
    """Products with the Gauss–Newton matrix of one batch.

    The matrix is the Hessian of q ↦ inner_objective(λ, w₀ + q, y₀ + J q) at 0. J q is computed by
    double backward, because some layers lack forward mode: p(v) = Jᵀv is linear in v, and
    (∂p/∂v)ᵀ q = J q.
    """

    def __init__(self, pullback: Pullback, batch: Batch, prediction: Prediction) -> None:
        leaves, spec = pytree.tree_flatten(prediction)
        self.w = list(pullback.params.values())
        moved = [
            i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        self.y: list[Tensor] = [leaves[i] for i in moved]
        constants: list[Any] = [
            leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        with torch.enable_grad():
            self.v = [torch.zeros_like(y, requires_grad=True) for y in self.y]
            self.p: Output | None = None
            if moved:
                p = torch.autograd.grad(
                    self.y, self.w, self.v, create_graph=True, materialize_grads=True
                )
                self.p = without_value(flat(p))
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
            n = len(self.w)
            self.slopes = [without_value(t) for t in (flat(slopes[:n]), *slopes[n:])]

    def product(self, q: Tensor) -> Float[Tensor, " m"]:
        """Return the product with q."""
        tangents = () if self.p is None else vjp([self.p], self.v, [q])
        curved = vjp(self.slopes, self.inputs, [q, *tangents])
        own, through = list(curved[: len(self.w)]), curved[len(self.w) :]
        del curved
        product = flatten_and_free(own)  # a new tensor: autograd may return q or an expanded one
        if self.y:
            torch._foreach_add_(unflat(product, self.w), list(vjp(self.y, self.w, through)))
        return product


def _damped(product: Product, damping: float) -> Product:
    return product if damping == 0 else lambda q: product(q).add_(q, alpha=damping)
