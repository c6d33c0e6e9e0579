"""Forward mode: the derivatives of w and of the optimizer's memory in λ, carried along with the inner steps."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float
from torch import Tensor

from bilevel import Batch, Hypers, Params
from bilevel.solvers.optim.functional import FunctionalOptimizer
from bilevel.solvers.unroll.reverse import Mode, Unroll, Vectors, partial_vjp
from bilevel.solvers.unroll.trajectory import InnerGradient, InnerState, Trajectory


@dataclass(frozen=True)
class Forward(Mode):
    """The derivatives Z = ∂(w, memory)/∂u of the steps so far, carried along: memory does not grow with K, but with h.

        Z_k = (∂Φ_k/∂(w, memory)) Z_{k−1} + ∂Φ_k/∂u,    ŵ(u₀ + δ) = w_K + Z_K δ

    With g = ∇_w L_T, what a step needs of the second derivatives is ġ = (∂g/∂w) ẇ + (∂g/∂λ) λ̇ for each of the h columns. The
    Hessian of L_T in (w, λ) is symmetric, so ġ is (ẇ, λ̇) pulled back through the graph of ∇L_T: that graph, with its masks,
    is built once for all columns, and a column costs two plain gradients. No forward-mode formula of the network's functions is
    needed, of which PyTorch lacks some, and has others wrong when they are differentiated. (Where the backward pass of a custom
    autograd function is not its derivative, no second derivative means anything, in either mode.)

    Source: Franceschi et al., ICML 2017, section 3.2; Pearlmutter, Neural Computation 1994.
    """

    def begin(
        self, trajectory: Trajectory, start: InnerState, u: Float[Tensor, " h"], steps: int
    ) -> Unroll:
        return ForwardUnroll(trajectory, start, u, steps=steps, last=steps)


class ForwardUnroll(Unroll):
    """Steps with their derivatives in each coordinate of u.

    Attributes:
        columns: for each coordinate, the derivative of every tensor of the point.
    """

    def prepare(self) -> None:
        u = self.u
        self.columns: list[Vectors] = [[None] * len(self.point.tensors()) for _ in u]
        self.directions: list[list[Tensor | None]] = []
        for direction in torch.eye(u.numel(), dtype=u.dtype, device=u.device):
            with forward_ad.dual_level():
                moved = self.space.constrain(forward_ad.make_dual(self.u, direction))
                self.directions.append(
                    [forward_ad.unpack_dual(moved[name]).tangent for name in self.space.tuned]
                )

    def step(self, batch: Batch) -> Tensor:
        gradient = self.inner_gradient(batch)
        weights = list(gradient.params.values())
        update = UpdateTangents(self.trajectory.optimizer, self.point, gradient, self.hypers)
        for k, direction in enumerate(self.directions):
            column = self.columns[k]
            # the graphs serve every column, and are freed with the last
            keep = k + 1 < len(self.directions)
            moved = partial_vjp(
                gradient.gradients,
                [*column[: len(weights)], *direction],
                weights,
                retain_graph=keep,
            )
            self.columns[k] = update.jvp(
                column, moved, dict(zip(self.space.tuned, direction, strict=True)), keep=keep
            )
        self.point = update.end
        return gradient.loss

    def respond(self, offset: Float[Tensor, " h"]) -> Params:
        answer = dict(self.point.params)
        for δ, column in zip(offset, self.columns, strict=True):
            for name, tangent in zip(answer, column, strict=False):
                if tangent is not None:
                    answer[name] = torch.addcmul(answer[name], δ, tangent)
        return answer


class UpdateTangents:
    """A step of the optimizer, and what it makes of tangents: J t is the derivative of v ↦ Jᵀv, which is linear, along t.

    The graph of Jᵀv is built once for all columns, where forward-mode duals would repeat the step for each of them.

    Args:
        optimizer: the optimizer.
        point: where the step starts.
        gradient: ∇L_T there.
        hypers: λ, with the settings that it holds.

    Attributes:
        end: where the step leads to, as a constant.
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
        """The derivative of every tensor of `end` from those of the point, of the gradients and of λ."""
        gradients = [ġ for ġ, moving in zip(moved, self._moving, strict=True) if moving]
        tangents = [*column, *gradients, *(direction[name] for name in self._settings)]
        return partial_vjp(self._pulled, tangents, self._cotangents, retain_graph=keep)
