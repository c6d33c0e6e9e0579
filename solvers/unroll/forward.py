"""Forward mode: the derivatives of w and of the optimizer's memory in λ, step by step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float
from torch import Tensor

from bilevel import Batch, Hypers, Params
from bilevel.solvers.optim.functional import FunctionalOptimizer
from bilevel.solvers.unroll.base import Mode, Unroll, Vectors, norm_of, partial_vjp
from bilevel.solvers.unroll.trajectory import InnerGradient, InnerState, Trajectory

FEWEST = 4
"""Steps from which on the growth of the derivatives is measured."""


@dataclass(frozen=True)
class Forward(Mode):
    """The derivatives Z = ∂(w, memory)/∂u, updated in every step, for few hyperparameters.

        Z_k = (∂Φ_k/∂(w, memory)) Z_{k−1} + ∂Φ_k/∂u,    ŵ(u₀ + δ) = w_K + Z_K δ

    The memory does not grow with K; it grows with h, the number of columns of Z.

    With g = ∇_w L_T, a step needs ġ = (∂g/∂w) ẇ + (∂g/∂λ) λ̇ for each column. The Hessian of L_T in
    (w, λ) is symmetric, so ġ is (ẇ, λ̇) pulled back through the graph of ∇L_T. This graph with its
    masks is built once for all columns, and a column costs two plain gradients. So no forward-mode
    formula of the network's functions is needed: PyTorch lacks some, and others are wrong when
    differentiated again. (If the backward pass of a custom autograd function is not its derivative,
    second derivatives are meaningless in either mode.)

    Source: Franceschi et al., ICML 2017, section 3.2; Pearlmutter, Neural Computation 1994.
    """

    def begin(
        self, trajectory: Trajectory, start: InnerState, u: Float[Tensor, " h"], steps: int
    ) -> Unroll:
        return ForwardUnroll(trajectory, start, u, steps=steps, last=steps)


class ForwardUnroll(Unroll):
    """Steps with their derivatives in each coordinate of u.

    Attributes:
        columns: the derivatives of all tensors of the state, for each coordinate.
        directions: the derivatives of the tuned leaves of λ, for each coordinate.
    """

    half: Tensor | None = None

    def prepare(self) -> None:
        u = self.u
        self.columns: list[Vectors] = [[None] * len(self.point.tensors()) for _ in u]
        self.directions: list[list[Tensor | None]] = []
        for direction in torch.eye(u.numel(), dtype=u.dtype, device=u.device):
            with forward_ad.dual_level():
                moved = self.space.constrain(forward_ad.make_dual(u, direction))
                leaves = [moved[name] for name in self.space.tuned]
                self.directions.append([forward_ad.unpack_dual(leaf).tangent for leaf in leaves])

    def step(self, batch: Batch) -> Tensor:
        gradient = self.inner_gradient(batch)
        weights = list(gradient.params.values())
        update = UpdateTangents(self.trajectory.optimizer, self.point, gradient, self.hypers)
        for k, direction in enumerate(self.directions):
            column = self.columns[k]
            # all columns use the same graphs, and the last column frees them
            keep = k + 1 < len(self.directions)
            tangents = [*column[: len(weights)], *direction]
            moved = partial_vjp(gradient.gradients, tangents, weights, retain_graph=keep)
            named = dict(zip(self.space.tuned, direction, strict=True))
            self.columns[k] = update.jvp(column, moved, named, keep=keep)
        self.point = update.end
        self.taken += 1
        if self.taken in (self.last // 2, self.last) and self.last >= FEWEST:
            self.measure(len(weights))
        return gradient.loss

    def measure(self, weights: int) -> None:
        """Keep ‖∂w/∂u‖ at half of the steps; at the end, extrapolate its growth to all steps."""
        moving = [t for column in self.columns for t in column[:weights] if t is not None]
        if not moving:
            return
        size = norm_of(moving)
        if self.taken < self.last:
            self.half = size
        elif self.half is not None:
            self.growth = (size / self.half.clamp_min(torch.finfo(size.dtype).tiny)).square()

    def respond(self, offset: Float[Tensor, " h"]) -> Params:
        answer = dict(self.point.params)
        for δ, column in zip(offset, self.columns, strict=True):
            for name, tangent in zip(answer, column, strict=False):
                if tangent is not None:
                    answer[name] = torch.addcmul(answer[name], δ, tangent)
        if not any(w.requires_grad for w in answer.values()):  # L_T does not depend on λ
            name = next(iter(answer))
            answer[name] = answer[name] + 0 * offset.sum()
        return answer


class UpdateTangents:
    """A step of the optimizer, and its Jacobian–vector products.

    J t is the derivative of v ↦ Jᵀv, which is linear, along t. The graph of Jᵀv is built once for
    all columns; forward-mode duals would repeat the step for each column.

    Args:
        optimizer: the optimizer.
        point: the state before the step.
        gradient: ∇L_T there.
        hypers: λ, with the optimizer settings that it holds.

    Attributes:
        end: the state after the step, as a constant.
    """

    def __init__(
        self,
        optimizer: FunctionalOptimizer,
        point: InnerState,
        gradient: InnerGradient,
        hypers: Hypers,
    ) -> None:
        with torch.enable_grad():
            start = point.replaced(t.detach().requires_grad_() for t in point.tensors())
            gradients = [
                None if g is None else g.detach().requires_grad_()
                for g in gradient.gradients[: len(point.params)]
            ]
            self._settings = list(optimizer.tuned)
            settings = {name: hypers[name].detach().requires_grad_() for name in optimizer.tuned}
            params, moments = optimizer.step(
                start.params, start.moments, gradients, optimizer.settings(hypers | settings)
            )
            end = InnerState(params, moments, gradient.carry)
            inputs = [
                *start.tensors(),
                *(g for g in gradients if g is not None),
                *settings.values(),
            ]
            self._moving = [g is not None for g in gradients]
            self._cotangents = [
                t.new_zeros(()).expand_as(t).requires_grad_() for t in end.tensors()
            ]
            self._pulled = torch.autograd.grad(
                end.tensors(), inputs, self._cotangents, create_graph=True, allow_unused=True
            )
        self.end = end.constant()

    def jvp(
        self, column: Vectors, moved: Vectors, direction: Mapping[str, Tensor | None], *, keep: bool
    ) -> Vectors:
        """Return the tangents of all tensors of `end`.

        Args:
            column: the tangents of the state before the step.
            moved: the tangents of the gradients.
            direction: the tangents of λ, by name.
            keep: keep the graph for another column.
        """
        gradients = [ġ for ġ, moving in zip(moved, self._moving, strict=True) if moving]
        tangents = [*column, *gradients, *(direction[name] for name in self._settings)]
        return partial_vjp(self._pulled, tangents, self._cotangents, retain_graph=keep)
