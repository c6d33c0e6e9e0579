"""Batch-norm statistics of L_V as functions of w, against retraining to true minima."""

import copy
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.batch_norm import HELD, NormedRegression, at_minimum, minimum
from bilevel import ModuleProblem, Positive, Problem, Space
from bilevel.data.tensor_stream import streams
from bilevel.norm_statistics import Evaluated
from bilevel.solvers import CG, SOBA, Dense, Implicit, Penalty, Unrolled, centered_stn, delta_stn
from bilevel.solvers.autodiff.pullback import Pullback
from tests.support.solver_cases import convolutional, normed, ready

OFF = {0: 0.5, 1: 0.2, 4: 0.15}
"""By seed: a bound that the error with constant statistics exceeds."""
STILL = {"inner_optimizer": HELD, "outer_optimizer": HELD}
MOVING = {"inner_optimizer": partial(torch.optim.SGD, lr=0.4), "outer_optimizer": HELD}


@cache
def best(seed):
    return minimum(NormedRegression(seed))


def error(solver, seed):
    return float(solver.hypergradient()) / best(seed).hypergradient - 1


def at(seed, solver, **options):
    return at_minimum(NormedRegression(seed, **options), solver, best(seed))


def second_derivatives(core):
    """Return H and ∂²L_T/∂w∂u at the weights, dense."""
    w, batch = core.weights.detached(), core.data.train.peek()
    functions = core.functions
    pull = Pullback(core.problem, core.search.u0, w, core.carry, [batch], core.generator, functions)
    basis = torch.eye(sum(p.numel() for p in w.values())).double()
    return torch.stack([pull.hessian(e) for e in basis]), torch.stack(
        [pull.cross(e) for e in basis]
    )


@pytest.mark.parametrize("seed", OFF)
def test_implicit_at_a_true_minimum_is_the_derivative_of_retraining(seed):
    make = partial(Implicit, linear_solve=CG(iterations=100), **STILL)
    assert abs(error(at(seed, make()), seed)) < 0.001
    assert abs(error(at(seed, make(follow_statistics=False)), seed)) > OFF[seed]


@pytest.mark.parametrize("recipe", [delta_stn, centered_stn])
@pytest.mark.parametrize("seed", OFF)
def test_self_tuning_per_batch_is_exact_at_the_exact_response(seed, recipe):
    for follow in (True, False):
        solver = at(
            seed,
            recipe(response=Dense(), tune_scale=False, follow_statistics=follow, **STILL),
        )
        H, cross = second_derivatives(solver.core)
        columns = -torch.linalg.solve(H, cross)
        with torch.no_grad():
            leaves = solver.method.theta.leaves
            sizes = [leaf.numel() for leaf in leaves]
            for leaf, part in zip(leaves, columns.split(sizes), strict=True):
                leaf.copy_(part.reshape(leaf.shape))
        off = abs(error(solver, seed))
        assert off < 0.001 if follow else off > OFF[seed]


@pytest.mark.parametrize("seed", OFF)
def test_soba_is_exact_at_the_exact_adjoint(seed):
    solver = at(seed, SOBA(**STILL))
    core = solver.core
    H, _ = second_derivatives(core)
    batches = core.data.valid.peek(), core.weights.detached(), core.carry, core.data.train.peek()
    _, gradient, _ = core.outer_gradients(*batches)
    solver.method.adjoint = -torch.linalg.solve(H, gradient)
    assert abs(error(solver, seed)) < 0.001


@pytest.mark.parametrize("follow", [True, False])
def test_unrolled_tends_to_the_derivative_of_retraining(follow):
    solver = Unrolled(inner_steps=300, follow_statistics=follow, **MOVING)
    off = abs(error(at(3, solver), 3))
    assert off < 0.03 if follow else off > 0.07


