"""Measure the error of hypergradients of networks with batch norm, at true minima.

python -m benchmarks.batch_norm [--networks 3]

L_V reads running statistics, which follow w. The exact hypergradient is a central difference of
L_V over two retrainings to the minimum. The table shows the error of each solver with statistics
that follow w, and with constant ones (`follow_statistics=False`).
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import set_up
from bilevel import (
    Batch,
    Carry,
    Hypers,
    ModuleProblem,
    Params,
    Positive,
    Problem,
    Space,
    solvers,
    squared_norm,
)
from bilevel.params import detached
from bilevel.run.initial_params import WithInitialParams
from bilevel.solvers.base.descent import Descent

CPU = torch.device("cpu")
EXAMPLES, FEATURES, WIDTH = 40, 3, 4
STEP = 1e-3
"""Displacement of u for the central difference."""


class NormedRegression(ModuleProblem):
    """Regression by a network with batch norm in float64, on full batches with shifted validation.

        L_T = mean (y − f(x))² + ½ decay ‖w‖²

    An eps of 0.1 gives the weights before the norm a minimum under decay.
    """

    def __init__(self, seed: int, *, per_example: bool = False, scale: float = 0.1) -> None:
        draws = torch.Generator().manual_seed(seed)
        x = torch.randn(2 * EXAMPLES, FEATURES, generator=draws).double()
        noise = torch.randn(2 * EXAMPLES, 1, generator=draws).double()
        y = torch.sin(x.sum(1, keepdim=True)) + 0.3 * noise
        x[EXAMPLES:] += 0.7
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = nn.Linear(FEATURES, WIDTH), nn.BatchNorm1d(WIDTH, eps=0.1), nn.Tanh()
            module = nn.Sequential(*layers, nn.Linear(WIDTH, 1)).double()
        decay = Positive(init=0.05, scale=scale, per_example=per_example)
        train, valid = (x[:EXAMPLES], y[:EXAMPLES]), (x[EXAMPLES:], y[EXAMPLES:])
        super().__init__(module, Space(decay=decay), train, valid)

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Tensor, batch: Batch
    ) -> Tensor:
        """Return L_T."""
        penalty = (hypers["decay"] * squared_norm(params)).mean()
        return F.mse_loss(prediction, batch[1]) + 0.5 * penalty

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Tensor, batch: Batch
    ) -> Tensor:
        """Return L_V."""
        return F.mse_loss(prediction, batch[1])


class Minimum(NamedTuple):
    """w*(λ), its statistics, and dL_V(λ, w*(λ))/du by retraining."""

    params: Params
    carry: Carry
    hypergradient: float


def minimize(problem: Problem, u: Tensor, params: Params, carry: Carry) -> tuple[Params, Carry]:
    """Return the minimum of L_T at u near `params`, and the statistics that it leads to."""
    batch = problem.data(CPU, torch.Generator()).train.peek()
    w = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    hypers = problem.space.constrain(u)
    optimizer = torch.optim.LBFGS(
        list(w.values()),
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value, _ = problem.inner_loss(hypers, w, carry, batch, torch.Generator())
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    w = detached(w)
    for _ in range(400):  # 0.9^400 of the old statistics remains
        _, carry = problem.inner_loss(hypers, w, carry, batch, torch.Generator())
    return w, detached(carry)


def minimum(problem: Problem) -> Minimum:
    """Return the minimum at the initial λ, and the hypergradient by retraining."""
    u = problem.space.init(torch.float64)
    params, carry = minimize(problem, u, *problem.init(torch.Generator()))
    batch = problem.data(CPU, torch.Generator()).valid.peek()
    losses = []
    for moved in (u + STEP, u - STEP):
        best = minimize(problem, moved, params, carry)
        losses.append(problem.outer_loss(problem.space.constrain(moved), *best, batch)[0])
    return Minimum(params, carry, float(losses[0] - losses[1]) / (2 * STEP))


def at_minimum(problem: Problem, solver: Descent, best: Minimum) -> Descent:
    """Return the solver, set up with the weights and the statistics of the minimum."""
    set_up(solver, WithInitialParams(problem, {**best.params, **best.carry}), CPU)
    return solver


HELD = partial(torch.optim.SGD, lr=0.0)
_STILL = {"inner_optimizer": HELD, "outer_optimizer": HELD}
_SLOW = {"inner_optimizer": partial(torch.optim.SGD, lr=0.3), "outer_optimizer": HELD}


def self_tuning(recipe: Callable[..., Descent], **options: object) -> Callable[..., Descent]:
    """Return a self-tuning solver whose Θ has a falling learning rate, with w₀ and λ held."""
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    return partial(
        recipe,
        response_optimizer=partial(torch.optim.Adam, lr=0.05),
        inner_scheduler=schedule,
        tune_scale=False,
        **_STILL,
        **options,
    )


class Case(NamedTuple):
    """A solver, the rounds that it needs at the minimum, and whether λ varies per example."""

    make: Callable[..., Descent]
    rounds: int = 0
    epochs: int = 1
    per_example: bool = False


CASES: dict[str, Case] = {
    "implicit, CG": Case(
        partial(solvers.Implicit, linear_solve=solvers.CG(iterations=100), **_STILL)
    ),
    "unrolled, 1000 steps": Case(partial(solvers.Unrolled, inner_steps=1000, **_SLOW)),
    "centered STN, dense Θ": Case(
        self_tuning(solvers.centered_stn, response=solvers.Dense()), rounds=50, epochs=8
    ),
    "Δ-STN, dense Θ": Case(
        self_tuning(solvers.delta_stn, response=solvers.Dense()), rounds=50, epochs=8
    ),
    "Δ-STN, structured Θ": Case(self_tuning(solvers.delta_stn), rounds=50, epochs=8),
    "Δ-STN, structured Θ, λ per example": Case(
        self_tuning(solvers.delta_stn), rounds=50, epochs=8, per_example=True
    ),
}


def errors(case: Case, seeds: Sequence[int], *, follow: bool) -> list[float]:
    """Return the relative errors (ĝ − g)/g of the hypergradients at the minima of networks."""
    found = []
    for seed in seeds:
        best = minimum(NormedRegression(seed))
        problem = NormedRegression(seed, per_example=case.per_example)
        solver = at_minimum(problem, case.make(follow_statistics=follow), best)
        for _ in range(case.epochs):
            for _ in range(case.rounds):
                solver.step()
            solver.epoch_ended(None)
        found.append(float(solver.hypergradient()) / best.hypergradient - 1)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--networks", type=int, default=3)
    seeds = range(parser.parse_args().networks)
    print("| solver | statistics follow w: largest, median | constants: largest, median |")
    print("|---|---|---|")
    for name, case in CASES.items():
        cells = []
        for follow in (True, False):
            sizes = [abs(error) for error in errors(case, seeds, follow=follow)]
            cells.append(f"{max(sizes):.2%}, {statistics.median(sizes):.2%}")
        print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
