"""The inner step w_{k+1} = Φ(w_k; λ, batch) as a differentiable function."""

from collections.abc import Iterable, Sequence, Set
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import Batch, Carry, Hypers, Problem
from bilevel.params import Params, detached
from bilevel.solvers.autodiff.decompositions import Decomposed, twice_differentiable
from bilevel.solvers.autodiff.pullback import gradient_of
from bilevel.solvers.optim.functional import FunctionalOptimizer, Moments
from bilevel.solvers.optim.updates import Settings

AS_IT_IS = nullcontext()


class InnerState(NamedTuple):
    """The weights, the memory of the optimizer, and the carry (a constant of every step)."""

    params: Params
    moments: Moments
    carry: Carry

    def tensors(self) -> list[Tensor]:
        """Return the tensors that a step is differentiated in: the weights, then the memory."""
        return [
            *self.params.values(),
            *(slot for slots in self.moments.slots.values() for slot in slots.values()),
        ]

    def replaced(self, tensors: Iterable[Tensor]) -> "InnerState":
        """Return the state with other `tensors`, in the order of `tensors()`."""
        new = iter(tensors)
        params = {name: next(new) for name in self.params}
        slots = {
            name: {key: next(new) for key in slots} for name, slots in self.moments.slots.items()
        }
        return InnerState(params, Moments(slots, self.moments.steps), self.carry)

    def constant(self) -> "InnerState":
        """Return the state detached from the graph."""
        return self.replaced(t.detach() for t in self.tensors())


class InnerGradient(NamedTuple):
    """∇_w L_T at a state.

    Attributes:
        params: w, as in the graph of the gradients.
        gradients: one for each weight, then one for each extra input; None where L_T does not
            depend on it.
        loss: L_T, as a constant.
        carry: the carry after the pass, as a constant.
    """

    params: Params
    gradients: Sequence[Tensor | None]
    loss: Tensor
    carry: Carry


def lacks_second_derivative(gradients: Iterable[Tensor | None]) -> bool:
    """Return whether the graph of `gradients` has a function that is differentiable only once.

    Autograd raises for its own functions. For a custom function that is marked
    `once_differentiable`, it silently leaves out the second derivative in chosen inputs.
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
    """Steps of the inner optimizer on L_T, as pure functions; only the generator's state changes.

    Args:
        problem: the problem of L_T.
        optimizer: the inner optimizer.
        generator: for the masks.
        functions: the torch functions that the network calls; those that cannot be differentiated
            twice are decomposed while a graph is kept.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: FunctionalOptimizer,
        generator: torch.Generator,
        functions: Set[Any] = frozenset(),
    ) -> None:
        self.problem = problem
        self.optimizer = optimizer
        self.generator = generator
        self.functions = functions
        self._fused = isinstance(twice_differentiable(functions), Decomposed)

    def step(
        self, point: InnerState, u: Tensor, batch: Batch, *, create_graph: bool
    ) -> tuple[InnerState, Tensor]:
        """Return the state after one step, and L_T at `point` as a constant.

        Args:
            point: the state before the step.
            u: unconstrained coordinates, [h].
            batch: a training batch.
            create_graph: keep the graph, so that the step is differentiable in `u` and `point`.
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
        settings: Settings | None = None,
    ) -> tuple[InnerState, Tensor]:
        """Take `step` at λ in its own units.

        Args:
            point: the state before the step.
            hypers: λ.
            batch: a training batch.
            create_graph: keep the graph.
            decomposed: decompose the fused functions, so that a step without a graph has the same
                rounding errors as a step with one.
            settings: the settings of the optimizer at λ, if they are known.
        """
        settings = self.optimizer.settings(hypers) if settings is None else settings
        gradient = self.inner_gradient(
            point, hypers, batch, create_graph=create_graph, decomposed=decomposed
        )
        with torch.set_grad_enabled(create_graph):
            after, moments = self.optimizer.step(
                gradient.params, point.moments, gradient.gradients, settings
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
        """Return ∇_w L_T and the derivatives of L_T in `extra_inputs`."""
        with torch.enable_grad():
            params = {
                name: p if create_graph and p.requires_grad else p.detach().requires_grad_()
                for name, p in point.params.items()
            }
            fused = decomposed and self._fused
            with twice_differentiable(self.functions) if fused else AS_IT_IS:
                loss, carry = self.problem.inner_loss(
                    hypers, params, point.carry, batch, self.generator
                )
            inputs = [*params.values(), *extra_inputs]
            gradients = gradient_of(loss, inputs, create_graph=create_graph)
        return InnerGradient(params, gradients, loss.detach(), detached(carry))
