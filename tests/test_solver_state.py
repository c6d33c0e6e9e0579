"""What a solver carries from step to step: statistics, recurrent state, what a resumed run needs, and the first bad step."""

import io
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from bilevel import ModuleProblem, Positive, Problem, Real, Space, squared_norm, streams
from solvers import Dense, Fixed, SelfTuning

CPU = torch.device("cpu")
NAMES = ("centered", "regularized_w0", "linearize")
FLAGS = [dict(zip(NAMES, on, strict=True)) for on in itertools.product([True, False], repeat=3) if on[0] or not on[2]]

all_flags = pytest.mark.parametrize(
    "flags", FLAGS, ids=lambda flags: "-".join(name for name, on in flags.items() if on) or "none"
)


def split(examples=24, inputs=4):
    return torch.randn(examples, inputs).double(), torch.arange(examples) % 3


class Normed(ModuleProblem):
    """A network with batch norm and, where asked, dropout; the one hyperparameter is its weight decay."""

    def __init__(self, dropout=0.0, per_example=True):
        module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)).double()
        space = Space(decay=Positive(init=0.1, per_example=per_example))
        super().__init__(module, space, split(), split(), batch_size=8)

    def inner_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1]) + 0.5 * (hypers["decay"] * squared_norm(params)).mean()

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1])


class Recurrent(Problem):
    """h ← tanh(x Wᵀ + h Rᵀ): its state is carried from batch to batch."""

    def __init__(self):
        self.space = Space(decay=Real(init=0.1))

    def init(self, generator):
        params = {name: 0.5 * torch.randn(3, n, generator=generator).double() for name, n in (("W", 4), ("R", 3))}
        return params, {"h": torch.zeros(6, 3).double()}

    def data(self, device, generator):
        return streams(split(6), split(6), batch_size=None, device=device, generator=generator)

    def predict(self, hypers, params, carry, batch, *, train, generator):
        h = torch.tanh(F.linear(batch[0], params["W"]) + F.linear(carry["h"], params["R"]))
        return h, {"h": h}

    def inner_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1]) + 0.5 * (hypers["decay"] * squared_norm(params)).mean()

    outer_objective = inner_objective


def ready(problem, make=SelfTuning, seed=1, **options):
    """A solver set up on `problem`, Θ away from zero."""
    generator = torch.Generator().manual_seed(seed)
    solver = make(**options)
    solver.setup(problem, problem.data(CPU, generator), CPU, generator)
    if isinstance(solver, SelfTuning):
        with torch.no_grad():
            for t in solver.theta.leaves:
                t.add_(0.5 * torch.randn(t.shape, generator=generator, dtype=t.dtype))
    return solver


# --- batch norm ---


@all_flags
def test_running_statistics_are_those_of_the_pass_that_trains_w0_once_per_batch(flags):
    """Regularized: the unperturbed pass at λ₀; jointly: the perturbed one (linearized: its primal, at w₀)."""
    solver = ready(Normed(per_example=False), response=Dense(), **flags)
    problem, carry = solver.problem, dict(solver.carry)
    for _ in range(3):
        batch, state = solver.data.train.next(), solver.generator.get_state()
        w0, theta, centre = solver.weights.detached(), solver.theta.detached(), solver.belief.centre
        noise = solver.belief.perturbation(8, torch.Generator().set_state(state))
        at = 0 * noise if flags["regularized_w0"] or flags["linearize"] else noise
        weights = {name: w0[name] + theta[name] @ (at if flags["centered"] else centre + at) for name in w0}
        _, carry = problem.predict(
            problem.space.constrain(centre), weights, carry, batch, train=True, generator=solver.generator
        )
        solver.generator.set_state(state)
        solver.inner_step(batch)
        torch.testing.assert_close(solver.carry, carry)
    assert solver.carry["1.num_batches_tracked"] == 3


@all_flags
def test_an_outer_step_writes_no_statistics(flags):
    solver = ready(Normed(), **flags)
    solver.inner_step(solver.data.train.next())
    before = {name: t.clone() for name, t in solver.carry.items()}
    solver.outer_step(solver.data.valid.next())
    assert all(torch.equal(solver.carry[name], t) for name, t in before.items())


# --- recurrent state ---


