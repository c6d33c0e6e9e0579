"""The cost of a hypergradient in plain gradients, counted exactly by `FlopCounterMode`."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.decays import decays
from bilevel.solvers import (
    CG,
    SAMA,
    SOBA,
    FixedPoint,
    Forward,
    GaussNewton,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
    Penalty,
    Reverse,
    Unrolled,
)
from tests.support.solver_cases import ready, sgd

SIZES = (784, 64, 64, 10)


def count(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def plain_gradient(solver):
    hypers = solver.core.problem.space.constrain(solver.core.search.u0)
    params = {name: p.detach().requires_grad_() for name, p in solver.core.weights.tensors.items()}
    loss, _ = solver.core.problem.inner_loss(
        hypers, params, solver.core.carry, solver.core.data.train.peek(), solver.core.generator
    )
    torch.autograd.grad(loss, list(params.values()))


def cost(make, hypers=4):
    """Return the cost of one hypergradient, or of the round that it unrolls, in plain gradients."""
    solver = ready(decays(hypers, SIZES), make())
    solver.step()  # warm starts, power iterations
    work = (
        solver.step
        if isinstance(solver, Unrolled)
        else lambda: solver.hypergradient(solver.core.data.valid.peek())
    )
    return count(work) / count(lambda: plain_gradient(solver))


SOLVES = {
    "CG": lambda k: CG(iterations=k),
    "Neumann": lambda k: Neumann(terms=k),
    "fixed point": lambda k: FixedPoint(iterations=k),
    "Nyström": lambda k: Nystrom(rank=k),
}


@pytest.mark.parametrize("k", [2, 10])
@pytest.mark.parametrize("hypers", [4, None], ids=["few", "per weight"])
@pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES)
def test_an_implicit_hypergradient_costs_two_and_a_half_gradients_a_term(solve, hypers, k):
    assert cost(lambda: Implicit(linear_solve=solve(k)), hypers) <= 2.5 * k + 5


def test_a_term_more_costs_one_product_more():
    """A product is at most 2.5 gradients, and the solve holds nothing that grows otherwise."""
    few, many = (cost(partial(Implicit, linear_solve=CG(iterations=k))) for k in (5, 10))
    assert 5 <= many - few <= 12.5


def test_a_gauss_newton_product_costs_no_more_than_a_hessian_one():
    hessian, gauss_newton = (
        cost(lambda: Implicit(linear_solve=CG(iterations=20), curvature=curvature))  # noqa: B023
        for curvature in (Implicit().curvature, GaussNewton())
    )
    assert gauss_newton <= hessian


@pytest.mark.parametrize(
    "mode",
    [Reverse(), Reverse(truncate=3), Reverse(checkpoint=True)],
    ids=["whole", "truncated", "again"],
)
def test_reverse_mode_costs_four_gradients_a_step(mode):
    assert cost(lambda: Unrolled(inner_steps=10, inner_optimizer=sgd(0.01), mode=mode)) <= 4 * 10


def test_truncation_saves_the_graph_of_the_steps_before():
    whole, truncated = (
        cost(lambda: Unrolled(inner_steps=10, mode=Reverse(truncate=truncate)))  # noqa: B023
        for truncate in (None, 2)
    )
    assert truncated < 0.7 * whole


@pytest.mark.parametrize("hypers", [1, 4])
def test_forward_mode_costs_two_gradients_a_step_and_hyperparameter(hypers):
    assert cost(lambda: Unrolled(inner_steps=5, mode=Forward()), hypers) <= (2 * hypers + 1.5) * 5


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: Implicit(linear_solve=Identity()), 7.5),
        (SAMA, 3.5),
        (SOBA, 5.0),
        (Penalty, 3.5),
    ],
    ids=["identity", "SAMA", "SOBA", "penalty"],
)
def test_what_needs_no_solve_costs_a_few_gradients(make, most):
    assert cost(make) <= most
