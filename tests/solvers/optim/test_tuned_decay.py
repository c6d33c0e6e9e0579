"""A weight decay of the inner optimizer that λ holds, against closed forms and retraining."""

from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.optim import Adam, AdamW

from bilevel import BilevelError, ModuleProblem, Positive, Refused, Space, squared_norm
from bilevel.solvers import (
    CG,
    SAMA,
    SOBA,
    Dense,
    Fixed,
    Implicit,
    PopulationBased,
    Reverse,
    Search,
    SelfTuning,
    Unrolled,
    delta_stn,
)
from tests.support.dense_derivatives import F64, Shifted, close, quadratic
from tests.support.solver_cases import FLAGS, Decayed, ready, set_to, sgd

EXACT = CG(iterations=60, tolerance=1e-13)


def tuned(problem, **domains):
    """Return a problem whose λ also holds weight decays of the optimizer."""
    problem.space = Space(
        **problem.space, **{n: Positive(optimizer="weight_decay", **d) for n, d in domains.items()}
    )
    return problem


def slope(problem, κ):
    """Return the minimum of the decayed quadratic at its initial λ, and ∂w*/∂κ."""
    λ = problem.space["hyper"].initial()
    K = problem.A + κ * torch.eye(5, dtype=F64)
    w = torch.linalg.solve(K, -(problem.B @ λ + problem.d))
    return w, -torch.linalg.solve(K, w)


def of_u(κ):
    """Return dκ/du of a positive number κ = softplus(u)."""
    return -torch.expm1(-torch.tensor(κ, dtype=F64))


# --- a coupled decay is exact ---


@pytest.mark.parametrize("make", [sgd(0.1, momentum=0.9), partial(Adam, lr=0.01)])
def test_implicit_differentiation_in_a_coupled_decay_is_the_closed_form(make):
    κ, problem = 0.4, tuned(quadratic(), decay={"init": 0.4})
    solver = ready(problem, Implicit(linear_solve=EXACT, inner_optimizer=make))
    w, dw = slope(problem, κ)
    set_to(solver.core.weights.leaves[0], w)
    at = w.clone().requires_grad_()
    loss, _ = problem.outer_loss(
        solver.solution().hypers, {"w": at}, {}, solver.core.data.valid.next()
    )
    (outer,) = torch.autograd.grad(loss, at)
    close(solver.hypergradient()[3], outer @ dw * of_u(κ), 1e-9)
    assert solver.method.report["inner_gradient_norm"] < 1e-12


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_the_response_to_a_coupled_decay_tends_to_the_closed_form(flags):
    κ, problem = 0.7, tuned(quadratic(init=(0.5, -0.3, 0.2)), decay={"init": 0.7, "scale": 0.3})
    solver = ready(
        problem,
        SelfTuning(
            **flags,
            response=Dense(),
            tune_scale=flags["centered"],
            scale_optimizer=sgd(0.0),
            inner_optimizer=sgd(0.1, momentum=0.5),
            inner_steps=600,
        ),
    )
    solver.step(warmup=True)
    w, dw = slope(problem, κ)
    close(
        solver.solution().params["w"],
        w,
        1e-3 if flags["centered"] and flags["regularized_w0"] else 0.1,
    )
    if flags["centered"]:  # the curvature of w* in λ is a part of Θ
        close(solver.method.theta.leaves[0].detach()[:, 3], dw * of_u(κ), 0.1)


def test_the_decay_of_a_step_follows_the_hyperparameter():
    problem = tuned(quadratic(), decay={"init": 0.1})
    solver = ready(problem, Implicit(linear_solve=EXACT, inner_optimizer=sgd(0.3), inner_steps=400))
    with torch.no_grad():
        for u in (solver.core.search.u, solver.core.search.u0):
            u[3] = torch.log(torch.expm1(torch.tensor(2.0)))
    solver.step(warmup=True)
    close(solver.solution().params["w"], slope(problem, 2.0)[0], 1e-6)


