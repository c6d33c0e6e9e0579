"""Tests of what SOBA, SAMA and the penalty method share: convergence, resumption, refusals."""

import copy
import gc
import io
from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from bilevel import BilevelError, Need, Refused
from bilevel.problems import Quadratic
from bilevel.solvers.penalty import Penalty
from bilevel.solvers.sama import SAMA
from bilevel.solvers.soba import SOBA
from tests.support.dense_derivatives import (
    F64,
    OPTIMIZERS,
    STARTS,
    Noisy,
    close,
    quadratic,
    regret,
    ridge,
    rmsprop,
)
from tests.support.device_waits import Waited, no_waiting
from tests.support.solver_cases import Decayed, normed, ready, sgd

SOLVERS = {
    "soba": SOBA,
    "sama": SAMA,
    "sama exact": partial(SAMA, finite_difference=False),
    "penalty": Penalty,
}

all_solvers = pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS)

# Solver, rounds, the part of the first regret that may be left; SAMA has its own fixed point.
CONVERGES = {
    "soba": (lambda: SOBA(inner_optimizer=sgd(1.0), outer_optimizer=sgd(0.005)), 150, 1e-3),
    "penalty": (
        lambda: Penalty(
            weight=10.0, growth=5.0, inner_optimizer=sgd(0.5), outer_optimizer=sgd(0.015)
        ),
        50,
        1e-3,
    ),
}


@pytest.mark.parametrize(("start", "direct"), [*zip(STARTS, (0.0, 1.0, 0.0), strict=True)])
@pytest.mark.parametrize("name", CONVERGES)
def test_on_the_quadratic_it_comes_to_the_optimum(name, start, direct):
    make, rounds, part = CONVERGES[name]
    problem = Quadratic.random(
        condition=3.0, direct=direct, dtype=F64, space={"hyper": {"init": list(start)}}
    )
    solver = ready(problem, make())
    first = regret(solver)
    for _ in range(rounds):
        solver.step()
    assert regret(solver) < part * first


RIDGE = {  # solver, rounds, the part of the first regret that may be left
    "soba": (lambda: SOBA(inner_optimizer=sgd(0.3), outer_optimizer=rmsprop(0.03)), 130, 0.1),
    "sama": (
        lambda: SAMA(inner_steps=3, inner_optimizer=sgd(0.3), outer_optimizer=rmsprop(0.04)),
        70,
        0.2,
    ),
    "penalty": (
        lambda: Penalty(
            weight=10.0,
            growth=2.0,
            inner_steps=3,
            inner_optimizer=sgd(0.3),
            outer_optimizer=rmsprop(0.04),
        ),
        70,
        0.1,
    ),
}


@pytest.mark.parametrize(
    ("start", "per_feature"), [(0.0, False), (1.0, False), (-4.0, False), (0.0, True)]
)
@pytest.mark.parametrize("name", RIDGE)
def test_on_ridge_the_regret_falls(name, start, per_feature):
    make, rounds, part = RIDGE[name]
    solver = ready(ridge(start, per_feature), make())
    first = regret(solver)
    for n in range(rounds):
        solver.step(warmup=n < 10)
    assert regret(solver) < part * first


def tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("make", [SOBA, SAMA, Penalty])
def test_nothing_of_earlier_steps_stays_alive(make):
    options = {} if make is SOBA else {"inner_steps": 1}
    problem = Quadratic.random(weights=2, hypers=1, dtype=F64)
    solver = ready(problem, make(inner_optimizer=sgd(0.1), outer_optimizer=sgd(0.01), **options))
    counts = []
    for rounds in (20, 180):
        for _ in range(rounds):
            solver.step()
        solver.services.bad_step()  # tests the losses that wait, as every evaluation does
        counts.append(tensors())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("optimizer", [sgd(0.05, momentum=0.9), OPTIMIZERS["adam"]])
