"""Implicit differentiation: closed forms, dense derivatives, reports, refusals and state."""

import dataclasses
import gc
import io
import math
import re
from importlib import resources

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, hessian, jacrev
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel import BilevelError, Positive, Problem, Real, Refused, Runner, Space, streams
from bilevel.problems import Quadratic, Ridge
from bilevel.run.loop import SolverWarning
from bilevel.services import Services
from bilevel.solvers import (
    CG,
    FixedPoint,
    Identity,
    LinearSolve,
    Neumann,
    Nystrom,
    Solved,
    recipes,
)
from bilevel.solvers.autodiff.pullback import Pullback, flat, unflat
from bilevel.solvers.implicit import Implicit
from bilevel.solvers.linear_solve.curvature import GaussNewton, Hessian
from tests.support.device_waits import Waited, no_waiting
from tests.support.solver_cases import (
    CPU,
    PROBLEMS,
    Decayed,
    Recurrent,
    classifier,
    convolutional,
    normed,
    ready,
    set_to,
    sgd,
)

DOUBLE = {"dtype": torch.float64}
CLOSED = {
    "quadratic": lambda: Quadratic.random(6, 3, direct=0.5, **DOUBLE),
    "ridge": lambda: Ridge.synthetic(features=5, **DOUBLE),
    "ridge per feature": lambda: Ridge.synthetic(features=5, per_feature=True, **DOUBLE),
}
SOLVES = {
    "CG": CG(iterations=20, tolerance=0.0),
    "Neumann": Neumann(terms=250),
    "fixed point": FixedPoint(iterations=250),
    "Nyström": Nystrom(rank=6, damping=1e-11),
}
EXACT = CG(iterations=60, tolerance=0.0)
EVERY = [CG(), Neumann(), FixedPoint(), Nystrom(rank=3), Identity()]
all_solves = pytest.mark.parametrize("solve", EVERY, ids=lambda s: type(s).__name__)
all_closed = pytest.mark.parametrize("name", CLOSED)


def stationary(problem, solver):
    """The solver, with w = w*(λ₀)."""
    solver = ready(problem, solver)
    for name, w in problem.best_response(solver.solution().hypers).items():
        set_to(solver.core.weights.tensors[name], w)
    return solver


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def densely(solver, curvature=None):
    """Return ∂_u L_V − (∂²L_T/∂u∂w)ᵀ H⁻¹ ∇_w L_V at the solver's u and w, by dense derivatives.

    `curvature` replaces H.
    """
    problem, leaves = solver.core.problem, solver.core.weights.leaves
    train, valid = solver.core.data.train.peek(), solver.core.data.valid.peek()

    def params(w):
        return dict(zip(solver.core.weights.tensors, unflat(w, leaves), strict=True))

    def inner(u, w):
        return problem.inner_loss(
            problem.space.constrain(u), params(w), solver.core.carry, train, None
        )[0]

    def outer(u, w):
        return problem.outer_loss(problem.space.constrain(u), params(w), solver.core.carry, valid)[
            0
        ]

    u, w = solver.core.search.u0, flat(leaves).detach()
    H = hessian(inner, argnums=1)(u, w) if curvature is None else curvature
    mixed = jacrev(jacrev(inner, argnums=1), argnums=0)(u, w)
    return jacrev(outer)(u, w) - mixed.T @ torch.linalg.solve(H, jacrev(outer, argnums=1)(u, w))


# --- the hypergradient ---


@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()], ids=["Hessian", "Gauss–Newton"])
@pytest.mark.parametrize("solve", SOLVES)
@all_closed
def test_at_the_best_response_it_is_the_closed_form(name, solve, curvature):
    """The models are linear in w, so that the Gauss–Newton matrix is the Hessian."""
    solver = stationary(CLOSED[name](), Implicit(linear_solve=SOLVES[solve], curvature=curvature))
    hypers = solver.solution().hypers
    assert relative(solver.hypergradient(), solver.core.problem.hypergradient(hypers)) < 1e-8


@pytest.mark.parametrize(
    "solve",
    [CG(iterations=1), Neumann(terms=2), Nystrom(rank=2), Identity()],
    ids=lambda s: type(s).__name__,
)
@all_closed
def test_with_less_effort_it_is_not(name, solve):
    solver = stationary(CLOSED[name](), Implicit(linear_solve=solve))
    assert (
        relative(
            solver.hypergradient(), solver.core.problem.hypergradient(solver.solution().hypers)
        )
        > 1e-3
    )


@all_closed
def test_elsewhere_it_is_its_own_definition_and_not_the_closed_form(name):
    solver = ready(CLOSED[name](), Implicit(linear_solve=EXACT), away=0.5)
    ours = solver.hypergradient()
    assert relative(ours, densely(solver)) < 1e-10
    assert relative(ours, solver.core.problem.hypergradient(solver.solution().hypers)) > 1e-2