@pytest.mark.parametrize("seed", OFF)
def test_penalty_is_right_up_to_its_weight(seed):
    """y = z − H⁻¹∇L_V/σ is stationary, and gives the hypergradient up to O(1/σ)."""
    solver = at(seed, Penalty(weight=1e5, weight_max=1e5, growth=0.0, **MOVING))
    core, y = solver.core, solver.method.penalized
    H, _ = second_derivatives(core)
    batches = core.data.valid.peek(), core.weights.detached(), core.carry, core.data.train.peek()
    _, gradient, _ = core.outer_gradients(*batches)
    moves = []
    for shift in (torch.zeros_like(gradient), torch.linalg.solve(H, gradient) / 1e5):
        parts = shift.split([leaf.numel() for leaf in y.leaves])
        with torch.no_grad():
            for leaf, z, part in zip(y.leaves, core.weights.leaves, parts, strict=True):
                leaf.copy_(z - part.reshape(leaf.shape))
        before = [leaf.detach().clone() for leaf in y.leaves]
        if shift.any():
            assert abs(error(solver, seed)) < 0.01
        solver.method.descend_penalized(batches[3], batches[0])
        moves.append(sum((a - b).square().sum() for a, b in zip(y.leaves, before, strict=True)))
    assert moves[1] < 1e-4 * moves[0]


# --- statistics of a module ---


class Plain(ModuleProblem):
    def __init__(self, module, shape):
        draws = torch.Generator().manual_seed(0)
        split = (torch.randn(shape, generator=draws).double(),)
        space = Space(decay=Positive(init=0.1, per_example=False))
        super().__init__(module.double(), space, split, split)

    def inner_objective(self, hypers, params, prediction, batch):
        return prediction.square().mean()

    outer_objective = inner_objective


NORMS = {
    "1d": (lambda m: nn.BatchNorm1d(3, momentum=m), (5, 3)),
    "1d, sequences": (lambda m: nn.BatchNorm1d(3, momentum=m), (5, 3, 4)),
    "2d": (lambda m: nn.BatchNorm2d(3, momentum=m), (5, 3, 2, 4)),
    "3d, no gain": (lambda m: nn.BatchNorm3d(3, momentum=m, affine=False), (5, 3, 2, 2, 2)),
    "synchronized": (lambda m: nn.SyncBatchNorm(3, momentum=m), (5, 3, 4)),
    "instances": (
        lambda m: nn.InstanceNorm1d(3, momentum=m, track_running_stats=True),
        (5, 3, 4),
    ),
}


def statistics(problem):
    params, carry = problem.init(torch.Generator())
    batch = problem.data(torch.device("cpu"), torch.Generator()).train.peek()
    hypers = problem.space.constrain(problem.space.init())
    draws = torch.Generator()
    found = problem.statistics(hypers, params, carry, batch, draws)
    after = problem.predict(hypers, params, carry, batch, train=True, generator=draws)[1]
    return found, after


@pytest.mark.parametrize("name", NORMS)
def test_statistics_are_what_the_running_ones_tend_to(name):
    make, shape = NORMS[name]
    first = nn.Linear(shape[-1], shape[-1])
    problem = Plain(nn.Sequential(first, make(1.0), nn.Tanh()), shape)
    found, after = statistics(problem)
    assert set(found) == {n for n in after if "running" in n}
    for key, value in found.items():
        torch.testing.assert_close(value, after[key])


def test_a_norm_that_is_called_twice_has_the_average_that_many_batches_lead_to():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=0.3)

        def forward(self, x):
            return self.norm(torch.tanh(self.norm(self.first(x))))

    problem = Plain(Twice(), (5, 3))
    found, _ = statistics(problem)
    params, carry = problem.init(torch.Generator())
    batch = problem.data(torch.device("cpu"), torch.Generator()).train.peek()
    for _ in range(200):
        _, carry = problem.predict({}, params, carry, batch, train=True, generator=None)
    for key, value in found.items():
        torch.testing.assert_close(value, carry[key])


def frozen():
    return nn.BatchNorm1d(3).eval()


