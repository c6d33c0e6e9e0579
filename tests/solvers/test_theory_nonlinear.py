"""The papers' theory on networks: linearization (T7), the gate (T8), Δ-STN and centered STN."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import hessian, jacrev

from bilevel import Problem, Real, Space, squared_norm, streams
from bilevel.problems import Ridge
from bilevel.solvers import Dense, SelfTuning, centered_stn, delta_stn, stn
from tests.support.solver_cases import classifier, expected_loss, ready, set_to, sgd

# --- T7: what linearization computes ---


class Tanh(Problem):
    """A network y = tanh(X Aᵀ) b with a decay e^λ per layer, small enough for exact Hessians."""

    def __init__(self, scale):
        self.space = Space(log_decay=Real(init=-4.0, shape=(2,), scale=scale, per_example=False))
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(20, 2, generator=generator).double()
        self.split = (
            x,
            torch.sin(2 * x[:, 0])
            + x[:, 1] ** 2
            + 0.3 * torch.randn(20, generator=generator).double(),
        )

    def init(self, generator):
        return {
            "a": torch.randn(3, 2, generator=generator).double(),
            "b": torch.randn(3, generator=generator).double(),
        }, {}

    def data(self, device, generator):
        return streams(self.split, self.split, batch_size=None, device=device, generator=generator)

    def predict(self, hypers, params, carry, batch, *, train, generator):
        return torch.tanh(batch[0] @ params["a"].T) @ params["b"], carry

    def penalty(self, hypers, params):
        first, second = hypers["log_decay"].exp()
        return 0.5 * first * squared_norm({"a": params["a"]}) + 0.5 * second * squared_norm(
            {"b": params["b"]}
        )

    def inner_objective(self, hypers, params, prediction, batch):
        return 0.5 * F.mse_loss(prediction, batch[1]) + self.penalty(hypers, params)

    def outer_objective(self, hypers, params, prediction, batch):
        return 0.5 * F.mse_loss(prediction, batch[1])


def named(flat):
    return {"a": flat[:6].reshape(3, 2), "b": flat[6:]}


def stationary(problem):
    """w at a minimum of L_T(λ₀, ·), and there −H⁻¹H_{wλ} and −G⁻¹H_{wλ}."""
    u, w = (
        problem.space.init().double(),
        torch.cat(
            [t.flatten() for t in problem.init(torch.Generator().manual_seed(0))[0].values()]
        ),
    )

    def loss(w, u):
        return problem.inner_loss(problem.space.constrain(u), named(w), {}, problem.split, None)[0]

    optimizer = torch.optim.LBFGS(
        [w.requires_grad_()],
        lr=1,
        max_iter=500,
        tolerance_grad=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(w, u)
        value.backward()
        return value

    optimizer.step(closure)
    w = w.detach()
    for _ in range(5):
        w = w - torch.linalg.solve(hessian(loss)(w, u), jacrev(loss)(w, u))
    assert jacrev(loss)(w, u).norm() < 1e-12
    H, cross = hessian(loss)(w, u), jacrev(jacrev(loss), argnums=1)(w, u)
    J = jacrev(
        lambda w: problem.predict({}, named(w), {}, problem.split, train=True, generator=None)[0]
    )(w)
    G = J.T @ J / len(J) + hessian(lambda w: problem.penalty(problem.space.constrain(u), named(w)))(
        w
    )
    assert torch.linalg.eigvalsh(H).min() > 0
    return w, -torch.linalg.solve(H, cross), -torch.linalg.solve(G, cross)


def fitted_response(scale, linearize):
    """Return the Θ [9, 2] of least expected perturbed loss at a stationary w₀, and two oracles."""
    problem = Tanh(scale)
    solver = ready(problem, SelfTuning(response=Dense(), linearize=linearize))
    w, exact, gauss_newton = stationary(problem)

    def loss(theta):
        solver.method.theta.tensors = {"a": theta[:6].reshape(3, 2, 2), "b": theta[6:]}
        return expected_loss(solver, named(w), order=4)

    theta = (gauss_newton if linearize else exact).clone()
    for _ in range(1 if linearize else 4):  # linearized, the loss is quadratic in Θ
        first, second = (
            torch.autograd.functional.jacobian(loss, theta),
            torch.autograd.functional.hessian(loss, theta),
        )
        theta = theta - torch.linalg.solve(second.reshape(18, 18), first.reshape(18)).reshape(9, 2)
    assert torch.autograd.functional.jacobian(loss, theta).norm() < 1e-10
    return theta, exact, gauss_newton


@pytest.mark.parametrize("linearize", [True, False])
def test_t7_linearized_fits_the_gauss_newton_response_and_otherwise_the_exact_one(linearize):
    """As σ → 0, Δ-STN tends to −G⁻¹H_{wλ} and centered STN to −H⁻¹H_{wλ}.

    The errors are of order σ², and the two limits differ by far more.
    """
    errors = []
    for scale in (0.03, 0.01):
        theta, exact, gauss_newton = fitted_response(scale, linearize)
        own, other = (gauss_newton, exact) if linearize else (exact, gauss_newton)
        errors.append(((theta - own).norm() / own.norm()).item())
        assert (theta - other).norm() > 0.1 * other.norm()
    assert errors[1] < 2e-3
    assert 7 < errors[0] / errors[1] < 11


# --- T8: the shape of ridge's best response ---


def test_t8_ridge_is_a_sigmoid_gate_on_principal_components():
    """w*_i = sigmoid(2 log d_i − log n − λ) w_OLS,i, with singular values d_i of X."""
    problem = Ridge.synthetic(examples=50, features=4, dtype=torch.float64)
    X, y = problem._splits[0]
    _, d, basis = torch.linalg.svd(X, full_matrices=False)
    ols = torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
    for λ in (-3.0, 0.0, 2.0):
        gate = torch.sigmoid(2 * torch.log(d) - math.log(50) - λ)
        hypers = {"log_decay": torch.tensor(λ, dtype=torch.float64)}
        torch.testing.assert_close(
            basis @ problem.best_response(hypers)["weight"][0], gate * (basis @ ols)
        )
        slope = basis @ problem.best_response_jacobian(hypers)[:, 0]
        torch.testing.assert_close(slope, -gate * (1 - gate) * (basis @ ols))


class Gates(Problem):
    """Ridge in its principal components, w [d], with a decay e^{λ_i} each."""

    def __init__(self, d, target, scale):
        self.d, self.target = d, target
        self.space = Space(
            log_decay=Real(init=-1.0, shape=(len(d),), scale=scale, per_example=False)
        )

    def init(self, generator):
        return {"w": torch.randn(len(self.d), generator=generator).double()}, {}

    def data(self, device, generator):
        return streams(
            (torch.zeros(2),),
            (torch.zeros(2),),
            batch_size=None,
            device=device,
            generator=generator,
        )

    def predict(self, hypers, params, carry, batch, *, train, generator):
        return self.d * params["w"], carry

    def inner_objective(self, hypers, params, prediction, batch):
        return (
            0.5 * (prediction - self.d * self.target).square().sum()
            + 0.5 * (hypers["log_decay"].exp() * params["w"] ** 2).sum()
        )

    outer_objective = inner_objective


def test_t8_a_structured_response_learns_the_slope_of_the_gate():
    """Θ = diag(U) W₁ tends to −diag(gate (1 − gate) w_OLS) by Δ-STN's own steps at a small σ."""
    d, target = torch.tensor([1.5, 1.0, 0.5]).double(), torch.tensor([1.0, -2.0, 1.5]).double()
    solver = ready(
        Gates(d, target, scale=0.02),
        delta_stn(inner_optimizer=sgd(0.3), response_optimizer=sgd(0.1 / 0.02**2)),
    )
    gate = torch.sigmoid(2 * torch.log(d) + 1.0)
    set_to(solver.core.weights.tensors["w"], gate * target)
    for _ in range(600):
        solver.method.inner_step(solver.core.data.train.peek())
    torch.testing.assert_close(solver.core.weights.detached()["w"], gate * target)
    theta = (
        solver.method.theta.detached()["rows"]
        * solver.method.theta.detached()["weights.w"][:, None]
    )
    torch.testing.assert_close(theta, torch.diag(-gate * (1 - gate) * target), atol=0.01, rtol=0)