@pytest.mark.parametrize("linearize", [True, False])
def test_the_two_passes_keep_their_own_recurrent_state(linearize):
    """w₀'s pass carries f(w₀); Θ's pass f(w₀ + Θε), or its primal f(w₀) when linearized, each from where it was."""
    solver = ready(Recurrent(), linearize=linearize, inner_optimizer=partial(torch.optim.SGD, lr=0.5))
    own = theirs = torch.zeros(6, 3).double()
    for _ in range(3):
        batch, rows = solver.data.train.next(), solver.theta.tensors["rows"].detach().clone()
        W, R = (w.clone() for w in solver.weights.detached().values())
        units = {name: t.detach().clone() for name, t in solver.theta.tensors.items()}
        noise = solver.belief.perturbation(6, torch.Generator().set_state(solver.generator.get_state()))
        solver.separate_step(batch)
        own = torch.tanh(batch[0] @ W.T + own @ R.T)
        torch.testing.assert_close(solver.carry["h"], own)
        W, R = solver.weights.detached().values()  # Θ's pass comes after w₀ has moved
        before = batch[0] @ W.T + theirs @ R.T
        if not linearize:
            u, v = (noise @ rows.T).split(3, dim=1)
            before = before + u * (batch[0] @ units["weights.W"].T) + v * (theirs @ units["weights.R"].T)
        theirs = torch.tanh(before)
        torch.testing.assert_close(solver.response_carry["h"], theirs)
        assert not solver.response_carry["h"].requires_grad
    assert not torch.allclose(own, theirs)


@pytest.mark.parametrize("linearize", [True, False])
def test_a_joint_step_has_one_recurrent_state(linearize):
    solver = ready(Recurrent(), linearize=linearize, regularized_w0=False)
    solver.joint_step(solver.data.train.next())
    assert torch.equal(solver.carry["h"], solver.response_carry["h"])
    assert not solver.carry["h"].requires_grad
    solver.step()


# --- resuming ---

MAKERS = {"-".join(name for name, on in flags.items() if on) or "none": partial(SelfTuning, **flags) for flags in FLAGS} | {
    "fixed": Fixed
}


def rounds(solver, n):
    for _ in range(n):
        solver.step()
        solver.epoch_ended(1.0)


@pytest.mark.parametrize("scheduler", ["StepLR", "ReduceLROnPlateau"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(name, scheduler):
    schedules = {
        "StepLR": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        "ReduceLROnPlateau": partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5),
    }
    momentum = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    options = {"inner_optimizer": momentum, "inner_scheduler": schedules[scheduler], "clip_norm": 1.0}
    problem = Normed(dropout=0.3)
    solver = ready(problem, MAKERS[name], **options)
    rounds(solver, 2)
    file = io.BytesIO()
    torch.save((solver.state_dict(), solver.data.train.state_dict(), solver.data.valid.state_dict()), file)
    rounds(solver, 2)

    resumed = ready(problem, MAKERS[name], seed=2, **options)
    assert not torch.equal(resumed.weights.leaves[0], solver.weights.leaves[0])
    file.seek(0)
    state, train, valid = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    resumed.data.train.load_state_dict(train)
    resumed.data.valid.load_state_dict(valid)
    rounds(resumed, 2)

    ours, theirs = (tree_leaves((s.state_dict(), s.solution())) for s in (resumed, solver))
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert solver.weights.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / (16 if scheduler == "StepLR" else 8))


# --- the first bad step ---


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", MAKERS)
def test_the_first_loss_that_is_not_finite_is_noted(name, value):
    """After two good training batches the third is bad: step 3, whatever comes after."""
    solver = ready(Normed(), MAKERS[name])
    assert solver.bad_step() is None
    good, count = solver.data.train.next, iter(range(100))
    solver.data.train.next = lambda: (good()[0] * (value if next(count) == 2 else 1), torch.arange(8) % 3)
    solver.step(limit=2)
    assert solver.bad_step() is None
    solver.step(limit=2)
    assert solver.bad_step() == 3
    solver.step()
    assert solver.bad_step() == 3


def test_a_bad_validation_loss_is_noted_at_the_inner_step_that_it_follows():
    solver = ready(Normed())
    good = solver.data.valid.next
    solver.data.valid.next = lambda: (good()[0] * math.nan, torch.arange(8) % 3)
    solver.step(limit=3)
    assert solver.bad_step() == 3
