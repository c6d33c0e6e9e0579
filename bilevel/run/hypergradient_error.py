"""The error of a solver's hypergradient, for problems with an exact one."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bilevel.data.tensor_stream import Data
from bilevel.params import Hypers
from bilevel.problem import Problem
from bilevel.solver import Solver
from bilevel.space import Space


class HypergradientError:
    """Compare the hypergradient of a solver with the exact one, without an effect on the run.

    A copy of the solver computes the hypergradient on streams of its own. Before each measurement
    the copy takes over the state of the solver and of its streams. So the result is the
    hypergradient that the solver would follow next: same weights, next validation batch, next
    random draws. One thing differs. In a run, an implicit solver uses the last training batches of
    the round; here it uses the next ones.
    """

    def __init__(self, problem: Problem, twin: Solver, data: Data) -> None:
        self.problem = problem
        self.twin = twin
        self.data = data

    @classmethod
    def of(
        cls, problem: Problem, solver: Solver, device: torch.device
    ) -> "HypergradientError | None":
        """Make one for a solver that is not set up yet.

        The result is None if the problem has no exact hypergradient of its whole space, or if the
        solver follows no hypergradient.
        """
        hypers = problem.space.constrain(problem.space.init(torch.float64))
        exact = problem.exact_hypergradient(hypers)
        follows = type(solver).hypergradient is not Solver.hypergradient
        if exact is None or exact.numel() != problem.space.numel or not follows:
            return None
        twin = copy.deepcopy(solver)
        data = problem.data(device, torch.Generator().manual_seed(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the solver itself gives the same warnings
            twin.setup(problem, data, device, torch.Generator(device).manual_seed(0))
        return cls(problem, twin, data)

    def measure(self, solver: Solver, data: Data, hypers: Hypers) -> dict[str, float]:
        """Return `norm` ‖g‖, `cosine` g·g*/‖g‖‖g*‖ and `error` ‖g − g*‖/‖g*‖.

        Here g = dL_V/du is the hypergradient of the solver and g* the exact one. A quotient by
        zero is left out: a response that has not been trained yet gives g = 0, without a direction.

        Args:
            solver: the solver, which stays as it is.
            data: its streams, which stay as they are.
            hypers: its λ.
        """
        exact = self.problem.exact_hypergradient(hypers)
        if exact is None or not bool(torch.isfinite(exact).all()):
            return {}
        copy_state(solver, self.twin)
        for split in ("train", "valid"):
            copy_state(getattr(data, split), getattr(self.data, split))
        gradient = self.twin.hypergradient()
        if gradient is None:
            return {}
        g = gradient.detach().to("cpu", torch.float64)
        truth = in_coordinates(self.problem.space, hypers, exact)
        norm, length = float(g.norm()), float(truth.norm())
        measured = {"norm": norm}
        if norm > 0 and length > 0:
            measured["cosine"] = float(g @ truth) / (norm * length)
        if length > 0:
            measured["error"] = float((g - truth).norm()) / length
        return measured


def in_coordinates(space: Space, hypers: Hypers, gradient: Tensor) -> Tensor:
    """Return dL/du = (dλ/du)ᵀ dL/dλ at λ, [h] in float64 on the CPU."""
    wide = {name: leaf.detach().to("cpu", torch.float64) for name, leaf in hypers.items()}
    with torch.enable_grad():
        u = space.unconstrain(wide).requires_grad_()
        leaves = space.constrain(u)
        weights = space.by_name(gradient.detach().to("cpu", torch.float64))
        parts = [(leaves[name] * weight).sum() for name, weight in weights.items()]
        return torch.autograd.grad(torch.stack(parts).sum(), u)[0]


def copy_state(source: Any, target: Any) -> None:
    """Load a deep copy of the state of `source` into `target`."""
    state = tree_map_only(Tensor, lambda t: t.detach().clone(), source.state_dict())
    target.load_state_dict(state)
