"""SOBA, SAMA and the penalty method: dense definitions, closed forms, predicted biases."""

import copy
import gc
import io
import itertools
from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from bilevel import BilevelError, Interval, Need, Positive, Refused
from bilevel.problems import Quadratic, Ridge
from bilevel.solvers import Fixed
from bilevel.solvers.optim.optimized import apply_gradients
from bilevel.solvers.penalty import Penalty
from bilevel.solvers.sama import SAMA
from bilevel.solvers.soba import SOBA
from tests.support.device_waits import Waited, no_waiting
from tests.support.solver_cases import Decayed, normed, ready, set_to, sgd

F64 = torch.float64
SOLVERS = {
    "soba": SOBA,
    "sama": SAMA,
    "sama exact": partial(SAMA, finite_difference=False),
    "penalty": Penalty,
}
all_solvers = pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS)


class Noisy(Decayed):
    """A tanh network with decay and input noise of a tuned, differentiable strength."""

    def __init__(self, batch_size=None):
        space = {
            "strength": Interval(low=0.0, high=1.0, init=0.4, per_example=False),
            "decay": Positive(init=0.3, per_example=False),
        }
        super().__init__(
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
            (24, 4),
            batch_size=batch_size,
            **space,
        )

    def inputs(self, hypers, batch, *, train, generator):
        x = batch[0]
        if train:
            x = x * (
                1 + hypers["strength"] * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            )
        return (x,), {}


STARTS = [(0.0, 0.0, 0.0), (2.0, -2.0, 1.0), (-3.0, 3.0, 3.0)]


def rmsprop(lr, **options):
    return partial(torch.optim.RMSprop, lr=lr, **options)


def quadratic(direct=1.0, init=(0.5, -1.0, 2.0), condition=10.0):
    return Quadratic.random(
        5, len(init), condition, direct=direct, dtype=F64, space={"hyper": {"init": list(init)}}
    )


def ridge(init=0.0, per_feature=False):
    """Data for which λ* exists, one for all and per feature."""
    start = [init] * 3 if per_feature else init
    return Ridge.synthetic(
        features=3,
        noise=2.0,
        data_seed=5,
        dtype=F64,
        per_feature=per_feature,
        space={"log_decay": {"init": start}},
    )


PROBLEMS = {
    "quadratic": partial(quadratic, 0.0),
    "quadratic with a direct term": quadratic,
    "ridge": ridge,
    "ridge per feature": partial(ridge, per_feature=True),
}
all_problems = pytest.mark.parametrize("make_problem", PROBLEMS.values(), ids=PROBLEMS)


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def unflat(vector, like):
    return [
        part.view(t.shape)
        for part, t in zip(vector.split([t.numel() for t in like]), like, strict=True)
    ]


def dense(solver, w=None):
    """Return ∇_w L_T, H, ∂²L_T/∂w∂u [m, h], ∇_w L_V and ∂_u L_V at the solver's (w, u).

    The batches are the first ones, and the masks are the next ones.
    """
    problem, leaves, state = (
        solver.core.problem,
        solver.core.weights.leaves,
        solver.core.generator.get_state(),
    )
    w, u = flat(leaves) if w is None else w, solver.core.search.u.detach().clone()
    names = list(solver.core.weights.tensors)

    def inner(w, u):
        generator = torch.Generator().set_state(state)
        hypers = problem.space.constrain(u)
        params = dict(zip(names, unflat(w, leaves), strict=True))
        return problem.inner_loss(
            hypers, params, solver.core.carry, solver.core.data.train.peek(), generator
        )[0]

    def outer(w, u):
        params = dict(zip(names, unflat(w, leaves), strict=True))
        return problem.outer_loss(
            problem.space.constrain(u), params, solver.core.carry, solver.core.data.valid.peek()
        )[0]

    derivatives = torch.autograd.functional
    gradient, _ = derivatives.jacobian(inner, (w, u))
    (H, cross), _ = derivatives.hessian(inner, (w, u))
    outer_gradient, direct = derivatives.jacobian(outer, (w, u))
    return gradient, H, cross, outer_gradient, direct


def truth(problem):
    """The closed-form hypergradient where λ begins."""
    return problem.hypergradient(problem.space.constrain(problem.space.init(F64)))


