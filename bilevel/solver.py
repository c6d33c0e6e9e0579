"""The interface of a solver: set up on a problem, advanced by rounds, asked for its solution."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bilevel.data.tensor_stream import Data
from bilevel.params import Batch, Carry, Hypers, Metrics, Params, to_device
from bilevel.prediction import check_prediction
from bilevel.problem import Problem
from bilevel.requirements import Need, Trait, check_space
from bilevel.services import Capturable, Services
from bilevel.space import Space

Split: TypeAlias = Literal["train", "valid"]


class Solution(NamedTuple):
    """Hyperparameters in their own units, and the weights and carry that belong to them."""

    hypers: Hypers
    params: Params
    carry: Carry


class RunnerHooks:
    """Questions of the runner that a solver may answer; each default is an empty answer."""

    def epoch_ended(self, valid_loss: float | None) -> None:
        """Step learning-rate schedules; `valid_loss` is the last one measured, if any."""

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return warnings by kind, from mean metrics; the runner issues each kind once."""
        return {}

    def scales(self) -> Hypers:
        """Return σ of the perturbation of each hyperparameter, in unconstrained coordinates."""
        return {}

    def lost(self) -> str | None:
        """Return what a solver lost where it has no trained solution though no loss ended the run.

        The runner asks at the end of a run, which then ends as diverged.
        """
        return None

    def outer_loss_at(self, offset: Tensor, batch: Batch) -> Tensor | None:
        """Return L_V(λ(u + δ), ŵ(u + δ)), [], on a validation batch, differentiable in δ, [h].

        None where ŵ is known at u alone. Nothing changes, and every call has the same draws.
        """
        return None

    def extra_tensors(self) -> Params:
        """Return the trained tensors other than w and λ; the runner checks that they are finite."""
        return {}

    def memory_settings(self, space: Space) -> list[str]:
        """Return settings that lower the memory of this solver, each with its present value."""
        return []

    def capturable(self) -> Capturable | str | None:
        """Declare the state of steps that may be captured; a string is the reason against it."""
        return None

    def displace(self, offset: Tensor) -> None:
        """Move u by `offset`, [h], and w not; frozen steps then train at the new λ."""
        raise NotImplementedError

    def plain(self) -> "Solver | None":
        """Return a new solver that trains w in the same way and holds λ; None if there is none."""
        return None


class Solver(RunnerHooks, ABC):
    """A method for min_λ L_V(λ, w*(λ)); stateful, as PyTorch's optimizers are.

    Attributes:
        needs: properties of a problem that this solver relies on.
        traits: other facts about the solver.
        inner_count: inner steps taken so far.
        outer_count: outer steps taken so far.
        services: timers and watches, from `setup`; `step` must not wait for the device.
    """

    needs: frozenset[Need] = frozenset()
    traits: frozenset[Trait] = frozenset()
    inner_count: int = 0
    outer_count: int = 0
    services: Services

    @abstractmethod
    def setup(
        self,
        problem: Problem,
        data: Data,
        device: torch.device,
        generator: torch.Generator,
        services: Services | None = None,
    ) -> None:
        """Build all state on `device`; `generator`, on `device`, serves every later draw."""

    @abstractmethod
    def step(self, *, warmup: bool = False, limit: int | None = None) -> Metrics:
        """Take at most `limit` inner steps, then outer steps unless `warmup`; return scalars."""

    @abstractmethod
    def solution(self) -> Solution:
        """Return the current λ and w, detached."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the next step: tensors, numbers, strings, containers of them."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, bit for bit; called after `setup`."""

    def hypergradient(self, batch: Batch | None = None) -> Tensor | None:
        """Return dL_V/du [h] on a validation batch, by default the next; u stays as it is."""
        return None

    def check(self, problem: Problem, data: Data, device: torch.device) -> None:
        """Raise `Refused` if this solver cannot tune `problem`; for `setup` and `check_problem`."""
        check_space(type(self).__name__, problem.space, self.needs, self.traits)
        check_prediction(problem, data, device)
        self.refuse(problem, data, device)

    def refuse(self, problem: Problem, data: Data, device: torch.device) -> None:
        """Raise `Refused` for reasons beyond `needs` and `traits`."""


class Stepwise(Solver):
    """A solver that a caller can also drive batch by batch, in place of `step`.

    A round is `begin_round`, `inner_steps` times `take_inner`, `end_inner`, `outer_steps` times
    `take_outer`, and `end_outer`. The outer steps and `end_outer` are left out in warm-up. A solver
    that owns its trials (search, population) is none.

    Attributes:
        inner_steps: inner steps of a round.
        outer_steps: outer steps of a round; 0 for a solver that never moves λ.
        inner_optimizer: makes the optimizer of w.
    """

    inner_steps: int
    outer_steps: int
    inner_optimizer: Callable[..., torch.optim.Optimizer]

    @abstractmethod
    def step(
        self, *, warmup: bool = False, limit: int | None = None, frozen: bool = False
    ) -> Metrics:
        """Take at most `limit` inner steps, then outer steps unless `warmup`; return scalars.

        If `frozen`, the steps train w alone, with the training batches and the draws of plain
        training at the present λ. λ and its scale stay, and nothing is spent on the response.
        """

    @property
    @abstractmethod
    def inner_takes(self) -> tuple[Split, ...]:
        """The splits of which an inner step takes a batch each; known after `setup`."""

    @property
    @abstractmethod
    def outer_takes(self) -> tuple[Split, ...]:
        """The splits of which an outer step takes a batch each; known after `setup`."""

    @property
    @abstractmethod
    def carry(self) -> Carry:
        """The carry that belongs to w now."""

    @abstractmethod
    def take_inner(self, *batches: Batch) -> Metrics:
        """Take one inner step on given batches; `inner_loss` is among the metrics."""

    @abstractmethod
    def take_outer(self, *batches: Batch) -> Metrics:
        """Take one outer step on given batches."""

    def begin_round(self, steps: int, *, warmup: bool) -> None:
        """Prepare a round of `steps` inner steps."""

    def end_inner(self) -> Metrics:
        """End the inner steps of a round; return further metrics."""
        return {}

    def end_outer(self) -> Metrics:
        """End the outer steps of a round; return further metrics."""
        return {}

    def scheduled(self) -> Sequence[torch.optim.Optimizer]:
        """Return the optimizers beside that of w that follow its learning-rate schedule."""
        return []


def initial_state(
    problem: Problem, device: torch.device, generator: torch.Generator
) -> tuple[Params, Carry]:
    """Return w and carry of `problem.init` on `device`.

    They are drawn on the CPU from the seed of `generator`, so that they are the same on any device.
    """
    params, carry = problem.init(on_cpu(generator, 0))
    return to_device(params, device), to_device(carry, device)


def on_cpu(generator: torch.Generator, draw: int) -> torch.Generator:
    """Return a generator on the CPU, a function of the seed of `generator` and of `draw`."""
    return torch.Generator().manual_seed((generator.initial_seed() + draw) % 2**63)
