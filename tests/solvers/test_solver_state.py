"""The state of a solver between steps: statistics, recurrent state, resumption, first bad step."""

import io
import math
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bilevel.solvers import Dense, SelfTuning
from tests.support.solver_cases import Recurrent, all_flags, all_solvers, normed, ready, sgd

# --- batch norm ---


@all_flags
def test_running_statistics_are_those_of_the_pass_that_trains_w0_once_per_batch(flags):
    """Statistics come from the unperturbed pass at λ₀; in a joint step, from the perturbed one."""
    solver = ready(normed(per_example=False), SelfTuning(response=Dense(), **flags), away=0.5)
    problem, carry = solver.core.problem, dict(solver.core.carry)
    for _ in range(3):
        batch, state = solver.core.data.train.next(), solver.core.generator.get_state()
        w0, theta, centre = (
            solver.core.weights.detached(),
            solver.method.theta.detached(),
            solver.core.search.u0,
        )
        noise = solver.core.search.perturbation(8, torch.Generator().set_state(state))
        at = 0 * noise if flags["regularized_w0"] or flags["linearize"] else noise
        weights = {
            name: w0[name] + theta[name] @ (at if flags["centered"] else centre + at) for name in w0
        }
        _, carry = problem.predict(
            problem.space.constrain(centre),
            weights,
            carry,
            batch,
            train=True,
            generator=solver.core.generator,
        )
        solver.core.generator.set_state(state)
        solver.method.inner_step(batch)
        torch.testing.assert_close(solver.core.carry, carry)
    assert solver.core.carry["1.num_batches_tracked"] == 3


@all_flags
def test_an_outer_step_writes_no_statistics(flags):
    solver = ready(normed(), SelfTuning(**flags), away=0.5)
    solver.method.inner_step(solver.core.data.train.next())
    before = {name: t.clone() for name, t in solver.core.carry.items()}
    solver.method.outer_step(solver.core.data.valid.next())
    assert all(torch.equal(solver.core.carry[name], t) for name, t in before.items())


# --- recurrent state ---


@pytest.mark.parametrize("linearize", [True, False])
def test_the_two_passes_keep_their_own_recurrent_state(linearize):
    """The pass of w₀ carries f(w₀); that of Θ carries f(w₀ + Θε), or f(w₀) if linearized."""
    solver = ready(Recurrent(), SelfTuning(linearize=linearize, inner_optimizer=sgd(0.5)), away=0.5)
    own = theirs = torch.zeros(6, 3).double()
    for _ in range(3):
        batch, rows = (
            solver.core.data.train.next(),
            solver.method.theta.tensors["rows"].detach().clone(),
        )
        W, R = (w.clone() for w in solver.core.weights.detached().values())
        units = {name: t.detach().clone() for name, t in solver.method.theta.tensors.items()}
        noise = solver.core.search.perturbation(
            6, torch.Generator().set_state(solver.core.generator.get_state())
        )
        solver.method.separate_step(batch)
        own = torch.tanh(batch[0] @ W.T + own @ R.T)
        torch.testing.assert_close(solver.core.carry["h"], own)
        W, R = solver.core.weights.detached().values()  # Θ's pass comes after w₀ has moved
        before = batch[0] @ W.T + theirs @ R.T
        if not linearize:
            u, v = (noise @ rows.T).split(3, dim=1)
            before = (
                before + u * (batch[0] @ units["weights.W"].T) + v * (theirs @ units["weights.R"].T)
            )
        theirs = torch.tanh(before)
        torch.testing.assert_close(solver.method.response_carry["h"], theirs)
        assert not solver.method.response_carry["h"].requires_grad
    assert not torch.allclose(own, theirs)


@pytest.mark.parametrize("linearize", [True, False])
def test_a_joint_step_has_one_recurrent_state(linearize):
    solver = ready(Recurrent(), SelfTuning(linearize=linearize, regularized_w0=False), away=0.5)
    solver.method.joint_step(solver.core.data.train.next())
    assert torch.equal(solver.core.carry["h"], solver.method.response_carry["h"])
    assert not solver.core.carry["h"].requires_grad
    solver.step()


# --- resuming ---


def rounds(solver, n):
    for _ in range(n):
        solver.step()
        solver.epoch_ended(1.0)


@pytest.mark.parametrize("scheduler", ["StepLR", "ReduceLROnPlateau"])
@all_solvers
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(make, scheduler):
    schedules = {
        "StepLR": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        "ReduceLROnPlateau": partial(
            torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5
        ),
    }
    options = {
        "inner_optimizer": sgd(0.05, momentum=0.9),
        "inner_scheduler": schedules[scheduler],
        "clip_norm": 1.0,
    }
    problem = normed(dropout=0.3)
    solver = ready(problem, make(**options), away=0.5)
    rounds(solver, 2)
    file = io.BytesIO()
    torch.save(
        (
            solver.state_dict(),
            solver.core.data.train.state_dict(),
            solver.core.data.valid.state_dict(),
        ),
        file,
    )
    rounds(solver, 2)

    resumed = ready(problem, make(**options), away=0.5, seed=2)
    assert not torch.equal(resumed.core.weights.leaves[0], solver.core.weights.leaves[0])
    file.seek(0)
    state, train, valid = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    resumed.core.data.train.load_state_dict(train)
    resumed.core.data.valid.load_state_dict(valid)
    rounds(resumed, 2)

    ours, theirs = (tree_leaves((s.state_dict(), s.solution())) for s in (resumed, solver))
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert solver.core.weights.optimizer.param_groups[0]["lr"] == pytest.approx(
        0.05 / (16 if scheduler == "StepLR" else 8)
    )


# --- the first bad step ---


@pytest.mark.parametrize("value", [math.nan, math.inf])
@all_solvers
def test_the_first_loss_that_is_not_finite_is_noted(make, value):
    """After two good training batches the third is bad: step 3, whatever comes after."""
    solver = ready(normed(), make(), away=0.5)
    assert solver.services.bad_step() is None
    good, count = solver.core.data.train.next, iter(range(100))
    solver.core.data.train.next = lambda: (
        good()[0] * (value if next(count) == 2 else 1),
        torch.arange(8) % 3,
    )
    solver.step(limit=2)
    assert solver.services.bad_step() is None
    solver.step(limit=2)
    assert solver.services.bad_step() == 3
    solver.step()
    assert solver.services.bad_step() == 3


def test_a_bad_validation_loss_is_noted_at_the_inner_step_that_it_follows():
    solver = ready(normed(), away=0.5)
    good = solver.core.data.valid.next
    solver.core.data.valid.next = lambda: (good()[0] * math.nan, torch.arange(8) % 3)
    solver.step(limit=3)
    assert solver.services.bad_step() == 3