def at_minimum(solver):
    """Leave w at w*(λ)."""
    best = solver.core.problem.best_response(solver.solution().hypers)
    for name, leaf in solver.core.weights.tensors.items():
        set_to(leaf, best[name])


def regret(solver):
    problem = solver.core.problem
    hypers = solver.solution().hypers
    return float(problem.exact(hypers)["regret"])


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- SOBA ---


@all_problems
def test_the_fixed_point_of_soba_is_the_closed_form(make_problem):
    solver = ready(make_problem(), SOBA())
    at_minimum(solver)
    gradient, H, _, outer_gradient, _ = dense(solver)
    assert gradient.norm() < 1e-12
    solver.method.adjoint = -torch.linalg.solve(H, outer_gradient)
    close(solver.hypergradient(), truth(solver.core.problem), 1e-10)
    at = solver.method.directions(solver.core.data.train.peek(), solver.core.data.valid.peek())
    assert max(at.w.norm(), at.q.norm()) < 1e-11
    assert at.metrics["residual"] < 1e-11


@pytest.mark.parametrize("make_problem", [quadratic, ridge, Noisy])
def test_a_step_of_soba_is_its_three_formulas_at_one_point(make_problem):
    """The steps are simultaneous: with w or q first, q or λ would differ by more than rounding."""
    α, β, γ = 0.1, 0.2, 0.3
    solver = ready(
        make_problem(), SOBA(adjoint_lr=β, inner_optimizer=sgd(α), outer_optimizer=sgd(γ)), away=0.5
    )
    w, u = flat(solver.core.weights.leaves), solver.core.search.u.detach().clone()
    q = solver.method.adjoint = torch.randn(w.shape, dtype=F64)
    masks = solver.core.generator.get_state()
    gradient, H, cross, outer_gradient, direct = dense(solver)
    assert q @ H @ q > 0
    later = dense(solver, w - α * gradient)
    solver.step()
    close(flat(solver.core.weights.leaves), w - α * gradient, 1e-12)
    close(solver.method.adjoint, q - β * (H @ q + outer_gradient), 1e-12)
    close(solver.core.search.u.detach(), u - γ * (cross.T @ q + direct), 1e-12)
    assert torch.equal(solver.core.search.u0, solver.core.search.u.detach())

    assert not torch.equal(solver.core.generator.get_state(), masks) or not isinstance(
        solver.core.problem, Noisy
    )
    assert not torch.allclose(
        solver.method.adjoint, q - β * (later[1] @ q + later[3]), rtol=1e-4, atol=1e-4
    )
    moved = q - β * (H @ q + outer_gradient)
    assert not torch.allclose(
        solver.core.search.u, u - γ * (cross.T @ moved + direct), rtol=1e-4, atol=1e-4
    )


