"""Watch self-tuning solvers on the toy regressions: ŵ and Θ against w*(λ) and its Jacobian."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from bilevel import solvers
from bilevel.problems.closed_form.generalized_ridge import GeneralizedRidge
from bilevel.problems.closed_form.input_dropout import InputDropout
from bilevel.problems.closed_form.linear_network import LinearNetwork
from bilevel.problems.closed_form.ridge import Ridge
from bilevel.solvers import SelfTuning

KINDS: dict[str, tuple[type[GeneralizedRidge], dict[str, Any]]] = {
    "ridge": (Ridge, {}),
    "ridge per feature": (Ridge, {"per_feature": True}),
    "linear network": (LinearNetwork, {}),
    "input dropout": (InputDropout, {}),
    "input dropout per feature": (InputDropout, {"per_feature": True}),
}
RECIPES: dict[str, Callable[..., SelfTuning]] = {
    "stn": solvers.stn,
    "centered_stn": solvers.centered_stn,
    "delta_stn": solvers.delta_stn,
}
NAMES = {"stn": "STN", "centered_stn": "centered STN", "delta_stn": "Δ-STN"}
RESPONSES = {"dense": solvers.Dense, "structured": solvers.Structured}

CPU = torch.device("cpu")


class Job(NamedTuple):
    """The settings of a training run.

    Attributes:
        data_seed: The seed of the data; None for the default of the data set.
        rounds: Rounds of five inner steps and one outer step; the first `warmup` rounds have none.
        init: The initial λ; None for the default of the problem.
    """

    kind: str
    data: str
    data_seed: int | None
    recipe: str
    response: str
    seed: int
    rounds: int
    warmup: int
    inner: float
    outer: float
    features: int | None = None
    init: float | None = None


def make(job: Job) -> GeneralizedRidge:
    """Return the problem in float64, with σ = 0.5 at the start as in `conf/problem`."""
    cls, options = KINDS[job.kind]
    (name,) = cls.penalized
    given = {"data_seed": job.data_seed, "features": job.features}
    options = options | {key: value for key, value in given.items() if value is not None}
    domain = {"scale": 0.5} if job.init is None else {"scale": 0.5, "init": job.init}
    return getattr(cls, job.data)(dtype="float64", space={name: domain}, **options)


def ready(job: Job, problem: GeneralizedRidge) -> SelfTuning:
    """Return the solver with default settings except the rates, set up."""
    outer = partial(torch.optim.RMSprop, lr=job.outer)
    solver = RECIPES[job.recipe](
        response=RESPONSES[job.response](),
        inner_optimizer=partial(torch.optim.SGD, lr=job.inner, momentum=0.9),
        outer_optimizer=outer,
        scale_optimizer=outer,
    )
    data = problem.data(CPU, torch.Generator().manual_seed(job.seed))
    solver.setup(problem, data, CPU, torch.Generator().manual_seed(job.seed))
    return solver


def train(solver: SelfTuning, rounds: Iterable[int], warmup: int) -> Iterator[int]:
    """Yield the number of rounds each time it reaches one of `rounds`; warm-up counts."""
    done = 0
    for wanted in rounds:
        while done < wanted:
            solver.step(warmup=done < warmup)
            done += 1
        yield done


def response_jacobian(problem: GeneralizedRidge, solver: SelfTuning) -> Tensor:
    """Return ∂ŵ/∂λ at λ₀, [d, h], for the linear map, as an outer step uses it."""
    return jacobian(
        lambda offset: problem.linear_map(solver.method.respond(offset)),
        torch.zeros_like(solver.core.search.u0),
    )


def watch(job: Job) -> dict[str, Any]:
    """Train, and compare at some 20 moments, most of them early, until the run diverges."""
    problem = make(job)
    solver = ready(job, problem)
    moments = sorted({round(job.rounds ** (k / 24)) for k in range(25)})
    points = []
    for rounds in train(solver, moments, job.warmup):
        leaves = (solver.core.search.u0, *solver.core.weights.leaves, *solver.method.theta.leaves)
        if not all(bool(leaf.isfinite().all()) for leaf in leaves):
            break
        points.append(compare(problem, solver, rounds))
    return {"job": job, "steps": [5 * rounds for rounds in moments], "points": points}


def compare(problem: GeneralizedRidge, solver: SelfTuning, rounds: int) -> dict[str, Any]:
    """Compare ŵ, Θ and λ with their closed forms at the current λ₀.

    `response_cosine` and `response_error` compare Θ with ∂w*/∂λ. `projected_error` compares it with
    the best structured Θ, whose own error is `floor`. `weight_error` is ‖ŵ − w*‖/‖w*‖.
    """
    hypers = problem.space.constrain(solver.core.search.u0)
    exact, theta = problem.best_response_jacobian(hypers), response_jacobian(problem, solver)
    w, best = problem.linear_map(solver.solution().params), problem.minimizer(hypers)
    nearest = one_direction(exact, problem.hessian(hypers), solver.core.search.sigma.detach())
    size = theta.norm() * exact.norm()
    values = {
        "response_cosine": (theta * exact).sum() / size
        if bool(size > 0)
        else torch.zeros(()),  # Θ = 0 at first
        "response_error": (theta - exact).norm() / exact.norm(),
        "projected_error": (theta - nearest).norm() / nearest.norm(),
        "floor": (nearest - exact).norm() / exact.norm(),
        "weight_error": (w - best).norm() / best.norm(),
    }
    return {
        "steps": 5 * rounds,
        "hypers": solver.core.search.u0.tolist(),
        "sigma": solver.core.search.sigma.tolist(),
        **{name: float(value) for name, value in values.items()},
    }


def one_direction(exact: Tensor, curvature: Tensor, sigma: Tensor) -> Tensor:
    """Return the best Θ of rank one for a linear map: argmin ‖A^½ (Θ − J) diag σ‖_F.

    One output of a structured response moves along one direction W₁, by (Uε): Θ = W₁ᵀU.
    """
    eigenvalues, basis = torch.linalg.eigh(curvature)
    root = basis * eigenvalues.sqrt() @ basis.T
    left, values, right = torch.linalg.svd(root @ exact * sigma, full_matrices=False)
    return torch.linalg.solve(root, values[0] * torch.outer(left[:, 0], right[0])) / sigma


def spread(values: list[float], form: str = ".3f") -> str:
    """Return mean ± standard deviation of the finite values, and the number of the others."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "diverged"
    deviation = f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    lost = f" ({len(values) - len(known)} diverged)" if len(known) < len(values) else ""
    return f"{statistics.mean(known):{form}}{deviation}{lost}"