def test_on_a_network_it_is_its_own_definition():
    """With the Hessian damped until it is positive definite, and weight decay under a softplus."""
    solver = ready(
        tanh(),
        Implicit(linear_solve=CG(iterations=300, tolerance=0.0), curvature=Hessian(damping=2.0)),
        away=0.3,
    )
    assert (
        relative(
            solver.hypergradient(),
            densely(solver, dense_hessian(solver) + 2.0 * torch.eye(27).double()),
        )
        < 1e-9
    )
    assert solver.method.report["negative_curvature"] == 0


def test_the_direct_term_adds_up():
    """Without an indirect term, from a validation loss that does not see w, it is the whole."""
    problem = Quadratic.random(4, 2, direct=0.7, **DOUBLE)
    solver = stationary(problem, Implicit(linear_solve=EXACT))
    λ = solver.solution().hypers["hyper"]
    with_direct = solver.hypergradient()
    problem.M, batch = 0 * problem.M, {**solver.core.data.valid.peek(), "M": 0 * problem.M[None]}
    direct = solver.hypergradient(batch)
    torch.testing.assert_close(direct, problem.P @ (λ - problem.lambda_bar))
    assert relative(with_direct, direct) > 0.1


def test_the_identity_is_one_step_of_gradient_descent():
    """−η (∂²L_T/∂u∂w)ᵀ ∇_w L_V."""
    solver = ready(CLOSED["quadratic"](), Implicit(linear_solve=Identity(scale=0.3)))
    problem, w, λ = solver.core.problem, solver.core.weights.detached()["w"], solver.core.search.u0
    expected = problem.P @ (λ - problem.lambda_bar) - 0.3 * problem.B.T @ problem.M @ (
        w - problem.w_bar
    )
    torch.testing.assert_close(solver.hypergradient(), expected)


def test_it_descends_to_the_optimum():
    problem = Quadratic.random(5, 1, condition=2.0, **DOUBLE)
    J = problem.best_response_jacobian()
    rate = 0.5 / (J.T @ problem.M @ J).item()
    solver = ready(problem, Implicit(inner_optimizer=sgd(1.0), outer_optimizer=sgd(rate)))
    for _ in range(100):
        solver.step()
    torch.testing.assert_close(
        solver.solution().hypers["hyper"], problem.optimum()["hyper"], rtol=0, atol=1e-6
    )


# --- the curvature ---


def tanh(**options):
    """A tanh network with 27 weights, its decay tuned."""
    return Decayed(
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), batch_size=None, **options
    )


def dense(product, size):
    return torch.stack([product(q) for q in torch.eye(size).double()])


def pullback(solver, batches=None, seed=0):
    draws = torch.Generator().manual_seed(seed)
    batches = [solver.core.data.train.peek()] if batches is None else batches
    return Pullback(
        solver.core.problem,
        solver.core.search.u0,
        solver.core.weights.detached(),
        solver.core.carry,
        batches,
        draws,
        solver.core.functions,
    )


def dense_hessian(solver):
    """∂²L_T/∂w², by torch.func."""
    problem, leaves = solver.core.problem, solver.core.weights.leaves
    hypers = problem.space.constrain(solver.core.search.u0)

    def loss(w):
        params = dict(zip(solver.core.weights.tensors, unflat(w, leaves), strict=True))
        return problem.inner_loss(
            hypers, params, solver.core.carry, solver.core.data.train.peek(), None
        )[0]

    return hessian(loss)(flat(leaves).detach())


def dense_gauss_newton(solver):
    """Jᵀ ∂²ℓ/∂y² J + decay · I, by torch.func and without the library's predict."""
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, labels = solver.core.data.train.peek()

    def logits(w):
        return functional_call(
            module,
            dict(
                zip(solver.core.weights.tensors, unflat(w, solver.core.weights.leaves), strict=True)
            ),
            (x,),
        )

    w = flat(solver.core.weights.leaves).detach()
    J = jacrev(logits)(w).reshape(-1, len(w))
    inner = hessian(lambda y: F.cross_entropy(y.reshape(-1, 3), labels))(logits(w).reshape(-1))
    return J.T @ inner @ J + solver.solution().hypers["decay"] * torch.eye(len(w)).double()


