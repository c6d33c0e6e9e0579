"""The papers' theory for a quadratic L_T (T1–T4, T6): conditioning, limits of Θ, variance of w₀."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.func import hessian

from bilevel.problems import Quadratic
from bilevel.solvers import Dense, SelfTuning, centered_stn, delta_stn, stn
from bilevel.solvers.optim.optimized import descend
from tests.support.solver_cases import all_flags, expected_loss, nodes, ready, set_to, sgd

# --- T1, T2: conditioning ---


def response_hessian(lambda0, scale, condition, centered):
    """Return the Hessian of E_ε L_T in (Θ, w₀), by the solver's own joint loss."""
    problem = Quadratic.random(
        3,
        len(lambda0),
        condition,
        dtype=torch.float64,
        space={"hyper": {"init": list(lambda0), "scale": scale}},
    )
    flags = {"centered": centered, "regularized_w0": False, "linearize": False}
    solver = ready(problem, SelfTuning(response=Dense(), **flags))
    h = len(lambda0)

    def loss(flat):
        solver.method.theta.tensors["w"] = flat[: 3 * h].reshape(h, 3).T
        return expected_loss(solver, {"w": flat[3 * h :]}, order=2)

    return hessian(loss)(torch.zeros(3 * (h + 1), dtype=torch.float64)), problem.A


def second_moment(lambda0, scale, centered):
    """A = E[(δ; 1)(δ; 1)ᵀ] with δ = ε or λ₀ + ε."""
    mean = torch.tensor(
        [*(0.0 * np.array(lambda0) if centered else lambda0), 1.0], dtype=torch.float64
    )
    return torch.outer(mean, mean) + torch.diag(
        torch.tensor([scale**2] * len(lambda0) + [0.0], dtype=torch.float64)
    )


@pytest.mark.parametrize("centered", [True, False])
def test_t1_the_response_hessian_is_a_kronecker_product(centered):
    ours, G = response_hessian((1.5, -2.0), 0.7, 5.0, centered)
    torch.testing.assert_close(ours, torch.kron(second_moment((1.5, -2.0), 0.7, centered), G))


def uncentered_eigenvalues(lambda0, scale):
    """{μ₊, s² (h − 1 times), s²/μ₊}, μ₊ = (a + s² + 1 + √((a + s² + 1)² − 4s²))/2, a = ‖λ₀‖²."""
    total = sum(x * x for x in lambda0) + scale**2 + 1
    largest = (total + math.sqrt(total**2 - 4 * scale**2)) / 2
    return sorted([largest, *[scale**2] * (len(lambda0) - 1), scale**2 / largest])


def test_t2_the_example_of_the_notes():
    """For λ₀ = (1.5, −2), s = .7: cond A = 120.25 and 2.04.

    With cond G_w = 2.0416 the response Hessians have 245.5 and 4.2.
    """
    assert torch.linalg.cond(second_moment((1.5, -2.0), 0.7, False)).item() == pytest.approx(
        120.25, abs=0.01
    )
    conditions = [
        torch.linalg.cond(response_hessian((1.5, -2.0), 0.7, 2.0416, centered)[0]).item()
        for centered in (False, True)
    ]
    assert [round(c, 1) for c in conditions] == [245.5, 4.2]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.floats(-4, 4), min_size=1, max_size=3), st.floats(0.2, 3))
@example([0.0], 0.3)
@example([0.0, 0.0], 2.0)
@example([4.0], 0.2)
@example([1.5, -2.0, 0.5], 1.0)
def test_t2_centering_never_conditions_worse_and_is_equal_at_zero(lambda0, scale):
    """cond G · max(s², s⁻²) centered, and cond G · μ₊/min(s², s²/μ₊) uncentered."""
    (uncentered, G), (centered, _) = (
        response_hessian(lambda0, scale, 5.0, c) for c in (False, True)
    )
    expected = [
        a * g
        for a in uncentered_eigenvalues(lambda0, scale)
        for g in torch.linalg.eigvalsh(G).tolist()
    ]
    found = torch.linalg.eigvalsh(uncentered)
    torch.testing.assert_close(
        found, torch.tensor(sorted(expected), dtype=torch.float64), rtol=1e-8, atol=1e-10
    )
    worse, better = torch.linalg.cond(uncentered).item(), torch.linalg.cond(centered).item()
    assert better == pytest.approx(5 * max(scale**2, scale**-2))
    assert worse >= better * (1 - 1e-9)
    if sum(x * x for x in lambda0) > 1e-2:
        assert worse > better * (1 + 1e-6)
    if not any(lambda0):
        assert worse == pytest.approx(better)


