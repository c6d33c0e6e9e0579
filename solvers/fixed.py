"""Plain training at given hyperparameters: the baseline of every method."""

from dataclasses import dataclass
from typing import Any

import torch

from bilevel import Batch, Carry, Data, Metrics, Problem, Solution
from bilevel.checks.check_problem import check_laws
from bilevel.params import count_examples
from bilevel.requirements import Trait
from bilevel.services import Capturable, Services
from bilevel.solver import Split, Stepwise
from bilevel.solvers.base.core import Core, averaged
from bilevel.solvers.base.settings import InnerSettings, trains_plainly
from bilevel.solvers.hyper_schedules import Constant, Gaussian, HyperSchedule


@trains_plainly
@dataclass(kw_only=True, eq=False)
class Fixed(InnerSettings, Stepwise):
    """w descends L_T(λ, ·) at a given λ.

    Attributes:
        hypers: the rule for λ: its initial values (None), the values of another run (`Replayed`),
            `Gaussian` or `Sinusoidal`.
        core: problem, data and weights (`core.weights`), after `setup`.
        rule: `hypers` in use, after `setup`.
    """

    traits = frozenset({Trait.TUNES_NOTHING})
    hypers: HyperSchedule | None = None
    outer_steps = 0

    def __post_init__(self) -> None:
        self.check_inner()
        if isinstance(self.hypers, Gaussian):
            self.traits = frozenset({Trait.TUNES_NOTHING, Trait.PER_EXAMPLE})

    def setup(
        self,
        problem: Problem,
        data: Data,
        device: torch.device,
        generator: torch.Generator,
        services: Services | None = None,
    ) -> None:
        self.check(problem, data, device)
        check_laws(self, problem, data, device)
        self.services = services or Services()
        self.rule = Constant() if self.hypers is None else self.hypers
        constants = self.rule.constants(problem.space)
        self.core = Core(self, problem, data, device, generator, self.services, constants)
        self.rule.setup(problem.space, self.core.weights.leaves[0])

    def step(
        self, *, warmup: bool = False, limit: int | None = None, frozen: bool = False
    ) -> Metrics:
        """Take the inner steps of a round, at most `limit`; no other steps exist."""
        steps = self.inner_steps if limit is None else min(limit, self.inner_steps)
        with self.services.phase("inner"):
            following = self.core.next_batches
            return averaged(self.take_inner(*following(self.inner_takes)) for _ in range(steps))

    @property
    def inner_takes(self) -> tuple[Split, ...]:
        return ("train",)

    @property
    def outer_takes(self) -> tuple[Split, ...]:
        return ()

    @property
    def carry(self) -> Carry:
        return self.core.carry

    def take_inner(self, *batches: Batch) -> Metrics:
        self.inner_count += 1
        self.core.inner_count = self.inner_count
        return self.services.take(self.inner_step, *batches)

    def take_outer(self, *batches: Batch) -> Metrics:
        return {}  # λ does not move

    def inner_step(self, batch: Batch) -> Metrics:
        """Take one step of w on a training batch."""
        before, core = self.inner_count - 1, self.core  # this step is counted already
        hypers = self.rule.draw(before, count_examples(batch), core.generator)
        return core.descend_inner(hypers, batch)

    def capturable(self) -> Capturable | str:
        if not isinstance(self.rule, (Constant, Gaussian)):
            name = type(self.rule).__name__
            return f"{name} hyperparameters depend on the number of the step, a number of the host"
        owners = [(self.core, ("carry",)), (self.rule, ())]
        return Capturable([self.core.weights.optimizer], owners)

    def epoch_ended(self, valid_loss: float | None) -> None:
        self.core.weights.epoch_ended(valid_loss)

    def solution(self) -> Solution:
        weights = self.core.weights.detached()
        return Solution(self.rule.at(self.inner_count), weights, self.core.carry)

    def state_dict(self) -> dict[str, Any]:
        return {
            "core": self.core.state_dict(),
            "hypers": self.rule.state_dict(),
            "inner_count": self.inner_count,
            "outer_count": self.outer_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state["hypers"])
        self.core.load_state_dict(state["core"])
        self.inner_count, self.outer_count = state["inner_count"], state["outer_count"]
        self.core.inner_count = self.inner_count