OPTIMIZERS = {
    "SGD": sgd(0.1, momentum=0.9),
    "Adam": partial(Adam, lr=0.01),
    "AdamW": partial(AdamW, lr=0.01),
    "decoupled NAdam": partial(torch.optim.NAdam, decoupled_weight_decay=True),
}


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_at_a_constant_decay_are_those_of_the_optimizer(make, clip_norm):
    """Also under a schedule, with two groups of weights of which one has its own constant decay."""

    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def runs(solver):
        problem = tuned(Decayed(network), κ={"init": 0.2, "params": "*.weight"})
        options = {
            "inner_optimizer": make,
            "inner_scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
            "clip_norm": clip_norm,
        }
        solver = ready(problem, solver(**options), seed=3)
        for _ in range(3):
            solver.step(warmup=True)
            solver.epoch_ended(None)
        return solver.solution().params

    fixed = runs(Fixed)
    for solver in (Implicit, partial(SelfTuning, tune_scale=False)):
        for name, p in runs(solver).items():
            close(p, fixed[name], 1e-12)


# --- a decoupled decay ---


@pytest.mark.parametrize("make", [AdamW, partial(torch.optim.NAdam, decoupled_weight_decay=True)])
def test_a_decoupled_decay_has_the_slope_of_its_preconditioned_penalty(make):
    """w* = t/(1 + κs) where √v̂ = s ≫ |∇L|, and so dw*/dκ = −s w*/(1 + κs)."""
    κ, noise = 0.1, 4.0
    optimizer = partial(make, lr=8e-3, betas=(0.9, 0.99))
    solver = ready(
        tuned(Shifted(noise), decay={"init": κ}),
        Implicit(linear_solve=EXACT, batches=2, inner_optimizer=optimizer, inner_steps=400),
    )
    set_to(solver.core.weights.leaves[0], torch.tensor(1.4))
    solver.step(warmup=True)
    w = solver.core.weights.leaves[0].item()
    assert w == pytest.approx(2 / (1 + κ * noise), rel=0.05)
    dw = -noise * w / (1 + κ * noise) * float(of_u(κ))
    assert solver.hypergradient()[1].item() == pytest.approx(w * dw, rel=0.05)


@pytest.mark.parametrize("linearize", [True, False])
def test_the_response_descends_the_penalty_at_the_perturbed_decay(linearize):
    β, eps = 0.9, 1e-3
    adamw = partial(AdamW, lr=0.01, betas=(0.9, β), eps=eps)
    problem = tuned(quadratic(), decay={"init": 0.2})
    solver = ready(problem, delta_stn(response=Dense(), inner_optimizer=adamw, linearize=linearize))
    core, method = solver.core, solver.method
    solver.step(warmup=True)
    state = core.weights.optimizer.state[core.weights.leaves[0]]
    p = (state["exp_avg_sq"] / (1 - β ** float(state["step"]))).sqrt() + eps
    w0, batch, losses = core.weights.detached(), core.data.train.peek(), []
    for decay in (core.weight_decay, None):
        core.weight_decay = decay
        core.generator.manual_seed(3)
        losses.append(method.perturbed_loss(w0, {}, batch)[0])
    core.generator.manual_seed(3)
    ε = core.search.perturbation(1, core.generator)
    w, κ = (
        w0["w"] + method.theta.leaves[0] @ ε,
        problem.space.constrain(core.search.u0 + ε)["decay"],
    )
    assert abs(κ - 0.2) > 0.01
    close(losses[0] - losses[1], 0.5 * (p * (κ * w**2 - 0.2 * w0["w"] ** 2)).sum(), 1e-10)


class Regression(ModuleProblem):
    """Least squares on minibatches, whose noise exceeds the mean gradient."""

    def __init__(self, κ):
        draws = torch.Generator().manual_seed(0)
        x = torch.randn(64, 3, generator=draws, dtype=F64)
        truth = torch.tensor([[0.4], [-0.3], [0.2]], dtype=F64)
        y = x @ truth + 2 * torch.randn(64, 1, generator=draws, dtype=F64)
        module = nn.Linear(3, 1, bias=False).double()
        nn.init.zeros_(module.weight)
        space = Space(κ=Positive(init=κ, optimizer="weight_decay"))
        valid = (x[:32], x[:32] @ truth)
        super().__init__(module, space, (x, y), valid, batch_size=8)

    def inner_objective(self, hypers, params, prediction, batch):
        return 0.5 * (prediction - batch[1]).square().mean()

    outer_objective = inner_objective


