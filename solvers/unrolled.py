"""Unrolled differentiation: the best response is what K steps of the inner optimizer make of λ."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel import Batch, Data, Metrics, Need, Params, Problem, Refused, SolverWarning, Space
from bilevel.params import to_device
from bilevel.requirements import check_space
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.base.dry_run import check_response
from bilevel.solvers.optim.functional import FunctionalOptimizer, Moments
from bilevel.solvers.optim.optimized import RMSPROP, SGD, MakeOptimizer, MakeScheduler
from bilevel.solvers.response.jacobian import Dense
from bilevel.solvers.unroll.forward import Forward
from bilevel.solvers.unroll.reverse import Mode, Reverse, StoredGraph, Unroll
from bilevel.solvers.unroll.trajectory import InnerState, Trajectory, lacks_second_derivative

REVERSE = Reverse()

MANY = 100
"""Coordinates from which on forward mode is advised against."""


class Unrolled(Descent):
    """λ descends L_V at the weights that K inner steps lead to, through those steps.

        ŵ(λ) = w_K,    w_{k+1} = Φ(w_k; λ, batch_k),    k = 0 … K−1

    Φ is a step of the inner optimizer, its memory (momentum, second moments) part of what is differentiated; batch-norm
    statistics and recurrent state are constants. λ may hold settings of that optimizer (`Domain.optimizer`); a tuned learning
    rate is multiplied by what its schedule makes of the one that it began with. A round is K training batches and one outer
    step, to which its graph serves.

    Args:
        mode: how the steps are differentiated: `Reverse(truncate=…, checkpoint=…)`, or `Forward()` for few hyperparameters.
        inner_steps: K.
        restart: a round begins at the initial weights, with a fresh optimizer, and not where the last one ended: the
            hypergradient is then exactly that of K steps from there (a schedule goes on, as one over
            rounds). Otherwise λ is tuned online, and its effect on earlier
            rounds is not seen.
        inner_optimizer: for w; SGD, Adam, AdamW or RMSprop.
        inner_scheduler: its learning-rate schedule, stepped every epoch.
        clip_norm: largest gradient norm of w; its effect is differentiated.
        outer_optimizer: for u.

    Source: Maclaurin et al., ICML 2015; Franceschi et al., ICML 2017; Shaban et al., AISTATS 2019.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.INNER_DERIVATIVE, Need.SECOND_DERIVATIVES})
    tunes_optimizer: ClassVar[bool] = True

    twin: FunctionalOptimizer
    trajectory: Trajectory
    start: InnerState | None = None
    unroll: Unroll | None = None

    def __init__(
        self,
        *,
        mode: Mode = REVERSE,
        inner_steps: int = 10,
        restart: bool = False,
        inner_optimizer: MakeOptimizer = SGD,
        inner_scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
        outer_optimizer: MakeOptimizer = RMSPROP,
    ) -> None:
        super().__init__(
            inner_steps=inner_steps,
            inner_optimizer=inner_optimizer,
            inner_scheduler=inner_scheduler,
            clip_norm=clip_norm,
            outer_optimizer=outer_optimizer,
        )
        self.mode, self.restart = mode, restart

    def memory_settings(self, space: Space) -> list[str]:
        if not isinstance(self.mode, Reverse):
            return [
                f"solver.mode._target_=bilevel.solvers.Reverse (now h = {space.numel} directions are carried along)"
            ]
        kept = (
            self.inner_steps
            if self.mode.truncate is None
            else min(self.mode.truncate, self.inner_steps)
        )
        steps = f"fewer solver.inner_steps, or solver.mode.truncate (now {kept} steps in one graph)"
        return [steps] if self.mode.checkpoint else [steps, "solver.mode.checkpoint=true"]

    # --- a round ---

    def inner_phase(self, steps: int, *, warmup: bool) -> Metrics:
        self.unroll = None
        if warmup and not self.twin.tuned:
            return super().inner_phase(steps, warmup=warmup)
        start, u = self.here() if warmup or self.start is None else self.start, self.belief.centre
        # settings that λ holds are on the device, where the twin takes them without waiting
        self.unroll = unroll = (
            StoredGraph(self.trajectory, start, u, steps=steps, last=0)
            if warmup
            else self.mode.begin(self.trajectory, start, u, steps)
        )
        metrics = super().inner_phase(steps, warmup=warmup)
        self.twin.write(unroll.point.params, unroll.point.moments)
        self.carry = unroll.point.carry
        if warmup:
            self.unroll = None
        return metrics

    def inner_step(self, batch: Batch) -> Metrics:
        if self.unroll is None:
            return super().inner_step(batch)
        loss = self.unroll.step(batch)
        self.watch(loss)
        return {"inner_loss": loss}

    def here(self) -> InnerState:
        """Where the last round ended, apart from what the optimizer will change in place."""
        params, moments = self.twin.read()
        return InnerState({name: p.clone() for name, p in params.items()}, moments, self.carry)

    def respond(self, offset: Tensor) -> Params:
        if self.unroll is None:
            self.inner_phase(self.inner_steps, warmup=False)
        assert self.unroll is not None
        return self.unroll.respond(offset)

    def outer_phase(self) -> Metrics:
        metrics = super().outer_phase()
        self.unroll = None  # and with it the graph
        return metrics

    def hypergradient(self, batch: Batch | None = None) -> Tensor:
        """dL_V/du of the K inner steps that a round takes, which this takes; u stays."""
        self.inner_phase(self.inner_steps, warmup=False)
        gradient = super().hypergradient(batch)
        self.unroll = None
        return gradient

    def doubts(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Say so where the steps amplify a change of λ beyond what numbers hold."""
        if math.isfinite(metrics.get("hypergradient_norm", 0.0)):
            return {}
        return {
            "hypergradient": (
                f"the hypergradient through {self.inner_steps} inner steps is not finite: they amplify what λ changes; lower "
                "the inner learning rate or inner_steps, truncate (mode=Reverse(truncate=…)), or clip gradients (clip_norm)"
            )
        }

    # --- set-up and state ---

    def build(
        self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator
    ) -> None:
        super().build(problem, data, device, generator)
        self.twin = FunctionalOptimizer(self.weights, problem.space)
        self.trajectory = Trajectory(problem, self.twin, generator, self.functions)
        self.start = None
        if self.restart:
            fresh = Moments(
                {name: {} for name in self.weights.tensors}, dict.fromkeys(self.weights.tensors, 0)
            )
            self.start = InnerState(self.here().params, fresh, self.carry)

    def check(self, problem: Problem, data: Data, device: torch.device) -> None:
        """Refuse besides what has no differentiable twin, and columns that would not fit in memory."""
        if isinstance(self.mode, Forward):
            check_space(
                type(self).__name__, problem.space, self.needs, tunes_optimizer=self.tunes_optimizer
            )
            check_response(problem, Dense(), device)
            if problem.space.numel >= MANY:
                warnings.warn(
                    f"{type(self).__name__}: forward mode carries w once for each of λ's {problem.space.numel} coordinates, at "
                    "every inner step; mode=Reverse costs the same for any number of them",
                    SolverWarning,
                    stacklevel=2,
                )
        super().check(problem, data, device)

    def rehearse(self) -> None:
        super().rehearse()
        first = self.mode.begin(self.trajectory, self.here(), self.belief.centre, 1)
        lacking = self.lacking()
        if lacking is not None and lacks_second_derivative(
            first.inner_gradient(self.data.train.peek()).gradients
        ):
            raise Refused(lacking.format(said="a function is marked once_differentiable"))

    def state_dict(self) -> dict[str, Any]:
        start = (
            None if self.start is None else {"params": self.start.params, "carry": self.start.carry}
        )
        return super().state_dict() | {"start": start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.unroll = None
        if self.start is not None:
            start = to_device(state["start"], self.device)
            self.start = InnerState(start["params"], self.start.moments, start["carry"])
