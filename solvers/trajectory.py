"""Inner training as a function of λ: one step w_{k+1} = Φ(w_k; λ, batch), which autograd may follow."""

from collections.abc import Set
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import Batch, Carry, Problem
from bilevel.params import Params, detached
from solvers.composed import twice_differentiable
from solvers.updates import Moments, Twin


class Point(NamedTuple):
    """Where training stands: weights, the optimizer's memory, and the carry (a constant of every step)."""

    params: Params
    moments: Moments
    carry: Carry


class Trajectory:
    """Steps of the inner optimizer on L_T, pure: nothing changes but the state of `generator`.

    Args:
        problem: whose L_T is descended.
        twin: the inner optimizer.
        generator: of the masks.
        functions: what the network calls; what cannot be differentiated twice is composed while a graph is kept.
    """

    def __init__(self, problem: Problem, twin: Twin, generator: torch.Generator, functions: Set[Any] = frozenset()) -> None:
        self.problem, self.twin, self.generator, self.functions = problem, twin, generator, functions

    def step(self, point: Point, u: Tensor, batch: Batch, *, create_graph: bool) -> tuple[Point, Tensor]:
        """Φ, and L_T at `point` as a constant; differentiable in `u`, and in `point`, when `create_graph`.

        Args:
            point: where to start from.
            u: unconstrained coordinates, [h].
            batch: of training.
            create_graph: whether the step shall be differentiated itself.
        """
        with torch.enable_grad():
            hypers = self.problem.space.constrain(u if create_graph else u.detach(), self.generator)
            params = point.params if create_graph else detached(point.params)
            params = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in params.items()}
            with twice_differentiable(self.functions) if create_graph else nullcontext():
                loss, carry = self.problem.inner_loss(hypers, params, point.carry, batch, self.generator)
            gradients = torch.autograd.grad(loss, list(params.values()), create_graph=create_graph, materialize_grads=True)
        with torch.set_grad_enabled(create_graph):
            after, moments = self.twin.step(params, point.moments, gradients, self.twin.settings(hypers))
        if not create_graph:
            after = detached(after)
        return Point(after, moments, detached(carry)), loss.detach()
