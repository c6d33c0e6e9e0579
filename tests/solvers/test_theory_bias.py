"""The bias of w₀ where λ enters nonlinearly (T5): the joint update has it, the regularized not."""

import math

import pytest
import torch
from torch.func import hessian, jacrev

from bilevel.problems import Ridge
from bilevel.solvers import Dense, SelfTuning
from tests.support.solver_cases import expected_loss, ready, set_to, sgd


def ridge(scale, per_example=False):
    return Ridge.synthetic(
        features=4,
        noise=0.5,
        dtype=torch.float64,
        space={"log_decay": {"init": -0.5, "scale": scale, "per_example": per_example}},
    )


def joint_fixed_point(problem, scale):
    """Solve [[H + c₀I, c₁I], [c₁I, σ²H + c₂I]] [w₀; Θ] = [b; 0].

    Here c₀ = e^{λ+σ²/2}, c₁ = σ²c₀ and c₂ = (σ² + σ⁴)c₀.
    """
    H, eye, c0 = problem.gram, torch.eye(4, dtype=torch.float64), math.exp(-0.5 + scale**2 / 2)
    c1, c2 = scale**2 * c0, (scale**2 + scale**4) * c0
    system = torch.cat(
        [torch.cat([H + c0 * eye, c1 * eye], 1), torch.cat([c1 * eye, scale**2 * H + c2 * eye], 1)]
    )
    return torch.linalg.solve(
        system, torch.cat([problem.moment, torch.zeros(4, dtype=torch.float64)])
    ).split(4)


@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_t5_the_joint_gradient_vanishes_at_the_biased_point(scale, linearize):
    problem = ridge(scale)
    solver = ready(problem, SelfTuning(response=Dense(), regularized_w0=False, linearize=linearize))
    w0, theta = solver.core.weights.tensors["weight"], solver.method.theta.tensors["weight"]
    biased, slope = joint_fixed_point(problem, scale)
    set_to(theta, slope)
    best = problem.best_response(solver.solution().hypers)["weight"]
    for value, vanishes in ((biased, True), (best, False)):
        set_to(w0, value)
        gradients = torch.autograd.grad(expected_loss(solver, order=40), [w0, theta])
        assert all((g.abs().max() < 1e-10) == vanishes for g in gradients)


def own_fixed_point(problem):
    """Return the (w₀, Θ) where the gradient of the solver's expected joint loss vanishes."""
    solver = ready(problem, SelfTuning(response=Dense(), regularized_w0=False, linearize=False))

    def loss(flat):
        solver.method.theta.tensors["weight"] = flat[4:].reshape(1, 4, 1)
        return expected_loss(solver, {"weight": flat[:4][None]}, order=12)

    start = torch.zeros(8, dtype=torch.float64)
    return -torch.linalg.solve(hessian(loss)(start), jacrev(loss)(start)).split(4)[0]


def test_t5_leading_bias():
    """w₀ − w* = −(σ²/2) e^λ (H + e^λ I)⁻¹ (w* + 2Θ*) + O(σ⁴) at the end of the joint descent."""
    mismatch = {}
    for scale in (0.4, 0.2, 0.1, 0.05):
        problem = ridge(scale)
        hypers = {"log_decay": torch.tensor(-0.5, dtype=torch.float64)}
        best, slope = (
            problem.best_response(hypers)["weight"][0],
            problem.best_response_jacobian(hypers)[:, 0],
        )
        decayed = problem.gram + math.exp(-0.5) * torch.eye(4, dtype=torch.float64)
        leading = -(scale**2) / 2 * math.exp(-0.5) * torch.linalg.solve(decayed, best + 2 * slope)
        mismatch[scale] = (own_fixed_point(problem) - best - leading).norm() / best.norm()
    for scale in (0.4, 0.2, 0.1):
        assert 12 < mismatch[scale] / mismatch[scale / 2] < 20  # fourth order
    assert mismatch[0.05] < 1e-5


def test_t5_a_run_ends_at_the_biased_point_when_joint_and_at_the_right_one_when_regularized():
    """At σ = 1 averaged joint iterates lie at the formula's w₀, and the regularized ones at w*."""
    problem = ridge(1.0, per_example=True)
    ends = {}
    for name, recipe in {
        "joint": {"regularized_w0": False, "linearize": False},
        "regularized": {},
    }.items():
        solver, mean = (
            ready(problem, SelfTuning(inner_optimizer=sgd(0.3), **recipe)),
            torch.zeros(1, 4, dtype=torch.float64),
        )
        for step in range(600):
            solver.method.inner_step(solver.core.data.train.next())
            mean += solver.core.weights.detached()["weight"] * (step >= 100) / 500
        ends[name] = mean[0]
    biased, best = (
        joint_fixed_point(problem, 1.0)[0],
        problem.best_response(solver.solution().hypers)["weight"][0],
    )
    bias = (biased - best).norm() / best.norm()
    assert bias > 0.02
    assert (ends["regularized"] - best).norm() < 1e-8 * best.norm()
    assert (ends["joint"] - biased).norm() < 0.25 * bias * best.norm()