def test_the_products_are_those_of_the_dense_matrices():
    solver = ready(tanh(), Implicit(), away=0.5)
    ours, H = pullback(solver), dense_hessian(solver)
    torch.testing.assert_close(dense(Hessian().at(ours), 27), H)
    torch.testing.assert_close(
        dense(Hessian(damping=0.3).at(ours), 27), H + 0.3 * torch.eye(27).double()
    )
    G = dense(GaussNewton().at(ours), 27)
    torch.testing.assert_close(G, dense_gauss_newton(solver))
    torch.testing.assert_close(
        dense(GaussNewton(damping=0.3).at(ours), 27), G + 0.3 * torch.eye(27).double()
    )
    assert relative(G, H) > 0.1
    assert torch.linalg.eigvalsh(G).min() > 0 > torch.linalg.eigvalsh(H).min()
    product, cross = ours.both(torch.ones(27).double())
    torch.testing.assert_close(product, H.sum(0))
    torch.testing.assert_close(cross, ours.cross(torch.ones(27).double()))


def test_with_gauss_newton_the_mixed_derivative_stays_exact():
    solver = ready(
        tanh(),
        Implicit(linear_solve=CG(iterations=200, tolerance=0.0), curvature=GaussNewton()),
        away=0.5,
    )
    assert relative(solver.hypergradient(), densely(solver, dense_gauss_newton(solver))) < 1e-9


class Tree(Problem):
    """A problem whose prediction is a pytree: y = tanh(x w), w itself and a string."""

    def __init__(self):
        self.space = Space(weight=Real(init=[0.5, -0.3], shape=(2,), per_example=False))

    def init(self, generator):
        return {
            "w": torch.randn(3, generator=generator).double(),
            "idle": torch.zeros(2).double(),
        }, {}

    def data(self, device, generator):
        splits = [
            (torch.randn(8, 3, generator=torch.Generator().manual_seed(i)).double(),)
            for i in range(2)
        ]
        return streams(*splits, batch_size=None, device=device, generator=generator)

    def predict(self, hypers, params, carry, batch, *, train, generator):
        return {
            "y": torch.tanh(batch[0] @ params["w"]),
            "parts": [params["w"], "name", batch[0].sum()],
        }, carry

    def inner_objective(self, hypers, params, prediction, batch):
        a, b = hypers["weight"]
        cross = (prediction["y"].mean() + 1) * params[
            "w"
        ].sum()  # curvature between prediction and w
        return (
            (prediction["y"] - a).square().mean()
            + b.exp() * prediction["parts"][0].square().sum()
            + 0.1 * cross
        )

    def outer_objective(self, hypers, params, prediction, batch):
        return (prediction["y"] - 1).square().mean()


def test_a_prediction_may_be_a_pytree_and_a_weight_may_do_nothing():
    solver = ready(Tree(), Implicit(curvature=GaussNewton()), away=0.3)
    x, (a, b), w = (
        solver.core.data.train.peek()[0],
        solver.core.search.u0,
        solver.core.weights.detached()["w"],
    )
    y, J = torch.tanh(x @ w), jacrev(lambda w: torch.tanh(x @ w))(w)

    def linearized(w_new):
        linear = y + J @ (w_new - w)
        cross = (linear.mean() + 1) * w_new.sum()
        return (linear - a).square().mean() + b.exp() * w_new.square().sum() + 0.1 * cross

    G = dense(GaussNewton().at(pullback(solver)), 5)
    torch.testing.assert_close(G[:3, :3], hessian(linearized)(w))
    assert not G[3:].any()
    assert not G[:, 3:].any()
    assert torch.isfinite(solver.hypergradient()).all()


@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()], ids=["Hessian", "Gauss–Newton"])
def test_masks_are_frozen_so_that_the_matrix_is_symmetric(curvature):
    """Two passes with dropout differ, but qᵀ(A p) = pᵀ(A q): the draws are those of one pass."""
    solver = ready(normed(dropout=0.5), Implicit(curvature=curvature), away=0.5)
    one, other = pullback(solver, seed=1), pullback(solver, seed=2)
    m = sum(leaf.numel() for leaf in solver.core.weights.leaves)
    p, q = torch.randn(2, m).double()
    product = curvature.at(one)
    assert abs(p @ product(q) - q @ product(p)) < 1e-12 * product(q).norm() * p.norm()
    assert torch.equal(product(q), product(q))
    assert relative(curvature.at(other)(q), product(q)) > 1e-2
    assert relative(other.gradient, one.gradient) > 1e-2


def test_all_products_of_an_outer_step_are_of_one_pass():
    solver = ready(
        normed(dropout=0.5), Implicit(linear_solve=CG(iterations=7), batches=2), away=0.5
    )
    solver.inner_phase(2, warmup=False)
    passes, predict = [], solver.core.problem.predict
    solver.core.problem.predict = lambda *args, train, **kw: (
        passes.append(train),
        predict(*args, train=train, **kw),
    )[1]
    solver.hypergradient()
    assert passes == [False, True, True]


