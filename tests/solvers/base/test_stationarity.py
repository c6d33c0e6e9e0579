"""Warnings about a w that does not come near a minimum of L_T, and about a response of noise."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bilevel import ModuleProblem, Positive, Space, squared_norm
from bilevel.problems import Quadratic, Ridge
from bilevel.solvers import (
    SAMA,
    SOBA,
    Dense,
    FirstOrder,
    Penalty,
    Unrolled,
    centered_stn,
    delta_stn,
    stn,
)
from bilevel.solvers.response.settled import FIRST, Settled
from tests.support.solver_cases import ready

SOLVERS = {
    "delta_stn": delta_stn,
    "stn": stn,
    "centered_stn": centered_stn,
    "unrolled": Unrolled,
    "sama": SAMA,
}


def sgd(rate):
    return partial(torch.optim.SGD, lr=rate)


def trained(problem, make, rate, rounds=20):
    solver = ready(problem, make(inner_optimizer=sgd(rate), inner_steps=5))
    metrics = {}
    for _ in range(rounds):
        metrics = {name: float(value) for name, value in solver.step().items()}
    return solver.warnings(metrics)


class Unbounded(ModuleProblem):
    """L_T is linear in w, so it has no minimum."""

    slope = 1.0

    def inner_objective(self, hypers, params, prediction, batch):
        return -self.slope * prediction.mean() + 1e-6 * (hypers["decay"] * params["weight"].sum())

    def outer_objective(self, hypers, params, prediction, batch):
        return F.mse_loss(prediction, batch[1])


class Steep(Unbounded):
    slope = 10.0


class Logistic(ModuleProblem):
    def inner_objective(self, hypers, params, prediction, batch):
        return self.outer_objective(hypers, params, prediction, batch) + 0.5 * (
            hypers["decay"] * squared_norm(params)
        )

    def outer_objective(self, hypers, params, prediction, batch):
        return F.binary_cross_entropy_with_logits(prediction, (batch[1] > 0).to(prediction))


def module_problem(kind):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, generator=draws).abs()
    y = torch.randn(16, 1, generator=draws)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Linear(3, 1, bias=False)
    nn.init.constant_(module.weight, 0.5)
    space = Space(decay=Positive(init=0.1, per_example=False))
    return kind(module, space, (x, y), (x, y))


PROBLEMS = {
    "ridge": Ridge.synthetic,
    "quadratic": partial(Quadratic.random, seed=1),
    "logistic": partial(module_problem, Logistic),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_rate_that_trains_nothing_gives_a_warning_with_the_numbers(name, problem):
    found = trained(PROBLEMS[problem](), SOLVERS[name], 1e-9)
    assert "after 100 inner steps, L_T = " in found["stationarity"]
    assert "runner.warmup_epochs" in found["stationarity"]
    assert "unbounded" not in found


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_rate_that_trains_gives_none(name, problem):
    found = trained(PROBLEMS[problem](), SOLVERS[name], 0.05)
    assert not {"stationarity", "unbounded", "noise"} & found.keys()


@pytest.mark.parametrize("kind", [Unbounded, Steep])
@pytest.mark.parametrize("name", [*SOLVERS, "penalty", "first_order"])
def test_an_objective_without_a_lower_bound_gives_a_warning(name, kind):
    make = {**SOLVERS, "penalty": Penalty, "first_order": FirstOrder}[name]
    if name == "first_order":
        kind = type("Direct", (kind,), {"outer_objective": _direct})
    found = trained(module_problem(kind), make, 0.05 / kind.slope)
    assert "after 100 inner steps, L_T = -" in found["unbounded"]
    assert "bound it" in found["unbounded"]


def _direct(self, hypers, params, prediction, batch):
    return F.mse_loss(prediction, batch[1]) + hypers["decay"].mean()


def test_checks_become_rare_since_initial_weights_may_be_slow_to_make():
    problem, calls = Ridge.synthetic(), []
    solver = ready(problem, SAMA(inner_optimizer=sgd(0.05), inner_steps=10))
    init = problem.init
    problem.init = lambda generator: calls.append(solver.inner_count) or init(generator)
    for _ in range(45):
        solver.step()
        solver.warnings({})
    assert calls == [50, 100, 200, 400]


def test_soba_is_checked_too():
    solver = ready(Ridge.synthetic(), SOBA(inner_optimizer=sgd(1e-9)))
    for _ in range(60):
        solver.step()
    assert "stationarity" in solver.warnings({})


def test_a_restarted_unroll_assumes_no_minimum():
    make = partial(Unrolled, restart=True)
    assert "stationarity" not in trained(Ridge.synthetic(), make, 1e-9)


def test_noise_is_told_from_growth_and_from_a_constant():
    draws = torch.Generator().manual_seed(0)

    def found(theta_at):
        settled = Settled()
        for n in range(1, 2 * FIRST + 1):
            settled.round_ended([theta_at(n)])
        return settled.warnings("SelfTuning")

    fixed = torch.randn(50, generator=draws)
    noise = lambda: torch.randn(50, generator=draws)  # noqa: E731
    assert "mostly noise" in found(lambda n: noise())["noise"]
    assert "mostly noise" in found(lambda n: 0.5 * fixed + noise())["noise"]
    assert not found(lambda n: fixed)
    assert not found(lambda n: n * fixed)
    assert not found(lambda n: fixed + 0.2 * noise())
    walk = [torch.zeros(50)]
    for _ in range(2 * FIRST):
        walk.append(walk[-1] + noise())
    assert not found(walk.__getitem__)


def test_a_dense_response_is_watched_and_its_record_is_saved():
    problem = Quadratic.random(seed=1)
    solver = ready(problem, stn(response=Dense(), inner_optimizer=sgd(0.05), inner_steps=1))
    for _ in range(FIRST):
        solver.step()
    assert solver.method.settled.rounds == FIRST
    again = Settled()
    again.load_state_dict(solver.state_dict()["method"]["settled"], torch.device("cpu"))
    assert again.rounds == FIRST
    assert again.change
    assert all(map(torch.equal, again.change, solver.method.settled.change))
    assert ready(Ridge.synthetic(), stn()).method.settled is None
