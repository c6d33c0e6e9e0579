"""Tests of SAMA against the derivatives of optimizer steps, and of its fixed point."""

import copy
import itertools
from functools import partial

import pytest
import torch

from bilevel import Refused
from bilevel.solvers.optim.optimized import apply_gradients
from bilevel.solvers.sama import SAMA
from bilevel.solvers.soba import SOBA
from tests.support.dense_derivatives import (
    F64,
    OPTIMIZERS,
    PROBLEMS,
    STARTS,
    Noisy,
    close,
    dense,
    flat,
    quadratic,
    regret,
    unflat,
)
from tests.support.solver_cases import ready, sgd


def sama_truth(solver, rate):
    _, _, cross, outer_gradient, direct = dense(solver)
    return direct - rate * cross.T @ outer_gradient


@pytest.mark.parametrize("finite_difference", [True, False])
@pytest.mark.parametrize("make_problem", [*PROBLEMS.values(), Noisy], ids=[*PROBLEMS, "network"])
def test_sama_with_sgd_is_the_identity_for_the_inverse_hessian(make_problem, finite_difference):
    """∂_λ L_T is at most quadratic in w; only for the network the difference is off by alpha²."""
    network = make_problem is Noisy
    options = {"alpha": 1e-4 if network else 1.0, "finite_difference": finite_difference}
    solver = ready(make_problem(), SAMA(inner_optimizer=sgd(0.05), **options), away=0.5)
    expected = sama_truth(solver, 0.05)
    tolerance = (1e-7 if network else 1e-11) if finite_difference else 1e-12
    close(solver.hypergradient(solver.core.data.valid.peek()), expected, tolerance)
    indirect = expected - dense(solver)[4]
    assert indirect.norm() > 1e4 * tolerance


def test_the_error_of_the_finite_difference_goes_with_alpha_squared():
    """So both passes have the same masks: otherwise it would go with 1/alpha."""
    problem, errors = Noisy(), []
    for alpha in (0.4, 0.2, 0.1, 0.05):
        solver = ready(problem, SAMA(alpha=alpha, inner_optimizer=sgd(0.05)), away=0.5)
        expected = sama_truth(solver, 0.05)
        errors.append((solver.hypergradient(solver.core.data.valid.peek()) - expected).norm())
    ratios = [float(a / b) for a, b in itertools.pairwise(errors)]
    assert ratios[1:] == pytest.approx([4, 4], rel=0.1)


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_adaptation_is_the_derivative_of_the_optimizers_own_step(optimizer, steps, clip_norm):
    """Central differences of `torch.optim` in three directions, after `steps` steps."""
    solver = ready(Noisy(), SAMA(inner_optimizer=optimizer, clip_norm=clip_norm), away=0.5)
    if steps:
        solver.inner_phase(steps, warmup=True)
    m, h = flat(solver.core.weights.leaves).numel(), 1e-6
    vector, gradient = torch.randn(2, m, dtype=F64)

    def stepped(g):
        trained = copy.deepcopy(solver.core.weights)
        apply_gradients(unflat(g, trained.leaves), trained)
        return flat(trained.leaves)

    adapted = solver.method.adapted(vector, gradient)
    for direction in torch.randn(3, m, dtype=F64):
        moved = (stepped(gradient + h * direction) - stepped(gradient - h * direction)) / (2 * h)
        assert float(adapted @ direction) == pytest.approx(
            float(-vector @ moved), rel=1e-5, abs=1e-8
        )


