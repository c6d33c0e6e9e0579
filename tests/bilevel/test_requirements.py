"""Needs of solvers: refused problems, tunable settings of the inner optimizer, warnings."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from bilevel import (
    BilevelError,
    Data,
    Integer,
    Interval,
    Need,
    Positive,
    Real,
    Refused,
    Runner,
    SolverWarning,
    Space,
    Trait,
    check_problem,
)
from bilevel.data.tensor_stream import stream
from bilevel.domains import optimizer_setting
from bilevel.problems import Quadratic
from bilevel.solvers import Fixed, delta_stn
from tests.support.fakes import FakeProblem, FakeSolver
from tests.support.solver_cases import ready, sgd


class Needy(FakeSolver):
    needs = frozenset({Need.INNER_DERIVATIVE})


class Timed(FakeSolver):
    traits = frozenset({Trait.TUNES_OPTIMIZER})


def refusal(solver, **space):
    problem = FakeProblem()
    problem.space = Space(**space)
    with pytest.raises(Refused) as info:
        solver.check(problem, None, torch.device("cpu"))
    return str(info.value)


RATE = Interval(low=0.0, high=0.9, init=0.3, differentiable=False)


# --- refusals ---


@pytest.mark.parametrize(
    "domain", [RATE, Integer(low=0, high=5, init=2.0)], ids=["sampled", "rounded"]
)
def test_a_solver_that_needs_the_derivative_names_what_lacks_it_and_what_else_could_tune_it(domain):
    message = refusal(Needy(), decay=Positive(init=1.0), drop=domain)
    parts = (
        "Needy needs ∂L_T/∂λ",
        "`drop`",
        "self-tuning",
        "black-box",
        "problem.dropout=gaussian",
        "problem.space.drop.frozen=true",
    )
    for part in parts:
        assert part in message


def test_a_setting_of_the_optimizer_is_refused_where_it_cannot_be_tuned():
    message = refusal(FakeSolver(), rate=Positive(init=0.1, optimizer="lr"))
    for part in (
        "FakeSolver cannot tune `rate`",
        "inner optimizer's lr",
        "unrolled",
        "problem.space.rate.frozen=true",
    ):
        assert part in message


def test_nothing_to_tune_is_refused():
    assert "every hyperparameter is frozen" in refusal(
        FakeSolver(), decay=Positive(init=1.0, frozen=True)
    )


def test_what_is_frozen_or_needed_by_nobody_is_not_refused():
    problem, cpu = FakeProblem(), torch.device("cpu")
    data = problem.data(cpu, torch.Generator())
    problem.space = Space(decay=Positive(init=1.0), drop=replace(RATE, frozen=True))
    Needy().check(problem, data, cpu)
    held = {"decay": Positive(init=1.0), "drop": replace(RATE, frozen=True)}
    problem.space = Space(**held, rate=Positive(init=0.1, optimizer="lr"))
    Timed().check(problem, data, cpu)
    problem.space = Space(**held | {"drop": RATE}, rate=Positive(init=0.1, optimizer="lr"))
    Fixed().check(problem, data, cpu)  # it tunes nothing


def test_a_self_tuning_network_refuses_a_learning_rate():
    problem = Quadratic.random(space={"rate": {"optimizer": "lr", "init": 0.1}})
    with pytest.raises(Refused, match="cannot tune `rate`"):
        ready(problem, delta_stn())


# --- settings of the inner optimizer ---


def test_a_setting_is_one_number_for_all_examples():
    domain = Positive(init=0.1, optimizer="lr")
    assert not domain.per_example
    with pytest.raises(BilevelError, match=r"shape=\(2,\) must be \(\) for a setting"):
        Positive(init=0.1, optimizer="lr", shape=(2,))
    with pytest.raises(BilevelError, match="did you mean `momentum`"):
        Interval(low=0.0, high=1.0, init=0.9, optimizer="momentun")


def test_configuration_adds_a_setting_by_a_new_name():
    space = Space(decay=Real(init=0.0)).override(
        {
            "rate": {"optimizer": "lr", "init": 0.1},
            "inertia": {"optimizer": "momentum", "init": 0.5, "high": 0.9, "scale": 0.3},
        }
    )
    assert (space["rate"], space["rate"].init) == (Positive(init=0.1, optimizer="lr"), 0.1)
    assert (space["inertia"].high, space["inertia"].scale, space["inertia"].per_example) == (
        0.9,
        0.3,
        False,
    )
    assert optimizer_setting("beta2", init=0.9) == Interval(
        low=0.0, high=1.0, init=0.9, optimizer="beta2"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init": 0.1}, "hyperparameter `rate` is unknown"),
        ({"optimizer": "lr"}, "needs an initial value"),
        ({"optimizer": "lr", "init": -1.0}, "`rate`: init=-1.0 must be above low=0"),
        ({"optimizer": "speed", "init": 1.0}, "`rate`: optimizer='speed'"),
        ({"optimizer": "lr", "init": 1.0, "higher": 2.0}, "`rate`: .*higher"),
    ],
)
def test_a_setting_that_cannot_be_added_is_refused(change, words):
    with pytest.raises(BilevelError, match=words):
        Space(decay=Real(init=0.0)).override({"rate": change})


def test_the_check_of_a_problem_does_not_miss_what_acts_on_the_way():
    problem = Quadratic.random(space={"rate": {"optimizer": "lr", "init": 0.1}})
    assert check_problem(problem, solvers={}).ok


@pytest.mark.parametrize("frozen", [False, True])
def test_plain_training_takes_its_settings_from_lambda(frozen):
    settings = {
        "rate": {"optimizer": "lr", "init": 0.02},
        "b": {"optimizer": "beta1", "init": 0.7, "frozen": frozen},
    }
    by_lambda = ready(
        Quadratic.random(space=settings), Fixed(inner_optimizer=partial(torch.optim.Adam, lr=0.5))
    )
    by_hand = ready(
        Quadratic.random(),
        Fixed(inner_optimizer=partial(torch.optim.Adam, lr=0.02, betas=(0.7, 0.999))),
    )
    by_lambda.step()
    by_hand.step()
    assert torch.equal(by_lambda.core.weights.leaves[0], by_hand.core.weights.leaves[0])
    assert by_lambda.core.weights.optimizer.param_groups[0]["betas"] == (0.7, 0.999)


def test_a_schedule_scales_the_tuned_rate():
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    problem = Quadratic.random(space={"rate": {"optimizer": "lr", "init": 0.02}})
    solver = ready(problem, Fixed(inner_optimizer=sgd(0.5), inner_scheduler=scheduler))
    solver.step()
    solver.epoch_ended(None)
    assert solver.core.weights.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_an_optimizer_without_the_setting_is_refused():
    problem = Quadratic.random(space={"b": {"optimizer": "beta1", "init": 0.7}})
    with pytest.raises(BilevelError, match="no setting `beta1`"):
        ready(problem, Fixed(inner_optimizer=sgd(0.1)))


# --- what a runner makes of it ---


class Doubting(FakeSolver):
    def warnings(self, metrics):
        seen.append(dict(metrics))
        return (
            {"size": f"the loss is {metrics['inner_loss']:.2f}"} if "inner_loss" in metrics else {}
        )


seen: list[dict] = []


def test_a_doubt_is_told_once_a_run_from_the_means_since_the_last_evaluation(tmp_path):
    seen.clear()
    with pytest.warns(SolverWarning, match="the loss is") as warned:
        Runner(epochs=4, warmup_epochs=1, progress="none", picture=False).run(
            FakeProblem(), Doubting(), directory=tmp_path
        )
    assert len(warned) == 1
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [m.get("inner_loss") for m in seen] == [r.get("inner_loss") for r in records]
    assert len(records) == 5


def test_a_resumed_run_does_not_tell_it_again(tmp_path):
    settings = {"warmup_epochs": 1, "progress": "none", "picture": False}
    with pytest.warns(SolverWarning):
        Runner(epochs=2, **settings).run(FakeProblem(), Doubting(), directory=tmp_path)
    Runner(epochs=4, **settings).run(
        FakeProblem(), Doubting(), directory=tmp_path, resume=True
    )  # a warning is an error here


class Known(FakeProblem):
    def exact(self, hypers):
        return {"regret": (hypers["decay"] - 0.01).abs()}


@pytest.mark.parametrize(
    "given", [None, {"w": torch.ones(3)}], ids=["own weights", "given weights"]
)
def test_what_is_exact_is_recorded(tmp_path, given):
    runner = Runner(epochs=3, warmup_epochs=1, progress="none", picture=False)
    summary = runner.run(Known(), FakeSolver(), directory=tmp_path, params=given)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["exact.regret"] for r in records] == pytest.approx(
        [abs(r["hypers.decay"] - 0.01) for r in records], abs=1e-8
    )
    assert records[0]["exact.regret"] < records[-1]["exact.regret"]
    assert summary["last"]["exact.regret"] == records[-1]["exact.regret"]


def test_examples_looked_at_beside_next_are_counted():
    own = stream((torch.zeros(6, 1),), 2, torch.Generator())
    borrowed = stream(own, 2, torch.Generator())
    data = Data(own, borrowed)
    borrowed.next()
    data.valid.count(5)
    assert data.valid.examples == 7
    state = borrowed.state_dict()
    again = stream(own, 2, torch.Generator())
    again.load_state_dict(state)
    assert again.examples == 7
