"""Weight decay of the inner optimizer is a part of L_T, against closed forms and dense matrices."""

from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.optim import SGD, Adam, AdamW

from bilevel import Refused, Space
from bilevel.problems import Quadratic
from bilevel.solvers import (
    CG,
    SOBA,
    Dense,
    FirstOrder,
    Fixed,
    GaussNewton,
    Hessian,
    Implicit,
    Penalty,
    SelfTuning,
    Unrolled,
    delta_stn,
)
from bilevel.solvers.optim.optimized import Optimized
from bilevel.solvers.optim.weight_decay import WeightDecay
from tests.support.dense_derivatives import (
    F64,
    Noisy,
    Shifted,
    close,
    dense,
    flat,
    quadratic,
    truth,
)
from tests.support.solver_cases import FLAGS, Decayed, ready, set_to, sgd

EXACT = CG(iterations=60, tolerance=1e-13)


def decayed(problem, κ):
    """Return the joint quadratic whose L_T has the penalty too."""
    coefficients = [getattr(problem, name) for name in ("B", "C", "d", "e", "M", "w_bar", "P")]
    A = problem.A + κ * torch.eye(len(problem.d), dtype=F64)
    init = {"hyper": {"init": problem.space["hyper"].init}}
    return Quadratic(A, *coefficients, problem.lambda_bar, space=init)


def grouped(make, *decays, **options):
    """Return an optimizer with a weight decay for matrices and one for all other weights."""

    def made(params):
        params = list(params)
        parts = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
        return make(
            [{"params": p, "weight_decay": κ} for p, κ in zip(parts, decays, strict=True)],
            **options,
        )

    return made


COUPLED = {
    "SGD, 0.01": (sgd(0.1, weight_decay=0.01), 0.01),
    "SGD, 0.5": (sgd(0.1, momentum=0.9, dampening=0.5, weight_decay=0.5), 0.5),
    "Nesterov": (sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.05), 0.05),
    "fused SGD": (sgd(0.1, fused=True, weight_decay=0.2), 0.2),
    "Adam": (partial(Adam, lr=0.01, weight_decay=0.3), 0.3),
    "foreach Adam": (partial(Adam, lr=0.01, foreach=True, amsgrad=True, weight_decay=0.3), 0.3),
    "RMSprop": (partial(torch.optim.RMSprop, centered=True, weight_decay=0.1), 0.1),
    "NAdam": (partial(torch.optim.NAdam, weight_decay=0.1), 0.1),
    "Adagrad": (partial(torch.optim.Adagrad, weight_decay=0.1), 0.1),
    "ASGD": (partial(torch.optim.ASGD, weight_decay=0.1, lambd=0.05), 0.15),
    "one κ for all": (grouped(SGD, 0.2, 0.2, lr=0.1), 0.2),
}


@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()])
@pytest.mark.parametrize(("optimizer", "κ"), COUPLED.values(), ids=COUPLED)
def test_implicit_differentiation_at_the_decayed_minimum_is_the_closed_form(
    optimizer, κ, curvature
):
    true = decayed(quadratic(), κ)
    solver = ready(
        quadratic(),
        Implicit(linear_solve=EXACT, curvature=curvature, inner_optimizer=optimizer),
    )
    set_to(solver.core.weights.leaves[0], true.best_response(solver.solution().hypers)["w"])
    close(solver.hypergradient(), truth(true), 1e-10)
    assert solver.method.report["inner_gradient_norm"] < 1e-12
    assert not torch.allclose(truth(true), truth(quadratic()), rtol=1e-3)


