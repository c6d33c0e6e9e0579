"""∇_w L_T as a function to differentiate again: products with the Hessian and with the mixed derivative, of one graph."""

from collections.abc import Sequence, Set
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import Batch, Carry, Params, Problem
from solvers.composed import twice_differentiable


class Pullback:
    """The gradient g(u, w) = ∇_w L_T(λ(u), w) at one point, pulled back as often as wanted.

        q ↦ H q = (∂g/∂w)ᵀ q    and    q ↦ (∂g/∂u)ᵀ q = (∂²L_T/∂u∂w)ᵀ q

    The graph of g is built once, so that its sampled masks are the same in every product: H is one symmetric matrix, whatever
    a second pass would have drawn. Vectors in the space of w are flat, in the order of `params`. Several batches are averaged.

    Args:
        problem: whose L_T.
        u: unconstrained coordinates, [h].
        params: w, as constants.
        carry: with which each pass begins; what the passes would write is dropped.
        batches: of training, one at least.
        generator: of the masks.
        functions: the torch functions that the network calls (`Descent.functions`).

    Attributes:
        gradient: g, [m], as a constant.
    """

    def __init__(
        self,
        problem: Problem,
        u: Float[Tensor, " h"],
        params: Params,
        carry: Carry,
        batches: Sequence[Batch],
        generator: torch.Generator,
        functions: Set[Any] = frozenset(),
    ) -> None:
        with torch.enable_grad():  # a custom backward, where a solve happens, has gradients off
            self._u = u.detach().requires_grad_()
            w = {name: p.detach().requires_grad_() for name, p in params.items()}
            self._w = list(w.values())
            hypers = problem.space.constrain(self._u, generator)
            with twice_differentiable(functions):
                losses = [problem.inner_loss(hypers, w, carry, batch, generator)[0] for batch in batches]
            loss = sum(losses[1:], start=losses[0]) / len(losses)
            gradients = torch.autograd.grad(loss, self._w, create_graph=True, materialize_grads=True)
        self._gradients = [g for g in gradients if g.requires_grad]
        self._moving = [g.requires_grad for g in gradients]
        self.gradient = flat(gradients).detach()

    def hessian(self, q: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """H q."""
        return flat(self._pull(q, self._w)).detach()

    def cross(self, q: Float[Tensor, " m"]) -> Float[Tensor, " h"]:
        """(∂²L_T/∂u∂w)ᵀ q."""
        return self._pull(q, [self._u])[0].detach()

    def both(self, q: Float[Tensor, " m"]) -> tuple[Float[Tensor, " m"], Float[Tensor, " h"]]:
        """H q and (∂²L_T/∂u∂w)ᵀ q, for the price of one."""
        *products, cross = self._pull(q, [*self._w, self._u])
        return flat(products).detach(), cross.detach()

    def _pull(self, q: Tensor, inputs: list[Tensor]) -> Sequence[Tensor]:
        parts = [part for part, moving in zip(unflat(q, self._w), self._moving, strict=True) if moving]
        if not parts:
            return [torch.zeros_like(x) for x in inputs]
        return torch.autograd.grad(self._gradients, inputs, parts, retain_graph=True, materialize_grads=True)


def flat(tensors: Sequence[Tensor]) -> Float[Tensor, " m"]:
    """The tensors as one vector.

    Example:
        >>> flat([torch.ones(2, 2), torch.zeros(1)])
        tensor([1., 1., 1., 1., 0.])
    """
    return torch.cat([t.reshape(-1) for t in tensors])


def unflat(vector: Float[Tensor, " m"], like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flat`, with the shapes of `like`."""
    return [part.view(t.shape) for part, t in zip(vector.split([t.numel() for t in like]), like, strict=True)]