def test_the_weights_of_soba_are_trained_as_plain_training_would():
    """Momentum, clipping and schedule apply; batch-norm statistics are those of the one pass."""
    options = {
        "inner_optimizer": sgd(0.1, momentum=0.9),
        "clip_norm": 0.5,
        "inner_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    }
    problem = normed()
    ours, plain = ready(problem, SOBA(**options)), ready(problem, Fixed(inner_steps=1, **options))
    for _ in range(4):
        for solver in (ours, plain):
            solver.step(warmup=True)
            solver.epoch_ended(None)
        close(flat(ours.core.weights.leaves), flat(plain.core.weights.leaves), 1e-11)
        for name, statistic in plain.core.carry.items():
            torch.testing.assert_close(ours.core.carry[name], statistic)
    assert (ours.inner_count, ours.outer_count) == (4, 0)
    assert torch.equal(ours.core.search.u, problem.space.init(F64))
    assert ours.method.adjoint.norm() > 0


def test_the_adjoint_comes_to_its_solution_at_the_rate_of_one_over_L():
    """At a fixed w the error falls by 1 − μ/L = 9/10 a step, once L has been found."""
    solver = ready(quadratic(), SOBA(inner_optimizer=sgd(0.0)))
    _, H, _, outer_gradient, _ = dense(solver)
    exact, errors = -torch.linalg.solve(H, outer_gradient), []
    for _ in range(2):
        for _ in range(60):
            metrics = solver.step(warmup=True)
        errors.append((solver.method.adjoint - exact).norm())
    assert metrics["largest_eigenvalue"] == pytest.approx(1.0, abs=1e-6)
    assert errors[1] / errors[0] == pytest.approx(0.9**60, rel=0.01)
    assert metrics["residual"] == pytest.approx(
        float((H @ (solver.method.adjoint - exact)).norm() / outer_gradient.norm()), rel=0.2
    )


def test_no_step_of_the_adjoint_more_than_doubles_it():
    """The power iteration begins in the eigenvector of the smallest eigenvalue, 1/1000 of L."""
    solver = ready(quadratic(condition=1000.0), SOBA(inner_optimizer=sgd(0.0)))
    _, H, _, outer_gradient, _ = dense(solver)
    solver.method.top, solver.method.adjoint = (
        torch.linalg.eigh(H)[1][:, 0],
        torch.randn(5, dtype=F64),
    )
    for _ in range(60):
        before = solver.method.adjoint
        L = max((H @ solver.method.top).norm(), (H @ before).norm() / before.norm())
        solver.step(warmup=True)
        close(solver.method.adjoint, before - (H @ before + outer_gradient) / L, 1e-10)
        assert (solver.method.adjoint + outer_gradient / L).norm() <= 2 * before.norm() * (1 + 1e-9)


def test_an_adjoint_step_above_two_over_L_gives_a_warning_and_diverges():
    metrics = {}
    for rate in (1.9, 2.1):
        solver = ready(quadratic(), SOBA(adjoint_lr=rate, inner_optimizer=sgd(0.0)))
        for _ in range(100):
            metrics[rate] = solver.step(warmup=True)
        metrics[rate] = {name: float(value) for name, value in metrics[rate].items()}
        metrics[rate]["warnings"] = solver.warnings(metrics[rate])
    assert metrics[1.9]["residual"] < 1e-3
    assert metrics[1.9]["warnings"] == {}
    assert metrics[2.1]["residual"] > 10
    assert set(metrics[2.1]["warnings"]) == {"adjoint_lr", "residual"}
    assert "adjoint_lr=2.1 is at least 2.1/L" in metrics[2.1]["warnings"]["adjoint_lr"]
    assert solver.warnings({}) == {}


def test_negative_curvature_does_not_carry_the_adjoint_off_and_gives_a_warning():
    """With H + 2|κ|I the adjoint stays bounded; with H it would grow as 1.5^t along −1/2."""
    problem = quadratic()
    eigenvalues, vectors = torch.linalg.eigh(problem.A)
    eigenvalues[0] = -0.5
    problem.A = vectors * eigenvalues @ vectors.T
    solver = ready(problem, SOBA(inner_optimizer=sgd(0.0)))
    for _ in range(150):
        metrics = solver.step(warmup=True)
    rest = solver.method.adjoint
    metrics = {name: float(value) for name, value in solver.step(warmup=True).items()}
    close(solver.method.adjoint, rest, 1e-6)
    curvature = rest @ problem.A @ rest / (rest @ rest)
    assert curvature < 0
    _, H, _, outer_gradient, _ = dense(solver)
    close((H - 2 * curvature * torch.eye(5)) @ rest, -outer_gradient, 1e-5)
    assert set(solver.warnings(metrics)) == {"curvature"}


# --- SAMA ---


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


OPTIMIZERS = {
    "sgd": sgd(0.05),
    "momentum": sgd(0.05, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": sgd(0.05, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.02, betas=(0.8, 0.9), weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "rmsprop": rmsprop(0.02, alpha=0.8),
    "centered rmsprop": rmsprop(0.02, alpha=0.8, centered=True, momentum=0.5),
}


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


# --- the penalty method ---


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
    _, gradient, metrics = solver.method.differentiate(solver.core.data.valid.peek())
    close(
        gradient,
        solver.core.outer_gradients(
            solver.core.data.valid.peek(), solver.core.weights.detached(), solver.core.carry
        )[2],
        0.0,
    )
    assert metrics["inner_gap"] == 0


def test_a_gap_of_the_wrong_sign_gives_a_warning():
    solver = ready(quadratic(), Penalty())
    assert "z is far from its minimum" in solver.warnings({"inner_gap": -0.1})["inner_gap"]
    assert solver.warnings({"inner_gap": 0.1}) == solver.warnings({}) == {}


# --- convergence ---

# Solver, rounds, the part of the first regret that may be left; SAMA has its own fixed point.
CONVERGES = {
    "soba": (lambda: SOBA(inner_optimizer=sgd(1.0), outer_optimizer=sgd(0.005)), 150, 1e-3),
    "penalty": (
        lambda: Penalty(
            weight=10.0, growth=5.0, inner_optimizer=sgd(0.5), outer_optimizer=sgd(0.015)
        ),
        50,
        1e-3,
    ),
}


@pytest.mark.parametrize(("start", "direct"), [*zip(STARTS, (0.0, 1.0, 0.0), strict=True)])
@pytest.mark.parametrize("name", CONVERGES)
def test_on_the_quadratic_it_comes_to_the_optimum(name, start, direct):
    make, rounds, part = CONVERGES[name]
    problem = Quadratic.random(
        condition=3.0, direct=direct, dtype=F64, space={"hyper": {"init": list(start)}}
    )
    solver = ready(problem, make())
    first = regret(solver)
    for _ in range(rounds):
        solver.step()
    assert regret(solver) < part * first


RIDGE = {  # solver, rounds, the part of the first regret that may be left
    "soba": (lambda: SOBA(inner_optimizer=sgd(0.3), outer_optimizer=rmsprop(0.03)), 130, 0.1),
    "sama": (
        lambda: SAMA(inner_steps=3, inner_optimizer=sgd(0.3), outer_optimizer=rmsprop(0.04)),
        70,
        0.2,
    ),
    "penalty": (
        lambda: Penalty(
            weight=10.0,
            growth=2.0,
            inner_steps=3,
            inner_optimizer=sgd(0.3),
            outer_optimizer=rmsprop(0.04),
        ),
        70,
        0.1,
    ),
}


@pytest.mark.parametrize(
    ("start", "per_feature"), [(0.0, False), (1.0, False), (-4.0, False), (0.0, True)]
)
@pytest.mark.parametrize("name", RIDGE)
def test_on_ridge_the_regret_falls(name, start, per_feature):
    make, rounds, part = RIDGE[name]
    solver = ready(ridge(start, per_feature), make())
    first = regret(solver)
    for n in range(rounds):
        solver.step(warmup=n < 10)
    assert regret(solver) < part * first


# --- what every solver owes the runner ---


def tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("make", [SOBA, SAMA, Penalty])
def test_nothing_of_earlier_steps_stays_alive(make):
    options = {} if make is SOBA else {"inner_steps": 1}
    problem = Quadratic.random(weights=2, hypers=1, dtype=F64)
    solver = ready(problem, make(inner_optimizer=sgd(0.1), outer_optimizer=sgd(0.01), **options))
    counts = []
    for rounds in (20, 180):
        for _ in range(rounds):
            solver.step()
        counts.append(tensors())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("optimizer", [sgd(0.05, momentum=0.9), OPTIMIZERS["adam"]])
@all_solvers
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(make, optimizer):
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    problem, options = (
        normed(0.3),
        {"inner_optimizer": optimizer, "inner_scheduler": schedule, "clip_norm": 1.0},
    )
    solver = ready(problem, make(**options), away=0.5)

    def rounds(solver):
        for _ in range(3):
            solver.step()
            solver.epoch_ended(None)

    rounds(solver)
    file = io.BytesIO()
    torch.save(
        (
            solver.state_dict(),
            solver.core.data.train.state_dict(),
            solver.core.data.valid.state_dict(),
        ),
        file,
    )
    rounds(solver)
    resumed = ready(problem, make(**options), away=0.5, seed=2)
    file.seek(0)
    state, train, valid = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    resumed.core.data.train.load_state_dict(train)
    resumed.core.data.valid.load_state_dict(valid)
    rounds(resumed)
    ours, theirs = (tree_leaves((s.state_dict(), s.solution())) for s in (resumed, solver))
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@all_solvers
@pytest.mark.parametrize("make_problem", [Noisy, normed, quadratic, ridge])
@pytest.mark.parametrize("optimizer", [sgd(0.05, momentum=0.9), OPTIMIZERS["rmsprop"]])
def test_no_step_waits_for_the_device(make, make_problem, optimizer):
    solver = ready(make_problem(), make(inner_optimizer=optimizer, clip_norm=1.0))
    solver.step(limit=1)
    with no_waiting():
        solver.step(warmup=True)
        solver.step()
        solver.step(limit=1)
    with pytest.raises(Waited), no_waiting():
        float(solver.step()["outer_loss"])


@all_solvers
def test_warm_up_leaves_the_hyperparameters_and_a_limit_is_kept(make):
    solver = ready(Noisy(), make())
    u = solver.core.search.u.detach().clone()
    solver.step(warmup=True)
    assert torch.equal(solver.core.search.u, u)
    assert solver.outer_count == 0
    before = solver.inner_count
    metrics = solver.step(limit=1)
    assert (solver.inner_count - before, solver.outer_count) == (1, 1)
    assert not torch.equal(solver.core.search.u, u)
    assert {"inner_loss", "outer_loss", "hypergradient_norm"} <= set(metrics)


@all_solvers
def test_the_hypergradient_is_what_an_outer_step_follows_and_moves_nothing(make):
    solver = ready(Noisy(), make(outer_optimizer=sgd(0.1)), away=0.5)
    solver.step()
    saved = copy.deepcopy(solver.state_dict())
    gradient = solver.hypergradient(solver.core.data.valid.peek())
    solver.core.generator.set_state(saved["core"]["generator"])
    for a, b in zip(tree_leaves(saved), tree_leaves(solver.state_dict()), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    u = solver.core.search.u.detach().clone()
    if isinstance(solver, SOBA):
        solver.step()
    else:
        solver.method.outer_step(solver.core.data.valid.peek())
    close(solver.core.search.u.detach(), u - 0.1 * gradient, 1e-13)


@all_solvers
def test_sampled_rates_and_settings_of_the_optimizer_are_refused_by_name(make):
    sampled = Noisy()
    sampled.space = sampled.space.override({"strength": {"differentiable": False}})
    with pytest.raises(Refused, match="`strength` is sampled"):
        ready(sampled, make())
    rated = Noisy()
    rated.space = rated.space.override({"rate": {"optimizer": "lr", "init": 0.1}})
    with pytest.raises(Refused, match="cannot tune `rate`"):
        ready(rated, make())


class Once(nn.Module):
    """Instance norm with running statistics, whose second derivative PyTorch lacks."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = (
            nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
            nn.Linear(12, 3),
        )

    def forward(self, x):
        return self.head(self.norm(x).flatten(1))


@all_solvers
def test_only_what_needs_second_derivatives_refuses_a_layer_without(make):
    problem, solver = Decayed(Once(), (24, 4, 3)), make()
    if Need.SECOND_DERIVATIVES in solver.needs:
        with pytest.raises(Refused, match="needs second derivatives of L_T"):
            ready(problem, solver)
    else:
        assert "hypergradient_norm" in ready(problem, solver).step()
    assert Need.SECOND_DERIVATIVES not in SAMA.needs


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (SOBA, {"adjoint_lr": 0.0}, "adjoint_lr=0.0"),
        (SAMA, {"alpha": -1.0}, "alpha=-1.0"),
        (Penalty, {"weight": 0.0}, "weight=0.0"),
        (Penalty, {"weight": 2.0, "weight_max": 1.0}, "weight_max=1.0"),
        (Penalty, {"growth": -0.1}, "growth=-0.1"),
    ],
)
def test_settings_that_cannot_be_are_named(make, options, message):
    with pytest.raises(BilevelError, match=message):
        make(**options)


def test_an_optimizer_without_a_differentiable_form_is_refused_by_sama_alone():
    with pytest.raises(Refused, match="Adagrad has no differentiable form"):
        ready(quadratic(), SAMA(inner_optimizer=partial(torch.optim.Adagrad, lr=0.1)))
    ready(quadratic(), SOBA(inner_optimizer=partial(torch.optim.Adagrad, lr=0.1))).step()


def test_both_weights_of_the_penalty_have_the_settings_that_lambda_holds():
    settings = {"rate": {"optimizer": "lr", "init": 0.07, "frozen": True}}
    solver = ready(Quadratic.random(space=settings), Penalty())
    rates = [
        group.optimizer.param_groups[0]["lr"]
        for group in (solver.core.weights, solver.method.penalized)
    ]
    assert rates == pytest.approx([0.07, 0.07])
