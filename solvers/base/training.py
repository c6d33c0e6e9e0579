"""Training w round by round: what every solver with an inner problem of its own does."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from bilevel import Batch, BilevelError, Carry, Data, Hypers, Metrics, Params, Problem, Solver
from bilevel.params import detached, to_device
from bilevel.solvers.optim.functional import configured, optimizer_settings
from bilevel.solvers.optim.optimized import MakeOptimizer, MakeScheduler, Optimized, descend


class Training(Solver):
    """Rounds of `inner_steps` updates of w on training batches.

    A subclass says what one update is; `Descent` adds an outer phase to the round.

    Attributes:
        weights: w and its optimizer.
        carry: batch-norm statistics, recurrent state.
    """

    problem: Problem
    data: Data
    device: torch.device
    generator: torch.Generator
    weights: Optimized
    carry: Carry

    def __init__(
        self,
        *,
        inner_steps: int,
        inner_optimizer: MakeOptimizer,
        inner_scheduler: MakeScheduler | None,
        clip_norm: float | None,
    ) -> None:
        at_least(inner_steps=inner_steps, least=1)
        check_clip_norm(clip_norm)
        self.inner_steps = inner_steps
        self.inner_optimizer, self.inner_scheduler, self.clip_norm = (
            inner_optimizer,
            inner_scheduler,
            clip_norm,
        )

    @abstractmethod
    def inner_step(self, batch: Batch) -> Metrics:
        """Train w, and whatever else the inner phase trains, on one batch."""

    def descend_inner(self, u: Tensor, batch: Batch) -> Metrics:
        """w takes one step of its optimizer on L_T(λ(u), ·), at a constant λ."""
        return self.descend_at(self.problem.space.constrain(u, self.generator), batch)

    def descend_at(self, hypers: Hypers, batch: Batch) -> Metrics:
        """The same at λ in its own units."""
        loss, carry = self.problem.inner_loss(
            hypers, self.weights.tensors, self.carry, batch, self.generator
        )
        self.watch(loss)
        descend(loss, self.weights)
        self.carry = detached(carry)
        return {"inner_loss": loss.detach()}

    def inner_phase(self, steps: int, *, warmup: bool) -> Metrics:
        """`steps` inner steps, each on the next training batch; the means of their metrics.

        `warmup` says that no outer phase follows.
        """
        totals: Metrics = {}
        for _ in range(steps):
            self.inner_count += 1
            for name, value in self.take(self.inner_step, self.next_batch(self.data.train)).items():
                totals[name] = totals[name] + value if name in totals else value
        return {name: total / steps for name, total in totals.items()}

    def outer_phase(self) -> Metrics:
        """What follows the inner steps of a round after warm-up; nothing, unless a subclass tunes λ."""
        return {}

    def trained(self) -> dict[str, Optimized]:
        """What the inner phase trains, by name: scheduled and saved."""
        return {"weights": self.weights}

    def trained_with(self, tensors: Params, optimizer: MakeOptimizer) -> Optimized:
        """`tensors` under `optimizer`, with the schedule and the clipping of the inner phase."""
        return Optimized(tensors, optimizer, self.inner_scheduler, self.clip_norm)

    def setup(
        self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator
    ) -> None:
        self.problem, self.data, self.device, self.generator = problem, data, device, generator
        params, self.carry = self.initial(problem, device, generator)
        initial = {name: problem.space[name].initial() for name in problem.space}
        self.configured_optimizer = configured(
            self.inner_optimizer, optimizer_settings(problem.space, initial)
        )
        self.weights = self.trained_with(params, self.configured_optimizer)

    def step(self, *, warmup: bool = False, limit: int | None = None) -> Metrics:
        steps = self.inner_steps if limit is None else min(limit, self.inner_steps)
        with self.phase("inner"):
            metrics = self.inner_phase(steps, warmup=warmup)
        with self.phase("outer"):
            return metrics if warmup else metrics | self.outer_phase()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [group.optimizer for group in self.trained().values()]

    def epoch_ended(self, valid_loss: float | None) -> None:
        for group in self.trained().values():
            group.epoch_ended(valid_loss)

    def state_dict(self) -> dict[str, Any]:
        return {
            "trained": {name: group.state_dict() for name, group in self.trained().items()},
            "carry": self.carry,
            "generator": self.generator.get_state(),
            "inner_count": self.inner_count,
            "outer_count": self.outer_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, group in self.trained().items():
            group.load_state_dict(state["trained"][name])
        self.carry = to_device(state["carry"], self.device)
        self.generator.set_state(state["generator"].cpu())
        self.inner_count, self.outer_count = state["inner_count"], state["outer_count"]


def at_least(*, least: float, **values: float) -> None:
    """Raise where a value is too small, or NaN."""
    for name, value in values.items():
        if not value >= least:
            raise BilevelError(
                f"{name}={value} is {'no number' if value != value else f'below {least}'}; choose {name} ≥ {least}"
            )


def above_zero(**values: float) -> None:
    """Raise where a value is not a positive and finite number."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise BilevelError(f"{name}={value} is not a positive, finite number; choose one")


def check_clip_norm(clip_norm: float | None) -> None:
    """Raise where a largest gradient norm is none."""
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise BilevelError(
            f"clip_norm={clip_norm} clips to no norm; choose a positive and finite one, or null for no clipping"
        )
