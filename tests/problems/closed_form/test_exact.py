"""Tests of the exact regret and hypergradient of problems with closed forms, in float64."""

import copy
import math

import pytest
import torch

from bilevel import BilevelError
from bilevel.problems import ElasticNet, Quadratic, Ridge
from bilevel.problems.closed_form.input_dropout import InputDropout
from bilevel.problems.closed_form.linear_network import LinearNetwork
from bilevel.problems.closed_form.linear_regression import Linear

CPU, F64 = torch.device("cpu"), torch.float64

PROBLEMS = {
    "quadratic": lambda **options: Quadratic.random(6, 3, condition=30.0, seed=1, **options),
    "quadratic with a direct term": lambda **options: Quadratic.random(
        6, 3, seed=2, direct=0.7, **options
    ),
    "quadratic with more hyperparameters than weights": lambda **options: Quadratic.random(
        2, 4, seed=2, **options
    ),
    "ridge": lambda **options: Ridge.synthetic(40, 5, condition=20.0, **options),
    "linear network": lambda **options: LinearNetwork.synthetic(40, 5, condition=20.0, **options),
    "input dropout": lambda **options: InputDropout.synthetic(40, 5, condition=20.0, **options),
    "elastic net": lambda **options: ElasticNet.synthetic(60, 10, 100.0, active=5, **options),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=PROBLEMS)
def make(request):
    return PROBLEMS[request.param]


def draws(problem, count=20, seed=3):
    return [
        problem.space.constrain(u)
        for u in torch.randn(count, problem.space.numel, generator=generator(seed), dtype=F64)
    ]


def test_regret_is_the_loss_beyond_the_optimums(make):
    problem = make(dtype=F64)
    batch, best = problem.data(CPU, generator()).valid.peek(), problem.optimum()

    def loss(λ):
        return problem.outer_loss(λ, problem.best_response(λ), {}, batch)[0]

    for λ in draws(problem):
        exact = problem.exact(λ)
        torch.testing.assert_close(exact["regret"], loss(λ) - loss(best), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(exact["hypergradient_norm"], problem.hypergradient(λ).norm())
        assert exact["regret"] > -1e-12


def test_there_is_none_at_the_optimum(make):
    problem = make(dtype=F64)
    exact = problem.exact(problem.optimum())
    assert abs(exact["regret"]) < 1e-12
    assert exact["hypergradient_norm"] < 1e-9


def test_near_the_optimum_regret_is_not_below_zero(make):
    problem = make(dtype=F64)
    best = problem.space.unconstrain(problem.optimum())
    for scale in (1e-3, 1e-6, 1e-9):
        for direction in torch.randn(5, len(best), generator=generator(), dtype=F64):
            exact = problem.exact(problem.space.constrain(best + scale * direction))
            assert exact["regret"] > -1e-12
            assert exact["regret"] < 1e4 * scale**2 + 1e-12


def test_of_a_problem_in_single_precision_it_is_double(make):
    problem = make()
    λ = problem.space.constrain(
        torch.randn(problem.space.numel, generator=generator()).requires_grad_()
    )
    exact = problem.exact(λ)
    assert {value.dtype for value in exact.values()} == {F64}
    assert not any(value.requires_grad for value in exact.values())
    best = {name: leaf.double() for name, leaf in problem.optimum().items()}
    assert (
        -1e-12 < problem.exact(best)["regret"] < 1e-8
    )  # λ* itself may be rounded to single precision


def test_the_optimum_is_sought_once(make, monkeypatch):
    sought = []
    for base in (Quadratic, Linear):
        monkeypatch.setattr(
            base, "optimum", lambda self, of=base.optimum: sought.append(self) or of(self)
        )
    problem = make(dtype=F64)
    with torch.no_grad():  # as an evaluation may be
        values = [problem.exact(λ)["regret"] for λ in draws(problem, 3) * 2]
    assert len(sought) == 1
    assert values[:3] == values[3:]
    assert copy.deepcopy(problem).exact(draws(problem, 1)[0])["regret"] == values[0]


@pytest.mark.parametrize(
    "make",
    [lambda: Ridge.diabetes(0), lambda: Ridge.synthetic(per_feature=True), ElasticNet.synthetic],
)
def test_without_an_optimum_there_is_no_regret(make):
    problem = make()
    with pytest.raises(BilevelError, match="there is no λ"):
        problem.optimum()
    assert list(problem.exact(draws(problem, 1)[0])) == ["hypergradient_norm"]


def test_frozen_hyperparameters_stay_and_regret_is_against_the_best_of_the_others():
    free = ElasticNet.synthetic(60, 10, 100.0, active=5, dtype=F64)
    problem = ElasticNet.synthetic(
        60, 10, 100.0, active=5, dtype=F64, space={"log_l2": {"frozen": True, "init": -2.5}}
    )
    best = problem.optimum()
    assert best["log_l2"] == -2.5
    assert problem.hypergradient(best).abs().max() < 1e-10
    assert free.exact(best)["regret"] > 1e-4  # what the freezing costs is not the solver's regret
    grid = [
        {**best, "log_l1": best["log_l1"] + move} for move in torch.linspace(-3, 3, 61, dtype=F64)
    ]
    regrets = [problem.exact(λ)["regret"].item() for λ in grid]
    assert min(range(61), key=regrets.__getitem__) == 30
    assert abs(regrets[30]) < 1e-12


def test_freezing_what_runs_off_leaves_an_optimum():
    problem = ElasticNet.synthetic(space={"log_l1": {"frozen": True, "init": -4.0}})
    assert problem.exact(problem.optimum())["regret"].abs() < 1e-12


@pytest.mark.parametrize("make", [Quadratic.random, Ridge.synthetic])
def test_with_everything_frozen_nothing_is_lost(make):
    (name,) = make().space
    problem = make(space={name: {"frozen": True, "init": 0.5}})
    exact = problem.exact(problem.space.constrain(problem.space.init()))
    assert exact == {"regret": 0, "hypergradient_norm": 0}
    assert torch.equal(problem.optimum()[name].double(), problem.space[name].initial())


def test_settings_of_the_optimizer_are_none_of_its_business(make):
    plain, problem = (
        make(dtype=F64),
        make(dtype=F64, space={"rate": {"optimizer": "lr", "init": 0.03}}),
    )
    for λ in draws(plain, 3):
        assert problem.exact({**λ, "rate": torch.tensor(0.1)}) == plain.exact(λ)


def test_a_diverged_hyperparameter_has_no_number(make):
    problem = make()
    for far in (math.nan, math.inf, 1e30):  # a run that ends so must be able to say it
        λ = {name: torch.full_like(leaf, far) for name, leaf in draws(problem, 1)[0].items()}
        exact = problem.exact(λ)
        assert list(exact) == ["regret", "hypergradient_norm"]
        if math.isnan(far):
            assert all(math.isnan(value) for value in exact.values())
