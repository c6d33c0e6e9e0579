"""Tests of the measures on toy regressions: projections onto structured responses, curvatures."""

import math

import pytest
import torch

from benchmarks.experiments.conditioning import TanhNetwork, condition, curvature
from benchmarks.toys import Job, compare, make, one_direction, ready, response_jacobian, train
from bilevel.problems import Ridge

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=F64)


# --- the best structured response ---


def objective(theta, exact, curvature, sigma):
    error = (theta - exact) * sigma
    return (error * (curvature @ error)).sum()


def test_the_best_direction_is_a_minimum_over_rank_one():
    """Stationary in both factors, and no draw nearby or anywhere is better."""
    exact, root, sigma = (
        normal(5, 3),
        normal(5, 5, seed=1),
        torch.tensor([0.3, 1.0, 2.0], dtype=F64),
    )
    A = root @ root.T + 0.1 * torch.eye(5, dtype=F64)
    best = one_direction(exact, A, sigma)
    assert torch.linalg.matrix_rank(best, rtol=1e-10) == 1
    left, values, right = torch.linalg.svd(best)
    factors = [(values[0] * left[:, 0]).requires_grad_(), right[0].requires_grad_()]
    gradients = torch.autograd.grad(objective(torch.outer(*factors), exact, A, sigma), factors)
    assert max(g.abs().max() for g in gradients) < 1e-12
    least = objective(best, exact, A, sigma)
    for seed in range(200):
        scale = 10.0 ** -(seed % 4)
        other = torch.outer(
            factors[0] + scale * normal(5, seed=seed),
            factors[1] + scale * normal(3, seed=seed + 1000),
        )
        assert objective(other, exact, A, sigma) >= least
    assert least > 1e-3


def test_the_best_direction_of_one_hyperparameter_is_exact():
    exact = normal(4, 1)
    best = one_direction(
        exact,
        torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)),
        torch.tensor([0.2], dtype=F64),
    )
    torch.testing.assert_close(best, exact)


# --- what a run is compared with ---


def job(kind, recipe="delta_stn", response="dense", **options):
    return Job(
        kind,
        "synthetic",
        3,
        recipe,
        response,
        0,
        4,
        warmup=1,
        inner=0.01,
        outer=0.01,
        features=4,
        **options,
    )


@pytest.mark.parametrize("kind", ["ridge", "linear network", "input dropout per feature"])
def test_errors_vanish_at_the_closed_form_and_not_beside_it(kind):
    problem = make(job(kind, init=0.5))
    solver = ready(job(kind, init=0.5), problem)
    hypers = problem.space.constrain(solver.core.search.u0)
    exact = problem.best_response_jacobian(hypers)
    with torch.no_grad():
        for name, w in problem.best_response(hypers).items():
            solver.core.weights.tensors[name].copy_(w)
    if kind != "linear network":
        with torch.no_grad():
            solver.method.theta.tensors["weight"].copy_(exact[None])
        errors = compare(problem, solver, 7)
        assert errors["response_error"] < 1e-12
        assert errors["response_cosine"] == pytest.approx(1)
        assert errors["steps"] == 35
    errors = compare(problem, solver, 7)
    assert errors["weight_error"] < 1e-12
    with torch.no_grad():
        for leaf in (*solver.method.theta.leaves, *solver.core.weights.leaves):
            leaf.add_(0.1 * normal(*leaf.shape))
    errors = compare(problem, solver, 7)
    assert errors["response_error"] > 1e-2
    assert errors["weight_error"] > 1e-2


@pytest.mark.parametrize("recipe", ["stn", "delta_stn"])
def test_the_jacobian_of_a_network_is_that_of_its_product(recipe):
    """By differences of the map of ŵ(λ₀ + ε)."""
    made = job("linear network", recipe=recipe, response="structured", init=1.0)
    problem = make(made)
    solver = ready(made, problem)
    assert list(train(solver, [1, 4], 1)) == [1, 4]
    assert (solver.inner_count, solver.outer_count) == (20, 3)
    step = torch.tensor([1e-5], dtype=F64)
    with torch.no_grad():
        moved = [problem.linear_map(solver.method.respond(move)) for move in (step, -step)]
    difference = (moved[0] - moved[1]) / 2e-5
    assert difference.norm() > 1e-6
    torch.testing.assert_close(
        response_jacobian(problem, solver)[:, 0], difference, rtol=1e-6, atol=1e-10
    )


# --- curvature ---


@pytest.mark.parametrize("centered", [True, False])
def test_the_curvature_of_ridge_is_known(centered):
    """T5's moments: E e^{λ+ε}(1, ε, ε²) = (c₀, s²c₀, (s² + s⁴)c₀) with c₀ = e^{λ + s²/2}."""
    λ, s = -0.7, 0.3
    problem = Ridge.synthetic(features=3, dtype=F64)
    hypers = {"log_decay": torch.tensor(λ, dtype=F64)}
    theta, w = problem.best_response_jacobian(hypers), problem.minimizer(hypers)
    spectra = curvature(problem, theta, w, *torch.tensor([[λ], [s]], dtype=F64), centered=centered)
    H, identity, c0 = problem.gram, torch.eye(3, dtype=F64), math.exp(λ + s * s / 2)
    first, second = s * s * c0, (s * s + s**4) * c0
    known = torch.cat(
        [
            torch.cat([s * s * H + second * identity, first * identity], 1),
            torch.cat([first * identity, H + c0 * identity], 1),
        ]
    )
    shift = torch.kron(
        torch.tensor([[1.0, λ], [0.0, 1.0]], dtype=F64), identity
    )  # (Θ, φ) → (Θ, w₀ = φ + Θλ), transposed
    if not centered:
        known = shift @ known @ shift.T
    torch.testing.assert_close(
        torch.tensor(spectra.true, dtype=F64), torch.linalg.eigvalsh(known), rtol=1e-7, atol=1e-9
    )
    torch.testing.assert_close(spectra.gauss_newton, spectra.true)  # linear in w
    assert 1e-4 < spectra.errors[1] < 0.5  # but e^λ varies within σ
    a = 0 if centered else λ * λ
    total = a + s * s + 1
    largest = (total + math.sqrt(total**2 - 4 * s * s)) / 2
    assert spectra.moment == pytest.approx(1 / s**2 if centered else largest**2 / s**2)
    assert condition(spectra.formula) == pytest.approx(spectra.moment * spectra.weights)


def test_the_curvature_of_a_network_is_not_its_gauss_newton_matrix_far_from_a_fit():
    problem = TanhNetwork(100, 0.3)
    w = torch.cat([p.reshape(-1) for p in problem.init(generator())[0].values()])
    theta, (u, sigma) = 0.1 * normal(17, 2), torch.tensor([[-4.0, -4.0], [0.3, 0.3]], dtype=F64)
    spectra = curvature(problem, theta, w, u, sigma, centered=True)
    assert len(spectra.true) == 51
    assert spectra.true[0] < 0 < spectra.gauss_newton[0]
    assert spectra.errors[0] > 0.01
    other = curvature(problem, theta, w, u, sigma, centered=False)
    assert other.moment > spectra.moment
    assert other.weights == spectra.weights