def test_several_batches_are_averaged_and_no_other_is_drawn():
    solver = ready(normed(), Implicit(batches=2, inner_steps=3), away=0.5)
    seen, order = [], solver.core.data.train.next
    solver.core.data.train.next = lambda: (seen.append(order()), seen[-1])[1]
    solver.inner_phase(3, warmup=False)
    assert [id(batch) for batch, _ in solver.method.recent] == [id(batch) for batch in seen[1:]]
    whole, *single = (pullback(solver, batches) for batches in (seen[1:], seen[1:2], seen[2:]))
    q = torch.randn(len(whole.gradient)).double()
    for average, parts in (
        (whole.gradient, [p.gradient for p in single]),
        (whole.hessian(q), [p.hessian(q) for p in single]),
        (whole.cross(q), [p.cross(q) for p in single]),
        *((GaussNewton().at(whole)(q), [GaussNewton().at(p)(q) for p in single]),),
    ):
        torch.testing.assert_close(average, (parts[0] + parts[1]) / 2)
    assert relative(single[0].gradient, single[1].gradient) > 0.1
    examples = solver.core.data.train.examples
    solver.method.outer_step(solver.core.data.valid.peek())
    assert solver.core.data.train.examples == examples
    assert solver.method.report["inner_gradient_norm"].item() == pytest.approx(
        pullback(solver, seen[1:]).gradient.norm().item()
    )


def test_a_recurrent_state_goes_on_from_batch_to_batch_as_in_training():
    solver = ready(Recurrent(), Implicit(batches=2, inner_steps=3))
    before, carries = solver.core.carry, []
    step = solver.core.descend_inner
    solver.core.descend_inner = lambda u, batch: (
        carries.append(solver.core.carry),
        step(u, batch),
    )[1]
    solver.inner_phase(3, warmup=False)
    assert carries[0] is before
    assert solver.method.recent[0][1] is carries[1]
    batch, w, h = solver.core.data.train.peek(), solver.core.weights.detached(), carries[1]["h"]
    hypers, losses = solver.core.problem.space.constrain(solver.core.search.u0), []
    for _ in range(2):
        h, carry = solver.core.problem.predict(
            hypers, w, {"h": h}, batch, train=True, generator=None
        )
        losses.append(solver.core.problem.inner_objective(hypers, w, h, batch))
        assert carry["h"] is h
    batches, carry = solver.method._recent()
    ours = Pullback(
        solver.core.problem, solver.core.search.u0, w, carry, batches, torch.Generator()
    )
    torch.testing.assert_close(ours.loss, sum(losses) / 2)


# --- layers that PyTorch does not differentiate twice ---


@pytest.mark.parametrize(
    "name", ["dropout and batch norm", "lstm per batch", "carried state", "every domain", "digits"]
)
def test_a_round_runs_or_is_refused_in_a_sentence(name):
    problem = PROBLEMS[name]()
    if any(not problem.space[hyper].differentiable for hyper in problem.space.tuned):
        with pytest.raises(Refused, match="is sampled or rounded and has none"):
            ready(problem, Implicit())
        return
    solver = ready(problem, Implicit(curvature=GaussNewton()))
    solver.step()
    assert torch.isfinite(solver.hypergradient()).all()


def test_training_batch_norm_is_differentiated_twice():
    """Against a Hessian by central differences of the gradient."""
    solver = ready(normed(), Implicit(), away=0.5)
    ours, batch = pullback(solver), solver.core.data.train.peek()
    q = torch.randn(len(ours.gradient)).double()

    def gradient(w):
        leaves = [t.requires_grad_() for t in unflat(w, solver.core.weights.leaves)]
        params = dict(zip(solver.core.weights.tensors, leaves, strict=True))
        hypers = solver.core.problem.space.constrain(solver.core.search.u0)
        loss, _ = solver.core.problem.inner_loss(
            hypers, params, solver.core.carry, batch, torch.Generator().manual_seed(0)
        )
        return flat(torch.autograd.grad(loss, leaves))

    w = flat(solver.core.weights.leaves).detach()
    torch.testing.assert_close(ours.gradient, gradient(w))
    central = (gradient(w + 1e-5 * q) - gradient(w - 1e-5 * q)) / 2e-5
    torch.testing.assert_close(ours.hessian(q), central, rtol=1e-6, atol=1e-8)