@pytest.mark.parametrize("kind", ["adam", "rmsprop"])
def test_the_adaptation_of_adam_and_rmsprop_is_the_diagonal_worked_out_by_hand(kind):
    solver = ready(
        Noisy(), SAMA(inner_optimizer=OPTIMIZERS["adamw" if kind == "adam" else kind]), away=0.5
    )
    solver.inner_phase(4, warmup=True)
    state = [solver.core.weights.optimizer.state[leaf] for leaf in solver.core.weights.leaves]
    vector, g = torch.randn(2, flat(solver.core.weights.leaves).numel(), dtype=F64)
    if kind == "adam":
        (b1, b2), t, η, eps = (0.9, 0.999), 5, 0.02, 1e-8
        m, v = (flat([s[name] for s in state]) for name in ("exp_avg", "exp_avg_sq"))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        c1, c2 = 1 - b1**t, (1 - b2**t) ** 0.5
        root = v.sqrt() / c2 + eps
        diagonal = η / c1 * ((1 - b1) / root - m * (1 - b2) * g / (v.sqrt() * c2 * root**2))
    else:
        a, η, eps = 0.8, 0.02, 1e-8
        v = a * flat([s["square_avg"] for s in state]) + (1 - a) * g**2
        root = v.sqrt() + eps
        diagonal = η * (1 / root - g * (1 - a) * g / (v.sqrt() * root**2))
    close(solver.method.adapted(vector, g), diagonal * vector, 1e-10)


def test_sama_adapts_at_the_gradient_of_its_own_batch():
    """For Adam: dL_V(w − s(∇_w L_T(λ, w)))/dλ with ∇_w L_V at the present w, by autograd."""
    solver = ready(Noisy(), SAMA(alpha=1e-4, inner_optimizer=OPTIMIZERS["adam"]), away=0.5)
    solver.inner_phase(3, warmup=True)
    solver.method.recent = None  # the first batch again: the split is one batch
    masks = solver.core.generator.get_state()
    _, _, cross, outer_gradient, direct = dense(solver)
    gradient = dense(solver)[0]
    expected = direct - cross.T @ solver.method.adapted(outer_gradient, gradient)
    close(solver.hypergradient(), expected, 1e-6)
    drawn = solver.core.generator.get_state()
    solver.core.generator.set_state(masks)
    solver.finite_difference = False
    close(solver.hypergradient(), expected, 1e-11)
    assert torch.equal(
        solver.core.generator.get_state(), drawn
    )  # one draw of the masks, however many passes


@pytest.mark.parametrize("case", [(3.0, 0.5, 0.0), (3.0, 0.5, 1.0), (1.0, 1.0, 0.0)])
@pytest.mark.parametrize("start", STARTS)
def test_sama_comes_to_the_fixed_point_of_the_identity(start, case):
    """P(λ − λ̄) = η Bᵀ M (w*(λ) − w̄): not λ*, unless A = I/η, where ηI is the inverse Hessian."""
    condition, η, direct = case
    problem = quadratic(direct, start, condition)
    B, M, P, J = problem.B, problem.M, problem.P, problem.best_response_jacobian()
    solver = ready(problem, SAMA(inner_steps=2, inner_optimizer=sgd(η), outer_optimizer=sgd(0.3)))
    first = regret(solver)
    for _ in range(70):
        solver.step()
    at_zero = problem.best_response({"hyper": torch.zeros(3, dtype=F64)})["w"]
    expected = torch.linalg.solve(
        P - η * B.T @ M @ J, P @ problem.lambda_bar + η * B.T @ M @ (at_zero - problem.w_bar)
    )
    close(solver.core.search.u.detach(), expected, 0.03)
    distance = (expected - problem.optimum()["hyper"]).norm()
    assert distance < 1e-10 if condition == 1.0 else distance > 0.1
    assert regret(solver) < (1e-3 if condition == 1.0 else 0.3) * first


def test_a_difference_that_is_rounding_gives_a_warning():
    assert (
        "raise alpha"
        in ready(quadratic(), SAMA()).warnings({"relative_difference": 1e-15})["alpha"]
    )
    solver = ready(quadratic(), SAMA())
    metrics = {name: float(value) for name, value in solver.step().items()}
    assert (
        solver.warnings(metrics)
        == solver.warnings({})
        == solver.warnings({"relative_difference": 0.0})
        == {}
    )


def test_an_optimizer_without_a_differentiable_form_is_refused_by_sama_alone():
    with pytest.raises(Refused, match="Rprop has no differentiable form"):
        ready(quadratic(), SAMA(inner_optimizer=partial(torch.optim.Rprop, lr=0.1)))
    ready(quadratic(), SOBA(inner_optimizer=partial(torch.optim.Rprop, lr=0.1))).step()
