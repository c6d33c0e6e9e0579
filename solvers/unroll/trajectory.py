"""Inner training as a function of λ: one step w_{k+1} = Φ(w_k; λ, batch), which autograd may follow."""

from collections.abc import Iterable, Sequence, Set
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import Batch, Carry, Hypers, Problem
from bilevel.params import Params, detached
from bilevel.solvers.autodiff.decompositions import twice_differentiable
from bilevel.solvers.optim.functional import FunctionalOptimizer, Moments


class InnerState(NamedTuple):
    """Where training stands: weights, the optimizer's memory, and the carry (a constant of every step)."""

    params: Params
    moments: Moments
    carry: Carry

    def tensors(self) -> list[Tensor]:
        """What a step depends on, and is differentiated in: the weights, then the memory."""
        return [
            *self.params.values(),
            *(slot for slots in self.moments.slots.values() for slot in slots.values()),
        ]

    def replaced(self, tensors: Iterable[Tensor]) -> "InnerState":
        """The same with other `tensors`, in that order."""
        new = iter(tensors)
        params = {name: next(new) for name in self.params}
        slots = {
            name: {key: next(new) for key in slots} for name, slots in self.moments.slots.items()
        }
        return InnerState(params, Moments(slots, self.moments.steps), self.carry)

    def constant(self) -> "InnerState":
        """The same, cut from the graph."""
        return self.replaced(t.detach() for t in self.tensors())


class InnerGradient(NamedTuple):
    """∇_w L_T at a point.

    Attributes:
        params: w as the graph of the gradients knows it.
        gradients: by weight, then by what else was asked for; None where L_T does not depend on it.
        loss: L_T, as a constant.
        carry: what the pass hands on, as a constant.
    """

    params: Params
    gradients: Sequence[Tensor | None]
    loss: Tensor
    carry: Carry


def lacks_second_derivative(gradients: Iterable[Tensor | None]) -> bool:
    """Whether a function on the way to `gradients` can be differentiated once alone.

    Autograd says so for its own functions; of a custom one that is marked `once_differentiable` it leaves the second derivative
    out, in silence, where derivatives in chosen tensors are asked for.
    """
    nodes, seen = [g.grad_fn for g in gradients if g is not None], set()
    while nodes:
        if (node := nodes.pop()) is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


class Trajectory:
    """Steps of the inner optimizer on L_T, pure: nothing changes but the state of `generator`.

    Args:
        problem: whose L_T is descended.
        optimizer: the inner optimizer.
        generator: of the masks.
        functions: what the network calls; what cannot be differentiated twice is composed while a graph is kept.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: FunctionalOptimizer,
        generator: torch.Generator,
        functions: Set[Any] = frozenset(),
    ) -> None:
        self.problem, self.optimizer, self.generator, self.functions = (
            problem,
            optimizer,
            generator,
            functions,
        )

    def step(
        self, point: InnerState, u: Tensor, batch: Batch, *, create_graph: bool
    ) -> tuple[InnerState, Tensor]:
        """Φ, and L_T at `point` as a constant; differentiable in `u`, and in `point`, when `create_graph`.

        Args:
            point: where to start from.
            u: unconstrained coordinates, [h].
            batch: of training.
            create_graph: whether the step shall be differentiated itself.
        """
        hypers = self.problem.space.constrain(u if create_graph else u.detach(), self.generator)
        return self.advance(
            point, hypers, batch, create_graph=create_graph, decomposed=create_graph
        )

    def advance(
        self,
        point: InnerState,
        hypers: Hypers,
        batch: Batch,
        *,
        create_graph: bool,
        decomposed: bool,
    ) -> tuple[InnerState, Tensor]:
        """`step` at λ itself; `decomposed` rounds as a differentiable step does, whether or not there is a graph."""
        gradient = self.inner_gradient(
            point, hypers, batch, create_graph=create_graph, decomposed=decomposed
        )
        with torch.set_grad_enabled(create_graph):
            after, moments = self.optimizer.step(
                gradient.params, point.moments, gradient.gradients, self.optimizer.settings(hypers)
            )
        end = InnerState(after, moments, gradient.carry)
        return end if create_graph else end.constant(), gradient.loss

    def inner_gradient(
        self,
        point: InnerState,
        hypers: Hypers,
        batch: Batch,
        *,
        create_graph: bool,
        decomposed: bool,
        extra_inputs: Sequence[Tensor] = (),
    ) -> InnerGradient:
        """∇_w L_T, and the derivatives of L_T in the tensors `extra_inputs`."""
        with torch.enable_grad():
            params = {
                name: p if create_graph and p.requires_grad else p.detach().requires_grad_()
                for name, p in point.params.items()
            }
            with twice_differentiable(self.functions) if decomposed else nullcontext():
                loss, carry = self.problem.inner_loss(
                    hypers, params, point.carry, batch, self.generator
                )
            inputs = [*params.values(), *extra_inputs]
            gradients = torch.autograd.grad(
                loss, inputs, create_graph=create_graph, allow_unused=True
            )
        return InnerGradient(params, gradients, loss.detach(), detached(carry))