def retrained(problem, decays, lr, steps=12000, last=8000):
    """Return the mean w of the last steps of AdamW, [decays, 3], on the same batches for each κ."""
    x, y = problem._splits[0]
    κ = torch.tensor(decays, dtype=F64)[:, None]
    w, m, v, total = (torch.zeros(len(decays), 3, dtype=F64) for _ in range(4))
    draws = torch.Generator().manual_seed(5)
    batches = torch.cat([torch.randperm(64, generator=draws) for _ in range(steps // 8)])
    for t, rows in enumerate(batches.split(8), start=1):
        g = (w @ x[rows].T - y[rows].T) @ x[rows] / 8
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w * (1 - lr * κ)
        w = w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        if t > steps - last:
            total = total + w / last
    return total


def test_the_hypergradient_of_adamw_is_that_of_retraining_on_minibatches():
    κ, δ, lr = 0.1, 0.02, 1e-3
    problem = Regression(κ)
    below, w, above = retrained(problem, [κ - δ, κ, κ + δ], lr).split(1)
    solver = ready(
        problem,
        Implicit(
            linear_solve=EXACT,
            inner_optimizer=partial(AdamW, lr=lr),
            inner_steps=1200,
            batches=8,
        ),
    )
    set_to(solver.core.weights.leaves[0], w)
    solver.step(warmup=True)  # for v̂
    set_to(solver.core.weights.leaves[0], w)
    batch = solver.core.data.valid.peek()
    ours = solver.hypergradient(batch)[0] / of_u(κ)
    at = [problem.outer_loss({}, {"weight": each}, {}, batch)[0] for each in (above, below)]
    close(ours, (at[0] - at[1]) / (2 * δ), 0.03)


# --- unrolled ---


@pytest.mark.parametrize("make", [sgd(0.1, momentum=0.5), partial(AdamW, lr=0.05)])
def test_unrolled_differentiates_a_decay_of_selected_weights(make):
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def ended(κ, mode=None):
        problem = tuned(
            Decayed(network),
            first={"init": κ, "params": "0.*"},
            second={"init": 0.3, "params": "2.weight"},
        )
        solver = ready(problem, Unrolled(inner_optimizer=make, restart=True, **(mode or {})))
        core, batch = solver.core, solver.core.data.valid.peek()
        gradient = solver.hypergradient(batch)
        with torch.no_grad():
            loss, _ = core.problem.outer_loss(
                solver.solution().hypers, core.weights.tensors, core.carry, batch
            )
        return loss, gradient

    δ, κ = 1e-5, 0.5
    numeric = (ended(κ + δ)[0] - ended(κ - δ)[0]) / (2 * δ) * of_u(κ)
    names = list(tuned(Decayed(network), first={"init": κ}).space)
    for mode in ({}, {"mode": Reverse(checkpoint=True)}):
        close(ended(κ, mode)[1][names.index("first")], numeric, 1e-4)


# --- names, groups and refusals ---


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({"a": {"init": 1.0, "params": "*.weigth"}}, r"matches no weight \(did you mean `weight`"),
        (
            {"a": {"init": 1.0, "params": "0.*"}, "b": {"init": 1.0, "params": ["*.weight"]}},
            r"selects the weight `0.weight` twice",
        ),
    ],
)
def test_wrong_patterns_are_one_sentence(space, sentence):
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(BilevelError, match=sentence):
        ready(tuned(Decayed(network), **space), Implicit())


def test_patterns_are_for_weight_decay_alone_and_exclude_a_decay_of_all():
    with pytest.raises(BilevelError, match="selects weights for a weight decay"):
        Positive(init=0.1, optimizer="lr", params="*.weight")
    with pytest.raises(BilevelError, match=r"both set the weight_decay.*params="):
        Space(
            a=Positive(init=0.1, optimizer="weight_decay"),
            b=Positive(init=0.1, optimizer="weight_decay", params="*.weight"),
        )


@pytest.mark.parametrize("solver", [SOBA, SAMA])
def test_solvers_without_the_penalty_refuse_and_name_those_with_it(solver):
    with pytest.raises(
        Refused, match=r"`decay`.*is no part of L_T here; tune it with a self-tuning"
    ):
        ready(tuned(quadratic(), decay={"init": 0.1}), solver())


def test_a_decay_without_a_formula_is_refused():
    problem = tuned(Decayed(nn.Linear(4, 3, bias=False)), κ={"init": 0.1})
    with pytest.raises(Refused, match="Adafactor moves the minimum in w by an amount that has no"):
        ready(problem, delta_stn(inner_optimizer=torch.optim.Adafactor))


@pytest.mark.parametrize(("κ", "warns"), [(0.01, False), (0.5, True)])
def test_a_tuned_decay_that_is_too_strong_warns(κ, warns):
    problem = tuned(quadratic(), decay={"init": κ})
    solver = ready(problem, Implicit(inner_optimizer=AdamW))
    set_to(solver.core.weights.leaves[0], torch.ones(5, dtype=F64))
    assert ("weight_decay" in solver.core.warnings()) == warns


def test_black_box_solvers_set_the_decay_of_selected_weights():
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    space = {"a": {"init": 0.5, "params": "*.weight"}}
    for solver in (Search(), PopulationBased(population=2, interval=1.0)):
        ready(tuned(Decayed(network), **space), solver)
        if isinstance(solver, Search):
            groups, λ = solver.core.weights.optimizer.param_groups, solver.hypers["a"]
        else:
            member = solver.members[1]
            solver.explore(member)
            groups = member.weights.optimizer.param_groups
            λ = solver.problem.space.constrain(member.u)["a"]
        by_rank = {g["params"][0].ndim: g["weight_decay"] for g in groups}
        assert by_rank == {1: 0, 2: pytest.approx(float(λ))}


def test_a_run_continues_bit_for_bit():
    def started():
        problem = tuned(Decayed(nn.Linear(4, 3)), κ={"init": 0.2, "params": ["weight"]})
        return ready(problem, delta_stn(inner_optimizer=AdamW))

    first, second = started(), started()
    first.step()
    second.load_state_dict(first.state_dict())
    for split in ("train", "valid"):
        state = getattr(first.core.data, split).state_dict()
        getattr(second.core.data, split).load_state_dict(state)
    first.step()
    second.step()
    ours, theirs = first.solution(), second.solution()
    assert all(torch.equal(p, theirs.params[name]) for name, p in ours.params.items())
    assert torch.equal(ours.hypers["κ"], theirs.hypers["κ"])
    assert float(ours.hypers["κ"]) != pytest.approx(0.2, abs=1e-9)


# --- L2 by pattern ---

PARAMS = {
    "0.weight": torch.full((2, 3), 2.0),
    "0.bias": torch.ones(2),
    "head.weight": torch.ones(1, 2),
}


def test_a_penalty_by_patterns_has_a_coefficient_for_each_group():
    found = squared_norm(PARAMS, {"0.*": torch.tensor(0.5), "head.*": 3.0})
    assert found.item() == 0.5 * (24 + 2) + 3 * 2
    each = squared_norm(PARAMS, {"*.weight": torch.tensor([1.0, 2.0])})
    assert each.tolist() == [26.0, 52.0]


def test_a_vector_of_another_size_names_the_patterns():
    sentence = r"shape \[2\] and must have one entry for each of the 10 entries of w; .*"
    with pytest.raises(
        BilevelError, match=sentence + r"\{'0\*': c\[..., 0\], 'head\*': c\[..., 1\], …\}"
    ):
        squared_norm(PARAMS, torch.ones(2))
    with pytest.raises(BilevelError, match=r"selects the weight `0.weight` twice"):
        squared_norm(PARAMS, {"0.*": 1.0, "*.weight": 1.0})