# --- Δ-STN and centered STN ---


@pytest.mark.parametrize(("sizes", "equal"), [([6, 3], True), ([6, 5, 3], False)])
def test_delta_stn_is_centered_stn_where_the_network_is_linear_in_w(sizes, equal):
    """On a linear model w₀, Θ, u and s are equal over several rounds; with a hidden layer not."""
    states = []
    for recipe in (delta_stn, centered_stn):
        solver = ready(classifier(sizes), recipe(inner_optimizer=sgd(0.3)))
        for _ in range(6):
            solver.step()
        states.append(
            torch.cat(
                [
                    t.detach().flatten()
                    for t in (
                        *solver.core.weights.leaves,
                        *solver.method.theta.leaves,
                        solver.core.search.u,
                        solver.core.search.s,
                    )
                ]
            )
        )
    gap = (states[0] - states[1]).abs().max()
    assert gap < 1e-12 if equal else gap > 1e-6


def test_a_large_entropy_weight_widens_the_scales_and_none_narrows_them():
    """−τH in the outer loss: σ grows with τ (PAPER 1.4)."""
    sigma = []
    for tau in (0.0, 10.0):
        solver = ready(classifier([6, 5, 3]), stn(entropy_weight=tau, inner_optimizer=sgd(0.1)))
        for _ in range(10):
            solver.step()
        sigma.append(solver.core.search.sigma)
    assert (sigma[1] > 1.02).all()
    assert (sigma[1] > sigma[0]).all()
