"""The simulated problem of benchmark_bilevel: random quadratics of 100 weights and 100 λ.

Each of the n terms of an objective has matrices of rank 1, so an example is six vectors:

    ½ (aᵀw)² + ½ (bᵀλ)² + (pᵀλ)(qᵀw) + rᵀw + sᵀλ

Source: Dagréou, Moreau, Vaiter & Ablin, AISTATS 2024; `datasets/simulated.py` of the benchmark.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.outside import threefry
from benchmarks.outside.objectives import Objectives, ready
from benchmarks.outside.rows import Options, Row, compared, not_run, sampled, version
from bilevel import Batch, Hypers, Params, Real, Space
from bilevel.solvers import CG, SOBA, Implicit, Penalty
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.optim.optimized import Optimized

SEED, EXAMPLES, SIZE = 2442, 1024, 100
MU, LARGEST, CROSS = 0.1, 1.0, 0.1
START = -2.0

SIGNS = (0x785F286029F32D8E014590726, 0x2E990FA0F7E2C4919C2521604)
"""For L_T and L_V: bit i is 1 where the largest entry of the i-th left singular vector is negative.

LAPACK is free to choose these signs, and the problem depends on them. These are the ones that it
chose in float32 under JAX.
"""

PUBLISHED_START, PUBLISHED_BEST = 99.16222, -0.1211764
"""Φ(λ₀) and Φ*, as computed by the benchmark's own generator under JAX 0.5 or later."""

# The solvers' settings are the defaults of `solvers/soba.py` and `solvers/f2sa.py`.
BATCH, STEP = 64, 0.1
ROUNDS, SEEDS = 4000, (1, 2, 3)


class Terms(NamedTuple):
    """The vectors of the terms, [n, 100] each, in the order of the module's formula."""

    a: Tensor
    b: Tensor
    p: Tensor
    q: Tensor
    r: Tensor
    s: Tensor


class Draws(NamedTuple):
    """A generator of random numbers: keys, normal numbers, and singular vectors U and Vᵀ."""

    split: Callable[[Any, int], Any]
    normal: Callable[..., Tensor]
    svd: Callable[[Tensor, int], tuple[Tensor, Tensor]]


def own_svd(x: Tensor, signs: int) -> tuple[Tensor, Tensor]:
    """Return U and Vᵀ in float64, with the signs of `SIGNS` where x is square."""
    U, _, V = torch.linalg.svd(x)
    if x.shape[1] == 1:
        return U, V
    negative = U.gather(0, U.abs().argmax(0)[None])[0] < 0
    wanted = torch.tensor([bool(signs >> i & 1) for i in range(SIZE)])
    flip = torch.where(negative == wanted, 1.0, -1.0).double()
    return U * flip, V * flip[:, None]


OWN = Draws(threefry.split, threefry.normal, own_svd)


def jax_draws() -> tuple[Any, Draws]:
    """Return the key of the seed and JAX's own generator."""
    import jax

    jax.config.update("jax_threefry_partitionable", True)

    def tensor(x: Any) -> Tensor:
        return torch.tensor(jax.device_get(x))

    def svd(x: Tensor, signs: int) -> tuple[Tensor, Tensor]:
        U, _, V = jax.numpy.linalg.svd(jax.numpy.asarray(x.numpy(), "float32"))
        return tensor(U).double(), tensor(V).double()

    draws = Draws(
        jax.random.split, lambda key, *shape: tensor(jax.random.normal(key, shape, "float32")), svd
    )
    return jax.random.PRNGKey(SEED), draws


def terms(key: Any, signs: int, draws: Draws) -> Terms:
    """Draw the terms of one objective as the benchmark does, in float64 from float32 numbers."""
    keys = draws.split(key, 10)

    def normal(number: int, *shape: int) -> Tensor:
        return draws.normal(keys[number], *shape).double()

    def spectrum(count: int, power: float, top: float) -> Tensor:
        ends = power * math.log10(MU), power * math.log10(top)
        return torch.logspace(*ends, count, dtype=torch.float64)

    def root(number: int, spectrum: Tensor) -> Tensor:
        """Return U diag(spectrum) Uᵀ, with U the left singular vectors of a random column."""
        U, _ = draws.svd(normal(number, SIZE, 1), 0)
        return U * spectrum @ U.T

    a = normal(1, EXAMPLES, SIZE) @ root(0, spectrum(SIZE, 0.5, LARGEST))
    flat = torch.cat([torch.zeros(1, dtype=torch.float64), spectrum(SIZE - 1, 0.5, LARGEST)])
    b = normal(3, EXAMPLES, SIZE) @ root(2, flat)
    U, V = draws.svd(normal(4, SIZE, SIZE), signs)
    cross = normal(5, EXAMPLES, SIZE)
    p, q = cross * spectrum(SIZE, 1.0, CROSS) @ U.T, cross @ V.T
    return Terms(a, b, p, q, normal(6, EXAMPLES, SIZE), normal(7, EXAMPLES, SIZE))


