"""Tests of the learning rates of λ and σ, which follow the schedule of w by default."""

from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import bilevel
from bilevel import BilevelError
from bilevel.problems import Quadratic
from bilevel.solvers import (
    SAMA,
    SOBA,
    EvolutionStrategies,
    Implicit,
    SelfTuning,
    Unrolled,
    centered_stn,
    stn,
)
from bilevel.solvers.optim.followed_schedule import FollowedSchedule
from bilevel.solvers.penalty import Penalty
from tests.support.solver_cases import Decayed, ready, sgd

SOLVERS = {
    "delta_stn": SelfTuning,
    "centered_stn": centered_stn,
    "stn": stn,
    "implicit": Implicit,
    "unrolled": partial(Unrolled, inner_steps=2),
    "soba": SOBA,
    "sama": SAMA,
    "penalty": Penalty,
    "es": EvolutionStrategies,
}
halved = partial(StepLR, step_size=1, gamma=0.5)
lowered = partial(ReduceLROnPlateau, patience=0, factor=0.1)


def solver(make=SelfTuning, **settings):
    settings = {"inner_optimizer": sgd(0.1), "outer_optimizer": sgd(0.4), **settings}
    problem = Quadratic.random(weights=2, hypers=1, dtype=torch.float64)
    made = ready(problem, make(**settings), away=0.1)
    made.step()  # the first direction of some solvers is 0
    return made


def rates(solver):
    return [group.optimizer.param_groups[0]["lr"] for group in solver.core.search.trained()]


def moved(solver):
    """Take a round; return the distance that u moved in units of the hypergradient's norm."""
    before = solver.core.search.u.detach().clone()
    metrics = solver.step()
    distance = (solver.core.search.u.detach() - before).norm()
    return float(distance / metrics["hypergradient_norm"])


@pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS)
def test_the_step_of_u_shrinks_with_the_rate_of_w(make):
    ours = solver(make, inner_scheduler=halved)
    before = rates(ours)
    assert moved(ours) == pytest.approx(0.4)
    for factor in (0.5, 0.25):
        ours.epoch_ended(None)
        assert moved(ours) == pytest.approx(0.4 * factor)
        assert rates(ours) == [rate * factor for rate in before]


@pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS)
def test_null_keeps_the_rates_constant(make):
    ours = solver(make, inner_scheduler=halved, outer_scheduler=None)
    before = rates(ours)
    ours.epoch_ended(None)
    assert moved(ours) == pytest.approx(0.4)
    assert rates(ours) == before


def test_a_plateau_lowers_the_rate_of_u_too():
    ours = solver(inner_scheduler=lowered)
    for loss, factor in ((1.0, 1.0), (2.0, 0.1), (3.0, 0.01)):
        ours.epoch_ended(loss)
        assert moved(ours) == pytest.approx(0.4 * factor)


def test_a_schedule_of_its_own_steps_at_every_epoch_and_in_warm_up_without_a_warning():
    ours = solver(inner_scheduler=lowered, outer_scheduler=halved)
    ours.step(warmup=True)
    ours.epoch_ended(1.0)
    ours.epoch_ended(2.0)
    assert moved(ours) == pytest.approx(0.4 * 0.25)
    assert rates(ours) == pytest.approx([0.1, 0.03 / 4])
    assert ours.core.weights.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    resumed = solver(inner_scheduler=lowered, outer_scheduler=halved)
    resumed.load_state_dict(ours.state_dict())
    for each in (ours, resumed):
        each.epoch_ended(1.0)
        each.step()
    assert rates(resumed) == rates(ours) == pytest.approx([0.05, 0.03 / 8])


def test_a_learning_rate_that_lambda_holds_has_no_part_in_the_factor():
    space = {
        "rate": bilevel.domains.optimizer_setting("lr", init=0.3),
        "decay": bilevel.Positive(init=0.1),
    }
    problem = Decayed(torch.nn.Linear(4, 3), **space)
    ours = ready(problem, Unrolled(inner_steps=2, inner_scheduler=halved, outer_optimizer=sgd(0.4)))
    with torch.no_grad():
        ours.core.search.u.add_(1.0)
        ours.core.search.recentre()
    assert moved(ours) == pytest.approx(0.4, rel=1e-4)
    ours.epoch_ended(None)
    assert moved(ours) == pytest.approx(0.2, rel=1e-4)


def test_the_initial_rates_are_a_part_of_the_state():
    """A caller may load an optimizer whose rate has fallen, before its solver is set up."""
    leaders = [torch.optim.SGD([torch.zeros(1)], lr=lr) for lr in (0.1, 0.02)]
    schedules = [
        FollowedSchedule(leader, [torch.optim.SGD([torch.zeros(1)], lr=lr)])
        for leader, lr in zip(leaders, (0.4, 0.08), strict=True)
    ]
    schedules[1].load_state_dict(schedules[0].state_dict())
    for leader, schedule in zip(leaders, schedules, strict=True):
        leader.param_groups[0]["lr"] = 0.01
        schedule.follow()
    assert schedules[1].followers[0].param_groups[0]["lr"] == pytest.approx(0.04)
    assert schedules[0].factor == schedules[1].factor == pytest.approx(0.1)


def test_a_rate_that_is_a_tensor_is_changed_in_place():
    rate = torch.tensor(0.4)
    leader, follower = (torch.optim.SGD([torch.zeros(1)], lr=lr) for lr in (0.1, rate))
    schedule = FollowedSchedule(leader, [follower])
    leader.param_groups[0]["lr"] = 0.05
    schedule.follow()
    assert follower.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.2)


@pytest.mark.parametrize("value", ["iner", 3, True])
def test_another_value_is_refused_in_one_sentence(value):
    with pytest.raises(BilevelError, match=r"^outer_scheduler=.* is unknown.*; choose inner or"):
        SelfTuning(outer_scheduler=value)
