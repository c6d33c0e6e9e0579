"""How K inner steps are differentiated in λ; here by going back through them, in `bilevel.solvers.unroll.forward` along with them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, isqrt
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bilevel import Batch, BilevelError, Hypers, Params
from bilevel.solvers.unroll.trajectory import InnerGradient, InnerState, Trajectory

Vectors: TypeAlias = Sequence[Tensor | None]
"""One for each of some tensors, in its space; None for zeros."""


class Unroll(ABC):
    """Inner steps as they are taken, and ŵ after them.

    Args:
        trajectory: what a step is.
        start: where the first one begins; a constant.
        u: u₀, where λ is held, [h].
        steps: how many steps will be taken.
        last: how many of them are differentiated, the last ones.

    Attributes:
        point: where training stands.
        hypers: λ, of which the tuned ones are `leaves` of the graph.
    """

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
        self.prepare()

    def prepare(self) -> None:
        """Make what the derivatives need before the first step."""

    def inner_gradient(self, batch: Batch) -> InnerGradient:
        """∇L_T in w and in the leaves of λ where training stands, to be differentiated again in both."""
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
        """One step on `batch`; L_T before it, as a constant."""

    @abstractmethod
    def respond(self, offset: Float[Tensor, " h"]) -> Params:
        """ŵ(u₀ + offset), differentiable in offset at 0."""


class Mode(ABC):
    """A way to differentiate inner steps, as a value to compose `Unrolled` with."""

    @abstractmethod
    def begin(
        self, trajectory: Trajectory, start: InnerState, u: Float[Tensor, " h"], steps: int
    ) -> Unroll:
        """Before the first of `steps` steps."""


@dataclass(frozen=True)
class Reverse(Mode):
    """Back-propagation through the steps: any number of hyperparameters, and memory for every step that is differentiated.

        α_K = ∂_w L_V,    α_{k−1} = (∂Φ_k/∂w)ᵀ α_k,    dL_V/dλ = ∂_λ L_V + Σ_k (∂Φ_k/∂λ)ᵀ α_k

    Args:
        truncate: how many steps are differentiated, the last ones; None for all. The error is that of the terms left out.
        checkpoint: keep the state at ⌈√K⌉ of the steps alone and recompute the rest in the backward pass, with the same batches
            and masks: memory grows with √K, for about a quarter more time.

    Source: Maclaurin et al., ICML 2015; Franceschi et al., ICML 2017, section 3.1; truncation: Shaban et al., AISTATS 2019;
    checkpoints: Chen et al., 2016.

    Raises:
        BilevelError: `truncate` below 1.
    """

    truncate: int | None = None
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.truncate is not None and self.truncate < 1:
            raise BilevelError(
                f"truncate={self.truncate} would differentiate no step; give 1 or more, or null for all of them"
            )

    def begin(
        self, trajectory: Trajectory, start: InnerState, u: Float[Tensor, " h"], steps: int
    ) -> Unroll:
        last = steps if self.truncate is None else min(self.truncate, steps)
        kind = Checkpointed if self.checkpoint else StoredGraph
        return kind(trajectory, start, u, steps=steps, last=last)


class ReverseUnroll(Unroll):
    """Steps of which the `last` are differentiated by pulling ∂_w L_V back through them."""

    def step(self, batch: Batch) -> Tensor:
        if self.taken < self.first:
            self.point, loss = self.trajectory.advance(
                self.point, self.hypers, batch, create_graph=False, decomposed=False
            )
        else:
            self.point, loss = self.graph_step(batch)
        self.taken += 1
        return loss

    def respond(self, offset: Float[Tensor, " h"]) -> Params:
        at = self.space.constrain(self.u + offset)
        weights = [w.detach() for w in self.point.params.values()]
        answer = _Answer.apply(
            self.pull, len(self.leaves), *(at[name] for name in self.space.tuned), *weights
        )
        return dict(zip(self.point.params, answer, strict=True))

    @abstractmethod
    def graph_step(self, batch: Batch) -> tuple[InnerState, Tensor]:
        """A step that is differentiated later."""

    @abstractmethod
    def pull(self, cotangents: Vectors) -> Vectors:
        """(∂w_K/∂λ)ᵀ applied to `cotangents`, one for each weight: one for each leaf of λ."""


class StoredGraph(ReverseUnroll):
    """All in one graph, which one pull consumes: to retain it would cost a fifth more time."""

    def graph_step(self, batch: Batch) -> tuple[InnerState, Tensor]:
        return self.trajectory.advance(
            self.point, self.hypers, batch, create_graph=True, decomposed=True
        )

    def pull(self, cotangents: Vectors) -> Vectors:
        return partial_vjp(list(self.point.params.values()), cotangents, self.leaves)


class Segment(NamedTuple):
    """Steps to recompute: where they start, the generator's state there, and their batches."""

    start: InnerState
    masks: Tensor
    batches: list[Batch]


class Checkpointed(ReverseUnroll):
    """Segments of about √K steps, run without a graph, and once more with one when their turn comes in the backward pass."""

    def prepare(self) -> None:
        segments = isqrt(self.last - 1) + 1
        self.length = ceil(self.last / segments)
        self.segments: list[Segment] = []

    def graph_step(self, batch: Batch) -> tuple[InnerState, Tensor]:
        if (self.taken - self.first) % self.length == 0:
            self.segments.append(
                Segment(self.point, self.trajectory.generator.get_state(), [])
            )  # the state lies on the host
        self.segments[-1].batches.append(batch)
        return self.trajectory.advance(
            self.point, self.hypers, batch, create_graph=False, decomposed=True
        )

    def pull(self, cotangents: Vectors) -> Vectors:
        generator = self.trajectory.generator
        now, total = generator.get_state(), [torch.zeros_like(leaf) for leaf in self.leaves]
        memory = len(self.point.tensors()) - len(cotangents)
        adjoint = [*cotangents, *[None] * memory]  # L_V does not see the optimizer's memory
        for segment in reversed(self.segments):
            generator.set_state(segment.masks)
            moving = segment is not self.segments[0]
            start = segment.start.replaced(
                t.detach().requires_grad_(moving) for t in segment.start.tensors()
            )
            end = start
            for batch in segment.batches:
                end, _ = self.trajectory.advance(
                    end, self.hypers, batch, create_graph=True, decomposed=True
                )
            inputs = [*self.leaves, *(start.tensors() if moving else ())]
            arrived = partial_vjp(end.tensors(), adjoint, inputs)
            total = [t if g is None else t + g for t, g in zip(total, arrived, strict=False)]
            adjoint = list(arrived[len(self.leaves) :])
        generator.set_state(now)
        return total


class _Answer(torch.autograd.Function):
    """The weights as they are, with `pull` for their derivative in λ."""

    @staticmethod
    def forward(
        ctx: Any, pull: Callable[[Vectors], Vectors], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.pull, ctx.inputs = pull, len(tensors)
        return tensors[count:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        arrived = ctx.pull(cotangents)
        return None, None, *arrived, *[None] * (ctx.inputs - len(arrived))


def partial_vjp(
    outputs: Sequence[Tensor | None],
    cotangents: Vectors,
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> Vectors:
    """Vectors of `outputs`, pulled back to `inputs`; None where nothing arrives."""
    pairs = [
        (y, v)
        for y, v in zip(outputs, cotangents, strict=True)
        if v is not None and y is not None and y.requires_grad
    ]
    if not pairs or not inputs:
        return [None] * len(inputs)
    moving, vectors = zip(*pairs, strict=True)
    return torch.autograd.grad(
        moving, inputs, vectors, retain_graph=retain_graph, allow_unused=True
    )