def both(key: Any = None, draws: Draws = OWN) -> tuple[Terms, Terms]:
    """Return the terms of L_T and of L_V."""
    keys = draws.split(threefry.seeded(SEED) if key is None else key, 2)
    return terms(keys[0], SIGNS[0], draws), terms(keys[1], SIGNS[1], draws)


class Means(NamedTuple):
    """The averages of the terms: ½ wᵀAw + ½ λᵀBλ + λᵀCw + rᵀw + sᵀλ."""

    A: Tensor
    B: Tensor
    C: Tensor
    r: Tensor
    s: Tensor


def means(t: Terms) -> Means:
    """Return the matrices [100, 100] and vectors [100] of the whole objective."""
    n = len(t.a)
    return Means(t.a.T @ t.a / n, t.b.T @ t.b / n, t.p.T @ t.q / n, t.r.mean(0), t.s.mean(0))


def value(λ: Tensor, inner: Means, outer: Means) -> Tensor:
    """Return Φ(λ) = L_V(λ, w*(λ)), differentiable."""
    w = torch.linalg.solve(inner.A, -inner.r - inner.C.T @ λ)
    A, B, C, r, s = outer
    return 0.5 * w @ A @ w + 0.5 * λ @ B @ λ + λ @ C @ w + r @ w + s @ λ


def minimum(inner: Means, outer: Means) -> Tensor:
    """Return argmin Φ, [100], by one Newton step on the quadratic Φ."""
    zero = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
    Phi = partial(value, inner=inner, outer=outer)
    gradient = torch.autograd.grad(Phi(zero), zero)[0]
    return -torch.linalg.solve(torch.autograd.functional.hessian(Phi, zero), gradient)


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


def sgd(lr: float) -> Any:
    """Return plain SGD as a function of the parameters."""
    return partial(torch.optim.SGD, lr=lr)


def end(solver: Descent, rounds: int, each: Callable[[int], None] = lambda t: None) -> Tensor:
    """Take rounds, with `each(t)` before round t = 1, 2, …; return λ."""
    for t in range(1, rounds + 1):
        each(t)
        solver.step()
    return solver.core.search.u.detach().clone()


def rate(group: Optimized, lr: float) -> None:
    """Set the rate of an optimizer."""
    for part in group.optimizer.param_groups:
        part["lr"] = lr


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


# --- the benchmark's algorithms, with gradients by hand: nothing is shared with our solvers ---


def batches(data: Terms, generator: torch.Generator) -> Iterator[Terms]:
    """Yield batches of 64 terms in a new random order in each epoch."""
    while True:
        for rows in torch.randperm(len(data.a), generator=generator).split(BATCH):
            yield Terms(*(x[rows] for x in data))


def gradients(t: Terms, w: Tensor, λ: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients in w and λ of the mean of some terms."""
    n = len(t.a)
    g_w = (t.a.T @ (t.a @ w) + t.q.T @ (t.p @ λ)) / n + t.r.mean(0)
    g_λ = (t.b.T @ (t.b @ λ) + t.p.T @ (t.q @ w)) / n + t.s.mean(0)
    return g_w, g_λ


def start(
    data: tuple[Terms, Terms], seed: int
) -> tuple[Tensor, Tensor, Iterator[Any], Iterator[Any]]:
    """Return w, λ and the batches of both objectives."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(SIZE, dtype=torch.float64)
    return w, torch.full_like(w, START), *(batches(part, generator) for part in data)


def their_soba(data: tuple[Terms, Terms], seed: int, rounds: int) -> Tensor:
    """Return λ of SOBA as the benchmark writes it: w, q and λ move with steps 0.1/√t."""
    w, λ, inner, outer = start(data, seed)
    q = torch.zeros_like(w)
    for t in range(1, rounds + 1):
        step = STEP / math.sqrt(t)
        i, o = next(inner), next(outer)
        g_w, (o_w, o_λ) = gradients(i, w, λ)[0], gradients(o, w, λ)
        Hq, cross = i.a.T @ (i.a @ q) / BATCH, i.p.T @ (i.q @ q) / BATCH
        w, q, λ = w - step * g_w, q - step * (Hq + o_w), λ - step * (cross + o_λ)
    return λ


def their_penalty(data: tuple[Terms, Terms], seed: int, rounds: int) -> Tensor:
    """Return λ of F2SA as the benchmark writes it: y moves by 0.1/t^(5/7) (∇L_V + σ∇L_T)."""
    z, λ, inner, outer = start(data, seed)
    y, σ = z, 1.0
    for t in range(1, rounds + 1):
        for _ in range(10):
            both_y = σ * gradients(next(inner), y, λ)[0] + gradients(next(outer), y, λ)[0]
            y = y - STEP / t ** (5 / 7) * both_y
            z = z - STEP / t ** (4 / 7) * gradients(next(inner), z, λ)[0]
        gap = gradients(next(inner), y, λ)[1] - gradients(next(inner), z, λ)[1]
        λ = λ - STEP / t ** (4 / 7) * (gradients(next(outer), y, λ)[1] + σ * gap)
        σ += 0.1 / t ** (1 / 7)
    return λ


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
