"""Implicit differentiation: ŵ is w as it was trained, and its derivative that of the minimizer it should have come to."""

import copy
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bilevel import Batch, BilevelError, Carry, Data, Metrics, Need, Params, Problem, Space
from bilevel.params import to_device
from bilevel.solvers.autodiff.pullback import Pullback, flat, unflat
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.base.training import at_least
from bilevel.solvers.linear_solve.base import Guess, LinearSolve
from bilevel.solvers.linear_solve.conjugate_gradients import CG
from bilevel.solvers.linear_solve.curvature import Curvature, GaussNewton, Hessian
from bilevel.solvers.linear_solve.nystrom import Nystrom
from bilevel.solvers.optim.optimized import RMSPROP, SGD, MakeOptimizer, MakeScheduler


class Implicit(Descent):
    """The best response by the implicit function theorem, whatever inner optimizer has trained w.

        ŵ(u) = w,    (∂ŵ/∂u)ᵀ v = −(∂²L_T/∂u∂w)ᵀ H⁻¹ v

    It is exact where ∇_w L_T = 0 and the solve is. All products of one outer step come of one graph, on the last training
    batches of the round and under one draw of their masks; nothing is held that is larger than a few vectors like w or λ
    (`Nystrom`: 2 · rank of them).

    Args:
        linear_solve: how H⁻¹v is computed: `CG`, `Neumann`, `FixedPoint`, `Nystrom` or `Identity`.
        curvature: H: `Hessian` or `GaussNewton`, with damping.
        warm_start: whether a solve begins where the last one ended, if it is one that can (CG, fixed point).
        batches: how many of the last training batches of a round the derivatives of L_T are averaged over.
        stationarity: warn where ‖∇_w L_T‖ exceeds this part of what it is at the initial weights.
        inner_steps: training batches per round.
        outer_steps: validation batches per round.
        inner_optimizer: for w.
        inner_scheduler: its learning-rate schedule, stepped every epoch.
        clip_norm: largest gradient norm of w.
        outer_optimizer: for u.

    Raises:
        BilevelError: more `batches` than a round has.

    Source: Pedregosa, ICML 2016 (CG); Lorraine et al., AISTATS 2020 (Neumann); Hataya & Yamada, AISTATS 2023 (Nyström);
        Luketina et al., ICML 2016 (identity).
    """

    needs = frozenset(
        {Need.INNER_DERIVATIVE, Need.SECOND_DERIVATIVES, Need.CONVEXITY, Need.STATIONARITY}
    )
    guess: Guess
    """What the last solve leaves to the next."""
    report: Metrics
    """Of the last solve."""
    initial_norm: Tensor
    """‖∇_w L_T‖ at the initial weights, []."""

    def __init__(
        self,
        *,
        linear_solve: LinearSolve = CG(),  # noqa: B008  (frozen)
        curvature: Curvature = Hessian(),  # noqa: B008
        warm_start: bool = True,
        batches: int = 1,
        stationarity: float = 0.1,
        inner_steps: int = 5,
        outer_steps: int = 1,
        inner_optimizer: MakeOptimizer = SGD,
        inner_scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
        outer_optimizer: MakeOptimizer = RMSPROP,
    ) -> None:
        super().__init__(
            inner_steps=inner_steps,
            outer_steps=outer_steps,
            inner_optimizer=inner_optimizer,
            inner_scheduler=inner_scheduler,
            clip_norm=clip_norm,
            outer_optimizer=outer_optimizer,
        )
        at_least(batches=batches, least=1)
        at_least(stationarity=stationarity, least=0)
        if batches > inner_steps:
            raise BilevelError(
                f"batches={batches} cannot be kept of a round of inner_steps={inner_steps}; choose no more batches than steps"
            )
        self.linear_solve, self.curvature, self.warm_start = linear_solve, curvature, warm_start
        self.batches, self.stationarity = batches, stationarity

    def memory_settings(self, space: Space) -> list[str]:
        kept = (
            [f"fewer solver.batches (now {self.batches} in one graph)"] if self.batches > 1 else []
        )
        sketch = self.linear_solve
        ranks = (
            [f"a smaller solver.linear_solve.rank (now {sketch.rank})"]
            if isinstance(sketch, Nystrom)
            else []
        )
        return kept + ranks

    def respond(self, offset: Tensor) -> Params:
        response = unflat(
            _BestResponse.apply(self.belief.centre + offset, self), self.weights.leaves
        )
        return dict(zip(self.weights.tensors, response, strict=True))

    def adjoint(self, u: Float[Tensor, " h"], v: Float[Tensor, " m"]) -> Float[Tensor, " h"]:
        """(∂²L_T/∂u∂w)ᵀ H⁻¹ v, by one solve, which is noted."""
        with self.phase("response"):
            return self._adjoint(u, v)

    def _adjoint(self, u: Tensor, v: Tensor) -> Tensor:
        batches, carry = self._recent()
        pullback = Pullback(
            self.problem, u, self.weights.detached(), carry, batches, self.generator, self.functions
        )
        norm = pullback.gradient_norm
        pullback.free_gradient()
        solved = self.linear_solve.solve(self.curvature.at(pullback), v, self.guess, self.generator)
        self.guess = Guess(
            solved.x if self.warm_start and self.linear_solve.continues else None,
            solved.eigenvector,
        )
        self.report = {
            "residual": solved.residual,
            "iterations": solved.iterations,
            "inner_gradient_norm": norm,
            "negative_curvature": solved.negative_curvature.to(v.dtype),
        }
        if solved.largest is not None:
            self.report["largest_eigenvalue"] = solved.largest
        return pullback.cross(solved.x)

    def inner_phase(self, steps: int, *, warmup: bool) -> Metrics:
        self.recent.clear()
        return super().inner_phase(steps, warmup=warmup)

    def inner_step(self, batch: Batch) -> Metrics:
        self.recent.append((batch, self.carry))
        return super().inner_step(batch)

    def outer_step(self, batch: Batch) -> Metrics:
        self.report = {}
        return super().outer_step(batch) | self.report

    def _recent(self) -> tuple[Sequence[Batch], Carry]:
        """The last training batches, and the carry with which the first of them was met; before training, the first batch."""
        if not self.recent:
            return [self.data.train.peek()], self.carry
        return [batch for batch, _ in self.recent], self.recent[0][1]

    def doubts(self, metrics: Mapping[str, float]) -> dict[str, str]:
        if "residual" not in metrics or (
            math.isnan(metrics["residual"]) and math.isnan(metrics["inner_gradient_norm"])
        ):
            return {}  # w itself has diverged, which the runner says
        found: dict[str, str] = {}
        name, solve = type(self).__name__, type(self.linear_solve).__name__
        if not metrics["residual"] <= self.linear_solve.tolerance:  # NaN too
            found["residual"] = (
                f"{name}: {solve} leaves a relative residual of {metrics['residual']:.2g} on average, above its tolerance "
                f"{self.linear_solve.tolerance:g}, so the hypergradient is not that of the curvature given; spend more on the "
                "solve, damp the curvature, or say by linear_solve.tolerance what will do"
            )
        if metrics["negative_curvature"] > 0:
            damped = "damp it (curvature.damping)"
            remedy = (
                damped
                if isinstance(self.curvature, GaussNewton)
                else f"use curvature=GaussNewton, {damped}"
            )
            found["negative_curvature"] = (
                f"{name}: {metrics['negative_curvature']:.0%} of the solves met curvature that is not positive, where H⁻¹v is "
                f"no best response; {remedy}, or train w for longer"
            )
        start = float(self.initial_norm)
        if not metrics["inner_gradient_norm"] <= self.stationarity * start:
            found["stationarity"] = (
                f"{name}: ‖∇_w L_T‖ = {metrics['inner_gradient_norm']:.2g} on average, where it was {start:.2g} at the initial "
                f"weights, and {self.stationarity:g} of that is wanted, because the implicit function theorem holds at a "
                "minimum alone; take more inner_steps, average over more batches, or say by stationarity what will do"
            )
        return found

    def build(
        self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator
    ) -> None:
        super().build(problem, data, device, generator)
        self.recent: deque[tuple[Batch, Carry]] = deque(maxlen=self.batches)
        self.guess, self.report = Guess(), {}
        draws = torch.Generator(device).manual_seed(generator.initial_seed())
        hypers = problem.space.constrain(self.belief.centre, draws)
        loss, _ = problem.inner_loss(
            hypers, self.weights.tensors, self.carry, data.train.peek(), draws
        )
        gradients = torch.autograd.grad(loss, self.weights.leaves, materialize_grads=True)
        self.initial_norm = torch.stack([g.norm() for g in gradients]).norm()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "guess": self.guess._asdict(),
            "initial_norm": self.initial_norm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.guess = Guess(
            **to_device(copy.deepcopy(state["guess"]), self.device)
        )  # a solve uses it up
        self.initial_norm = to_device(state["initial_norm"], self.device)
        self.recent.clear()


class _BestResponse(torch.autograd.Function):
    """u ↦ w, with the derivative of the minimizer."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, solver: Implicit) -> Tensor:
        ctx.solver = solver
        ctx.save_for_backward(u)
        return flat(solver.weights.leaves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return -ctx.solver.adjoint(u, v), None
