"""Tests of few-shot learning against closed forms and an explicit MAML, in float64."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from bilevel import BilevelError, SolverWarning, check_problem, evaluate, solvers
from bilevel.problems.few_shot.problem import FewShot
from bilevel.problems.few_shot.recipes import sinusoid
from bilevel.problems.few_shot.tasks import Tasks, sinusoids
from bilevel.problems.networks.mlp import MLP
from tests.support.solver_cases import ready, sgd

CPU, F64 = torch.device("cpu"), torch.float64
D, SHOTS, QUERIES, ρ = 3, 2, 4, 0.7
"""Fewer shots than weights: without the pull to φ there would be many w_t."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def lines(count, draws):
    """Return tasks y = a·x + noise with a ~ N(1, I)."""
    x = torch.randn(count, SHOTS + QUERIES, D, generator=draws)
    a = 1 + torch.randn(count, D, 1, generator=draws)
    y = x @ a + 0.1 * torch.randn(count, SHOTS + QUERIES, 1, generator=draws)
    return Tasks(x[:, :SHOTS], y[:, :SHOTS], x[:, SHOTS:], y[:, SHOTS:])


def linear(**options):
    options = {"tasks": 5, "unseen": 6, "proximity": ρ} | options
    return FewShot(lambda: nn.Linear(D, 1, bias=False).double(), lines, **options)


def small(**options):
    """Return a nonlinear network on sinusoids."""
    options = {"tasks": 3, "unseen": 4, "start_seed": 1} | options
    return FewShot(lambda: MLP([1, 5, 1]).double(), sinusoids(shots=4, queries=6), **options)


def best_response(hypers, tasks):
    """Return w_t* = (2 XᵀX/n + ρI)⁻¹ (2 Xᵀy/n + ρφ), [T, D, 1].

    It minimizes ‖Xw − y‖²/n + ½ρ‖w − φ‖².
    """
    X, y, φ = tasks.support_x, tasks.support_y, hypers["initialization"][:, None]
    A = 2 * X.mT @ X / SHOTS + hypers["proximity"] * torch.eye(D, dtype=F64)
    return torch.linalg.solve(A, 2 * X.mT @ y / SHOTS + hypers["proximity"] * φ)


def outer(hypers, tasks):
    return (tasks.query_x @ best_response(hypers, tasks) - tasks.query_y).square().mean()


def truth(solver):
    u = solver.core.search.u0.clone().requires_grad_()
    return torch.autograd.grad(outer(solver.core.problem.space.constrain(u), at_hand(solver)), u)[0]


def at_hand(solver):
    return solver.core.data.train.episodes.now()


def at_best_response(solver):
    hypers = solver.core.problem.space.constrain(solver.core.search.u0)
    w = best_response(hypers, at_hand(solver))
    with torch.no_grad():
        solver.core.weights.tensors["weight"].copy_((w - hypers["initialization"][:, None]).mT)
    return solver


# --- closed forms ---


@pytest.mark.parametrize("space", [{}, {"proximity": {"frozen": False}}], ids=["φ", "φ and ρ"])
def test_implicit_maml_is_exact_at_the_best_response(space):
    def made(iterations):
        solve = solvers.CG(iterations=iterations, tolerance=1e-14)
        return at_best_response(ready(linear(space=space), solvers.Implicit(linear_solve=solve)))

    solver = made(30)
    expected = truth(solver)
    torch.testing.assert_close(solver.hypergradient(), expected, rtol=1e-9, atol=1e-12)
    assert (made(1).hypergradient() - expected).norm() > 1e-3 * expected.norm()


def test_the_meta_gradient_is_the_papers():
    """It is dL_V/dφ = mean over t of (I + H_t/ρ)⁻¹ ∇q_t (Rajeswaran et al., eq. 6)."""
    solver = ready(linear(), solvers.Unrolled())
    tasks, hypers = at_hand(solver), solver.core.problem.space.constrain(solver.core.search.u0)
    w = best_response(hypers, tasks)
    slopes = 2 * tasks.query_x.mT @ (tasks.query_x @ w - tasks.query_y) / QUERIES
    H = 2 * tasks.support_x.mT @ tasks.support_x / SHOTS
    expected = torch.linalg.solve(torch.eye(D, dtype=F64) + H / ρ, slopes).mean(0)[:, 0]
    torch.testing.assert_close(truth(solver), expected)


def test_training_ends_at_the_best_response():
    solver = ready(linear(), solvers.Fixed(inner_optimizer=sgd(0.1)))
    for _ in range(120):
        solver.step()
    hypers = solver.solution().hypers
    w = hypers["initialization"] + solver.core.weights.detached()["weight"][:, 0]
    torch.testing.assert_close(w, best_response(hypers, at_hand(solver))[..., 0], rtol=0, atol=1e-9)


