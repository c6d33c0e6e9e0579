"""How near a solver's hypergradient is to the exact one, where the problem knows that."""

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


class Probe:
    """Asks a twin of the solver, on streams of its own, so that the run itself goes on as if nothing had been asked.

    The twin takes the solver's state and that of its streams over at every question: its answer is the hypergradient at w as it
    is, on the next validation batch and with the next draws; a solve that looks at training batches takes the next one.
    """

    def __init__(self, problem: Problem, twin: Solver, data: Data) -> None:
        self.problem, self.twin, self.data = problem, twin, data

    @classmethod
    def of(cls, problem: Problem, solver: Solver, device: torch.device) -> "Probe | None":
        """For a solver that is not set up yet; None where the problem knows no exact hypergradient of its whole space, or the
        solver follows none.
        """
        exact = problem.exact_hypergradient(
            problem.space.constrain(problem.space.init(torch.float64))
        )
        follows = type(solver).hypergradient is not Solver.hypergradient
        if exact is None or exact.numel() != problem.space.numel or not follows:
            return None
        twin = copy.deepcopy(solver)
        data = problem.data(device, torch.Generator().manual_seed(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the solver itself says it
            twin.setup(problem, data, device, torch.Generator(device).manual_seed(0))
        return cls(problem, twin, data)

    def measure(self, solver: Solver, data: Data, hypers: Hypers) -> dict[str, float]:
        """With g = dL_V/du of the solver and g* the exact one: `norm` ‖g‖, `cosine` g·g*/‖g‖‖g*‖ and `error` ‖g − g*‖/‖g*‖.

        A quotient by zero is left out: a response that has not begun to be learned gives g = 0, which has no direction.

        Args:
            solver: which is not touched.
            data: its streams, which are not touched.
            hypers: its λ.
        """
        exact = self.problem.exact_hypergradient(hypers)
        if exact is None or not bool(torch.isfinite(exact).all()):
            return {}
        _take(self.twin, solver.state_dict())
        for split in ("train", "valid"):
            _take(getattr(self.data, split), getattr(data, split).state_dict())
        gradient = self.twin.hypergradient()
        if gradient is None:
            return {}
        g, truth = (
            gradient.detach().to("cpu", torch.float64),
            in_coordinates(self.problem.space, hypers, exact),
        )
        norm, length = float(g.norm()), float(truth.norm())
        measured = {"norm": norm}
        if norm > 0 and length > 0:
            measured["cosine"] = float(g @ truth) / (norm * length)
        if length > 0:
            measured["error"] = float((g - truth).norm()) / length
        return measured


def in_coordinates(space: Space, hypers: Hypers, gradient: Tensor) -> Tensor:
    """dL/du = (dλ/du)ᵀ dL/dλ at λ, [h] in float64 on the CPU."""
    wide = {name: leaf.detach().to("cpu", torch.float64) for name, leaf in hypers.items()}
    with torch.enable_grad():
        u = space.unconstrain(wide).requires_grad_()
        leaves, weights = (
            space.constrain(u),
            space.by_name(gradient.detach().to("cpu", torch.float64)),
        )
        total = torch.stack(
            [(leaves[name] * weight).sum() for name, weight in weights.items()]
        ).sum()
        return torch.autograd.grad(total, u)[0]


def _take(owner: Any, state: dict[str, Any]) -> None:
    """Load a copy of the state, of which nothing is shared."""
    owner.load_state_dict(tree_map_only(Tensor, lambda t: t.detach().clone(), state))
