"""Implicit differentiation: ŵ is the trained w, with the derivative of a minimizer."""

import copy
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bilevel import Batch, Carry, Metrics, Need, Params, Space
from bilevel.params import to_device
from bilevel.requirements import Trait
from bilevel.solvers.autodiff.pullback import SMALL, Pullback, flat, unflat
from bilevel.solvers.base.core import Core
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.base.method import BestResponse
from bilevel.solvers.linear_solve.base import (
    UNIMPORTANT,
    Guess,
    LinearSolve,
    Solved,
    estimated_error,
    relative_norm,
)
from bilevel.solvers.linear_solve.conjugate_gradients import CG
from bilevel.solvers.linear_solve.curvature import Curvature, GaussNewton, Hessian
from bilevel.solvers.linear_solve.half_products import widened
from bilevel.solvers.linear_solve.nystrom import Nystrom
from bilevel.validate import at_least, whole, wrong


@dataclass(kw_only=True, eq=False)
class Implicit(Descent):
    """The best response by the implicit function theorem, whatever inner optimizer trains w.

        ŵ(u) = w,    (∂ŵ/∂u)ᵀ v = −(∂²L_T/∂u∂w)ᵀ H⁻¹ v

    It is exact where ∇_w L_T = 0 and the solve is exact. Weight decay of the optimizer of w is a
    part of L_T here, and λ may hold it. All products of one outer step come from one graph, on the
    last training batches of the round and under one draw of their masks. Memory holds a few vectors
    like w or λ (`Nystrom`: 2 · rank of them).

    Attributes:
        linear_solve: computes H⁻¹v: `CG`, `Neumann`, `FixedPoint`, `Nystrom` or `Identity`.
        curvature: H: `Hessian` or `GaussNewton`, with damping.
        warm_start: begin a solve where the last one ended, if the solve can (CG, fixed point).
        batches: the last training batches of a round over which derivatives of L_T are averaged.
        stationarity: warn if ‖∇_w L_T‖ exceeds this part of its value at the initial weights.

    Raises:
        BilevelError: more `batches` than a round has.

    Source: Pedregosa, ICML 2016 (CG); Lorraine et al., AISTATS 2020 (Neumann); Hataya & Yamada,
        AISTATS 2023 (Nyström); Luketina et al., ICML 2016 (identity).
    """

    needs = frozenset(
        {
            Need.OUTER_DERIVATIVE,
            Need.INNER_DERIVATIVE,
            Need.SECOND_DERIVATIVES,
            Need.CONVEXITY,
            Need.STATIONARITY,
        }
    )
    traits = frozenset({Trait.TUNES_DECAY})

    linear_solve: LinearSolve = CG()  # noqa: RUF009  (frozen)
    curvature: Curvature = Hessian()  # noqa: RUF009
    warm_start: bool = True
    batches: int = 1
    stationarity: float = 0.1

    def start(self, core: Core) -> "ImplicitMethod":
        """Return the method before its first solve."""
        return ImplicitMethod(self, core)

    def check_settings(self) -> None:
        whole(1, batches=self.batches)
        at_least(0, stationarity=self.stationarity)
        if self.batches > self.inner_steps:
            why = f"must not exceed inner_steps={self.inner_steps}, the batches of a round"
            raise wrong("batches", self.batches, why, "choose fewer batches or more inner steps")

    def memory_settings(self, space: Space) -> list[str]:
        lower = []
        if self.batches > 1:
            lower.append(f"fewer solver.batches (now {self.batches} in one graph)")
        if isinstance(self.linear_solve, Nystrom):
            lower.append(f"a smaller solver.linear_solve.rank (now {self.linear_solve.rank})")
        return lower