# --- T3: two-way interaction ---


def idle():
    """A quadratic in which λ does nothing: B = C = 0, e = 0."""
    q = Quadratic.random(weights=5, hypers=2, dtype=torch.float64)
    arguments = (q.A, 0 * q.B, 0 * q.C, q.d, 0 * q.e, q.M, q.w_bar)
    return Quadratic(*arguments, space={"hyper": {"init": [1.0, -0.5], "scale": 0.8}})


def one_round(recipe, noise, alpha=0.1, beta=0.2):
    """Take one training step with ε = `noise` from Φ = 0, then one λ step.

    Return g_T, g_V, Δλ, the effective weights before and after, and Φ.
    """
    solver = recipe(
        response=Dense(),
        inner_steps=1,
        tune_scale=False,
        inner_optimizer=sgd(alpha),
        outer_optimizer=sgd(beta),
    )
    solver = ready(idle(), solver)
    problem, u = solver.core.problem, solver.core.search.u.detach().clone()
    solver.core.search.perturbation = lambda *_: noise
    g_T = problem.A @ solver.core.weights.detached()["w"] + problem.d
    if recipe is not stn:  # w₀ moves first, and g_T is taken where it then is
        g_T = problem.A @ (solver.core.weights.detached()["w"] - alpha * g_T) + problem.d
    solver.method.inner_step(solver.core.data.train.next())
    before = solver.method.effective_weights()["w"].clone()
    solver.method.outer_step(solver.core.data.valid.next())
    solver.core.search.recentre()
    g_V = problem.M @ (before - problem.w_bar)
    return (
        g_T,
        g_V,
        solver.core.search.u.detach() - u,
        before,
        solver.method.effective_weights()["w"],
        solver.method.theta.detached()["w"],
    )


def test_t3_uncentered_a_useless_hyperparameter_is_pushed_along_itself():
    """∇_λ L_V = −α⟨g_T, g_V⟩(λ + ε), and the λ step moves the weights by −β ΦΦᵀ g_V."""
    noise, u = torch.tensor([0.3, 0.1]).double(), torch.tensor([1.0, -0.5]).double()
    for eps in (0 * noise, noise):
        g_T, g_V, change, before, after, phi = one_round(stn, eps)
        torch.testing.assert_close(change, 0.2 * 0.1 * (g_T @ g_V) * (u + eps))
        torch.testing.assert_close(after - before, -0.2 * phi @ phi.T @ g_V)
        assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("recipe", [centered_stn, delta_stn])
def test_t3_centered_the_push_has_mean_zero_and_moves_no_weight(recipe):
    """∇_λ L_V = −α⟨g_T, g_V⟩ε, whose mean is zero."""
    total = torch.zeros(2, dtype=torch.float64)
    for z, weight in zip(*nodes(2, order=3), strict=True):
        g_T, g_V, change, before, after, _ = one_round(recipe, 0.8 * z)
        torch.testing.assert_close(change, 0.2 * 0.1 * (g_T @ g_V) * 0.8 * z)
        assert torch.equal(before, after)
        total += weight * change
    assert total.abs().max() < 1e-14


# --- T4, T6: the joint quadratic ---


def quadratic(seed=0):
    return Quadratic.random(
        weights=6,
        hypers=2,
        condition=3.0,
        seed=seed,
        dtype=torch.float64,
        space={"hyper": {"init": [0.7, -0.4]}},
    )


@pytest.mark.parametrize("recipe", [delta_stn, centered_stn])
@pytest.mark.parametrize("seed", range(3))
def test_t4_theta_converges_to_the_best_response_jacobian_from_any_w0(recipe, seed):
    """Θ → −A⁻¹B down the expected loss, while w₀ stays where it began, far from its optimum."""
    solver = ready(
        quadratic(seed), recipe(response=Dense(), response_optimizer=sgd(1.0)), seed=seed
    )
    set_to(solver.core.search.s, torch.full((2,), 0.5))
    for _ in range(100):
        descend(expected_loss(solver, order=2), solver.method.theta)
    torch.testing.assert_close(
        solver.method.theta.detached()["w"],
        solver.core.problem.best_response_jacobian(),
        rtol=0,
        atol=1e-8,
    )
    assert (
        solver.core.weights.detached()["w"]
        - solver.core.problem.best_response(solver.solution().hypers)["w"]
    ).norm() > 0.5