def test_a_solve_writes_no_statistics():
    solver = ready(normed(), Implicit(), away=0.5)
    solver.method.inner_step(solver.core.data.train.next())
    before, examples = (
        {name: t.clone() for name, t in solver.core.carry.items()},
        solver.core.carry["1.num_batches_tracked"].item(),
    )
    weights = [leaf.detach().clone() for leaf in solver.core.weights.leaves]
    solver.method.outer_step(solver.core.data.valid.next())
    assert all(torch.equal(solver.core.carry[name], t) for name, t in before.items())
    assert all(torch.equal(a, b) for a, b in zip(weights, solver.core.weights.leaves, strict=True))
    assert examples == 1


class Once(torch.autograd.Function):
    """A layer whose backward pass has no derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return Once.apply(self.linear(x))


def test_a_layer_without_second_derivatives_is_refused():
    with pytest.raises(
        Refused, match="needs second derivatives of L_T, which PyTorch lacks for a layer"
    ):
        ready(Decayed(Odd()), Implicit())


# --- what it cannot tune ---


def test_plain_dropout_is_refused():
    with pytest.raises(
        Refused,
        match=r"Implicit needs ∂L_T/∂λ, but `input_dropout` is sampled or rounded.* relax it",
    ):
        ready(classifier(), Implicit())
    ready(
        classifier(
            **{
                f"{name}dropout{n}": {"frozen": True}
                for name, n in (("input_", ""), ("", 1), ("", 2))
            }
        ),
        Implicit(),
    )


def test_a_learning_rate_is_refused():
    problem = Ridge.synthetic(features=4, space={"rate": {"optimizer": "lr", "init": 0.1}})
    with pytest.raises(
        Refused, match="Implicit cannot tune `rate`: it sets the inner optimizer's lr"
    ):
        ready(problem, Implicit())


def test_a_step_above_its_bound_is_refused_at_set_up():
    for solve in (Neumann(step=10.0), FixedPoint(step=10.0)):
        with pytest.raises(
            BilevelError, match=r"step=10 is above 2/L = .* choose a smaller step, or step=null"
        ):
            ready(CLOSED["ridge"](), Implicit(linear_solve=solve))
    ready(CLOSED["ridge"](), Implicit(linear_solve=Neumann(step=0.5))).step()


def test_more_batches_than_a_round_has_are_refused():
    with pytest.raises(BilevelError, match=r"batches=3 must not exceed inner_steps=2"):
        Implicit(batches=3, inner_steps=2)


# --- no solve fails silently ---


@all_solves
def test_what_an_outer_step_reports(solve):
    solver = ready(CLOSED["quadratic"](), Implicit(linear_solve=solve))
    problem, w, λ = (
        solver.core.problem,
        solver.core.weights.detached()["w"].clone(),
        solver.core.search.u0.clone(),
    )
    at_start = problem.A @ w + problem.B @ λ + problem.d
    torch.testing.assert_close(solver.method.initial_norm, at_start.norm())
    metrics = solver.step()
    w = solver.core.weights.detached()["w"]
    assert metrics["inner_gradient_norm"].item() == pytest.approx(
        (problem.A @ w + problem.B @ λ + problem.d).norm().item()
    )
    assert metrics["negative_curvature"] == 0
    assert {
        "residual",
        "iterations",
        "outer_loss",
        "hypergradient_norm",
        "inner_loss",
    } <= metrics.keys()
    assert ("largest_eigenvalue" in metrics) == (type(solve) not in (CG, Identity))
    if "largest_eigenvalue" in metrics:
        least = 0.7 if isinstance(solve, Nystrom) else 0.999
        assert least < metrics["largest_eigenvalue"] < 1 + 1e-9
    assert "residual" not in solver.step(warmup=True)


def test_warnings_come_one_by_one():
    solver = ready(
        CLOSED["quadratic"](), Implicit(linear_solve=CG(tolerance=0.01), stationarity=0.2)
    )
    start = float(solver.method.initial_norm)
    good = {"residual": 0.009, "negative_curvature": 0.0, "inner_gradient_norm": 0.19 * start}
    assert solver.warnings(good) == solver.warnings({}) == {}
    assert (
        solver.warnings(dict.fromkeys(good, math.nan)) == {}
    )  # w has diverged, which the runner reports
    bad = {"residual": 0.011, "negative_curvature": 0.25, "inner_gradient_norm": 0.21 * start}
    sentences = {
        "residual": r"CG leaves a relative residual of 0\.011 .*, above its tolerance 0\.01, .*; "
        "spend more on the solve",
        "negative_curvature": r"25% of the solves met curvature that is not positive, .*; "
        "use curvature=GaussNewton, damp it",
        "stationarity": r"‖∇_w L_T‖ = .*, more than 0\.2 of its .* at the initial weights, .*; "
        "take more inner_steps",
    }
    for kind, value in bad.items():
        key = "stationarity" if kind == "inner_gradient_norm" else kind
        for wrong in (value, math.nan) if kind != "negative_curvature" else (value,):
            found = solver.warnings(good | {kind: wrong})
            assert list(found) == [key]
            assert "\n" not in found[key]
        assert re.search(sentences[key], solver.warnings(good | {kind: value})[key])
    identity = ready(CLOSED["quadratic"](), Implicit(linear_solve=Identity()))
    assert "residual" not in identity.warnings(good | {"residual": 5.0})
    gauss_newton = ready(CLOSED["quadratic"](), Implicit(curvature=GaussNewton()))
    assert (
        "; damp it"
        in gauss_newton.warnings(good | {"negative_curvature": 0.25})["negative_curvature"]
    )


# 1 % to 100 % of the hypergradient is lost to the damping
DAMPED = [(10.0, 0.1), (1e3, 0.1), (1e6, 0.1), (10.0, 0.01), (30.0, 1.0), (1e4, 1e-3)]


@pytest.mark.parametrize("curvature", [Hessian, GaussNewton])
@pytest.mark.parametrize(("condition", "damping"), DAMPED)
def test_the_error_that_damping_causes_is_reported(condition, damping, curvature):
    """The residual is that of A without damping, and the estimate is near the true error of x."""
    problem = Quadratic.random(10, 4, condition=condition, **DOUBLE)
    solver = stationary(
        problem, Implicit(linear_solve=CG(60), curvature=curvature(damping=damping))
    )
    exact = problem.hypergradient(solver.solution().hypers)
    off = relative(solver.hypergradient(), exact)
    report = solver.method.report
    v = problem.M @ (solver.core.weights.detached()["w"] - problem.w_bar)
    x = torch.linalg.solve(problem.A + damping * torch.eye(10).double(), v)
    torch.testing.assert_close(
        report["residual"], (problem.A @ x - v).norm() / v.norm(), rtol=1e-4, atol=0
    )
    assert report["damped_residual"] < 1e-5
    true = relative(x, torch.linalg.solve(problem.A, v))
    assert 0.5 * true < report["adjoint_error"] < 1.1 * true
    assert off > 0.01
    metrics = {name: value.item() for name, value in report.items()}
    warning = solver.warnings(metrics)["residual"]
    assert f"residual of {metrics['residual']:.2g} on average without curvature.damping=" in warning
    assert f"H⁻¹v is about {metrics['adjoint_error']:.0%} off" in warning
    assert "lower curvature.damping if" in warning


@pytest.mark.parametrize("condition", [10.0, 1e3])
def test_an_exact_solve_without_damping_does_not_warn(condition):
    """The remedy that the warning names: lower the damping."""
    solver = stationary(
        Quadratic.random(10, 4, condition=condition, **DOUBLE), Implicit(linear_solve=CG(60))
    )
    solver.hypergradient()
    metrics = {name: value.item() for name, value in solver.method.report.items()}
    assert "damped_residual" not in metrics
    assert metrics["residual"] < 1e-6
    assert metrics["adjoint_error"] < 1e-3
    assert solver.warnings(metrics) == {}


@pytest.mark.parametrize(
    ("solve", "condition"),
    [
        (Nystrom(rank=10, damping=0.01), 30.0),
        (Nystrom(rank=10, damping=0.003), 300.0),
        (Neumann(terms=10), 100.0),
        (Neumann(terms=20, step=0.5), 100.0),
        (FixedPoint(iterations=10, step=1.0), 300.0),
        (CG(iterations=3), 100.0),
    ],
    ids=str,
)
def test_every_inexact_solve_estimates_its_error(solve, condition):
    problem = Quadratic.random(10, 4, condition=condition, **DOUBLE)
    solver = stationary(problem, Implicit(linear_solve=solve))
    off = relative(solver.hypergradient(), problem.hypergradient(solver.solution().hypers))
    metrics = {name: value.item() for name, value in solver.method.report.items()}
    assert off > 0.05
    assert 0.3 * off < metrics["adjoint_error"] < 3 * off
    assert "% off" in solver.warnings(metrics)["residual"]


def test_a_residual_within_the_tolerance_with_a_large_error_warns():
    solver = ready(CLOSED["quadratic"](), Implicit(linear_solve=Nystrom(rank=3)))
    good = {"residual": 0.05, "negative_curvature": 0.0, "inner_gradient_norm": 0.0}
    assert solver.warnings(good | {"adjoint_error": 0.09}) == {}
    for error in (0.12, math.nan):
        found = solver.warnings(good | {"adjoint_error": error})["residual"]
        assert "residual of 0.05 on average, within its tolerance 0.1, and" in found
        assert "raise its rank, lower linear_solve.damping=0.01" in found


def test_a_solve_of_ones_own_may_leave_the_remainder_out():
    @dataclasses.dataclass(frozen=True)
    class Mine(LinearSolve):
        def solve(self, product, v, guess=None, generator=None):
            zero = torch.zeros_like(v[0])
            return Solved(v, zero + 0.3, zero, zero > 0)

    solver = ready(CLOSED["quadratic"](), Implicit(linear_solve=Mine()))
    solver.hypergradient()
    assert solver.method.report["residual"] == 0.3
    assert "adjoint_error" not in solver.method.report
    assert "above its tolerance 0.1" in solver.warnings(
        {name: value.item() for name, value in solver.method.report.items()}
    ).get("residual", "")


@pytest.mark.parametrize("name", ["cg", "neumann", "nystrom", "identity"])
def test_library_and_command_line_have_the_same_defaults(name):
    import hydra
    from omegaconf import OmegaConf

    text = resources.files("bilevel").joinpath(f"conf/solver/implicit_{name}.yaml").read_text()
    config = OmegaConf.create(text)
    recipe = getattr(recipes, f"implicit_{name}")()
    for setting in ("linear_solve", "curvature"):
        assert hydra.utils.instantiate(config[setting]) == getattr(recipe, setting)
    for setting in ("warm_start", "batches", "stationarity"):
        assert config[setting] == getattr(recipe, setting)


def test_a_run_warns_of_a_solve_cut_short(tmp_path):
    solver = Implicit(linear_solve=CG(iterations=1), inner_optimizer=sgd(0.01), inner_steps=1)
    runner = Runner(
        epochs=4, warmup_epochs=1, progress="none", picture=False, checkpoint_every=10**6
    )
    with pytest.warns(SolverWarning) as caught:
        runner.run(
            Quadratic.random(6, 2),
            solver,
            directory=tmp_path / "run",
            seed=0,
            names=("quadratic", "implicit"),
        )
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2
    assert any("relative residual" in s for s in messages)
    assert any("‖∇_w L_T‖" in s for s in messages)


def test_negative_curvature_is_reported():
    solver = ready(
        tanh(decay=Positive(init=1e-6)), Implicit(linear_solve=CG(iterations=50)), away=0.5
    )
    solver.hypergradient()
    assert solver.method.report["negative_curvature"] == 1
    positive = ready(
        tanh(decay=Positive(init=1e-2)),
        Implicit(linear_solve=CG(50), curvature=GaussNewton()),
        away=0.5,
    )
    positive.hypergradient()
    assert positive.method.report["negative_curvature"] == 0
    assert positive.method.report["residual"] < 1e-5


# --- no step waits for the device ---


@pytest.mark.parametrize(
    "curvature", [Hessian(), GaussNewton(damping=0.1)], ids=["Hessian", "Gauss–Newton"]
)
@all_solves
def test_no_step_waits_for_the_device(solve, curvature):
    """The check runs on the CPU; on CUDA the eigenvalues of `Nystrom` wait."""
    solver = ready(
        normed(dropout=0.3),
        Implicit(linear_solve=solve, curvature=curvature, batches=2, inner_steps=2, clip_norm=1.0),
    )
    solver.step(limit=1)
    with no_waiting():
        solver.step(warmup=True)
        solver.step()
        solver.step(limit=1)


def test_a_step_of_ones_own_is_held_against_its_bound_which_waits():
    solver = ready(CLOSED["ridge"](), Implicit(linear_solve=Neumann(step=0.5)))
    solver.step()
    with pytest.raises(Waited, match="a number is read"), no_waiting():
        solver.step()


# --- from one solve to the next ---


@pytest.mark.parametrize(
    "solve", [CG(iterations=2), FixedPoint(iterations=4)], ids=lambda s: type(s).__name__
)
def test_a_warm_start_lowers_the_residual(solve):
    warm, cold = (
        ready(
            CLOSED["quadratic"](),
            Implicit(linear_solve=solve, warm_start=w, outer_optimizer=sgd(1e-3)),
        )
        for w in (True, False)
    )
    for _ in range(30):
        last = warm.step()["residual"], cold.step()["residual"]
    assert last[0] < 0.1 * last[1]
    assert cold.method.guess.x is None
    assert ready(CLOSED["quadratic"](), Implicit(linear_solve=Neumann())).method.guess.x is None


@pytest.mark.parametrize(
    "solve",
    [CG(iterations=3), Neumann(terms=3), FixedPoint(iterations=3), Nystrom(rank=2), Identity()],
    ids=lambda s: type(s).__name__,
)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(solve):
    problem = normed(dropout=0.3)
    options = {"inner_optimizer": sgd(0.05, momentum=0.9), "batches": 2}
    solver = ready(problem, Implicit(linear_solve=solve, **options))
    for _ in range(3):
        solver.step()
    file = io.BytesIO()
    torch.save(
        (
            solver.state_dict(),
            solver.core.data.train.state_dict(),
            solver.core.data.valid.state_dict(),
        ),
        file,
    )
    file.seek(0)
    state, train, valid = torch.load(file, weights_only=True)
    resumed = ready(problem, Implicit(linear_solve=solve, **options), seed=2)
    resumed.load_state_dict(state)
    resumed.core.data.train.load_state_dict(train)
    resumed.core.data.valid.load_state_dict(valid)
    untouched = [t.clone() if isinstance(t, torch.Tensor) else t for t in tree_leaves(state)]
    for _ in range(2):
        first, second = solver.step(), resumed.step()
        assert all(torch.equal(first[name], second[name]) for name in first)
    ours, theirs = (tree_leaves((s.state_dict(), s.solution())) for s in (resumed, solver))
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    loaded = tree_leaves(state)
    guess = [
        i
        for i, t in enumerate(loaded)
        if isinstance(t, torch.Tensor) and t is state["method"]["guess"]["x"]
    ]
    assert all(
        torch.equal(loaded[i], untouched[i]) for i in guess
    )  # a solve uses its guess up, and not the caller's


def live():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_memory_is_flat_over_two_hundred_outer_steps():
    """No graph of an outer step outlives it."""
    solver = ready(
        Quadratic.random(4, 2, **DOUBLE), Implicit(linear_solve=CG(iterations=1), outer_steps=20)
    )
    solver.step()
    before = live()
    for _ in range(10):
        solver.step()
    assert live() == before


def test_the_problems_own_module_is_not_touched():
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    ready(Decayed(module), Implicit()).step()
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


# --- λ of any size ---


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made within."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))]
        )
        return out


class PerWeight(Problem):
    """Linear regression on a million features with a decay for each."""

    m = 10**6

    def __init__(self):
        self.space = Space(decay=Positive(init=0.1, shape=(self.m,), per_example=False))

    def init(self, generator):
        return {"w": torch.randn(self.m, generator=generator)}, {}

    def data(self, device, generator):
        rows = torch.randn(4, self.m, generator=torch.Generator().manual_seed(0)) / 1000
        return streams(
            (rows, torch.ones(4)),
            (-rows, torch.ones(4)),
            batch_size=None,
            device=device,
            generator=generator,
        )

    def predict(self, hypers, params, carry, batch, *, train, generator):
        return batch[0] @ params["w"], carry

    def inner_objective(self, hypers, params, prediction, batch):
        return (
            0.5 * F.mse_loss(prediction, batch[1])
            + 0.5 * (hypers["decay"] * params["w"] ** 2).sum()
        )

    def outer_objective(self, hypers, params, prediction, batch):
        return 0.5 * F.mse_loss(prediction, batch[1])


@all_solves
def test_a_million_decay_rates_need_no_matrix(solve):
    with Largest() as most:
        solver = ready(
            PerWeight(), Implicit(linear_solve=solve, inner_steps=1, inner_optimizer=sgd(0.1))
        )
        solver.step()
        gradient = solver.hypergradient()
    assert most.elements < 10**8
    assert gradient.shape == (10**6,)
    if isinstance(
        solve, CG
    ):  # H = XᵀX/n + D: by Woodbury, H⁻¹ needs a solve of four equations alone
        x, u, w = (
            solver.core.data.train.peek()[0].double(),
            solver.core.search.u0.double(),
            solver.core.weights.detached()["w"].double(),
        )
        D = F.softplus(u)
        valid, labels = solver.core.data.valid.peek()
        v = valid.double().T @ (valid.double() @ w - labels) / 4
        inner = torch.linalg.solve(4 * torch.eye(4).double() + x / D @ x.T, x @ (v / D))
        exact = -torch.sigmoid(u) * w * (v / D - x.T @ inner / D)
        assert relative(gradient.double(), exact) < 1e-4
        assert solver.method.report["iterations"] <= 10


@pytest.mark.parametrize("make", [convolutional, normed])
def test_curvature_through_convolutions_and_norms_is_symmetric(make):
    """Gauss–Newton products go back, forth and back again through the same layers."""
    problem = make()
    solver, generator = Implicit(), torch.Generator().manual_seed(1)
    data = problem.data(CPU, torch.Generator().manual_seed(1))
    solver.build(problem, data, CPU, generator, Services())
    at = pullback(solver)
    for product in (Hessian().at(at), GaussNewton().at(at)):
        p, q = torch.randn(2, len(at.gradient)).double()
        assert abs(p @ product(q) - q @ product(p)) < 1e-11 * product(q).norm() * p.norm()
        assert p @ GaussNewton().at(at)(p) > 0
