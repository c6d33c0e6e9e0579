"""SOBA: weights, adjoint and hyperparameters move at once, each along an average over examples.

Source: Dagréou, Ablin, Vaiter & Moreau, NeurIPS 2022 (arXiv 2201.13409).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel import Batch, Metrics, Need
from bilevel.params import to_device
from bilevel.solver import Split, on_cpu
from bilevel.solvers.autodiff.pullback import Pullback, unflat
from bilevel.solvers.base.core import Core
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.base.method import Method
from bilevel.solvers.linear_solve.half_products import widened
from bilevel.solvers.optim.optimized import MakeOptimizer, apply_gradients
from bilevel.validate import positive

SLOW: MakeOptimizer = partial(torch.optim.RMSprop, lr=0.006)
"""A fifth of the rate of other solvers, which move λ at every fifth step of w."""

MOST_RESIDUAL = 10
"""Relative, on a batch, whose noise in ∇_w L_V alone gives 1 or 2 for a q exact on average."""


@dataclass(kw_only=True, eq=False)
class SOBA(Descent):
    """A round is one step each of w, of the adjoint q and of λ, all at the same (w_t, q_t, λ_t).

    Weight decay of the optimizer of w is a part of L_T in D_q, and the optimizer adds it to D_w.

        D_w = ∇_w L_T,    D_q = H q + ∇_w L_V,    D_λ = (∂²L_T/∂λ∂w)ᵀ q + ∂_λ L_V

    These are the derivatives of L_V(λ, w) + qᵀ∇_w L_T(λ, w) in q, w and λ. D_w and D_q vanish at
    w = w*(λ) and q = −H⁻¹∇_w L_V (the paper's v), where D_λ is the hypergradient. Each is a sum
    over examples, so it is unbiased on batches, unlike an inverse. A round takes one training and
    one validation batch. The variance-reduced SABA of the same paper is not implemented.

    Differences from the paper:

    - w and λ move by their own optimizers, so momentum, schedule and clipping apply; the paper has
      plain SGD. λ moves as often as w, so its learning rate should be a fraction of that of a
      solver with five inner steps a round.
    - During warm-up w and q move alone, on batches of both splits, so that q means something when
      λ begins to move.
    - The step of q is 1/L. The paper takes the step of w, which is unrelated to L under Adam, and
      may lie above 2/L with momentum, where w is stable and q is not. L is the larger of two lower
      bounds: ‖Hv‖, with v from a power iteration of one product a round, and ‖Hq‖/‖q‖, by which
      ‖(I − H/L)q‖ ≤ 2‖q‖ however poor the first bound still is.
    - Where q meets negative curvature, κ = qᵀHq/‖q‖² < 0, its equation has no stable solution. H is
      then replaced by H + 2|κ|I, which along such a q is |H|. Where L_T is convex, as the paper
      assumes, this never happens.

    Attributes:
        adjoint_lr: the step of q; None for 1/L.

    Raises:
        BilevelError: `adjoint_lr` is not positive.

    Example:
        >>> from bilevel.problems import Quadratic
        >>> problem, device = Quadratic.random(seed=1), torch.device("cpu")
        >>> solver = SOBA()
        >>> data = problem.data(device, torch.Generator())
        >>> solver.setup(problem, data, device, torch.Generator())
        >>> sorted(solver.step())
        ['adjoint_curvature', 'hypergradient_norm', 'hypergradient_snr', 'inner_gradient_norm',
         'inner_loss', 'largest_eigenvalue', 'outer_loss', 'residual']
    """

    needs = frozenset(
        {Need.OUTER_DERIVATIVE, Need.INNER_DERIVATIVE, Need.SECOND_DERIVATIVES, Need.CONVEXITY}
    )

    adjoint_lr: float | None = None
    outer_optimizer: MakeOptimizer = SLOW
    inner_steps: int = field(init=False, default=1)
    outer_steps: int = field(init=False, default=1)

    def start(self, core: Core) -> "SOBAMethod":
        """Return the method with q = 0."""
        return SOBAMethod(self, core)

    def check_settings(self) -> None:
        if self.adjoint_lr is not None:
            positive("set it to null for 1/L", adjoint_lr=self.adjoint_lr)


class Directions(NamedTuple):
    """D_w [m], D_q [m] and D_λ [h] at one (w, q, λ), with their graph and metrics."""

    w: Tensor
    q: Tensor
    u: Tensor
    pull: Pullback
    shift: Tensor
    outer_loss: Tensor
    metrics: Metrics


class SOBAMethod(Method):
    """The adjoint, the power iteration, and the direction of λ between inner and outer step.

    Attributes:
        adjoint: q, [m].
        top: v, [m], of length 1, near the eigenvector of the largest eigenvalue.
        direction: D_λ between the two steps of a round, [h].
    """

    inner_takes: ClassVar[tuple[Split, ...]] = ("train", "valid")
    outer_takes: ClassVar[tuple[Split, ...]] = ()

    def __init__(self, settings: SOBA, core: Core) -> None:
        self.settings = settings
        self.core = core
        like, size = core.weights.leaves[0], sum(leaf.numel() for leaf in core.weights.leaves)
        self.weights_type, kind = like.dtype, core.search.u.dtype
        self.adjoint = torch.zeros(size, dtype=kind, device=core.device)
        drawn = torch.randn(size, dtype=kind, generator=on_cpu(core.generator, 1))
        drawn = drawn.to(core.device)
        self.top = drawn / drawn.norm()
        self.direction: Tensor | None = None

    def inner_step(self, *batches: Batch) -> Metrics:
        """Move w and q, and keep D_λ."""
        core = self.core
        at = self.directions(*batches)
        core.watch(at.pull.loss + at.outer_loss)
        with core.services.phase("response"):
            rate, largest = self.adjoint_rate(at)
            self.adjoint = self.adjoint - rate * at.q
        apply_gradients(unflat(at.w, core.weights.leaves), core.weights)
        core.carry = at.pull.carried
        self.direction = at.u
        return at.metrics | {"largest_eigenvalue": largest}

    def outer_step(self, *batches: Batch) -> Metrics:
        """Move u along D_λ of the inner step."""
        assert self.direction is not None, "the inner step of a round comes first"
        direction, self.direction = self.direction, None
        apply_gradients([direction], self.core.search.mean)
        return self.core.note_hypergradient(direction)

    def directions(self, batch: Batch, valid: Batch) -> Directions:
        """Return D_w, D_q and D_λ on a training and a validation batch; nothing moves."""
        core, q = self.core, self.adjoint
        params, u = core.weights.detached(), core.search.u
        with core.services.phase("outer"):
            outer_loss, outer_gradient, direct = core.outer_gradients(
                valid, params, core.carry, batch
            )
        pull = Pullback(
            core.problem, u, params, core.carry, [batch], core.generator, core.functions
        )
        with core.services.phase("response"):
            Hq, cross = widened(pull.both, self.weights_type)(q)
            outer_gradient = outer_gradient.to(q.dtype)
            if (decay := core.weight_decay) is not None:
                Hq = Hq + decay.times(q)
        curvature = over(q @ Hq, q @ q)
        metrics = {
            "inner_loss": pull.loss,
            "outer_loss": outer_loss,
            "inner_gradient_norm": (
                pull.gradient_norm if decay is None else core.decayed(pull.gradient).norm()
            ),
            "residual": over((Hq + outer_gradient).norm(), outer_gradient.norm()),
            "adjoint_curvature": curvature,
            "largest_eigenvalue": over(Hq.norm(), q.norm()),
        }
        shift = 2 * torch.relu(-curvature)
        D_q = Hq + shift * q + outer_gradient
        return Directions(pull.gradient, D_q, cross + direct, pull, shift, outer_loss, metrics)

    def adjoint_rate(self, at: Directions) -> tuple[Tensor | float, Tensor]:
        """Return the step size of q and a lower bound of L, and advance the power iteration."""
        largest = at.metrics["largest_eigenvalue"]
        if self.settings.adjoint_lr is not None:
            return self.settings.adjoint_lr, largest
        Hv = widened(at.pull.hessian, self.weights_type)(self.top)
        if (decay := self.core.weight_decay) is not None:
            Hv = Hv + decay.times(self.top)
        length = Hv.norm()
        self.top = torch.where(length == 0, self.top, over(Hv, length))
        largest = torch.maximum(largest, length)
        return over(torch.ones_like(largest), largest + at.shift), largest

    def outer_loss(self, batch: Batch) -> Tensor:
        """Return L_V with D_λ for its derivative in u; the training batch is only peeked at."""
        at = self.directions(self.core.data.train.peek(), batch)
        return at.outer_loss + at.u @ (self.core.search.u - self.core.search.u.detach())

    # --- what the runner asks for ---

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        found, rate = {}, self.settings.adjoint_lr
        step = (rate or 0.0) * metrics.get("largest_eigenvalue", 0.0)
        if step > 2:
            found["adjoint_lr"] = (
                f"SOBA: adjoint_lr={rate:g} is at least {step:.2g}/L, and the adjoint diverges "
                "above 2/L; lower it, or set it to null for 1/L"
            )
        if metrics.get("adjoint_curvature", 0.0) < 0:
            found["curvature"] = (
                "SOBA: the adjoint lies along negative curvature of L_T, far from a minimum in w, "
                "and |H| replaces H there; train longer before λ moves (runner.warmup_epochs), "
                "decay weights, or use a self-tuning solver"
            )
        if metrics.get("residual", 0.0) > MOST_RESIDUAL:
            found["residual"] = (
                f"SOBA: the adjoint misses its equation by {metrics['residual']:.2g} ‖∇_w L_V‖ on "
                "average, where q = 0 would miss it by 1: batches are too noisy, or w moves too "
                "fast; take larger batches or a smaller inner step"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"adjoint": self.adjoint, "top": self.top}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adjoint, self.top = to_device((state["adjoint"], state["top"]), self.core.device)


def over(a: Tensor, b: Tensor) -> Tensor:
    """Return a/b for b > 0, and 0 for b = 0."""
    return torch.where(b == 0, 0.0, a / b.clamp_min(torch.finfo(b.dtype).tiny))
