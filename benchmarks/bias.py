"""Measure the error of hypergradients where the exact one is known: w trained at a fixed λ."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.workloads import set_up
from bilevel import Problem, solvers
from bilevel.problems import Quadratic, Ridge
from bilevel.solvers.base.descent import Descent

HELD = partial(torch.optim.SGD, lr=0.0)
"""The outer optimizer that keeps λ fixed while the solver trains everything else."""
SGD = partial(torch.optim.SGD, lr=0.1)
STEPS, DRAWS = 2000, 100
"""Inner steps at the fixed λ before the measurement, and measured rounds."""

PROBLEMS: dict[str, Callable[[], Any]] = {
    "quadratic, 10 weights, 3 λ, condition 10": partial(
        Quadratic.random, dtype=torch.float64, space={"hyper": {"scale": 0.5}}
    ),
    "ridge, 10 features, one λ": partial(
        Ridge.synthetic, dtype=torch.float64, space={"log_decay": {"scale": 0.5}}
    ),
}

_made = partial(dict, inner_optimizer=SGD, outer_optimizer=HELD)

SOLVERS: dict[str, Callable[[], Descent]] = {
    "implicit, CG (10)": lambda: solvers.Implicit(
        linear_solve=solvers.CG(iterations=10), **_made()
    ),
    "implicit, Neumann (10)": lambda: solvers.Implicit(
        linear_solve=solvers.Neumann(terms=10), **_made()
    ),
    "implicit, Nyström (rank 10)": lambda: solvers.Implicit(
        linear_solve=solvers.Nystrom(rank=10), **_made()
    ),
    "implicit, Nyström (rank 5)": lambda: solvers.Implicit(
        linear_solve=solvers.Nystrom(rank=5), **_made()
    ),
    "implicit, identity": lambda: solvers.Implicit(linear_solve=solvers.Identity(), **_made()),
    "unrolled, 10 steps": lambda: solvers.Unrolled(inner_steps=10, **_made()),
    "unrolled, 100 steps": lambda: solvers.Unrolled(inner_steps=100, **_made()),
    "SOBA": lambda: solvers.SOBA(**_made()),
    "SAMA": lambda: solvers.SAMA(**_made()),
    "penalty": lambda: solvers.Penalty(**_made()),
    "evolution strategies": lambda: solvers.EvolutionStrategies(**_made()),
    "evolution strategies, truncated": lambda: solvers.EvolutionStrategies(
        persistent=False, **_made()
    ),
    **{
        name: partial(
            lambda recipe: recipe(response=solvers.Dense(), scale_optimizer=HELD, **_made()),
            getattr(solvers, name),
        )
        for name in ("delta_stn", "centered_stn", "stn")
    },
}


def bias() -> dict[str, dict[str, dict[str, float]]]:
    """Return ‖ĝ − g‖/‖g‖ of single draws (median) and of their mean, and its cosine with g."""
    return {
        title: {name: _error(make(), solver()) for name, solver in SOLVERS.items()}
        for title, make in PROBLEMS.items()
    }


def _error(problem: Problem, solver: Descent) -> dict[str, float]:
    set_up(solver, problem, torch.device("cpu"))
    while solver.inner_count < STEPS:
        solver.step()
    hypers = problem.space.constrain(solver.core.search.u0)
    exact = problem.hypergradient(hypers)  # type: ignore[attr-defined]
    drawn = []
    for _ in range(DRAWS):
        solver.step()
        drawn.append(solver.hypergradient())
    estimates = torch.stack(drawn)
    mean = estimates.mean(0)
    return {
        "error": ((estimates - exact).norm(dim=1) / exact.norm()).median().item(),
        "error_of_mean": ((mean - exact).norm() / exact.norm()).item(),
        "cosine": torch.cosine_similarity(mean, exact, dim=0).item(),
    }
