"""Tests of the elastic net against other solutions and differences, in float64."""

import math

import pytest
import torch
from torch.autograd.functional import hessian

import bilevel
from bilevel import BilevelError, solvers
from bilevel.problems import ElasticNet, Ridge

CPU, F64 = torch.device("cpu"), torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hypers(l1, l2):
    return {
        "log_l1": torch.tensor(float(l1), dtype=F64),
        "log_l2": torch.tensor(float(l2), dtype=F64),
    }


def made(**options):
    return ElasticNet.synthetic(60, 8, 100.0, active=4, dtype=F64, **options)


@pytest.mark.parametrize("smoothing", [1.0, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("at", [(-2, -2), (1, -8), (-8, 1), (-12, -12), (5, 5)])
def test_best_response_is_stationary_to_rounding(smoothing, at):
    problem, λ = made(smoothing=smoothing), hypers(*at)
    w = problem.best_response(λ)["weight"].requires_grad_()
    loss, _ = problem.inner_loss(
        λ, {"weight": w}, {}, problem.data(CPU, generator()).train.peek(), None
    )
    (gradient,) = torch.autograd.grad(loss, w)
    size = (
        problem.moment.abs().max() + math.exp(at[0]) + math.exp(at[1]) * w.abs().max()
    )  # what it is a difference of
    # With a small δ, a weight near zero has the slope 1/δ, so rounding moves the gradient.
    assert gradient.abs().max() < 2e-14 * size + 1e-16 * math.exp(at[0]) * w.abs().max() / smoothing


@pytest.mark.parametrize(("smoothing", "converges"), [(0.05, True), (1e-6, False)])
def test_gradient_descent_converges_at_steps_below_its_bound(smoothing, converges):
    problem, λ = (
        ElasticNet.synthetic(60, 8, active=4, smoothing=smoothing, dtype=F64),
        hypers(-1.5, -2.0),
    )
    batch = problem.data(CPU, generator()).train.peek()
    bound = torch.linalg.eigvalsh(problem.gram).max() + math.exp(-1.5) / 0.05 + math.exp(-2.0)
    w = problem.init(generator())[0]["weight"].requires_grad_()
    for _ in range(500):
        (gradient,) = torch.autograd.grad(
            problem.inner_loss(λ, {"weight": w}, {}, batch, None)[0], w
        )
        w = (w - 1.9 / bound * gradient).detach().requires_grad_()
    error = (w - problem.best_response(λ)["weight"]).abs().max()
    assert error < 1e-10 if converges else error > 1e-3


def test_as_the_smoothing_vanishes_it_is_scikit_learns_elastic_net():
    sklearn = pytest.importorskip("sklearn.linear_model")
    l1, l2 = math.exp(-1.5), math.exp(-3.0)
    errors = []
    for smoothing in (1e-1, 1e-2, 1e-3, 1e-5, 1e-7):
        problem = made(smoothing=smoothing)
        X, y = (t.numpy() for t in problem.data(CPU, generator()).train.peek())
        # α (ρ ‖w‖₁ + ½ (1 − ρ) ‖w‖²)
        theirs = sklearn.ElasticNet(
            alpha=l1 + l2, l1_ratio=l1 / (l1 + l2), fit_intercept=False, tol=1e-14, max_iter=100_000
        )
        w = torch.from_numpy(theirs.fit(X, y).coef_)
        errors.append(
            (problem.best_response(hypers(-1.5, -3.0))["weight"][0] - w).abs().max().item()
        )
    assert (w == 0).any()
    assert (w != 0).any()
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-2
    # A weight that is zero without smoothing lies at δ s/√(1 − s²), with its subgradient s. So the
    # error is proportional to δ.
    assert errors[-1] / errors[-2] == pytest.approx(1e-2, rel=0.01)
    assert errors[-1] < 1e-6


def test_without_an_l1_penalty_it_is_ridge_on_the_same_data():
    elastic, ridge = made(), Ridge.synthetic(60, 8, 100.0, active=4, dtype=F64)
    for ours, theirs in zip(
        elastic.data(CPU, generator()), ridge.data(CPU, generator()), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours.peek(), theirs.peek(), strict=True))
    decay = torch.tensor(-1.0, dtype=F64)
    torch.testing.assert_close(
        elastic.best_response(hypers(-60, -1.0))["weight"],
        ridge.best_response({"log_decay": decay})["weight"],
    )


def test_derivatives_of_the_best_response_to_third_order():
    """Two Newton steps carry the derivatives.

    The closed form and its differences are independent of them.
    """
    problem = made(smoothing=0.1)
    u = torch.tensor([-1.0, -2.0], dtype=F64)
    X, y = problem.data(CPU, generator()).valid.peek()

    def loss(u):
        return (
            0.5
            * (X @ problem.best_response(problem.space.constrain(u))["weight"][0] - y)
            .square()
            .mean()
        )

    def gradient(u):
        return problem.hypergradient(problem.space.constrain(u))

    moves = 1e-5 * torch.eye(2, dtype=F64)
    second = torch.stack([(gradient(u + move) - gradient(u - move)) / 2e-5 for move in moves])
    torch.testing.assert_close(hessian(loss, u), second, rtol=1e-7, atol=1e-9)

    def curvature(u):
        return hessian(loss, u, create_graph=True)[0, 1]

    third = torch.stack([(curvature(u + move) - curvature(u - move)) / 2e-5 for move in moves])
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(curvature, u), third, rtol=1e-6, atol=1e-8
    )


def test_closed_forms_speak_of_the_tuned_alone():
    full, λ = made(), hypers(-2.0, -3.0)
    half = made(space={"log_l1": {"frozen": True, "init": -2.0}})
    torch.testing.assert_close(
        half.best_response_jacobian(λ), full.best_response_jacobian(λ)[:, 1:]
    )
    torch.testing.assert_close(half.hypergradient(λ), full.hypergradient(λ)[1:])
    none = made(space={name: {"frozen": True} for name in ("log_l1", "log_l2")})
    assert none.best_response_jacobian(λ).shape == (8, 0)


def test_a_problem_that_is_clean_and_that_every_self_tuning_solver_runs():
    tried = {"delta_stn": solvers.delta_stn(), "stn": solvers.stn(response=solvers.Dense())}
    report = bilevel.check_problem(ElasticNet.synthetic(), solvers=tried)
    assert (report.findings, report.refused_by) == ([], {})


def test_what_cannot_be_solved_is_one_sentence():
    with pytest.raises(BilevelError, match="smoothing=0 must be positive"):
        made(smoothing=0)
    with pytest.raises(BilevelError, match="best response at log_l1=nan, log_l2=0 is not exact"):
        made().best_response(hypers(math.nan, 0.0))
