"""The cost of a step in units of one multiplication by all weights, by `FlopCounterMode`."""

import pytest
import torch
import torch.nn as nn

from bilevel.problems import MLP, Classification
from bilevel.problems.datasets.labelled_images import Images
from bilevel.solvers import Fixed, SelfTuning, centered_stn, delta_stn, stn
from bilevel.solvers.optim.optimized import descend
from tests.support.flops import count
from tests.support.solver_cases import all_flags, ready

B = 8


class Convolutions(nn.Module):
    """Two convolutions and a linear layer, with dropout before each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 16, 5, padding=2), nn.Conv2d(16, 32, 5, padding=2)
        self.head = nn.Linear(32 * 64, 10)

    def forward(self, x, drop=lambda site, x: x):
        x = torch.relu(self.first(drop(0, x)))
        return self.head(drop(2, torch.relu(self.second(drop(1, x)))).flatten(1))


# The paper's MLP at a quarter of its size. The first layer and the response's rows keep about their
# shares of a unit.
NETWORKS = {
    "mlp": (lambda: MLP([196, 300, 300, 300, 10]), (196,)),
    "convolutions": (Convolutions, (2, 8, 8)),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    """Return a problem, one unit, and the first layer's share of it.

    The gradient in the data is never needed.
    """
    make, shape = NETWORKS[request.param]
    split = torch.randn(B, *shape), torch.arange(B) % 10
    problem = Classification(
        make,
        Images(split, split, split, mean=0.0, std=1.0),
        sites=3 + (request.param == "mlp"),
        batch_size=B,
    )
    module = make()
    unit = count(lambda: module(split[0]))
    first = next(module.children()) if request.param == "convolutions" else module.layers[0]
    return problem, unit, count(lambda: first(split[0])) / unit


def stepped(problem, solver):
    """A solver past its first step, Θ away from zero, and a batch to train on."""
    solver = ready(problem, solver)
    solver.step()
    return solver, solver.core.data.train.next()


def within(spent, exact, most, rows=0.0):
    """Assert that `spent` is the exact count, plus at most `rows`, and within the budget."""
    assert exact <= spent + 1e-9 <= exact + rows + 2e-9
    assert spent <= most


def rows_cost(solver, unit, products=2):
    """Return the units of the products of ε [B, h] with U and V, forward and backward."""
    return products * 2 * B * solver.method.theta.tensors["rows"].numel() / unit


def test_plain_training_costs_three(network):
    problem, unit, first = network
    solver, _ = stepped(problem, Fixed(inner_steps=1))
    within(count(solver.step) / unit, 3 - first, 3)


def test_stn_costs_six(network):
    """Forward W₀x and W₁x; backward both to the inputs and both to the weights."""
    problem, unit, first = network
    solver, batch = stepped(problem, stn())
    within(
        count(lambda: solver.method.inner_step(batch)) / unit,
        6 - 2 * first,
        6,
        rows_cost(solver, unit),
    )


def test_delta_stn_costs_eight_at_most_three_for_w0_and_five_for_the_response(network):
    """Forward W₀x, W₀ẋ and W₁x; backward W₀ᵀδ and ∂W₁: no W₁ẋ, nothing through the primal."""
    problem, unit, first = network
    solver, batch = stepped(problem, delta_stn())
    whole = count(lambda: solver.method.inner_step(batch)) / unit

    def response():
        loss, _ = solver.method.perturbed_loss(
            solver.core.weights.detached(), solver.method.response_carry, batch
        )
        descend(loss, solver.method.theta)

    part = count(response) / unit
    rows = rows_cost(
        solver, unit, products=4
    )  # once for the prediction, once for the penalties on w
    within(part, 5 - 2 * first, 5, rows)
    within(whole - part, 3 - first, 3)
    within(whole, 8 - 3 * first, 8, rows)


@pytest.mark.parametrize(
    "cheaper", [{"response_every": 2}, {"response_fraction": 0.5}], ids=["every", "fraction"]
)
def test_a_cheaper_response_costs_as_much_as_its_share(network, cheaper):
    """Three for w₀, and half of five for the response: 11/6 of plain training, or less."""
    problem, unit, first = network
    solver, _ = stepped(problem, delta_stn(inner_steps=2, **cheaper))
    spent = count(lambda: solver.step(warmup=True)) / (2 * unit)
    within(spent, 5.5 - 2 * first, 5.5, rows_cost(solver, unit, products=4) / 2)
    plain, _ = stepped(problem, Fixed(inner_steps=2))
    rows = spent - (5.5 - 2 * first)
    assert (spent - rows) / (count(plain.step) / (2 * unit)) <= 11 / 6


def test_centered_stn_costs_three_and_five(network):
    """Θ's own step: forward W₀x and W₁x, backward both to the inputs, and ∂W₁."""
    problem, unit, first = network
    solver, batch = stepped(problem, centered_stn())
    within(
        count(lambda: solver.method.inner_step(batch)) / unit,
        8 - 3 * first,
        8,
        rows_cost(solver, unit),
    )


def test_an_outer_step_costs_four_and_forms_no_gradient_of_a_weight(network):
    """Forward W₀x and W₁x; backward both to the inputs of every layer but the first."""
    problem, unit, first = network
    solver, _ = stepped(problem, delta_stn())
    batch = solver.core.data.valid.next()
    within(
        count(lambda: solver.method.outer_step(batch)) / unit,
        4 - 2 * first,
        4,
        rows_cost(solver, unit),
    )


def leaves_of(loss):
    """The leaf tensors that a backward pass would reach."""
    found, queue, seen = [], [loss.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        queue.extend(parent for parent, _ in node.next_functions)
    return found


@all_flags
def test_an_outer_loss_reaches_u_and_s_alone(flags, monkeypatch):
    make, shape = NETWORKS["mlp"]
    split = torch.randn(B, *shape), torch.arange(B) % 10
    solver, _ = stepped(
        Classification(make, Images(split, split, split, 0.0, 1.0), sites=4, batch_size=B),
        SelfTuning(**flags),
    )
    seen = []
    monkeypatch.setattr(
        "bilevel.solvers.base.method.descend",
        lambda loss, *groups: seen.extend(leaves_of(loss)) or [None],
    )
    solver.method.outer_step(solver.core.data.valid.next())
    assert {id(t) for t in seen} == {id(solver.core.search.u), id(solver.core.search.s)}