def test_unrolling_for_longer_comes_to_the_implicit_one():
    """The K-step hypergradient lacks (I − ηA)^K of the response.

    w_K has the same error, so it is at most (1 − ηρ)^K, twice.
    """
    η, errors = 0.1, {}
    for K in (10, 20, 80):
        solver = ready(
            linear(), solvers.Unrolled(restart=True, inner_steps=K, inner_optimizer=sgd(η))
        )
        expected = truth(solver)
        errors[K] = ((solver.hypergradient() - expected).norm() / expected.norm()).item()
        assert errors[K] < 10 * (1 - η * ρ) ** K
    assert errors[10] > 0.05
    assert errors[80] < 0.1 * errors[20]


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_maml_is_unrolling_from_the_offset_zero(K, rho):
    """The truth is K gradient steps on w_t from φ, written for one task at a time."""
    α = 0.05
    problem = small(proximity=rho)
    solver = ready(problem, solvers.Unrolled(restart=True, inner_steps=K, inner_optimizer=sgd(α)))
    tasks, network = at_hand(solver), MLP([1, 5, 1]).double()
    φ = solver.core.search.u0.clone().requires_grad_()
    start = problem.initialization({"initialization": φ})
    total = 0.0
    for t in range(3):
        w = dict(start)
        for _ in range(K):
            fit = (
                (torch.func.functional_call(network, w, (tasks.support_x[t],)) - tasks.support_y[t])
                .square()
                .mean()
            )
            gradients = torch.autograd.grad(fit, list(w.values()), create_graph=True)
            gradients = [
                g + rho * (w[name] - start[name]) for g, name in zip(gradients, w, strict=True)
            ]
            w = {name: p - α * g for (name, p), g in zip(w.items(), gradients, strict=True)}
        total = (
            total
            + (torch.func.functional_call(network, w, (tasks.query_x[t],)) - tasks.query_y[t])
            .square()
            .mean()
            / 3
        )
    expected = torch.autograd.grad(total, φ)[0]
    torch.testing.assert_close(solver.hypergradient(), expected, rtol=1e-9, atol=1e-12)
    first_order = torch.autograd.grad(
        problem.outer_loss(
            problem.space.constrain(φ), solver.core.weights.detached(), {}, tasks.queries()
        )[0],
        φ,
    )[0]
    assert (first_order - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("name", ["SAMA", "SOBA", "Penalty", "implicit_identity"])
def test_cheaper_directions_descend(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        solver = at_best_response(ready(linear(), getattr(solvers, name)()))
        for _ in range(30):
            solver.step(warmup=True)
        assert torch.cosine_similarity(solver.hypergradient(), truth(solver), dim=0) > 0.3


# --- unseen tasks ---


def test_adaptation_is_gradient_descent_on_each_task_by_itself():
    problem, α = small(proximity=0.3, adaptation_steps=3, adaptation_lr=0.05), 0.05
    hypers = problem.space.constrain(problem.space.init(F64))
    batch, network = problem.data(CPU, generator()).test.peek(), MLP([1, 5, 1]).double()
    with torch.no_grad():
        path, _ = problem.predict(hypers, {}, {}, batch, train=False, generator=None)
        metrics = problem.metrics(hypers, {}, path, batch)
    assert path.shape == (4, 4, 6, 1)
    for t in range(4):
        start = problem.initialization(hypers)
        w = {name: p.clone().requires_grad_() for name, p in start.items()}
        for step in range(4):
            outputs = torch.func.functional_call(network, w, (batch["x"][t],)).detach()
            torch.testing.assert_close(path[t, step], outputs)
            error = (outputs - batch["y"][t]).square().mean()
            if step in (0, 1):
                torch.testing.assert_close(metrics[f"mse_{step}"][t], error)
            fit = (
                (
                    torch.func.functional_call(network, w, (batch["support_x"][t],))
                    - batch["support_y"][t]
                )
                .square()
                .mean()
            )
            loss = fit + 0.15 * sum((w[name] - start[name]).square().sum() for name in w)
            gradients = torch.autograd.grad(loss, list(w.values()))
            w = {
                n: (p - α * g).detach().requires_grad_()
                for (n, p), g in zip(w.items(), gradients, strict=True)
            }
        torch.testing.assert_close(metrics["loss"][t], error)
    assert set(metrics) == {"loss", "mse_0", "mse_1"}


def test_meta_training_helps_tasks_that_it_has_not_seen():
    """The best φ is near the mean task, 1."""
    problem = linear(fresh_tasks=True, tasks=20, unseen=50, adaptation_lr=0.05)
    outer_optimizer = partial(torch.optim.Adam, lr=0.1)
    solver = ready(
        problem,
        solvers.Unrolled(
            restart=True, inner_steps=2, inner_optimizer=sgd(0.05), outer_optimizer=outer_optimizer
        ),
    )
    before = evaluate(problem, solver.solution(), solver.core.data.test)
    for _ in range(60):
        solver.step()
    after = evaluate(problem, solver.solution(), solver.core.data.test)
    assert after["loss"] < 0.8 * before["loss"]
    assert (solver.solution().hypers["initialization"] - 1).abs().max() < 0.35


# --- streams ---


@pytest.mark.parametrize("fresh", [True, False])
def test_tasks_last_for_a_round(fresh):
    data = linear(fresh_tasks=fresh).data(CPU, generator())
    first = [data.train.next()["x"] for _ in range(3)]
    assert all(torch.equal(x, first[0]) for x in first)
    tasks = data.train.episodes.now()
    assert torch.equal(tasks.support_x, first[0])
    for _ in range(2):  # two outer steps on one round
        assert torch.equal(data.valid.next()["x"], tasks.query_x)
    assert torch.equal(next(data.train.once())["x"], first[0])  # w still belongs to them
    assert torch.equal(data.train.next()["x"], first[0]) != fresh
    assert (data.train.examples, data.valid.examples) == (20, 10)


def test_evaluation_is_on_other_tasks_and_draws_nothing():
    data = linear(fresh_tasks=True).data(CPU, generator())
    valid, test = (next(split.once()) for split in (data.valid, data.test))
    assert len(next(data.valid.once(limit=2))["x"]) == 2
    assert not torch.equal(valid["x"], test["x"])
    data.train.next()
    queries = data.valid.peek()
    assert "support_x" not in queries
    assert torch.equal(data.valid.next()["x"], queries["x"])
    assert torch.equal(next(data.valid.once())["x"], valid["x"])
    assert data.valid.examples == 5
    again = linear(fresh_tasks=True).data(
        CPU, generator(8)
    )  # another run: other tasks to learn from, the same to be judged by
    assert torch.equal(next(again.test.once())["x"], test["x"])
    assert not torch.equal(again.train.peek()["x"], data.train.peek()["x"])


def test_a_stream_goes_on_where_its_state_was_taken():
    one, other = (linear(fresh_tasks=True).data(CPU, generator(seed)) for seed in (1, 2))

    def draw(data, rounds):
        return [
            part for _ in range(rounds) for part in (data.train.next()["x"], data.valid.next()["y"])
        ]

    draw(one, 3)
    for mine, theirs in zip(other, one, strict=True):
        mine.load_state_dict(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(draw(one, 3), draw(other, 3), strict=True))
    assert one.valid.examples == other.valid.examples


def test_sinusoids_are_finn_and_colleagues():
    tasks = sinusoids(shots=5, queries=50)(2000, generator())
    assert [tuple(t.shape[1:]) for t in tasks] == [(5, 1), (5, 1), (50, 1), (50, 1)]
    assert -5 <= tasks.query_x.min() < -4.9
    assert 4.9 < tasks.query_x.max() <= 5
    # amplitude and phase of every task by least squares on sin x and cos x, which knows neither
    x, y = tasks.query_x.double(), tasks.query_y.double()
    fitted = torch.linalg.lstsq(torch.cat([torch.sin(x), torch.cos(x)], -1), y)
    a, b = fitted.solution[..., 0].unbind(1)
    amplitude, phase = torch.hypot(a, b), torch.atan2(-b, a)
    assert 0.0999 < amplitude.min() < 0.2
    assert 4.9 < amplitude.max() < 5.0001
    assert amplitude.mean() == pytest.approx(2.55, abs=0.1)
    assert -1e-4 < phase.min() < 0.1
    assert 3.0 < phase.max() < math.pi + 1e-4


# --- solvers and errors ---


@pytest.mark.parametrize("fresh", [True, False])
def test_a_problem_without_errors_that_gradient_based_solvers_tune(fresh):
    known = {
        "implicit_cg": solvers.implicit_cg(),
        "implicit_identity": solvers.implicit_identity(),
        "unrolled": solvers.Unrolled(restart=True),
        "sama": solvers.SAMA(),
        "soba": solvers.SOBA(),
        "penalty": solvers.Penalty(),
        "delta_stn": solvers.delta_stn(),
    }
    report = check_problem(small(fresh_tasks=fresh), known)
    assert report.ok
    assert report.refused_by == {}
    assert [finding.level for finding in report.findings] == [
        "note"
    ]  # tasks and their weights have one order


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tasks": 0}, "tasks=0 must be a whole number of at least 1"),
        ({"unseen": 1.5}, "unseen=1.5 must be a whole number"),
        ({"adaptation_steps": 0}, "adaptation_steps=0 must be a whole number"),
        ({"adaptation_lr": -0.1}, "adaptation_lr=-0.1 must be positive"),
        ({"shots": 0}, "shots=0 must be a whole number of at least 1"),
        ({"queries": -1}, "queries=-1 must be a whole number"),
        ({"proximity": -1.0}, "must not be below"),
    ],
)
def test_bad_arguments_are_one_sentence(options, sentence):
    with pytest.raises(BilevelError, match=sentence):
        sinusoid(**options)


def test_a_network_with_buffers_is_refused():
    with pytest.raises(BilevelError, match="Sequential has buffers, and tasks cannot share them"):
        FewShot(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), lines)


def test_the_start_follows_from_its_seed_alone():
    state = torch.get_rng_state()
    one, two, other = (small(start_seed=seed).space.init(F64) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
