"""The hypergradients of this package, by its public interface."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.workloads import RATE, K, Work, network, penalty
from benchmarks.workloads import set_up
from bilevel import Batch, Hypers, ModuleProblem, Params, Prediction, Real, Space, solvers
from bilevel.solvers.base.descent import Descent


class Decayed(ModuleProblem):
    """A problem of the comparison as a user writes it: a module and two objectives.

    Args:
        work: the problem with its weights.
    """

    def __init__(self, work: Work) -> None:
        self.size = work.size
        init = work.u.double().tolist()
        space = Space(u=Real(init=init, shape=tuple(work.u.shape), per_example=False))
        super().__init__(module_of(work), space, work.train, work.valid)

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return F.cross_entropy(prediction, batch[1]) + penalty(
            self.size, list(params.values()), hypers["u"]
        )

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return F.cross_entropy(prediction, batch[1])


def module_of(work: Work) -> nn.Module:
    """Return the network as a module with the weights of `work`."""
    layers: list[nn.Module] = []
    for fan_in, out in pairwise(work.size.widths):
        layers += [nn.Linear(fan_in, out, bias=not work.size.per_weight), nn.Tanh()]
    module = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for p, t in zip(module.parameters(), work.w, strict=True):
            p.copy_(t)
        x = work.train[0]
        assert torch.equal(module(x), network(work.size, work.w, x))
    return module


def hypergradient(work: Work, solver: Descent) -> Callable[[], Tensor]:
    """Return `solver.hypergradient` on the validation examples, after set-up."""
    set_up(solver, Decayed(work), torch.device("cpu"))
    batch = solver.core.data.valid.peek()
    return lambda: solver.hypergradient(batch)


def cg(work: Work) -> Callable[[], Tensor]:
    """Return the hypergradient by K iterations of CG from 0."""
    solve = solvers.CG(iterations=K)
    return hypergradient(work, solvers.Implicit(linear_solve=solve, warm_start=False))


def neumann(work: Work) -> Callable[[], Tensor]:
    """Return the hypergradient by K terms of the series, at the given step."""
    solve = solvers.Neumann(terms=K, step=work.step)
    return hypergradient(work, solvers.Implicit(linear_solve=solve))


def reverse(work: Work) -> Callable[[], Tensor]:
    """Return the hypergradient through K steps of gradient descent, which are taken anew."""
    optimizer = partial(torch.optim.SGD, lr=RATE)
    return hypergradient(
        work, solvers.Unrolled(inner_steps=K, inner_optimizer=optimizer, restart=True)
    )


OURS: dict[str, Callable[[Work], Callable[[], Tensor]]] = {
    "CG": cg,
    "Neumann": neumann,
    "reverse": reverse,
}
