"""What a solver is: set up on a problem, advanced round by round, asked for its solution."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.data.stream import Stream
from bilevel.data.tensor_stream import Data
from bilevel.params import Batch, Carry, Hypers, Metrics, Params, to_device
from bilevel.problem import Problem
from bilevel.requirements import Need, check_space
from bilevel.space import Space
from bilevel.timers import Phases


class Solution(NamedTuple):
    """Hyperparameters in their own units, and the weights (and carry) that go with them."""

    hypers: Hypers
    params: Params
    carry: Carry


class Solver(ABC):
    """A method for min_λ L_V(λ, w*(λ)); stateful in PyTorch's way.

    A solver is only its mathematics: the runner counts, budgets, evaluates, logs and saves. `step` must not synchronize with
    the device; a loss that is not finite is noted by `watch` and read by the runner at the next evaluation.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    """What it relies on in a problem; see `check`."""
    tunes_optimizer: ClassVar[bool] = False
    """Whether it can tune settings of the inner optimizer (`Domain.optimizer`)."""
    subtracts: bool = False
    """Whether its hypergradient is a difference of nearly equal numbers, which needs all the digits there are."""
    inner_count: int = 0
    """Inner steps taken so far."""
    outer_count: int = 0
    """Outer steps taken so far."""
    tunes: bool = True
    """Whether it moves λ at all; a baseline does not."""
    phases: Phases | None = None
    """The clock of a run, which the runner sets; see `phase`."""
    capture: Callable[[Callable[[Batch], Metrics], Batch], Metrics] | None = None
    """Takes steps for it, as graphs of the device; the runner sets it; see `take`."""
    device_count: Tensor | None = None
    """[] on the device: `inner_count`, where steps are captured."""
    first_bad_step: Tensor | None = None
    """[] on the device: the inner step of the first loss that was not finite; see `watch`."""

    @abstractmethod
    def setup(
        self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator
    ) -> None:
        """Draw w from `problem.init` and build all state on `device`; `generator` (on `device`) serves every later draw.

        Raises:
            Refused: this solver cannot tune one of the hyperparameters of `problem.space`.
        """

    @abstractmethod
    def step(self, *, warmup: bool = False, limit: int | None = None) -> Metrics:
        """One round: some inner steps (at most `limit`), then some outer steps (none while `warmup`).

        Returns:
            Scalars on the device, for logs alone.
        """

    @abstractmethod
    def solution(self) -> Solution:
        """The current λ and w, detached."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors, numbers, strings and containers of them."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, bit for bit; called after `setup`."""

    def initial(
        self, problem: Problem, device: torch.device, generator: torch.Generator
    ) -> tuple[Params, Carry]:
        """The w and carry of `problem.init` on `device`, drawn on the CPU from the seed of `generator`, whatever the device."""
        params, carry = problem.init(on_cpu(generator, 0))
        return to_device(params, device), to_device(carry, device)

    def check(self, problem: Problem, data: Data, device: torch.device) -> None:
        """Raise `Refused` where this solver cannot tune `problem`; called by `setup` and by `check_problem`.

        The base class holds the space against `needs` and `tunes_optimizer`; one that tunes nothing refuses nothing.
        """
        if self.tunes:
            check_space(
                type(self).__name__, problem.space, self.needs, tunes_optimizer=self.tunes_optimizer
            )

    def scales(self) -> Hypers:
        """σ of the perturbation of each hyperparameter, in unconstrained coordinates; {} for solvers that draw none."""
        return {}

    def doubts(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Reasons to doubt what it does, a sentence for each kind, from the means of its metrics since the last evaluation.

        The runner warns of each kind once in a run.
        """
        return {}

    def epoch_ended(self, valid_loss: float | None) -> None:
        """The train stream finished an epoch: step learning-rate schedules. `valid_loss` is the last measured, if any."""

    def hypergradient(self, batch: Batch | None = None) -> Tensor | None:
        """dL_V/du, [h], as the next outer step would follow it; None for a solver that follows none.

        It is taken on `batch`, or else the next one of validation. It may draw, and take the inner steps of a round; u stays.
        """
        return None

    def beside(self) -> Params:
        """What it trains beside w and λ, by name (Θ of a response): a run in which that is not finite has diverged."""
        return {}

    def memory_settings(self, space: Space) -> list[str]:
        """What lowers the memory that it holds beside w and a batch, with present values; told where a run is out of it."""
        return []

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Within it, time counts as that of a phase, and not of one that it lies in; the records tell the seconds of each.

        `data` is what `next_batch` takes; `inner` the training of w; `response` the work on ŵ beyond it (a response network, a
        linear solve, particles); `outer` the steps of λ. No phase is asked for.
        """
        return nullcontext() if self.phases is None else self.phases(name)

    def next_batch(self, stream: Stream) -> Batch:
        """`stream.next()`, in a phase of its own."""
        with self.phase("data"):
            return stream.next()

    def take(self, step: Callable[[Batch], Metrics], batch: Batch) -> Metrics:
        """`step(batch)`, as a replayed graph where the run captures; for steps that change nothing on the host."""
        return step(batch) if self.capture is None else self.capture(step, batch)

    def uncapturable(self) -> str | None:
        """Why what it gives to `take` cannot be replayed as a graph, to follow 'since'; None where it can."""
        return f"the steps of {type(self).__name__} change what lies on the host"

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that its steps follow, for a capture, which holds their settings."""
        return []

    def watch(self, loss: Tensor) -> None:
        """Note on the device, without waiting for it, the first inner step at which `loss` was not finite."""
        never = torch.iinfo(torch.int64).max
        if self.first_bad_step is None:
            self.first_bad_step = torch.full((), never, device=loss.device)
        count = self.inner_count if self.device_count is None else self.device_count
        now = torch.where(torch.isfinite(loss.detach()).all(), never, count)
        self.first_bad_step = torch.minimum(self.first_bad_step, now)

    def bad_step(self) -> int | None:
        """The inner step of the first loss that was not finite (waits for the device), or None."""
        if (
            self.first_bad_step is None
            or (step := int(self.first_bad_step)) == torch.iinfo(torch.int64).max
        ):
            return None
        return step


def on_cpu(generator: torch.Generator, draw: int) -> torch.Generator:
    """A generator on the CPU that depends on the seed of `generator` and on the number of the draw, whatever the device."""
    return torch.Generator().manual_seed((generator.initial_seed() + draw) % 2**63)