class ImplicitMethod(BestResponse):
    """Plain training of w, and one linear solve per outer step.

    Attributes:
        recent: the last training batches of this round, each with the carry before it.
        guess: what the last solve leaves to the next.
        report: metrics of the last solve.
        initial_norm: ‖∇_w L_T‖ at the initial weights, [].
        small: whether w is so small that time counts and memory does not.
    """

    assumes_minimum = False  # it has a stricter check of its own

    def __init__(self, settings: Implicit, core: Core) -> None:
        self.settings = settings
        self.core = core
        self.recent: deque[tuple[Batch, Carry]] = deque(maxlen=settings.batches)
        self.guess = Guess()
        self.report: Metrics = {}
        core.tune_weight_decay()
        self.small = sum(leaf.numel() for leaf in core.weights.leaves) <= SMALL
        draws = torch.Generator(core.device).manual_seed(core.generator.initial_seed())
        hypers, batch = core.problem.space.constrain(core.search.u0, draws), core.data.train.peek()
        w = core.weights
        loss, _ = core.problem.inner_loss(hypers, w.tensors, core.carry, batch, draws)
        gradients = torch.autograd.grad(loss, w.leaves, materialize_grads=True)
        self.initial_norm = torch.stack([g.norm() for g in gradients]).norm()
        if core.weight_decay is not None:
            self.initial_norm = core.decayed(flat(gradients)).norm()

    def begin_round(self, steps: int, *, warmup: bool) -> None:
        """Forget the batches of the last round."""
        self.recent.clear()

    def inner_step(self, *batches: Batch) -> Metrics:
        """Take one step of w on L_T(λ₀, ·), and keep the batch for the solve."""
        (batch,) = batches
        self.recent.append((batch, self.core.carry))
        return self.core.descend_inner(self.core.hypers(), batch)

    def respond(self, offset: Tensor) -> Params:
        """Return w, with the derivative of the minimizer in offset."""
        self.report = {}
        weights = self.core.weights
        response = _BestResponse.apply(self.core.search.u0 + offset, self)
        parts = response if self.small else unflat(response[0], weights.leaves)
        return dict(zip(weights.tensors, parts, strict=True))

    def adjoint(self, u: Float[Tensor, " h"], v: Float[Tensor, " m"]) -> Float[Tensor, " h"]:
        """Return (∂²L_T/∂u∂w)ᵀ H⁻¹ v by one solve, and keep its report."""
        with self.core.services.phase("response"):
            return self._adjoint(u, v)

    def _adjoint(self, u: Tensor, v: Tensor) -> Tensor:
        core, given = self.core, self.settings
        batches, carry = self._recent()
        w = core.weights.detached()
        pull = Pullback(core.problem, u, w, carry, batches, core.generator, core.functions)
        decay = core.weight_decay
        norm = pull.gradient_norm if decay is None else core.decayed(pull.gradient).norm()
        pull.free_gradient()
        kind, v = v.dtype, v.to(u.dtype)
        H, cross = (widened(f, kind) for f in (given.curvature.at(pull), pull.cross))
        H = H if decay is None else decay.added_to(H, v)
        solved = given.linear_solve.solve(H, v, self.guess, core.generator)
        warm = given.warm_start and given.linear_solve.continues
        self.guess = Guess(solved.x if warm else None, solved.eigenvector)
        self.report = {
            "iterations": solved.iterations,
            "inner_gradient_norm": norm,
            "negative_curvature": solved.negative_curvature.to(v.dtype),
            **undamped(solved, v, given.curvature.damping),
        }
        if solved.largest is not None:
            self.report["largest_eigenvalue"] = solved.largest
        return cross(solved.x) if decay is None else cross(solved.x) + decay.cross(u, solved.x)

    def _recent(self) -> tuple[Sequence[Batch], Carry]:
        """Return the last batches and the carry before them; before training, the first batch."""
        if not self.recent:
            return [self.core.data.train.peek()], self.core.carry
        return [batch for batch, _ in self.recent], self.recent[0][1]

    def outer_metrics(self) -> Metrics:
        return self.report

    # --- what the runner asks for ---

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        if "residual" not in metrics or (
            math.isnan(metrics["residual"]) and math.isnan(metrics["inner_gradient_norm"])
        ):
            return {}  # w itself has diverged, which the runner reports
        given, found = self.settings, {}
        norm, tolerance = metrics["inner_gradient_norm"], given.linear_solve.tolerance
        worst = max(metrics["residual"], metrics.get("adjoint_error", 0.0), key=_nan_is_large)
        if not worst <= max(tolerance, UNIMPORTANT):  # NaN too
            found["residual"] = _about_residual(given, metrics)
        if metrics["negative_curvature"] > 0:
            gauss_newton = isinstance(given.curvature, GaussNewton)
            use = "" if gauss_newton else "use curvature=GaussNewton, "
            found["negative_curvature"] = (
                f"Implicit: {metrics['negative_curvature']:.0%} of the solves met curvature that "
                f"is not positive, where H⁻¹v is not a best response; {use}damp it "
                "(curvature.damping), or train w for longer"
            )
        start = float(self.initial_norm)
        if not norm <= given.stationarity * start:
            found["stationarity"] = (
                f"Implicit: ‖∇_w L_T‖ = {norm:.2g} on average, more than {given.stationarity:g} of "
                f"its {start:.2g} at the initial weights, and the implicit function theorem holds "
                "at a minimum alone; take more inner_steps, average over more batches, or raise "
                "stationarity"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"guess": self.guess._asdict(), "initial_norm": self.initial_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.core.device
        self.guess = Guess(**to_device(copy.deepcopy(state["guess"]), device))  # solves use it up
        self.initial_norm = to_device(state["initial_norm"], device)
        self.recent.clear()


def undamped(solved: Solved, v: Tensor, damping: float | Tensor) -> Metrics:
    """Return the residual ‖H x − v‖/‖v‖ of H without its damping, and an estimate of the error.

    (H + δI) x = v − r gives H x = v − (r + δx), so neither needs a product. If the solve gives no
    remainder r, the residual is its own and nothing is estimated.
    """
    if solved.remainder is None:
        return {"residual": solved.residual}
    metrics, r = {"residual": solved.residual}, solved.remainder
    if isinstance(damping, Tensor) or damping > 0:
        r.add_(solved.x * damping)
        metrics = {
            "residual": relative_norm(r.dot(r), v.dot(v)),
            "damped_residual": solved.residual,
        }
    return metrics | {"adjoint_error": estimated_error(solved.x, v, r)}


def _nan_is_large(number: float) -> float:
    return math.inf if math.isnan(number) else number


def _about_residual(given: Implicit, metrics: Mapping[str, float]) -> str:
    """Return the warning of a solve that misses H⁻¹v, with its size and the causes."""
    solve, damping, residual = given.linear_solve, given.curvature.damping, metrics["residual"]
    found = f"leaves a relative residual of {residual:.2g} on average"
    less = "damp the curvature"
    if "damped_residual" in metrics:
        found += f" without curvature.damping={damping:g}, {metrics['damped_residual']:.2g} with it"
        less = "lower curvature.damping if the curvature is positive definite"
    if isinstance(solve, Nystrom):
        less = f"raise its rank, lower linear_solve.damping={solve.damping:g}"
    above = not residual <= max(solve.tolerance, UNIMPORTANT)
    found += f", {'above' if above else 'within'} its tolerance {solve.tolerance:g}"
    if "adjoint_error" in metrics:
        found += f", and H⁻¹v is about {metrics['adjoint_error']:.0%} off"
    return (
        f"Implicit: {type(solve).__name__} {found}, so the hypergradient is not that of the given "
        f"curvature; spend more on the solve, {less}, or raise linear_solve.tolerance"
    )


class _BestResponse(torch.autograd.Function):
    """u ↦ w, as one vector or in parts, with the derivative of the minimizer."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, method: ImplicitMethod) -> tuple[Tensor, ...]:
        ctx.method = method
        ctx.save_for_backward(u)
        leaves = method.core.weights.leaves
        if method.small:
            return tuple(leaf.detach() for leaf in leaves)
        return (flat(leaves),)  # autograd would hold the parts of v beside the flat v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return -ctx.method.adjoint(u, flat(v) if ctx.method.small else v[0]), None
