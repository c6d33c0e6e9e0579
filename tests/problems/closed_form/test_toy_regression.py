"""Tests of the toy regressions: expected penalties, and the unique map of a linear network."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, vmap

import bilevel
from bilevel import Refused, solvers, squared_norm
from bilevel.problems import Ridge
from bilevel.problems.closed_form import linear_data
from bilevel.problems.closed_form.input_dropout import InputDropout
from bilevel.problems.closed_form.linear_network import LinearNetwork
from bilevel.solvers import CG, Dense, Implicit, Neumann, SelfTuning, Unrolled
from bilevel.solvers.optim.optimized import descend
from tests.support.solver_cases import expected_loss, ready, set_to, sgd

CPU, F64 = torch.device("cpu"), torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- input dropout ---


def dropout_pair(per_feature):
    sampled, expected = (
        InputDropout.synthetic(12, 4, dtype=F64, per_feature=per_feature, expected=expected)
        for expected in (False, True)
    )
    λ = torch.tensor([-2.0, -0.5, 0.3, 1.5] if per_feature else -0.4, dtype=F64)
    return sampled, expected, {"logit_rate": λ}


@pytest.mark.parametrize("per_feature", [False, True])
def test_the_sampled_loss_is_the_expected_one_on_average(per_feature, monkeypatch):
    """The test sums over all masks of four features.

    The loss is a sum over examples, so all share one mask.
    """
    sampled, expected, λ = dropout_pair(per_feature)
    batch, (params, _) = sampled.data(CPU, generator()).train.peek(), sampled.init(generator(1))
    rate = torch.sigmoid(λ["logit_rate"]).expand(4)
    total = 0.0
    for dropped in itertools.product([True, False], repeat=4):
        uniform = torch.tensor(
            [1.0 if yes else 0.0 for yes in dropped], dtype=F64
        )  # kept where below 1 − p
        monkeypatch.setattr(
            torch, "rand", lambda shape, uniform=uniform, **_: uniform.expand(shape)
        )
        probability = torch.where(torch.tensor(dropped), rate, 1 - rate).prod()
        total += probability * sampled.inner_loss(λ, params, {}, batch, None)[0]
    torch.testing.assert_close(
        total, expected.inner_loss(λ, params, {}, batch, None)[0], rtol=1e-12, atol=0
    )
    assert (total - sampled.outer_loss(λ, params, {}, batch)[0]) > 0.01  # of the penalty


@pytest.mark.parametrize("per_feature", [False, True])
def test_masks_follow_each_examples_own_rate(per_feature):
    problem = InputDropout.synthetic(4, 3, dtype=F64, per_feature=per_feature)
    X, w = (
        torch.ones(20_000, 3, dtype=F64),
        {"weight": torch.tensor([[1.0, 10.0, 100.0]], dtype=F64)},
    )
    rates = torch.tensor(
        [[0.1, 0.3, 0.6], [0.5, 0.2, 0.8]] if per_feature else [0.1, 0.6], dtype=F64
    )
    λ = {"logit_rate": torch.logit(rates).repeat_interleave(10_000, 0)}
    output, _ = problem.predict(λ, w, {}, (X, None), train=True, generator=generator())
    for row, rate in zip(
        output.split(10_000), rates if per_feature else rates[:, None].expand(2, 3), strict=True
    ):
        spread = rate / (1 - rate) * w["weight"][0].square()
        assert abs(row.mean() - 111) < 4 * math.sqrt(spread.sum() / 10_000)
        assert row.var() == pytest.approx(spread.sum().item(), rel=0.05)


def test_dropout_is_weight_decay_scaled_by_the_feature():
    """With second moments 1 it is ridge regression with e^λ = p/(1 − p) (Wager et al.)."""
    (X, y), valid, _ = linear_data.synthetic(40, 5, dtype=F64)
    X = X / X.square().mean(0).sqrt()
    λ = torch.tensor(-0.7, dtype=F64)
    dropped = InputDropout((X, y), valid).best_response({"logit_rate": λ})["weight"]
    torch.testing.assert_close(
        dropped, Ridge((X, y), valid).best_response({"log_decay": λ})["weight"]
    )
    stretched = InputDropout((X * torch.arange(1.0, 6.0, dtype=F64), y), valid).best_response(
        {"logit_rate": λ}
    )["weight"]
    torch.testing.assert_close(
        stretched * torch.arange(1.0, 6.0, dtype=F64), dropped
    )  # no scale of a feature matters


def test_the_expected_penalty_of_a_batch_is_its_own():
    problem = InputDropout.synthetic(40, 5, batch_size=8, dtype=F64, expected=True)
    batch, (params, _) = problem.data(CPU, generator()).train.next(), problem.init(generator())
    decays = torch.randn(8, generator=generator(1), dtype=F64)
    each = [
        problem.inner_loss({"logit_rate": decay}, params, {}, batch, None)[0] for decay in decays
    ]
    torch.testing.assert_close(
        problem.inner_loss({"logit_rate": decays}, params, {}, batch, None)[0],
        torch.stack(each).mean(),
    )
    plain = problem.outer_loss({}, params, {}, batch)[0]
    penalty = (
        0.5 * (decays[0].exp() * batch[0].square().mean(0) * params["weight"][0].square()).sum()
    )
    torch.testing.assert_close(each[0], plain + penalty)


def test_a_sampled_rate_is_refused_where_its_derivative_is_needed():
    with pytest.raises(Refused, match="`logit_rate` is sampled"):
        ready(InputDropout.synthetic(), Implicit())
    ready(InputDropout.synthetic(expected=True), Implicit())
    ready(InputDropout.synthetic(per_feature=True), SelfTuning())


def test_self_tuning_finds_the_response_of_sampled_dropout():
    """Θ under sampled masks, averaged over steps, is compared with the closed form.

    At rate zero Θ would be 0.
    """
    problem = InputDropout.synthetic(
        200, 3, noise=0.3, dtype=F64, space={"logit_rate": {"scale": 0.5}}
    )
    solver = ready(
        problem, SelfTuning(response=Dense(), inner_optimizer=sgd(0.3), response_optimizer=sgd(0.2))
    )
    mean, exact = (
        torch.zeros(3, 1, dtype=F64),
        problem.best_response_jacobian({"logit_rate": torch.tensor(-1.0)}),
    )
    for step in range(800):
        solver.method.inner_step(solver.core.data.train.next())
        mean += solver.method.theta.detached()["weight"][0] * (step >= 200) / 600
    assert (mean - exact).norm() < 0.1 * exact.norm()


# --- the linear network ---


def network(**options):
    return LinearNetwork.synthetic(40, 5, condition=20.0, dtype=F64, **options)


@pytest.mark.parametrize("hidden", [[], [1], [6], [4, 3]])
def test_the_prediction_is_the_map_and_its_gradient(hidden):
    problem = network(hidden=hidden)
    params, _ = problem.init(generator(2))
    X, y = batch = problem.data(CPU, generator()).train.peek()
    prediction, _ = problem.predict({}, params, {}, batch, train=True, generator=None)
    module = torch.nn.Sequential(
        *(torch.nn.Linear(W.shape[1], W.shape[0], bias=False) for W in params.values())
    ).double()
    named = {f"{i}.weight": W for i, W in enumerate(params.values())}

    def f(x):
        return functional_call(module, named, x)[0]

    torch.testing.assert_close(prediction["output"], vmap(f)(X))
    torch.testing.assert_close(prediction["gradient"], vmap(grad(f))(X))
    torch.testing.assert_close(problem.linear_map(params), grad(f)(X[0]))
    λ = torch.tensor(0.3, dtype=F64)
    wanted = (
        0.5 * (vmap(f)(X) - y).square().mean()
        + 0.5 * λ.exp() * vmap(grad(f))(X).square().sum(1).mean()
    )
    torch.testing.assert_close(
        problem.inner_loss({"log_penalty": λ}, params, {}, batch, None)[0], wanted
    )


def test_factors_are_not_unique_and_what_is_compared_is():
    problem, λ = network(hidden=[5]), {"log_penalty": torch.tensor(-1.5, dtype=F64)}
    batch, best = problem.data(CPU, generator()).train.peek(), problem.best_response(λ)
    M = torch.eye(5, dtype=F64) + 0.3 * torch.randn(5, 5, generator=generator(), dtype=F64)
    other = {
        "layers.0.weight": M @ best["layers.0.weight"],
        "layers.1.weight": best["layers.1.weight"] @ torch.linalg.inv(M),
    }
    losses = [problem.inner_loss(λ, params, {}, batch, None)[0] for params in (best, other)]
    torch.testing.assert_close(*losses)
    assert (best["layers.0.weight"] - other["layers.0.weight"]).norm() > 0.1
    torch.testing.assert_close(*(problem.linear_map(params) for params in (best, other)))


def test_training_comes_to_the_best_response_of_the_map_from_any_factors():
    problem, λ = network(hidden=[6]), {"log_penalty": torch.tensor(0.0, dtype=F64)}
    batch, maps, factors = problem.data(CPU, generator()).train.peek(), [], []
    for seed in range(2):
        params, _ = problem.init(generator(seed))
        for _ in range(600):
            leaves = {name: W.requires_grad_() for name, W in params.items()}
            gradients = torch.autograd.grad(
                problem.inner_loss(λ, leaves, {}, batch, None)[0], list(leaves.values())
            )
            params = {
                name: (W - 0.2 * g).detach()
                for (name, W), g in zip(leaves.items(), gradients, strict=True)
            }
        maps.append(problem.linear_map(params))
        factors.append(params["layers.0.weight"])
    for w in maps:
        torch.testing.assert_close(w, problem.minimizer(λ), rtol=1e-8, atol=1e-8)
    assert (factors[0] - factors[1]).norm() > 0.1


@pytest.mark.parametrize("λ", [-3.0, 0.0, 2.0])
def test_t8_in_principal_components_the_first_layer_is_gated_row_by_row(λ):
    """A best response has W_1 = diag(gate(λ)) V and W_2 = V w_OLS.

    The gate is gate_i = sigmoid(2 log d_i − log n − λ); L_T has the 1/n.
    """
    problem = network(hidden=[5])
    X, y = batch = problem.data(CPU, generator()).train.peek()
    _, d, V = torch.linalg.svd(X, full_matrices=False)
    ols = V @ torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
    hypers = {"log_penalty": torch.tensor(λ, dtype=F64)}

    def gated(λ):
        gate = torch.sigmoid(2 * torch.log(d) - math.log(len(X)) - λ)
        return {"layers.0.weight": gate[:, None] * V, "layers.1.weight": ols[None]}

    params = gated(hypers["log_penalty"])
    torch.testing.assert_close(problem.linear_map(params), problem.minimizer(hypers))
    leaves = {name: W.requires_grad_() for name, W in params.items()}
    gradients = torch.autograd.grad(
        problem.inner_loss(hypers, leaves, {}, batch, None)[0], list(leaves.values())
    )
    assert max(g.abs().max() for g in gradients) < 1e-12
    slope = jacobian(lambda λ: problem.linear_map(gated(λ)), hypers["log_penalty"])
    torch.testing.assert_close(slope[:, None], problem.best_response_jacobian(hypers))


EXACT = {
    "CG": lambda: Implicit(linear_solve=CG(iterations=30, tolerance=1e-14)),
    "Neumann": lambda: Implicit(linear_solve=Neumann(terms=200, step=0.3)),
    "unrolled": lambda: Unrolled(inner_steps=200, inner_optimizer=sgd(0.3)),
}


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_the_hypergradient_is_unique_though_the_hessian_is_singular(make):
    """Null directions of the Hessian do not change the map, L_V and ∂L_T/∂λ.

    So solves in its range are exact.
    """
    problem = LinearNetwork.synthetic(features=5, condition=5.0, dtype=F64, hidden=[3])
    solver = ready(problem, make())
    λ = problem.space.constrain(solver.core.search.u0)
    for name, W in problem.best_response(λ).items():
        set_to(solver.core.weights.tensors[name], W)
    exact = problem.hypergradient(λ)
    torch.testing.assert_close(
        solver.hypergradient(), exact, rtol=0, atol=1e-8 * exact.norm().item()
    )


@pytest.mark.parametrize("response", [solvers.Structured, Dense])
def test_delta_stn_learns_the_jacobian_of_the_map(response):
    """With a small σ, from the best response, ∂w/∂λ of ŵ is right.

    With one λ a structured response can represent it too.
    """
    problem = network(hidden=[3], space={"log_penalty": {"scale": 0.05, "per_example": False}})
    solver = ready(
        problem,
        SelfTuning(response=response(), response_optimizer=partial(torch.optim.Adam, lr=0.03)),
    )
    λ = problem.space.constrain(solver.core.search.u0)
    for name, W in problem.best_response(λ).items():
        set_to(solver.core.weights.tensors[name], W)
    for _ in range(250):
        descend(expected_loss(solver, solver.core.weights.detached(), order=3), solver.method.theta)
    ours = jacobian(
        lambda offset: problem.linear_map(solver.method.respond(offset)), torch.zeros(1, dtype=F64)
    )
    exact = problem.best_response_jacobian(λ)
    assert (ours - exact).norm() < 0.02 * exact.norm()


# --- data, and what users see ---


def test_real_sets_are_split_and_standardized_by_their_training_split():
    for data, shape in (
        (linear_data.linnerud(dtype=F64), (12, 3)),
        (linear_data.wine(dtype=F64), (106, 12)),
    ):
        X, y = data.train
        assert X.shape == shape
        for column in (*X.T, y):
            assert abs(column.mean()) < 1e-12
            assert abs(column.std() - 1) < 1e-12
        assert len(X) + len(data.valid[0]) + len(data.test[0]) == {3: 20, 12: 178}[X.shape[1]]
    assert not torch.equal(linear_data.wine(0).train[1], linear_data.wine(1).train[1])


@pytest.mark.parametrize(
    "make",
    [
        LinearNetwork.synthetic,
        InputDropout.synthetic,
        lambda: InputDropout.synthetic(per_feature=True, expected=True),
    ],
    ids=["network", "sampled", "expected"],
)
def test_problems_that_are_clean_and_that_every_self_tuning_solver_runs(make):
    report = bilevel.check_problem(
        make(), solvers={"delta_stn": solvers.delta_stn(), "stn": solvers.stn(response=Dense())}
    )
    assert (report.findings, report.refused_by) == ([], {})


def test_the_penalty_of_a_network_is_no_weight_decay():
    problem = network(hidden=[3])
    params, _ = problem.init(generator())
    batch = problem.data(CPU, generator()).train.peek()
    λ = {"log_penalty": torch.tensor(0.0, dtype=F64)}
    penalty = (
        problem.inner_loss(λ, params, {}, batch, None)[0]
        - problem.outer_loss(λ, params, {}, batch)[0]
    )
    assert abs(penalty - 0.5 * squared_norm(params)) > 0.1
