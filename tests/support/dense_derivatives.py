"""Problems in float64, and the dense derivatives of their losses at a solver's point."""

from functools import partial

import pytest
import torch
import torch.nn as nn

from bilevel import Interval, ModuleProblem, Positive, Real, Space
from bilevel.problems import Quadratic, Ridge
from tests.support.solver_cases import Decayed, set_to, sgd

F64 = torch.float64


class Noisy(Decayed):
    """A tanh network with decay and input noise of a tuned, differentiable strength."""

    def __init__(self, batch_size=None):
        space = {
            "strength": Interval(low=0.0, high=1.0, init=0.4, per_example=False),
            "decay": Positive(init=0.3, per_example=False),
        }
        super().__init__(
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
            (24, 4),
            batch_size=batch_size,
            **space,
        )

    def inputs(self, hypers, batch, *, train, generator):
        x = batch[0]
        if train:
            x = x * (
                1 + hypers["strength"] * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            )
        return (x,), {}


class Shifted(ModuleProblem):
    """½ (w − λ − t)² with the target t = ±s in turn: the gradient's noise is s for any w near λ."""

    def __init__(self, noise):
        split = (torch.tensor([[noise], [-noise]], dtype=F64),)
        module = nn.Linear(1, 1, bias=False).double()
        space = Space(shift=Real(init=2.0, per_example=False))
        super().__init__(module, space, split, (torch.zeros(1, 1, dtype=F64),), batch_size=1)

    def inputs(self, hypers, batch, *, train, generator):
        return (torch.ones_like(batch[0]),), {}

    def inner_objective(self, hypers, params, prediction, batch):
        return 0.5 * (prediction - hypers["shift"] - batch[0]).square().mean()

    def outer_objective(self, hypers, params, prediction, batch):
        return 0.5 * prediction.square().mean()


STARTS = [(0.0, 0.0, 0.0), (2.0, -2.0, 1.0), (-3.0, 3.0, 3.0)]


def rmsprop(lr, **options):
    return partial(torch.optim.RMSprop, lr=lr, **options)


def quadratic(direct=1.0, init=(0.5, -1.0, 2.0), condition=10.0):
    return Quadratic.random(
        5, len(init), condition, direct=direct, dtype=F64, space={"hyper": {"init": list(init)}}
    )


def ridge(init=0.0, per_feature=False):
    """Data for which λ* exists, one for all and per feature."""
    start = [init] * 3 if per_feature else init
    return Ridge.synthetic(
        features=3,
        noise=2.0,
        data_seed=5,
        dtype=F64,
        per_feature=per_feature,
        space={"log_decay": {"init": start}},
    )


PROBLEMS = {
    "quadratic": partial(quadratic, 0.0),
    "quadratic with a direct term": quadratic,
    "ridge": ridge,
    "ridge per feature": partial(ridge, per_feature=True),
}

all_problems = pytest.mark.parametrize("make_problem", PROBLEMS.values(), ids=PROBLEMS)


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def unflat(vector, like):
    return [
        part.view(t.shape)
        for part, t in zip(vector.split([t.numel() for t in like]), like, strict=True)
    ]


def dense(solver, w=None):
    """Return ∇_w L_T, H, ∂²L_T/∂w∂u [m, h], ∇_w L_V and ∂_u L_V at the solver's (w, u).

    The batches are the first ones, and the masks are the next ones.
    """
    problem, leaves, state = (
        solver.core.problem,
        solver.core.weights.leaves,
        solver.core.generator.get_state(),
    )
    w, u = flat(leaves) if w is None else w, solver.core.search.u.detach().clone()
    names = list(solver.core.weights.tensors)

    def inner(w, u):
        generator = torch.Generator().set_state(state)
        hypers = problem.space.constrain(u)
        params = dict(zip(names, unflat(w, leaves), strict=True))
        return problem.inner_loss(
            hypers, params, solver.core.carry, solver.core.data.train.peek(), generator
        )[0]

    def outer(w, u):
        params = dict(zip(names, unflat(w, leaves), strict=True))
        return problem.outer_loss(
            problem.space.constrain(u), params, solver.core.carry, solver.core.data.valid.peek()
        )[0]

    derivatives = torch.autograd.functional
    gradient, _ = derivatives.jacobian(inner, (w, u))
    (H, cross), _ = derivatives.hessian(inner, (w, u))
    outer_gradient, direct = derivatives.jacobian(outer, (w, u))
    return gradient, H, cross, outer_gradient, direct


def truth(problem):
    """The closed-form hypergradient where λ begins."""
    return problem.hypergradient(problem.space.constrain(problem.space.init(F64)))


def at_minimum(solver):
    """Leave w at w*(λ)."""
    best = solver.core.problem.best_response(solver.solution().hypers)
    for name, leaf in solver.core.weights.tensors.items():
        set_to(leaf, best[name])


def regret(solver):
    problem = solver.core.problem
    hypers = solver.solution().hypers
    return float(problem.exact(hypers)["regret"])


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


OPTIMIZERS = {
    "sgd": sgd(0.05),
    "momentum": sgd(0.05, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": sgd(0.05, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.02, betas=(0.8, 0.9), weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "rmsprop": rmsprop(0.02, alpha=0.8),
    "centered rmsprop": rmsprop(0.02, alpha=0.8, centered=True, momentum=0.5),
}
