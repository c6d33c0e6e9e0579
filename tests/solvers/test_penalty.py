"""Tests of the penalty method: its bias, its formulas and its two weights."""

import pytest
import torch

from bilevel.problems import Quadratic
from bilevel.solvers import Fixed
from bilevel.solvers.penalty import Penalty
from tests.support.dense_derivatives import (
    Noisy,
    at_minimum,
    close,
    dense,
    flat,
    quadratic,
    ridge,
    truth,
    unflat,
)
from tests.support.solver_cases import normed, ready, set_to, sgd


def at_minima(solver, σ):
    """Z at its minimum and y at its own, by Newton's method on the dense quadratic or ridge."""
    solver.method.sigma = σ
    at_minimum(solver)
    _, H, _, outer_gradient, _ = dense(solver)
    z = flat(solver.core.weights.leaves)
    M = torch.autograd.functional.hessian(
        lambda w: solver.core.problem.outer_loss(
            solver.solution().hypers,
            dict(
                zip(solver.core.weights.tensors, unflat(w, solver.core.weights.leaves), strict=True)
            ),
            {},
            solver.core.data.valid.peek(),
        )[0],
        z,
    )
    y = z - torch.linalg.solve(H + M / σ, outer_gradient / σ)
    for leaf, value in zip(
        solver.method.penalized.leaves, unflat(y, solver.method.penalized.leaves), strict=True
    ):
        set_to(leaf, value)
    return H, M, outer_gradient


@pytest.mark.parametrize("direct", [0.0, 1.0])
def test_the_bias_of_the_penalty_is_of_order_one_over_sigma_with_the_predicted_constant(direct):
    """σ Bᵀ(y − z) = −Bᵀ(A + M/σ)⁻¹g, so the error is Bᵀ A⁻¹ M A⁻¹ g / σ + O(1/σ²)."""
    solver = ready(quadratic(direct), Penalty())
    B, exact = solver.core.problem.B, truth(solver.core.problem)
    for σ in (1e2, 1e4, 1e6):
        H, M, g = at_minima(solver, σ)
        error = solver.hypergradient() - exact
        constant = B.T @ torch.linalg.solve(H, M @ torch.linalg.solve(H, g))
        relative = (error * σ - constant).norm() / constant.norm()
        assert relative < 100 * 10 / σ + 1e-8 * σ / 1e4
        definition = B.T @ (torch.linalg.solve(H, g) - torch.linalg.solve(H + M / σ, g))
        close(error, definition, 1e-9 * max(1.0, σ / 1e4))
    assert error.norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("per_feature", [False, True])
def test_on_ridge_the_penalty_approaches_the_closed_form_tenfold_for_every_tenfold_sigma(
    per_feature,
):
    solver = ready(ridge(per_feature=per_feature), Penalty())
    errors = []
    for σ in (1e2, 1e3, 1e4):
        at_minima(solver, σ)
        errors.append(float((solver.hypergradient() - truth(solver.core.problem)).norm()))
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([10, 10], rel=0.1)


def test_an_inner_step_of_the_penalty_is_its_formulas():
    σ, α = 20.0, 0.1
    solver = ready(quadratic(), Penalty(weight=σ, inner_optimizer=sgd(α)), away=0.5)
    p, λ = solver.core.problem, solver.core.search.u.detach().clone()
    z, y = (
        solver.core.weights.tensors["w"].detach().clone(),
        solver.method.penalized.tensors["w"].detach().clone(),
    )
    assert not torch.allclose(z, y)
    data = solver.core.data
    metrics = solver.method.inner_step(data.train.next(), data.valid.next())
    close(solver.core.weights.tensors["w"].detach(), z - α * (p.A @ z + p.B @ λ + p.d), 1e-12)
    close(
        solver.method.penalized.tensors["w"].detach(),
        y - α * (p.A @ y + p.B @ λ + p.d + p.M @ (y - p.w_bar) / σ),
        1e-12,
    )
    assert set(metrics) == {"inner_loss", "penalized_loss"}
    assert (solver.core.data.train.examples, solver.core.data.valid.examples) == (2, 1)


def test_the_weight_grows_by_round_up_to_its_maximum():
    solver = ready(
        quadratic(), Penalty(weight=1.0, growth=0.5, weight_max=2.2, inner_steps=1, outer_steps=2)
    )
    weights = [float(solver.step()["penalty_weight"]) for _ in range(4)]
    assert weights == pytest.approx([1.0, 1.5, 2.0, 2.2])
    solver.step(warmup=True)
    assert solver.method.sigma == 2.2
    again = ready(quadratic(), solver)
    assert again.method.sigma == 1.0


def test_the_solution_of_the_penalty_has_seen_no_validation_data():
    """In warm-up z is what plain training gives, bit for bit; y is not."""
    problem = Noisy(8)
    solver, plain = (
        ready(problem, Penalty(inner_optimizer=sgd(0.1))),
        ready(problem, Fixed(inner_optimizer=sgd(0.1))),
    )
    for _ in range(3):
        solver.step(warmup=True)
        plain.step(warmup=True)
    for name, value in solver.solution().params.items():
        assert torch.equal(value, plain.solution().params[name])
        assert not torch.allclose(value, solver.method.penalized.tensors[name])


@pytest.mark.parametrize("make_problem", [Noisy, normed])
def test_y_and_z_have_the_same_masks(make_problem):
    """At y = z nothing but the direct term is left, whatever σ."""
    solver = ready(make_problem(), Penalty(weight=1e3))
    core = solver.core
    train, valid = core.data.train.peek(), core.data.valid.peek()
    _, gradient, metrics = solver.method.differentiate(valid)
    direct = core.outer_gradients(valid, core.weights.detached(), core.carry, train)[2]
    close(gradient, direct, 0.0)
    assert metrics["inner_gap"] == 0


def test_a_gap_of_the_wrong_sign_gives_a_warning():
    solver = ready(quadratic(), Penalty())
    assert "z is far from its minimum" in solver.warnings({"inner_gap": -0.1})["inner_gap"]
    assert solver.warnings({"inner_gap": 0.1}) == solver.warnings({}) == {}


def test_both_weights_of_the_penalty_have_the_settings_that_lambda_holds():
    settings = {"rate": {"optimizer": "lr", "init": 0.07, "frozen": True}}
    solver = ready(Quadratic.random(space=settings), Penalty())
    rates = [
        group.optimizer.param_groups[0]["lr"]
        for group in (solver.core.weights, solver.method.penalized)
    ]
    assert rates == pytest.approx([0.07, 0.07])
