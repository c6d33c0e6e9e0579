"""Frozen rounds are plain training of w at the present λ, bit for bit and in cost."""

from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

import bilevel
from bilevel import Positive
from bilevel.problems import digits
from bilevel.solvers import Dense, Fixed, SelfTuning, Unrolled
from tests.support.device_waits import no_waiting
from tests.support.flops import count
from tests.support.solver_cases import Decayed, all_flags, every_domain, normed, ready, sgd
from tests.support.solver_list import BLACK_BOX, SOLVERS, leaves_equal, suited

INNER = {"inner_optimizer": sgd(0.05, momentum=0.9), "clip_norm": 1.0}
descending = pytest.mark.parametrize("name", [n for n in SOLVERS if n not in BLACK_BOX | {"fixed"}])


def fixed_from(solver, problem):
    """Return `Fixed` at the λ, the weights and the data of a solver."""
    other = ready(problem, Fixed(**INNER), seed=2)
    other.core.load_state_dict(solver.core.state_dict())
    for split in ("train", "valid"):
        state = getattr(solver.core.data, split).state_dict()
        getattr(other.core.data, split).load_state_dict(state)
    other.rule.u.copy_(solver.core.search.u0)
    return other


def same_weights(solver, other):
    ours, theirs = solver.solution(), other.solution()
    return leaves_equal(ours.params, theirs.params) and leaves_equal(ours.carry, theirs.carry)


def check_frozen(solver, problem):
    for n in range(3):
        solver.step(warmup=n == 0)
    search, count = solver.core.search, solver.outer_count
    before = [search.u0.clone(), search.u.detach().clone(), search.sigma.detach().clone()]
    valid = solver.core.data.valid.state_dict()
    solver.method.freeze()
    other = fixed_from(solver, problem)
    for limit in (None, 2, None):
        steps = solver.inner_count
        metrics = solver.step(frozen=True, limit=limit)
        taken = solver.inner_count - steps
        assert taken == min(limit or solver.inner_steps, solver.inner_steps)
        other.inner_steps = taken
        expected = other.step()
        assert metrics.keys() == {"inner_loss"}
        torch.testing.assert_close(metrics["inner_loss"], expected["inner_loss"])
        assert same_weights(solver, other)
    state = solver.core.generator.get_state()
    assert torch.equal(state, other.core.generator.get_state())
    for old, new in zip(before, (search.u0, search.u, search.sigma), strict=True):
        assert torch.equal(old, new)
    assert leaves_equal(valid, solver.core.data.valid.state_dict())
    assert solver.outer_count == count


@pytest.mark.filterwarnings("ignore::bilevel.SolverWarning")
@descending
def test_a_frozen_round_is_plain_training_at_the_present_hyperparameters(name):
    problem = suited(name, normed(dropout=0.3))
    check_frozen(ready(problem, SOLVERS[name](**INNER), away=0.5), problem)


@all_flags
@pytest.mark.parametrize("response", [None, Dense()], ids=["structured", "dense"])
def test_any_form_of_self_tuning_can_be_frozen(flags, response):
    problem = normed(dropout=0.3)
    solver = SelfTuning(response=response, **flags, **INNER)
    check_frozen(ready(problem, solver, away=0.5), problem)


def test_whole_numbers_are_drawn_as_in_plain_training():
    problem = every_domain()
    check_frozen(ready(problem, SelfTuning(**INNER), away=0.5), problem)


def test_the_weights_of_stn_stay_where_they_were_when_the_response_moves_into_them():
    problem = normed()
    solver = ready(problem, SOLVERS["stn"](**INNER), away=0.5)
    solver.step()
    before = {name: w.clone() for name, w in solver.solution().params.items()}
    assert not leaves_equal(before, solver.core.weights.detached())
    solver.method.freeze()
    assert leaves_equal(before, solver.solution().params)
    assert leaves_equal(before, solver.core.weights.detached())
    solver.step()  # λ may be released again
    assert not leaves_equal(before, solver.core.weights.detached())


def test_the_response_of_delta_stn_is_kept():
    solver = ready(digits(hidden=[8]), SelfTuning())
    solver.step()
    theta = [leaf.detach().clone() for leaf in solver.method.theta.leaves]
    solver.step(frozen=True)
    assert leaves_equal(theta, [leaf.detach() for leaf in solver.method.theta.leaves])


def test_a_learning_rate_that_lambda_holds_acts():
    space = {"rate": bilevel.domains.optimizer_setting("lr", init=0.3), "decay": Positive(init=0.1)}
    problem = Decayed(nn.Linear(4, 3), **space)
    solver = ready(problem, Unrolled(inner_steps=2, inner_optimizer=sgd(0.3)))
    with torch.no_grad():
        solver.core.search.u.add_(1.0)
        solver.core.search.recentre()
    rate = float(solver.solution().hypers["rate"])
    other = fixed_from(solver, problem)
    other.core.weights.optimizer.param_groups[0]["lr"] = rate
    other.core.weights.clip_norm = None
    assert rate != pytest.approx(0.3, rel=0.1)
    other.inner_steps = 2
    other.step()
    solver.step(frozen=True)
    ours, theirs = solver.solution().params, other.solution().params
    torch.testing.assert_close(ours, theirs)


def test_it_costs_what_plain_training_costs_and_waits_for_nothing():
    problem = digits(hidden=[16])
    fixed, solver = (ready(problem, make(inner_steps=1)) for make in (Fixed, SelfTuning))
    for each in (fixed, solver):
        each.step()
    assert count(lambda: solver.step(frozen=True)) == count(fixed.step)
    assert count(solver.step) > 2 * count(fixed.step)
    with no_waiting():
        solver.step(frozen=True)


def test_a_resumed_run_of_frozen_rounds_is_the_undisturbed_one():
    problem, make = normed(dropout=0.3), partial(SelfTuning, **INNER)
    solver, resumed = ready(problem, make(), away=0.5), ready(problem, make(), seed=2)
    solver.step()
    solver.step(frozen=True)
    resumed.load_state_dict(solver.state_dict())
    for split in ("train", "valid"):
        state = getattr(solver.core.data, split).state_dict()
        getattr(resumed.core.data, split).load_state_dict(state)
    for each in (solver, resumed):
        each.step(frozen=True)
        each.step()
    assert leaves_equal(*([*tree_leaves(each.state_dict())] for each in (solver, resumed)))


def test_fixed_takes_its_own_steps():
    problem = normed(dropout=0.3)
    one, other = (ready(problem, Fixed(**INNER)) for _ in range(2))
    one.step(frozen=True)
    other.step()
    assert same_weights(one, other)
