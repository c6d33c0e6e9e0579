"""Unrolled differentiation: the best response is the result of K inner optimizer steps at λ."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel import Batch, Metrics, Need, Params, Problem, Refused, SolverWarning, Space
from bilevel.params import to_device
from bilevel.requirements import Trait
from bilevel.solvers.base.core import Core
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.base.dry_run import check_response, lacks_derivative
from bilevel.solvers.base.method import BestResponse
from bilevel.solvers.optim.functional import FunctionalOptimizer, Moments
from bilevel.solvers.response.jacobian import Dense
from bilevel.solvers.unroll.base import Mode, Unroll
from bilevel.solvers.unroll.forward import Forward
from bilevel.solvers.unroll.reverse import Reverse, StoredGraph
from bilevel.solvers.unroll.trajectory import InnerState, Trajectory, lacks_second_derivative

MOST_GROWTH = 100
"""Growth of the adjoint over a round above which a warning is due; a stable step has none."""

MANY = 100
"""Coordinates of λ from which on forward mode warns."""


@dataclass(kw_only=True, eq=False)
class Unrolled(Descent):
    """λ descends L_V at the weights that K inner steps lead to, through those steps.

        ŵ(λ) = w_K,    w_{k+1} = Φ(w_k; λ, batch_k),    k = 0 … K−1

    Φ is a step of the inner optimizer, one of SGD, Adam, AdamW, NAdam, Adamax, RMSprop and Adagrad.
    Its memory (momentum, second moments) and its clipping are part of what is differentiated.
    Batch-norm statistics and recurrent state are constants within the steps. λ may hold settings of
    that optimizer
    (`Domain.optimizer`). A tuned learning rate is multiplied by the factor of its schedule. A round
    is K training batches and one outer step, which consumes the graph.

    Attributes:
        mode: how the steps are differentiated: `Reverse(truncate=…, checkpoint=…)`, or `Forward()`
            for few hyperparameters.
        inner_steps: K.
        restart: begin every round at the initial weights with a fresh optimizer. The hypergradient
            is then exactly that of K steps from there; a schedule continues, as one over rounds.
            Otherwise λ is tuned online, and its effect on earlier rounds is not seen.

    Source: Maclaurin et al., ICML 2015; Franceschi et al., ICML 2017; Shaban et al., AISTATS 2019.
    """

    needs = frozenset({Need.OUTER_DERIVATIVE, Need.INNER_DERIVATIVE, Need.SECOND_DERIVATIVES})
    traits = frozenset({Trait.TUNES_OPTIMIZER})

    mode: Mode = Reverse()  # noqa: RUF009  (frozen)
    inner_steps: int = 10
    restart: bool = False
    outer_steps: int = field(init=False, default=1)

    def start(self, core: Core) -> "UnrolledMethod":
        """Return the method between two rounds."""
        return UnrolledMethod(self, core)

    def fits(self, problem: Problem, device: torch.device) -> None:
        """Refuse columns of forward mode that would not fit in memory."""
        if not isinstance(self.mode, Forward):
            return
        check_response(problem, Dense(), device)
        if (h := problem.space.numel) >= MANY:
            warnings.warn(
                f"Unrolled: forward mode carries w once for each of the {h} coordinates of λ, at "
                "every inner step; mode=Reverse costs the same for any number of them",
                SolverWarning,
                stacklevel=2,
            )

    def memory_settings(self, space: Space) -> list[str]:
        if not isinstance(self.mode, Reverse):
            reverse = "solver.mode._target_=bilevel.solvers.Reverse"
            return [f"{reverse} (now h = {space.numel} directions are carried along)"]
        kept = min(self.mode.truncate or self.inner_steps, self.inner_steps)
        steps = f"fewer solver.inner_steps, or solver.mode.truncate (now {kept} steps in one graph)"
        return [steps] if self.mode.checkpoint else [steps, "solver.mode.checkpoint=true"]


class UnrolledMethod(BestResponse):
    """The steps of a round, and their graph until the outer step.

    Attributes:
        optimizer: the inner optimizer as a function.
        trajectory: the inner steps as functions.
        restart_point: the initial weights, where a round begins if `restart`; else None.
        unroll: the steps of this round; None between rounds and in plain warm-up.
        warmup: whether this round has no outer step.
    """

    unrolls: ClassVar[bool] = True
    plain_warmup: ClassVar[bool] = True

    def __init__(self, settings: Unrolled, core: Core) -> None:
        self.settings = settings
        self.core = core
        self.optimizer = FunctionalOptimizer(core.weights, core.problem.space)
        self.trajectory = Trajectory(core.problem, self.optimizer, core.generator, core.functions)
        self.unroll: Unroll | None = None
        self.warmup = False
        self.restart_point: InnerState | None = None
        self.assumes_minimum = not settings.restart
        if settings.restart:
            names = list(core.weights.tensors)
            fresh = Moments({name: {} for name in names}, dict.fromkeys(names, 0))
            self.restart_point = InnerState(self.here().params, fresh, core.carry)

    # --- w_{k+1} = Φ(w_k; λ, batch_k) ---

    def begin_round(self, steps: int, *, warmup: bool) -> None:
        """Begin the unroll at w and u₀; in warm-up without a graph.

        Plain warm-up takes the optimizer's own steps. Where λ holds settings of the optimizer, they
        lie on the device, and the optimizer takes them without waiting.
        """
        self.unroll = None
        self.warmup = warmup
        if warmup and not self.optimizer.tuned:
            return
        start = self.here() if warmup or self.restart_point is None else self.restart_point
        u = self.core.search.u0
        if warmup:
            self.unroll = StoredGraph(self.trajectory, start, u, steps=steps, last=0)
        else:
            self.unroll = self.settings.mode.begin(self.trajectory, start, u, steps)

    def inner_step(self, *batches: Batch) -> Metrics:
        """Take one step of w, and keep what its derivative needs."""
        if self.unroll is None:
            return self.core.descend_inner(self.core.hypers(), *batches)
        loss = self.unroll.step(*batches)
        self.core.watch(loss)
        return {"inner_loss": loss}

    def inner_ended(self) -> Metrics:
        """Write w_K and the optimizer's memory back."""
        if self.unroll is not None:
            self.optimizer.write(self.unroll.point.params, self.unroll.point.moments)
            self.core.carry = self.unroll.point.carry
        if self.warmup:
            self.unroll = None
        return {}

    def here(self) -> InnerState:
        """Return where training stands, apart from what the optimizer changes in place."""
        params, moments = self.optimizer.read()
        return InnerState({name: p.clone() for name, p in params.items()}, moments, self.core.carry)

    # --- ŵ = w_K ---

    def respond(self, offset: Tensor) -> Params:
        """Return w_K(u₀ + offset), after the inner steps of the round."""
        assert self.unroll is not None, "the inner steps of a round come first"
        return self.unroll.respond(offset)

    def outer_ended(self) -> Metrics:
        """Free the graph."""
        self.unroll = None
        return {}

    # --- what the runner asks for ---

    def outer_metrics(self) -> Metrics:
        growth = None if self.unroll is None else self.unroll.growth
        return {} if growth is None else {"adjoint_growth": growth}

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        growth, steps = metrics.get("adjoint_growth", 0.0), self.settings.inner_steps
        if math.isfinite(metrics.get("hypergradient_norm", 0.0)):
            if not growth > MOST_GROWTH:
                return {}
            return {
                "growth": f"Unrolled: {steps} inner steps amplify a change of w by {growth:.2g} on "
                "average, so the hypergradient is that of unstable steps and not of a minimum; "
                "lower the inner learning rate (gradient descent is stable below 2/L), take fewer "
                "inner_steps, or truncate (mode=Reverse(truncate=…))"
            }
        return {
            "hypergradient": "Unrolled: the hypergradient through "
            f"{self.settings.inner_steps} inner steps is not finite, because they amplify a change "
            "of λ; lower the inner learning rate or inner_steps, truncate "
            "(mode=Reverse(truncate=…)), or clip gradients (clip_norm)"
        }

    def after_dry_run(self) -> None:
        """Refuse a custom function without a second derivative, which autograd skips silently."""
        core, mode = self.core, self.settings.mode
        first = mode.begin(self.trajectory, self.here(), core.search.u0, 1)
        if lacks_second_derivative(first.inner_gradient(core.data.train.peek()).gradients):
            marked = "a function is marked once_differentiable"
            raise Refused(lacks_derivative(self.settings).format(error=marked))

    def state_dict(self) -> dict[str, Any]:
        if (start := self.restart_point) is None:
            return {}
        return {"params": start.params, "carry": start.carry}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unroll = None
        if self.restart_point is not None:
            start = to_device(state, self.core.device)
            moments = self.restart_point.moments
            self.restart_point = InnerState(start["params"], moments, start["carry"])