@pytest.mark.parametrize(
    "make",
    [
        frozen,
        partial(nn.BatchNorm1d, 3, track_running_stats=False),
        partial(nn.BatchNorm1d, 3, momentum=0.0),
        partial(nn.LayerNorm, 3),
    ],
    ids=["frozen", "no running statistics", "no momentum", "layer norm"],
)
def test_other_norms_have_no_statistics_that_follow(make):
    problem = Plain(nn.Sequential(nn.Linear(3, 3), make(), nn.Linear(3, 2)), (5, 3))
    assert statistics(problem)[0] == {}
    assert not ready(problem, Implicit()).core.follows


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2, 2)])
def test_evaluation_is_differentiable_in_the_statistics(shape):
    x = torch.randn(shape).double()
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    weight, bias = torch.randn(3).double(), torch.randn(3).double()

    def evaluated(mean, var):
        with Evaluated():
            return F.batch_norm(x, mean, var, weight, bias, training=False, eps=0.1)

    plain = F.batch_norm(x, mean, var, weight, bias, training=False, eps=0.1)
    assert torch.equal(evaluated(mean, var), plain)
    leaves = mean.requires_grad_(), var.requires_grad_()
    torch.testing.assert_close(evaluated(*leaves), plain)
    assert torch.autograd.gradcheck(evaluated, leaves)


# --- a carry of one's own ---


class Averaged(Problem):
    """L_T = ½ (w − λ)², and L_V = ½ (w + 2c − 1)² with a moving average c of w² in the carry.

    w*(λ) = λ and c = λ², so dL_V/dλ = (λ + 2λ² − 1)(1 + 4λ).
    """

    follows = True

    def __init__(self):
        self.space = Space(x=Positive(init=0.7))

    def init(self, generator):
        return {"w": torch.full((1,), 0.7).double()}, {"c": torch.full((1,), 0.49).double()}

    def data(self, device, generator):
        split = (torch.zeros(2, 1).double(),)
        return streams(split, split, batch_size=None, device=device, generator=generator)

    def predict(self, hypers, params, carry, batch, *, train, generator):
        w = params["w"]
        if train:
            return w, {"c": 0.9 * carry["c"] + 0.1 * w.detach().square()}
        return w + 2 * carry["c"], carry

    def statistics(self, hypers, params, carry, batch, generator):
        return {"c": params["w"].square()} if self.follows else {}

    def inner_objective(self, hypers, params, prediction, batch):
        return 0.5 * (prediction - hypers["x"].mean()).square().mean()

    def outer_objective(self, hypers, params, prediction, batch):
        return 0.5 * (prediction - 1).square().mean()


def test_an_average_in_a_carry_of_ones_own_follows_by_its_hook():
    x, space = 0.7, Space(x=Positive(init=0.7))
    u = space.init(torch.float64).requires_grad_()
    slope = float(torch.autograd.grad(space.constrain(u)["x"], u)[0])
    exact = (x + 2 * x**2 - 1) * (1 + 4 * x) * slope
    solver = ready(Averaged(), Implicit(**STILL))
    assert float(solver.hypergradient()) == pytest.approx(exact, rel=1e-6)
    problem = Averaged()
    problem.follows = False
    solver = ready(problem, Implicit(**STILL))
    assert float(solver.hypergradient()) == pytest.approx(exact / (1 + 4 * x), rel=1e-6)


# --- perturbations per example ---


@pytest.mark.parametrize("make", [normed, convolutional], ids=["dense", "convolutions"])
def test_per_example_statistics_stay_constant_and_a_warning_has_the_size(make):
    solver = ready(make(), delta_stn(inner_steps=2))
    assert not solver.core.follows
    for _ in range(20):
        metrics = {name: float(value) for name, value in solver.step().items()}
    before = copy.deepcopy(solver.state_dict())
    found = solver.warnings(metrics)
    assert "set solver.per_example=false" in found["statistics"]
    assert "%" in found["statistics"]
    assert torch.equal(before["core"]["generator"], solver.state_dict()["core"]["generator"])
    assert "statistics" not in solver.warnings(metrics)  # once


def test_the_named_remedy_lets_statistics_follow():
    solver = ready(normed(per_example=False), delta_stn())
    assert solver.core.follows
    metrics = {name: float(value) for name, value in solver.step().items()}
    assert "statistics" not in solver.warnings(metrics)


def test_a_resumed_solver_takes_the_same_steps():
    make = partial(normed, dropout=0.3, per_example=False)
    first, second = (ready(make(), delta_stn(inner_steps=2)) for _ in range(2))
    for _ in range(3):
        first.step()
    for part in ("train", "valid"):
        getattr(second.core.data, part).load_state_dict(getattr(first.core.data, part).state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for solver in (first, second):
        solver.step()
    assert torch.equal(first.core.search.u, second.core.search.u)
