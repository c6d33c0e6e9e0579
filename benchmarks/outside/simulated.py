"""The simulated problem of benchmark_bilevel: random quadratics of 100 weights and 100 λ.

Source: Dagréou, Moreau, Vaiter & Ablin, AISTATS 2024; `datasets/simulated.py` of the benchmark.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.outside.by_hand import BATCH, STEP, their_penalty, their_soba
from benchmarks.outside.objectives import Objectives, rate, ready, sgd
from benchmarks.outside.quadratic_terms import (
    SIZE,
    START,
    Terms,
    both,
    jax_draws,
    means,
    minimum,
    value,
)
from benchmarks.outside.rows import Options, Row, compared, not_run, sampled, version
from bilevel import Batch, Hypers, Params, Real, Space
from bilevel.solvers import CG, SOBA, Implicit, Penalty
from bilevel.solvers.base.descent import Descent

PUBLISHED_START, PUBLISHED_BEST = 99.16222, -0.1211764
"""Φ(λ₀) and Φ*, as computed by the benchmark's own generator under JAX 0.5 or later."""

ROUNDS, SEEDS = 4000, (1, 2, 3)


def objective(hypers: Hypers, params: Params, batch: Batch) -> Tensor:
    """Return the mean of the terms of a batch."""
    t, w = Terms(*batch), params["w"]
    λ = hypers["outer"].to(w)
    each = 0.5 * (t.a @ w).square() + 0.5 * (t.b @ λ).square() + (t.p @ λ) * (t.q @ w)
    return (each + t.r @ w + t.s @ λ).mean()


def problem(inner: Terms, outer: Terms, batch_size: int | None = None) -> Objectives:
    """Return the problem at the benchmark's start: w = 0 and λ = −2."""
    return Objectives(
        Space(outer=Real(init=START, shape=(SIZE,), per_example=False)),
        {"w": torch.zeros(SIZE, dtype=torch.float64)},
        objective,
        objective,
        tuple(inner),
        tuple(outer),
        batch_size=batch_size,
    )


def end(solver: Descent, rounds: int, each: Callable[[int], None] = lambda t: None) -> Tensor:
    """Take rounds, with `each(t)` before round t = 1, 2, …; return λ."""
    for t in range(1, rounds + 1):
        each(t)
        solver.step()
    return solver.core.search.u.detach().clone()


def our_soba(data: tuple[Terms, Terms], seed: int, rounds: int, *, own_rate: bool) -> Tensor:
    """Return λ of `SOBA`, with steps 0.1/√t of w and λ.

    Args:
        data: the terms of L_T and L_V.
        seed: seed of the order of the data.
        rounds: number of rounds.
        own_rate: move q by our 1/L, and not by 0.1/√t.
    """
    solver = ready(
        problem(*data, BATCH), SOBA(inner_optimizer=sgd(1), outer_optimizer=sgd(1)), seed
    )

    def each(t: int) -> None:
        step = STEP / math.sqrt(t)
        rate(solver.core.weights, step)
        rate(solver.core.search.mean, step)
        solver.adjoint_lr = None if own_rate else step

    return end(solver, rounds, each)


def our_penalty(data: tuple[Terms, Terms], seed: int, rounds: int) -> Tensor:
    """Return λ of `Penalty`, with F2SA's ten inner steps and its decaying steps."""
    solver = Penalty(inner_steps=10, inner_optimizer=sgd(1), outer_optimizer=sgd(1), growth=0.1)
    ready(problem(*data, BATCH), solver, seed)

    def each(t: int) -> None:
        for group in (*solver.optimized().values(), solver.core.search.mean):
            rate(group, STEP / t ** (4 / 7))

    return end(solver, rounds, each)


# --- the rows ---


def constants() -> list[Row]:
    """Return the rows of Φ(λ₀) and Φ*, of our numbers and of JAX's."""
    sources = {"": both()}
    rows = []
    if found := version("jax"):
        sources[f", drawn by jax {found}"] = both(*jax_draws())
    else:
        rows.append(not_run("Φ(λ₀) and Φ*, drawn by jax", "jax is not installed"))
    for what, data in sources.items():
        L = tuple(means(part) for part in data)
        λ0 = torch.full((SIZE,), START, dtype=torch.float64)
        rows += [
            compared(f"Φ(λ₀){what}", PUBLISHED_START, value(λ0, *L), 1e-4),
            compared(f"Φ*{what}", PUBLISHED_BEST, value(minimum(*L), *L), 1e-4),
        ]
    return rows


def exact_rows(data: tuple[Terms, Terms], rounds: int) -> list[Row]:
    """Return the rows of `Implicit` on whole objectives, against closed forms."""
    L = tuple(means(part) for part in data)
    λ0 = torch.full((SIZE,), START, dtype=torch.float64, requires_grad=True)
    exact = torch.autograd.grad(value(λ0, *L), λ0)[0]
    solver = Implicit(linear_solve=CG(iterations=100, tolerance=1e-14), inner_optimizer=sgd(1))
    ready(problem(*data), solver).inner_phase(400)
    tuned = Implicit(
        inner_steps=10, linear_solve=CG(), inner_optimizer=sgd(1), outer_optimizer=sgd(1)
    )
    λ = end(ready(problem(*data), tuned), rounds)
    best = value(minimum(*L), *L)
    what = f"Φ after {rounds} rounds of `Implicit` with CG, whole objectives"
    return [
        compared("∇Φ(λ₀) by CG: closed form", exact, solver.hypergradient(), 1e-10),
        compared(f"{what}: Φ*", best, value(λ, *L), 1e-6),
    ]


def run(options: Options) -> list[Row]:
    """Return the rows: the two constants, closed forms, then stochastic solvers."""
    data = both()
    L = tuple(means(part) for part in data)
    best = value(minimum(*L), *L)

    def gaps(solve: Callable[..., Tensor], rounds: int) -> list[float]:
        return [float(value(solve(data, seed, rounds), *L) - best) for seed in SEEDS]

    rounds = 200 if options.quick else ROUNDS
    long = gaps(their_soba, rounds)
    short = rounds // 10
    what = "Φ − Φ* after {} rounds of {}, batches of 64"
    return [
        *constants(),
        *exact_rows(data, 100 if options.quick else 1000),
        sampled(
            what.format(rounds, "SOBA, its steps"),
            long,
            gaps(partial(our_soba, own_rate=False), rounds),
            1e-6,
        ),
        sampled(
            what.format(rounds, "SOBA, our step 1/L of the adjoint"),
            long,
            gaps(partial(our_soba, own_rate=True), rounds),
            None,
        ),
        sampled(
            what.format(short, "F2SA (`Penalty`)"),
            gaps(their_penalty, short),
            gaps(our_penalty, short),
            None,
        ),
    ]