def test_t4_theta_converges_on_samples_too():
    """Averaged stochastic steps are unbiased for any w₀; the noise is (A w₀ + Bλ₀ + d)εᵀ."""
    solver = ready(
        quadratic(),
        delta_stn(response=Dense(), inner_optimizer=sgd(0.0), response_optimizer=sgd(0.05)),
    )
    mean, exact = (
        torch.zeros(6, 2, dtype=torch.float64),
        solver.core.problem.best_response_jacobian(),
    )
    for step in range(1200):
        solver.method.inner_step(solver.core.data.train.next())
        mean += solver.method.theta.detached()["w"] * (step >= 200) / 1000
    assert (mean - exact).norm() < 0.1 * exact.norm()


@all_flags
def test_t4_every_variant_finds_the_best_response(flags):
    """ŵ(λ₀) = w*(λ₀) and Θ = −A⁻¹B for every variant, because L_T is jointly quadratic."""
    solver = ready(quadratic(), SelfTuning(response=Dense(), inner_optimizer=sgd(0.2), **flags))
    for _ in range(600):
        solver.method.inner_step(solver.core.data.train.next())
    torch.testing.assert_close(
        solver.method.theta.detached()["w"],
        solver.core.problem.best_response_jacobian(),
        rtol=0,
        atol=1e-7,
    )
    hypers, params, _ = solver.solution()
    torch.testing.assert_close(
        params["w"], solver.core.problem.best_response(hypers)["w"], rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("linearize", [True, False])
def test_t4_expected_gradient(linearize):
    """∇_Θ E L_T = (AΘ + B) diag σ², at any w₀, λ₀ and Θ."""
    solver = ready(quadratic(), SelfTuning(response=Dense(), linearize=linearize))
    theta = solver.method.theta.tensors["w"]
    set_to(theta, torch.randn_like(theta))
    set_to(solver.core.search.s, torch.tensor([0.2, 1.5]))
    (ours,) = torch.autograd.grad(expected_loss(solver, order=3), theta)
    problem = solver.core.problem
    torch.testing.assert_close(
        ours, (problem.A @ theta.detach() + problem.B) * solver.core.search.sigma.detach() ** 2
    )


@pytest.mark.parametrize("exact", [True, False])
def test_t6_variance_that_the_perturbation_brings_into_w0s_gradient(exact):
    """Cov = (AΘ + B) diag σ² (AΘ + B)ᵀ, zero iff Θ is exact; the separate objective has none."""
    solver = ready(quadratic(), SelfTuning(response=Dense(), regularized_w0=False, linearize=False))
    problem, theta, w = (
        solver.core.problem,
        solver.method.theta.tensors["w"],
        solver.core.weights.tensors["w"],
    )
    set_to(theta, problem.best_response_jacobian() if exact else torch.randn_like(theta))
    set_to(solver.core.search.s, torch.tensor([0.2, 1.5]))
    gradients, (points, weight) = [], nodes(2, order=3)
    for z in points:
        solver.core.search.perturbation = lambda *_, z=z: solver.core.search.sigma.detach() * z
        gradients.append(
            torch.autograd.grad(
                solver.method.perturbed_loss(
                    solver.core.weights.tensors, {}, solver.core.data.train.peek()
                )[0],
                w,
            )[0]
        )
    centred = torch.stack(gradients) - weight @ torch.stack(gradients)
    slope = (problem.A @ theta + problem.B).detach() * solver.core.search.sigma.detach()
    covariance = centred.T @ (weight[:, None] * centred)
    torch.testing.assert_close(covariance, slope @ slope.T, atol=1e-14, rtol=1e-10)
    assert (covariance.abs().max() < 1e-14) == exact
    # The separate objective: whatever is drawn, w₀ takes the same step.
    ends = []
    for seed in range(3):
        separate = ready(quadratic(), delta_stn(response=Dense()))
        set_to(separate.method.theta.tensors["w"], theta.detach())
        separate.core.generator.manual_seed(seed)
        separate.method.inner_step(separate.core.data.train.next())
        ends.append(separate.core.weights.detached()["w"].clone())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
