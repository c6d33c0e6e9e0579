"""The random quadratics of benchmark_bilevel's simulated problem, and their closed forms.

Each of the n terms of an objective has matrices of rank 1, so an example is six vectors:

    ½ (aᵀw)² + ½ (bᵀλ)² + (pᵀλ)(qᵀw) + rᵀw + sᵀλ

Source: `datasets/simulated.py` of benchopt/benchmark_bilevel.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.outside import threefry

SEED, EXAMPLES, SIZE = 2442, 1024, 100
MU, LARGEST, CROSS = 0.1, 1.0, 0.1
START = -2.0

SIGNS = (0x785F286029F32D8E014590726, 0x2E990FA0F7E2C4919C2521604)
"""For L_T and L_V: bit i is 1 where the largest entry of the i-th left singular vector is negative.

LAPACK is free to choose these signs, and the problem depends on them. These are the ones that it
chose in float32 under JAX.
"""


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
