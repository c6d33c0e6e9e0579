"""A solver's hypergradient against finite differences of short trainings, while a run goes on."""

import copy
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.data.tensor_stream import Data
from bilevel.errors import BilevelError, SolverWarning
from bilevel.params import Batch, Carry, count_examples
from bilevel.problem import Problem
from bilevel.requirements import Trait
from bilevel.run.hypergradient_error import copy_state
from bilevel.run.settings import RunSettings
from bilevel.solver import Solver


def check_hypergradient_check(settings: RunSettings, solver: Solver) -> bool:
    """Return whether a run compares the hypergradient of its solver.

    Raises:
        BilevelError: it should, and the solver has no hypergradient or no steps at a given λ.

    Warns:
        SolverWarning: it should, and the solver tunes nothing.
    """
    if settings.hypergradient_check is None:
        return False
    name, setting = type(solver).__name__, "runner.hypergradient_check"
    if Trait.TUNES_NOTHING in solver.traits:
        warnings.warn(
            f"{setting} has no effect, since {name} follows no hypergradient; leave it out",
            SolverWarning,
            stacklevel=3,
        )
        return False
    follows = type(solver).hypergradient is not Solver.hypergradient
    moves = type(solver).displace is not Solver.displace
    if not (follows and moves and "frozen" in inspect.signature(solver.step).parameters):
        raise BilevelError(
            f"{setting}={settings.hypergradient_check} cannot measure {name}, which has no "
            "hypergradient or cannot train at a given λ (Solver.displace); leave it out"
        )
    return True


@dataclass(kw_only=True)
class HypergradientCheck:
    """Compare dL_V/du of a solver with differences of L_V after `steps` steps at constant λ.

        g_k ≈ (L_V(w_n(u + δe_k)) − L_V(w_n(u − δe_k))) / 2δ,    n = `steps`

    All trainings begin at the present w and its optimizer, and have the same batches and draws. A
    copy of the solver takes them, on streams of its own, so that the run keeps its bits.

    Attributes:
        problem: the problem as the solver meets it.
        twin: the copy of the solver, set up.
        data: the streams of the copy.
        seed: of the choice of coordinates.
        every: evaluations from one check to the next.
        steps: n, the length of a training.
        coordinates: the number of coordinates, drawn anew for each check.
        size: δ, in unconstrained coordinates.
        batches: validation batches for L_V and g, the next ones of the run; None for as many as
            the split has.
    """

    problem: Problem
    twin: Solver
    data: Data
    seed: int
    every: int
    steps: int
    coordinates: int
    size: float
    batches: int | None

    @classmethod
    def of(
        cls,
        settings: RunSettings,
        problem: Problem,
        solver: Solver,
        device: torch.device,
        seed: int,
    ) -> "HypergradientCheck | None":
        """Make one for a solver that is not set up yet; None where the settings ask for none."""
        if not check_hypergradient_check(settings, solver):
            return None
        assert settings.hypergradient_check is not None
        twin = copy.deepcopy(solver)
        cuda = [device] if device.type == "cuda" else []
        # a module may draw from the global random state when it is made
        with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the solver itself gives the same warnings
            data = problem.data(device, torch.Generator().manual_seed(0))
            twin.setup(problem, data, device, torch.Generator(device).manual_seed(0))
        return cls(
            problem=problem,
            twin=twin,
            data=data,
            seed=seed,
            every=settings.hypergradient_check,
            steps=settings.check_steps,
            coordinates=settings.check_coordinates,
            size=settings.check_size,
            batches=settings.check_batches,
        )

    def is_due(self, evaluations: int) -> bool:
        """Return whether a check belongs to the evaluation after `evaluations` others."""
        return evaluations > 0 and evaluations % self.every == 0

    def measure(self, solver: Solver, data: Data, evaluations: int) -> dict[str, float]:
        """Return `check_cosine` and `check_ratio` of the two gradients at the drawn coordinates.

        The ratio is ‖g‖ of the solver to ‖g‖ of the differences. A quotient by zero is left out.

        Args:
            solver: the solver, which stays as it is.
            data: its streams, which stay as they are.
            evaluations: the number of the evaluation, on which the draw of coordinates depends.
        """
        self._take_over(solver, data)
        valid = self.data.valid
        batches = [valid.next() for _ in range(self.batches or valid.steps_per_epoch)]
        gradient = self._hypergradient(solver, data, batches)
        h = gradient.numel()
        draws = torch.Generator().manual_seed((self.seed + 7919 * evaluations) % 2**63)
        chosen = torch.randperm(h, generator=draws)[: self.coordinates].sort().values
        differences = self.differences(solver, data, chosen, batches)
        own = gradient.detach().to("cpu", torch.float64)[chosen]
        norm, length = float(own.norm()), float(differences.norm())
        measured = {}
        if norm > 0 and length > 0:
            measured["check_cosine"] = float(own @ differences) / (norm * length)
        if length > 0:
            measured["check_ratio"] = norm / length
        return measured

    def differences(
        self, solver: Solver, data: Data, chosen: Tensor, batches: Sequence[Batch]
    ) -> Tensor:
        """Return the finite differences at the chosen coordinates of u, in float64 on the CPU."""
        found = torch.zeros(len(chosen), dtype=torch.float64)
        for i, k in enumerate(chosen.tolist()):
            for sign in (1.0, -1.0):
                offset = torch.zeros(self.problem.space.numel)
                offset[k] = sign * self.size
                loss = self._trained(solver, data, offset, batches)
                found[i] += sign * loss / (2 * self.size)
        return found

    def _take_over(self, solver: Solver, data: Data) -> None:
        copy_state(solver, self.twin)
        for split in ("train", "valid"):
            copy_state(getattr(data, split), getattr(self.data, split))

    def _hypergradient(self, solver: Solver, data: Data, batches: Sequence[Batch]) -> Tensor:
        """Return the mean of the solver's hypergradient over the batches, [h]."""
        total: Tensor | None = None
        examples = 0
        for batch in batches:
            if self.twin.inner_count != solver.inner_count:  # it unrolls, and has moved w
                self._take_over(solver, data)
            gradient = self.twin.hypergradient(batch)
            assert gradient is not None  # see `check_hypergradient_check`
            count = count_examples(batch)
            part = count * gradient.detach()
            total = part if total is None else total + part
            examples += count
        assert total is not None
        return total / examples

    def _trained(
        self, solver: Solver, data: Data, offset: Tensor, batches: Sequence[Batch]
    ) -> float:
        """Return L_V after a training at u + offset."""
        self._take_over(solver, data)
        self.twin.displace(offset)
        plain: Any = self.twin  # whose step takes `frozen`
        while (left := solver.inner_count + self.steps - plain.inner_count) > 0:
            plain.step(frozen=True, limit=left)
        return self._outer_loss(batches)

    @torch.no_grad()
    def _outer_loss(self, batches: Sequence[Batch]) -> float:
        """Return the mean of L_V of the copy over the batches."""
        hypers, params, carry = self.twin.solution()
        total, examples = 0.0, 0
        last: Carry | None = None
        for batch in batches:
            start = self.problem.outer_carry(carry, last, batch)
            loss, last = self.problem.outer_loss(hypers, params, start, batch)
            count = count_examples(batch)
            total, examples = total + count * float(loss), examples + count
        return total / examples
