"""SOBA: weights, adjoint and hyperparameters move at once, each along a direction that is an average over examples.

Source: Dagréou, Ablin, Vaiter & Moreau, NeurIPS 2022 (arXiv 2201.13409).
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import Batch, BilevelError, Data, Metrics, Need, Params, Problem
from bilevel.params import to_device
from bilevel.solver import on_cpu
from bilevel.solvers.autodiff.pullback import Pullback, unflat
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.optim.optimized import SGD, MakeOptimizer, MakeScheduler, apply_gradients

SLOW: MakeOptimizer = partial(torch.optim.RMSprop, lr=0.006)
"""A fifth of what other solvers take, which move λ at every fifth step of w."""

MOST_RESIDUAL = 10
"""Relative, on a batch; the noise of its ∇_w L_V alone makes it 1 or 2, however good q is on average."""


class Directions(NamedTuple):
    """D_w [m], D_q [m] and D_λ [h] at one (w, q, λ), the graph that they came of, and what was measured there."""

    w: Tensor
    q: Tensor
    u: Tensor
    pull: Pullback
    shift: Tensor
    outer_loss: Tensor
    metrics: Metrics


class SOBA(Descent):
    """One step of w, of the adjoint q and of λ a round, at the same time, on one training and one validation batch.

        D_w = ∇_w L_T,    D_q = H q + ∇_w L_V,    D_λ = (∂²L_T/∂λ∂w)ᵀ q + ∂_λ L_V,    all at (w_t, q_t, λ_t)

    These are the derivatives of L_V(λ, w) + qᵀ∇_w L_T(λ, w) in q, w and λ. They vanish, but for D_λ, at w = w*(λ) and
    q = −H⁻¹∇_w L_V (the paper's v), where D_λ is the hypergradient. Each is a sum over examples, hence unbiased on batches, as
    no inverse is. The variance-reduced SABA of the same paper, which keeps a gradient per example, is not here.

    It differs from the paper in this:

    - w and λ move by their own optimizers: momentum, schedule and clipping apply (the paper's are plain SGD). λ moves as often
      as w, so that its learning rate should be a fraction of what it is for a solver with five inner steps a round.
    - During warm-up w and q move alone, on batches of both splits: λ begins with a q that means something.
    - The step of q is 1/L. The paper's is that of w, which says nothing of L if it is Adam's, and may lie above 2/L with
      momentum, where w is stable and q is not. L is the larger of two lower bounds: ‖Hv‖, with v from a power iteration of one
      product a round, and ‖Hq‖/‖q‖, by which (I − H/L)q is never above 2‖q‖, however poor the first still is.
    - Where q has run into negative curvature, κ = qᵀHq/‖q‖² < 0, its equation has no stable solution, and H is replaced by
      H + 2|κ|I, which along such a q is |H|. Where L_T is convex, as the paper assumes, this never happens.

    Args:
        adjoint_lr: the step of q; None for 1/L.
        inner_optimizer: for w.
        inner_scheduler: its learning-rate schedule, stepped every epoch.
        clip_norm: largest gradient norm.
        outer_optimizer: for u.

    Raises:
        BilevelError: an `adjoint_lr` that is not positive.

    Example:
        >>> from bilevel.problems import Quadratic
        >>> problem, device = Quadratic.random(seed=1), torch.device("cpu")
        >>> solver = SOBA()
        >>> solver.setup(problem, problem.data(device, torch.Generator()), device, torch.Generator())
        >>> sorted(solver.step())
        ['adjoint_curvature', 'hypergradient_norm', 'inner_gradient_norm', 'inner_loss', 'largest_eigenvalue', 'outer_loss',
         'residual']
    """

    needs = frozenset({Need.INNER_DERIVATIVE, Need.SECOND_DERIVATIVES, Need.CONVEXITY})
    adjoint: Tensor
    """q, [m]."""
    top: Tensor
    """v, [m]: of length 1, near the eigenvector of the largest eigenvalue."""

    def __init__(
        self,
        *,
        adjoint_lr: float | None = None,
        inner_optimizer: MakeOptimizer = SGD,
        inner_scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
        outer_optimizer: MakeOptimizer = SLOW,
    ) -> None:
        if adjoint_lr is not None and not 0 < adjoint_lr < math.inf:
            raise BilevelError(
                f"adjoint_lr={adjoint_lr} is no step size; choose a positive one, or null for 1/L"
            )
        super().__init__(
            inner_steps=1,
            inner_optimizer=inner_optimizer,
            inner_scheduler=inner_scheduler,
            clip_norm=clip_norm,
            outer_optimizer=outer_optimizer,
        )
        self.adjoint_lr = adjoint_lr

    def step(self, *, warmup: bool = False, limit: int | None = None) -> Metrics:
        self.inner_count += 1
        with self.phase("inner"):
            at = self.directions(self.next_batch(self.data.train), self.next_batch(self.data.valid))
            self.watch(at.pull.loss + at.outer_loss)
            with self.phase("response"):
                rate, largest = self.adjoint_rate(at)
                self.adjoint = self.adjoint - rate * at.q
            apply_gradients(unflat(at.w, self.weights.leaves), self.weights)
            self.carry = at.pull.carried
        metrics = at.metrics | {"largest_eigenvalue": largest}
        if warmup:
            return metrics
        self.outer_count += 1
        with self.phase("outer"):
            apply_gradients([at.u], self.belief.mean)
            self.belief.recentre()
        return metrics | {"hypergradient_norm": at.u.norm()}

    def directions(self, batch: Batch, valid: Batch) -> Directions:
        """D_w, D_q and D_λ on a training and a validation batch; nothing moves."""
        params, q = self.weights.detached(), self.adjoint
        with self.phase("outer"):
            outer_loss, outer_gradient, direct = self.outer_gradients(valid, params, self.carry)
        pull = Pullback(
            self.problem, self.belief.u, params, self.carry, [batch], self.generator, self.functions
        )
        with self.phase("response"):
            Hq, cross = pull.both(q)
        curvature = over(q @ Hq, q @ q)
        metrics = {
            "inner_loss": pull.loss,
            "outer_loss": outer_loss,
            "inner_gradient_norm": pull.gradient_norm,
            "residual": over((Hq + outer_gradient).norm(), outer_gradient.norm()),
            "adjoint_curvature": curvature,
            "largest_eigenvalue": over(Hq.norm(), q.norm()),
        }
        shift = 2 * torch.relu(-curvature)
        return Directions(
            pull.gradient,
            Hq + shift * q + outer_gradient,
            cross + direct,
            pull,
            shift,
            outer_loss,
            metrics,
        )

    def adjoint_rate(self, at: Directions) -> tuple[Tensor | float, Tensor]:
        """The step size of q, and a lower bound of L; the power iteration, where it is in use, goes on by one product."""
        largest = at.metrics["largest_eigenvalue"]
        if self.adjoint_lr is not None:
            return self.adjoint_lr, largest
        Hv = at.pull.hessian(self.top)
        length = Hv.norm()
        self.top = torch.where(length == 0, self.top, over(Hv, length))
        largest = torch.maximum(largest, length)
        return over(torch.ones_like(largest), largest + at.shift), largest

    def outer_loss(self, batch: Batch) -> Tensor:
        """L_V at w, with D_λ as its derivative in u, on a training batch that is looked at alone."""
        at = self.directions(self.data.train.peek(), batch)
        return at.outer_loss + at.u @ (self.belief.u - self.belief.u.detach())

    def respond(self, offset: Tensor) -> Params:
        """The weights, as constants: `outer_loss` adds what they do to the hypergradient."""
        return self.weights.detached()

    def doubts(self, metrics: Mapping[str, float]) -> dict[str, str]:
        found = {}
        step = (self.adjoint_lr or 0.0) * metrics.get("largest_eigenvalue", 0.0)
        if step > 2:
            found["adjoint_lr"] = (
                f"SOBA: adjoint_lr={self.adjoint_lr:g} is at least {step:.2g}/L, and the adjoint diverges above 2/L; lower it, "
                "or set it to null for 1/L"
            )
        if metrics.get("adjoint_curvature", 0.0) < 0:
            found["curvature"] = (
                "SOBA: the adjoint lies along negative curvature of L_T, where w is near no minimum, and |H| is taken for H "
                "there; train longer before λ moves (runner.warmup_epochs), decay weights, or use a self-tuning solver"
            )
        if metrics.get("residual", 0.0) > MOST_RESIDUAL:
            found["residual"] = (
                f"SOBA: the adjoint misses its equation by {metrics['residual']:.2g} ‖∇_w L_V‖ on average, where none at all "
                "would miss it by 1: batches are too noisy, or w moves too fast; take larger batches or a smaller inner step"
            )
        return found

    def build(
        self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator
    ) -> None:
        super().build(problem, data, device, generator)
        like, size = self.weights.leaves[0], sum(leaf.numel() for leaf in self.weights.leaves)
        self.adjoint = torch.zeros(size, dtype=like.dtype, device=device)
        drawn = torch.randn(size, dtype=like.dtype, generator=on_cpu(generator, 1)).to(device)
        self.top = drawn / drawn.norm()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"adjoint": self.adjoint, "top": self.top}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.adjoint, self.top = to_device((state["adjoint"], state["top"]), self.device)


def over(a: Tensor, b: Tensor) -> Tensor:
    """a/b for b ≥ 0, and 0 where b is."""
    return torch.where(b == 0, 0.0, a / b.clamp_min(torch.finfo(b.dtype).tiny))
