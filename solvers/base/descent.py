"""The one outer loop: train near λ₀, then descend L_V along the hypergradient of a method."""

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel import Batch, Carry, Data, Hypers, Metrics, Need, Params, Problem, Solution
from bilevel.checks.check_problem import check_laws
from bilevel.params import to_device
from bilevel.requirements import Trait
from bilevel.services import Capturable, Services
from bilevel.solver import Solver, Split, Stepwise
from bilevel.solvers.autodiff.pullback import Pullback
from bilevel.solvers.base.core import Core, averaged
from bilevel.solvers.base.dry_run import (
    check_types,
    lacks_derivative,
    peeking,
    refusals,
    refuse_half_weights,
)
from bilevel.solvers.base.method import Method
from bilevel.solvers.base.settings import InnerSettings, OuterSettings, plain_training
from bilevel.solvers.base.stationarity import far_from_minimum
from bilevel.solvers.optim.optimized import Optimized


@dataclass(kw_only=True, eq=False)
class Descent(InnerSettings, OuterSettings, Stepwise):
    """Rounds of `inner_steps` updates of w, then `outer_steps` updates of λ.

    A concrete solver holds settings, and makes the mutable state of its method in `start`. This
    class does the rest. A solver implements `start` and hooks, and overrides nothing else.

    Attributes:
        core: problem, data, weights (`core.weights`) and search distribution (`core.search`).
        method: the state of the method.
    """

    core: Core = field(init=False, repr=False)
    method: Method = field(init=False, repr=False)

    @abstractmethod
    def start(self, core: Core) -> Method:
        """Return the method of this solver at its initial state."""

    # --- hooks for settings and refusals ---

    def check_settings(self) -> None:
        """Raise if a setting of this solver is wrong."""

    def fits(self, problem: Problem, device: torch.device) -> None:
        """Raise `Refused` before anything is built, for example if its state would not fit."""

    def lacking(self) -> str | None:
        """Return the refusal of a layer without a needed derivative, with {error} in it."""
        return None

    # --- a round ---

    def step(
        self, *, warmup: bool = False, limit: int | None = None, frozen: bool = False
    ) -> Metrics:
        """Take the inner steps of a round, at most `limit`, then the outer steps.

        If `frozen`, take the inner steps on w alone, at constant λ.
        """
        steps = self.inner_steps if limit is None else min(limit, self.inner_steps)
        if frozen:
            return self.frozen_phase(steps)
        with self.services.phase("inner"):
            metrics = self.inner_phase(steps, warmup=warmup)
        with self.services.phase("outer"):
            return metrics if warmup else metrics | self.outer_phase()

    def inner_phase(self, steps: int, *, warmup: bool = False) -> Metrics:
        """Take `steps` inner steps, each on the next batches; return the means of their metrics."""
        self.begin_round(steps, warmup=warmup)
        takes, following = self.inner_takes, self.core.next_batches
        return averaged(self.take_inner(*following(takes)) for _ in range(steps)) | self.end_inner()

    def frozen_phase(self, steps: int) -> Metrics:
        """Take `steps` steps of plain training at λ₀; return the means of their metrics."""
        with self.services.phase("inner"):
            if self.method.plain_warmup:
                return self.inner_phase(steps, warmup=True)
            self.method.freeze()
            following = self.core.next_batches
            return averaged(self.take_frozen(*following(("train",))) for _ in range(steps))

    def outer_phase(self) -> Metrics:
        """Take the outer steps, then set u₀ ← u; return the metrics of the last step."""
        metrics: Metrics = {}
        for _ in range(self.outer_steps):
            metrics = self.take_outer(*self.core.next_batches(self.outer_takes))
        return metrics | self.end_outer()

    # --- its parts, which a caller with batches of its own takes one by one ---

    @property
    def inner_takes(self) -> tuple[Split, ...]:
        return self.method.inner_takes

    @property
    def outer_takes(self) -> tuple[Split, ...]:
        return self.method.outer_takes

    @property
    def carry(self) -> Carry:
        return self.core.carry

    def begin_round(self, steps: int, *, warmup: bool) -> None:
        self.method.begin_round(steps, warmup=warmup)

    def take_inner(self, *batches: Batch) -> Metrics:
        self._count_inner(batches[0])
        step = self.method.lighter_step() or self.method.inner_step
        return self.services.take(step, *batches)

    def take_frozen(self, batch: Batch) -> Metrics:
        """Take one step of w alone on a training batch; `method.freeze` comes first."""
        self._count_inner(batch)
        return self.services.take(self.core.frozen_step, batch)

    def _count_inner(self, batch: Batch) -> None:
        self.inner_count += 1
        self.core.inner_count = self.inner_count
        self.core.latest = batch if self.core.follows else None

    def end_inner(self) -> Metrics:
        return self.method.inner_ended()

    def take_outer(self, *batches: Batch) -> Metrics:
        self.outer_count += 1
        if self.method.looks_back and self.core.follows:
            batches = (*batches, self.core.training_batch())
        if self.core.outer_rates is not None:
            self.core.outer_rates.follow()
        return self.services.take(self.method.outer_step, *batches)

    def end_outer(self) -> Metrics:
        self.core.search.recentre()
        return self.method.outer_ended()

    def hypergradient(self, batch: Batch | None = None) -> Tensor:
        """Return dL_V/du, [h], as an outer step on `batch`, or on the next one, would follow it.

        u stays as it is. A method that unrolls takes the inner steps of a round first.

        Example:
            >>> from bilevel import solvers
            >>> from bilevel.problems import Quadratic
            >>> problem, device = Quadratic.random(seed=1), torch.device("cpu")
            >>> data = problem.data(device, torch.Generator())
            >>> solver = solvers.delta_stn()
            >>> solver.setup(problem, data, device, torch.Generator())
            >>> solver.hypergradient().shape
            torch.Size([3])
        """
        if self.method.unrolls:
            self.inner_phase(self.inner_steps)
        loss = self.method.outer_loss(self.core.data.valid.next() if batch is None else batch)
        gradient = torch.autograd.grad(loss, self.core.search.u, materialize_grads=True)[0]
        if self.method.unrolls:
            self.method.outer_ended()
        return gradient

    # --- set-up ---

    def __post_init__(self) -> None:
        self.check_inner()
        self.check_outer()
        self.check_settings()

    def setup(
        self,
        problem: Problem,
        data: Data,
        device: torch.device,
        generator: torch.Generator,
        services: Services | None = None,
    ) -> None:
        self.check(problem, data, device)
        self.build(problem, data, device, generator, services or Services())

    def build(
        self,
        problem: Problem,
        data: Data,
        device: torch.device,
        generator: torch.Generator,
        services: Services,
    ) -> None:
        """Make the core and the method, without any check."""
        self.services = services
        self.core = Core(self, problem, data, device, generator, services)
        self.core.prepare_search(self)
        self.method = self.start(self.core)
        if self.outer_scheduler == "inner":
            self.core.follow_inner_schedule()

    def refuse(self, problem: Problem, data: Data, device: torch.device) -> None:
        """Refuse a problem on which a dry run of a round fails; the dry run shares no state."""
        check_types(problem)
        check_laws(self, problem, data, device)
        self.fits(problem, device)
        second = Need.SECOND_DERIVATIVES in self.needs
        trial, draws = copy.copy(self), torch.Generator(device).manual_seed(0)
        try:
            with refusals(self.lacking() or (lacks_derivative(self) if second else None)):
                trial.build(problem, peeking(data), device, draws, Services())
                if Trait.SUBTRACTS in self.traits:
                    refuse_half_weights(type(self).__name__, trial.core.problem)
                trial.method.before_dry_run()
                trial.step(limit=2)
                if second:
                    core, batches = trial.core, [data.train.peek()]
                    params, u = core.weights.detached(), core.search.u0
                    Pullback(
                        core.problem, u, params, core.carry, batches, draws, core.functions
                    ).check()
                trial.method.after_dry_run()
        finally:  # the core refers to the trial, so its memory would stay until a collection
            for name in ("core", "method"):
                vars(trial).pop(name, None)

    # --- what the runner asks for ---

    def solution(self) -> Solution:
        with torch.no_grad():
            hypers = self.core.problem.space.constrain(self.core.search.u0)
            weights = self.method.effective_weights() or self.core.weights.detached()
            return Solution(hypers, weights, self.core.carry)

    def optimized(self) -> dict[str, Optimized]:
        """Return what the inner phase trains, by name."""
        return {"weights": self.core.weights} | self.method.optimized()

    def scheduled(self) -> Sequence[torch.optim.Optimizer]:
        return [group.optimizer for group in self.method.optimized().values()]

    def epoch_ended(self, valid_loss: float | None) -> None:
        for group in (*self.optimized().values(), *self.core.search.trained()):
            group.epoch_ended(valid_loss)

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        found = self.core.warnings() | self.method.warnings(metrics)
        if self.method.assumes_minimum:
            w = self.method.effective_weights() or self.core.weights.detached()
            found |= far_from_minimum(type(self).__name__, self.core, w)
        return found

    def scales(self) -> Hypers:
        return self.method.scales()

    def outer_loss_at(self, offset: Tensor, batch: Batch) -> Tensor | None:
        return self.method.outer_loss_at(offset, batch)

    def extra_tensors(self) -> Params:
        return self.method.extra_tensors()

    def capturable(self) -> Capturable | None:
        if (rebound := self.method.rebound()) is None:
            return None
        core, groups = self.core, [*self.optimized().values(), *self.core.search.trained()]
        owners = [(core, ("carry", "last_outer_carry")), (core.search, ()), (self.method, rebound)]
        return Capturable([group.optimizer for group in groups], owners)

    def displace(self, offset: Tensor) -> None:
        self.method.freeze()  # a part of w may depend on u
        self.core.search.displace(offset)

    def plain(self) -> Solver:
        return plain_training(self)

    def state_dict(self) -> dict[str, Any]:
        return {
            "core": self.core.state_dict(),
            "search": self.core.search.state_dict(),
            "outer_rates": self.core.outer_rates and self.core.outer_rates.state_dict(),
            "last_outer_carry": self.core.last_outer_carry,
            "optimized": {n: group.state_dict() for n, group in self.method.optimized().items()},
            "method": self.method.state_dict(),
            "inner_count": self.inner_count,
            "outer_count": self.outer_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        core = self.core
        core.load_state_dict(state["core"])
        core.search.load_state_dict(state["search"])
        if core.outer_rates is not None and state.get("outer_rates"):
            core.outer_rates.load_state_dict(state["outer_rates"])
        core.last_outer_carry = to_device(state["last_outer_carry"], core.device)
        for name, group in self.method.optimized().items():
            group.load_state_dict(state["optimized"][name])
        self.inner_count, self.outer_count = state["inner_count"], state["outer_count"]
        core.inner_count = self.inner_count
        self.method.load_state_dict(state["method"])