@all_solvers
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(make, optimizer):
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    problem, options = (
        normed(0.3),
        {"inner_optimizer": optimizer, "inner_scheduler": schedule, "clip_norm": 1.0},
    )
    solver = ready(problem, make(**options), away=0.5)

    def rounds(solver):
        for _ in range(3):
            solver.step()
            solver.epoch_ended(None)

    rounds(solver)
    file = io.BytesIO()
    torch.save(
        (
            solver.state_dict(),
            solver.core.data.train.state_dict(),
            solver.core.data.valid.state_dict(),
        ),
        file,
    )
    rounds(solver)
    resumed = ready(problem, make(**options), away=0.5, seed=2)
    file.seek(0)
    state, train, valid = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    resumed.core.data.train.load_state_dict(train)
    resumed.core.data.valid.load_state_dict(valid)
    rounds(resumed)
    ours, theirs = (tree_leaves((s.state_dict(), s.solution())) for s in (resumed, solver))
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@all_solvers
@pytest.mark.parametrize("make_problem", [Noisy, normed, quadratic, ridge])
@pytest.mark.parametrize("optimizer", [sgd(0.05, momentum=0.9), OPTIMIZERS["rmsprop"]])
def test_no_step_waits_for_the_device(make, make_problem, optimizer):
    solver = ready(make_problem(), make(inner_optimizer=optimizer, clip_norm=1.0))
    solver.step(limit=1)
    with no_waiting():
        solver.step(warmup=True)
        solver.step()
        solver.step(limit=1)
    with pytest.raises(Waited), no_waiting():
        float(solver.step()["outer_loss"])


@all_solvers
def test_warm_up_leaves_the_hyperparameters_and_a_limit_is_kept(make):
    solver = ready(Noisy(), make())
    u = solver.core.search.u.detach().clone()
    solver.step(warmup=True)
    assert torch.equal(solver.core.search.u, u)
    assert solver.outer_count == 0
    before = solver.inner_count
    metrics = solver.step(limit=1)
    assert (solver.inner_count - before, solver.outer_count) == (1, 1)
    assert not torch.equal(solver.core.search.u, u)
    assert {"inner_loss", "outer_loss", "hypergradient_norm"} <= set(metrics)


@all_solvers
def test_the_hypergradient_is_what_an_outer_step_follows_and_moves_nothing(make):
    solver = ready(Noisy(), make(outer_optimizer=sgd(0.1)), away=0.5)
    solver.step()
    saved = copy.deepcopy(solver.state_dict())
    gradient = solver.hypergradient(solver.core.data.valid.peek())
    solver.core.generator.set_state(saved["core"]["generator"])
    for a, b in zip(tree_leaves(saved), tree_leaves(solver.state_dict()), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    u = solver.core.search.u.detach().clone()
    if isinstance(solver, SOBA):
        solver.step()
    else:
        solver.method.outer_step(solver.core.data.valid.peek())
    close(solver.core.search.u.detach(), u - 0.1 * gradient, 1e-13)


@all_solvers
def test_sampled_rates_and_settings_of_the_optimizer_are_refused_by_name(make):
    sampled = Noisy()
    sampled.space = sampled.space.override({"strength": {"differentiable": False}})
    with pytest.raises(Refused, match="`strength` is sampled"):
        ready(sampled, make())
    rated = Noisy()
    rated.space = rated.space.override({"rate": {"optimizer": "lr", "init": 0.1}})
    with pytest.raises(Refused, match="cannot tune `rate`"):
        ready(rated, make())


class Once(nn.Module):
    """Instance norm with running statistics, whose second derivative PyTorch lacks."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = (
            nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
            nn.Linear(12, 3),
        )

    def forward(self, x):
        return self.head(self.norm(x).flatten(1))


@all_solvers
def test_only_what_needs_second_derivatives_refuses_a_layer_without(make):
    problem, solver = Decayed(Once(), (24, 4, 3)), make()
    if Need.SECOND_DERIVATIVES in solver.needs:
        with pytest.raises(Refused, match="needs second derivatives of L_T"):
            ready(problem, solver)
    else:
        assert "hypergradient_norm" in ready(problem, solver).step()
    assert Need.SECOND_DERIVATIVES not in SAMA.needs


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (SOBA, {"adjoint_lr": 0.0}, "adjoint_lr=0.0"),
        (SAMA, {"alpha": -1.0}, "alpha=-1.0"),
        (Penalty, {"weight": 0.0}, "weight=0.0"),
        (Penalty, {"weight": 2.0, "weight_max": 1.0}, "weight_max=1.0"),
        (Penalty, {"growth": -0.1}, "growth=-0.1"),
    ],
)
def test_settings_that_cannot_be_are_named(make, options, message):
    with pytest.raises(BilevelError, match=message):
        make(**options)
