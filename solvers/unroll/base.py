"""The interface of unrolled inner steps, and the modes by which they are differentiated in λ."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import Batch, Hypers, Params
from bilevel.solvers.autodiff.pullback import backward
from bilevel.solvers.unroll.trajectory import InnerGradient, InnerState, Trajectory

Vectors: TypeAlias = Sequence[Tensor | None]
"""Tangents or cotangents of several tensors, in their shapes; None for zeros."""


class Unroll(ABC):
    """The inner steps of one round, and ŵ after them.

    Args:
        trajectory: takes the steps.
        start: the state before the first step, a constant.
        u: u₀, at which λ is held, [h].
        steps: the number of steps.
        last: the number of steps that are differentiated, the last ones.

    Attributes:
        point: the present state.
        hypers: λ; its tuned entries are `leaves` of the graph.
        settings: the settings of the optimizer in this round; None where λ holds some of them.
        growth: [], the growth of a derivative over the differentiated steps, where it is known;
            far above 1, the steps amplify any change of w.
    """

    growth: Tensor | None = None

    def __init__(
        self,
        trajectory: Trajectory,
        start: InnerState,
        u: Float[Tensor, " h"],
        *,
        steps: int,
        last: int,
    ) -> None:
        self.trajectory = trajectory
        self.point = start
        self.u = u.detach().clone()
        self.space = trajectory.problem.space
        self.first = steps - last
        self.last = last
        self.taken = 0
        hypers = self.space.constrain(self.u)
        self.leaves = [hypers[name].detach().requires_grad_() for name in self.space.tuned]
        self.hypers: Hypers = hypers | dict(zip(self.space.tuned, self.leaves, strict=True))
        optimizer = trajectory.optimizer
        # where λ holds settings, each step reads them anew, as a part of its graph
        self.settings = None if optimizer.tuned else optimizer.settings(self.hypers)
        self.prepare()

    def prepare(self) -> None:
        """Make what the derivatives need before the first step."""

    def inner_gradient(self, batch: Batch) -> InnerGradient:
        """Return ∇L_T at the present state in w and in the leaves of λ, differentiable in both."""
        return self.trajectory.inner_gradient(
            self.point,
            self.hypers,
            batch,
            create_graph=True,
            decomposed=True,
            extra_inputs=self.leaves,
        )

    @abstractmethod
    def step(self, batch: Batch) -> Tensor:
        """Take one step on `batch` and return L_T before it, as a constant."""

    @abstractmethod
    def respond(self, offset: Float[Tensor, " h"]) -> Params:
        """Return ŵ(u₀ + offset), differentiable in `offset` at 0."""


class Mode(ABC):
    """A way to differentiate inner steps: the value of `mode` in `Unrolled`."""

    @abstractmethod
    def begin(
        self, trajectory: Trajectory, start: InnerState, u: Float[Tensor, " h"], steps: int
    ) -> Unroll:
        """Return the unroll of `steps` steps from `start`, before the first of them."""


def norm_of(tensors: Vectors) -> Tensor:
    """Return the norm of all tensors together, []; at least one is not None."""
    return torch.stack([t.detach().norm() for t in tensors if t is not None]).norm()


def partial_vjp(
    outputs: Sequence[Tensor | None],
    cotangents: Vectors,
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> Vectors:
    """Return (∂outputs/∂inputs)ᵀ cotangents, with None for an input that no output depends on."""
    pairs = [
        (y, v)
        for y, v in zip(outputs, cotangents, strict=True)
        if v is not None and y is not None and y.requires_grad
    ]
    if not pairs or not inputs:
        return [None] * len(inputs)
    moving, vectors = zip(*pairs, strict=True)
    return backward(moving, vectors, inputs, retain_graph=retain_graph)