@pytest.mark.parametrize("κ", [0.02, 0.3])
def test_training_with_weight_decay_ends_where_the_derivative_is_taken(κ):
    """With κ = 0.02 the case of the audit: hypergradients of trained weights, not of a set w."""
    true = truth(decayed(quadratic(), κ))
    optimizer = sgd(0.5, momentum=0.5, weight_decay=κ)
    for solver in (
        Implicit(linear_solve=EXACT, inner_optimizer=optimizer, inner_steps=150),
        Unrolled(inner_optimizer=optimizer, inner_steps=150),
        SOBA(inner_optimizer=optimizer),
    ):
        ready(quadratic(), solver)
        for _ in range(300 // solver.inner_steps):
            solver.step(warmup=True)
        close(solver.hypergradient(), true, 1e-6)
        assert not solver.core.warnings()


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_the_response_tends_to_that_of_the_decayed_minimum(flags):
    """Θ → −(A + κI)⁻¹B, with momentum and without a decay of Θ itself."""
    problem, κ = quadratic(init=(0.5, -0.3, 0.2)), 0.7
    optimizer = sgd(0.1, momentum=0.5, weight_decay=κ)
    solver = ready(
        problem,
        SelfTuning(
            **flags,
            response=Dense(),
            tune_scale=False,
            inner_optimizer=optimizer,
            inner_steps=600,
        ),
    )
    solver.step(warmup=True)
    true = decayed(problem, κ)
    theta = solver.method.theta.leaves[0].detach()
    close(theta, -torch.linalg.solve(true.A, true.B), 1e-4)
    close(solver.hypergradient(), truth(true), 1e-3)


def test_each_group_of_parameters_has_its_own_decay():
    decays = (2.0, 0.5)
    problem = Noisy()
    implicit = ready(
        problem, Implicit(linear_solve=EXACT, inner_optimizer=grouped(SGD, *decays, lr=0.1))
    )
    D = flat(torch.full_like(p, decays[p.ndim <= 1]) for p in implicit.core.weights.leaves)
    gradient, H, cross, outer_gradient, direct = dense(implicit)
    q = -torch.linalg.solve(H + D.diag(), outer_gradient)
    close(implicit.hypergradient(), direct + cross.T @ q, 1e-9)
    w = flat(implicit.core.weights.leaves)
    close(implicit.method.report["inner_gradient_norm"], (gradient + D * w).norm(), 1e-10)

    soba = ready(problem, SOBA(inner_optimizer=grouped(SGD, *decays, lr=0.1)))
    soba.method.adjoint = q
    at = soba.method.directions(soba.core.data.train.peek(), soba.core.data.valid.peek())
    assert at.metrics["residual"] < 1e-10
    close(at.u, direct + cross.T @ q, 1e-9)


@pytest.mark.parametrize("decays", [(0.3, 0.0), (0.1, 0.1)])
def test_the_response_descends_the_penalty_of_each_group(decays):
    """Per-example weights, against the penalty of dense weights, one for each example."""
    problem = Decayed(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    plain = ready(problem, delta_stn(inner_optimizer=sgd(0.1)), away=0.5)
    solver = ready(problem, delta_stn(inner_optimizer=grouped(SGD, *decays, lr=0.1)), away=0.5)
    core, losses = solver.core, []
    for each in (plain, solver):
        each.core.generator.manual_seed(3)
        w0 = each.core.weights.detached()
        losses.append(each.method.perturbed_loss(w0, {}, each.core.data.train.peek())[0])
    core.generator.manual_seed(3)
    noise, w0 = core.search.perturbation(8, core.generator), core.weights.detached()
    params = solver.method.response.weights(solver.method.theta.tensors, w0, noise, tangent=False)
    penalty = sum(
        decays[p.ndim <= 1] * (p.dense().square().sum() / 8 - w0[name].square().sum())
        for name, p in params.items()
    )
    close(losses[1] - losses[0], 0.5 * penalty, 1e-10)
    assert all(g["weight_decay"] == 0 for g in solver.method.theta.optimizer.param_groups)


@pytest.mark.parametrize("κ", [0.05, 0.5])
def test_the_penalty_method_follows_the_decayed_minimum(κ):
    true = truth(decayed(quadratic(), κ))
    errors = []
    for weight in (100.0, 1000.0):
        solver = ready(
            quadratic(),
            Penalty(weight=weight, inner_optimizer=sgd(0.5, weight_decay=κ), inner_steps=2000),
        )
        metrics = solver.step(warmup=True)
        assert not solver.warnings({"inner_gap": float(metrics.get("inner_gap", 0.0))})
        errors.append(float((solver.hypergradient() - true).norm() / true.norm()))
    assert errors[0] < 0.2
    assert errors[1] < 0.15 * errors[0]


# --- AdamW ---


@pytest.mark.parametrize(
    "make",
    [
        AdamW,
        partial(AdamW, amsgrad=True),
        partial(Adam, decoupled_weight_decay=True),
        partial(torch.optim.NAdam, decoupled_weight_decay=True),
    ],
    ids=["AdamW", "amsgrad", "decoupled Adam", "decoupled NAdam"],
)
def test_a_decoupled_decay_is_a_penalty_with_the_preconditioner(make):
    """w* = λ/(1 + κs) where √v̂ = s ≫ |∇L|, and so dw*/dλ = 1/(1 + κs)."""
    κ, noise = 0.1, 4.0
    optimizer = partial(make, lr=8e-3, weight_decay=κ)
    slope = 1 / (1 + κ * noise)
    solver = ready(
        Shifted(noise),
        Implicit(linear_solve=EXACT, inner_optimizer=optimizer, batches=2, inner_steps=1200),
    )
    set_to(solver.core.weights.leaves[0], torch.tensor(1.3))
    solver.step(warmup=True)
    w = solver.core.weights.leaves[0].item()
    assert w == pytest.approx(2 * slope, rel=0.03)
    assert solver.hypergradient().item() == pytest.approx(w * slope, rel=0.02)
    assert not solver.core.warnings()


def test_the_response_descends_the_penalty_of_a_decoupled_decay():
    κ, β, eps = 0.2, 0.9, 1e-3
    adamw = partial(AdamW, lr=0.01, weight_decay=κ, betas=(0.9, β), eps=eps)
    solver = ready(quadratic(), delta_stn(response=Dense(), inner_optimizer=adamw))
    core, method = solver.core, solver.method
    solver.step(warmup=True)
    monitored = core.weights.optimizer.state[core.weights.leaves[0]]
    square, steps = monitored["exp_avg_sq"], float(monitored["step"])
    assert steps == 5
    c = κ * ((square / (1 - β**steps)).sqrt() + eps)
    w0, batch = core.weights.detached(), core.data.train.peek()
    losses = []
    for decay in (core.weight_decay, None):
        core.weight_decay = decay
        core.generator.manual_seed(3)
        losses.append(method.perturbed_loss(w0, {}, batch)[0])
    core.generator.manual_seed(3)
    w = w0["w"] + method.theta.leaves[0] @ core.search.perturbation(1, core.generator)
    close(losses[0] - losses[1], 0.5 * (c * (w**2 - w0["w"] ** 2)).sum(), 1e-10)
    (pushed,) = torch.autograd.grad(losses[0] - losses[1], method.theta.leaves)
    assert pushed.abs().max() > 0.01
    assert all(group["weight_decay"] == 0 for group in method.theta.optimizer.param_groups)


def test_a_decoupled_decay_before_the_first_step_is_none():
    solver = ready(quadratic(), Implicit(linear_solve=EXACT, inner_optimizer=AdamW))
    assert solver.core.weight_decay.coefficients() == [0.0]
    gradient, *_ = dense(solver)
    close(solver.method.initial_norm, gradient.norm(), 1e-12)


@pytest.mark.parametrize(("κ", "warns"), [(0.01, False), (0.5, True)])
def test_a_decoupled_decay_that_is_too_strong_warns(κ, warns):
    solver = ready(quadratic(), Implicit(inner_optimizer=partial(AdamW, weight_decay=κ)))
    set_to(solver.core.weights.leaves[0], torch.ones(5, dtype=F64))
    found = solver.core.warnings()
    assert ("weight_decay" in found) == warns
    if warns:
        assert "weight_decay · max |w| = 0.5 is above 0.3" in found["weight_decay"]


# --- refusals ---


class Shrinking(SGD):
    """An optimizer of somebody else, with a decay of its own."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1 - group["weight_decay"])
                if p.grad is not None:
                    p.data.add_(p.grad.sign(), alpha=-group["lr"])


REFUSED = {
    "Adafactor": torch.optim.Adafactor,
    "RAdam": partial(torch.optim.RAdam, decoupled_weight_decay=True),
    "Muon": torch.optim.Muon,
    "of somebody else": partial(Shrinking, lr=0.1),
}


class Matrix(Decayed):
    """A network with one matrix, as Muon takes it."""

    def __init__(self):
        super().__init__(nn.Linear(4, 3, bias=False))


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_a_decay_without_a_formula_is_refused_where_the_minimum_counts(make):
    for solver in (Implicit, SOBA, SelfTuning):
        with pytest.raises(Refused, match=r"inner_optimizer\.weight_decay=0\.1 of .* no formula"):
            ready(Matrix(), solver(inner_optimizer=partial(make, weight_decay=0.1)))
        remedy = ready(Matrix(), solver(inner_optimizer=partial(make, weight_decay=0.0)))
        assert remedy.core.weight_decay is None
        remedy.step()
    ready(Matrix(), Fixed(inner_optimizer=partial(make, weight_decay=0.1))).step()


@pytest.mark.parametrize(
    "make",
    [
        partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
        partial(SGD, lr=0.0),
        Adam,
        partial(AdamW, weight_decay=0.0),
        torch.optim.Adafactor,
        torch.optim.Rprop,
        grouped(SGD, 0.0, 0.0, lr=0.1),
    ],
)
def test_without_weight_decay_there_is_no_penalty(make):
    tensors = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    assert WeightDecay.of(Optimized(tensors, make), Space(), lambda: torch.zeros(0)) is None


def test_weight_decay_of_the_outer_optimizer_warns():
    """First-order descent alone does not ask for the decay of w, which is no part of ∂_λ L_V."""
    outer = partial(AdamW, lr=0.01)
    solver = ready(quadratic(), FirstOrder(outer_optimizer=outer, inner_optimizer=AdamW))
    assert list(solver.warnings({})) == ["outer_weight_decay"]
    kept = ready(quadratic(), FirstOrder(outer_optimizer=partial(outer, weight_decay=0.0)))
    assert not kept.warnings({})
