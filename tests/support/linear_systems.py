"""Symmetric linear systems with known solutions, and checks of every solve."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.solvers import Neumann

SIZES = [1, 2, 5, 30]
laws = settings(max_examples=40, deadline=None, derandomize=True)
systems = given(st.sampled_from(SIZES), st.floats(0, 4), st.floats(-3, 3), st.integers(0, 10**6))


def spd(size, condition=10.0, scale=1.0, seed=0):
    """Return A with distinct eigenvalues from `scale`/`condition` to `scale`, and v; float64."""
    draws = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(size, size, generator=draws).double()).Q
    values = scale * torch.logspace(0, -1, size, base=condition, dtype=torch.float64)
    A = Q * values @ Q.T
    return (A + A.T) / 2, torch.randn(size, generator=draws).double()


def products(A):
    """Return the product with A, and a list that records its arguments."""
    seen = []

    def product(q):
        seen.append(q.clone())
        return A @ q

    return product, seen


def error(x, A, v):
    """Return ‖x − A⁻¹v‖/‖A⁻¹v‖."""
    exact = torch.linalg.solve(A, v)
    return ((x - exact).norm() / exact.norm()).item()


def solve(method, A, v, guess=None, seed=0):
    """Solve a system and assert what every solve guarantees."""
    before = A.clone(), v.clone()
    product, _ = products(A)
    solved = method.solve(
        product,
        v,
        *([] if guess is None else [guess]),
        generator=torch.Generator().manual_seed(seed),
    )
    assert torch.equal(A, before[0])
    assert torch.equal(v, before[1])
    at = solved.x
    if getattr(method, "step", None) is not None:
        # the last step costs no product: the residual is that of the iterate before it
        count = method.terms if isinstance(method, Neumann) else method.iterations
        at = at - method.step * solved.remainder if count > 1 else at
    torch.testing.assert_close(solved.remainder, v - A @ at, rtol=1e-6, atol=1e-9 * v.norm().item())
    true = (A @ at - v).norm() / v.norm() if bool(v.any()) else torch.zeros(())
    torch.testing.assert_close(solved.residual, true.double(), rtol=1e-6, atol=1e-11)
    assert all(
        t.shape == () for t in (solved.residual, solved.iterations, solved.negative_curvature)
    )
    return solved
