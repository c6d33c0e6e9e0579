"""Reverse mode: back-propagation through K inner steps."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, isqrt
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bilevel import Batch, Params
from bilevel.solvers.unroll.base import Mode, Unroll, Vectors, norm_of, partial_vjp
from bilevel.solvers.unroll.trajectory import InnerState, Trajectory
from bilevel.validate import whole


@dataclass(frozen=True)
class Reverse(Mode):
    """Back-propagation through the steps, for any number of hyperparameters.

        α_K = ∂_w L_V,    α_{k−1} = (∂Φ_k/∂w)ᵀ α_k,    dL_V/dλ = ∂_λ L_V + Σ_k (∂Φ_k/∂λ)ᵀ α_k

    The memory grows with the number of differentiated steps.

    Args:
        truncate: differentiate the last `truncate` steps only; None for all steps. The error is the
            sum of the terms that are left out.
        checkpoint: keep the state at ⌈√K⌉ of the steps, and recompute the others in the backward
            pass with the same batches and masks. The memory then grows with √K, for about a quarter
            more time.

    Source: Maclaurin et al., ICML 2015; Franceschi et al., ICML 2017, section 3.1; truncation:
        Shaban et al., AISTATS 2019; checkpoints: Chen et al., 2016.

    Raises:
        BilevelError: `truncate` below 1.
    """

    truncate: int | None = None
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.truncate is not None:
            whole(1, "set it to 1 or more, or to null for all steps", truncate=self.truncate)

    def begin(
        self, trajectory: Trajectory, start: InnerState, u: Float[Tensor, " h"], steps: int
    ) -> Unroll:
        last = steps if self.truncate is None else min(self.truncate, steps)
        kind = Checkpointed if self.checkpoint else StoredGraph
        return kind(trajectory, start, u, steps=steps, last=last)


class ReverseUnroll(Unroll):
    """Steps of which the last ones are differentiated by pulling ∂_w L_V back through them."""

    def step(self, batch: Batch) -> Tensor:
        if self.taken < self.first:
            self.point, loss = self.trajectory.advance(
                self.point,
                self.hypers,
                batch,
                create_graph=False,
                decomposed=False,
                settings=self.settings,
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
        """Take a step that `pull` differentiates later; return the new state and L_T."""

    @abstractmethod
    def pull(self, cotangents: Vectors) -> Vectors:
        """Return (∂w_K/∂λ)ᵀ cotangents, one tensor for each leaf of λ.

        Args:
            cotangents: one tensor for each weight.
        """


class StoredGraph(ReverseUnroll):
    """All steps in one graph, which one pull frees; to retain it would cost a fifth more time."""

    def prepare(self) -> None:
        self.early: list[Tensor] = []

    def graph_step(self, batch: Batch) -> tuple[InnerState, Tensor]:
        after = self.trajectory.advance(
            self.point,
            self.hypers,
            batch,
            create_graph=True,
            decomposed=True,
            settings=self.settings,
        )
        if self.taken == self.first and self.last > 1:
            self.early = [w for w in after[0].params.values() if w.requires_grad]
        return after

    def pull(self, cotangents: Vectors) -> Vectors:
        # α_1 arises on the way to ∂L_V/∂λ, so its norm costs no further pass
        inputs, h = [*self.leaves, *self.early], len(self.leaves)
        arrived = partial_vjp(list(self.point.params.values()), cotangents, inputs)
        self.growth = growth_of(arrived[h:], cotangents)
        return arrived[:h]


def growth_of(early: Vectors, last: Vectors) -> Tensor | None:
    """Return ‖early‖/‖last‖ of two adjoints, [], and 0 for 0/0; None if one of them is unknown."""
    if all(t is None for t in early) or all(t is None for t in last):
        return None
    size = norm_of(last)
    return norm_of(early) / size.clamp_min(torch.finfo(size.dtype).tiny)


class Segment(NamedTuple):
    """Steps to recompute: the state and the generator's state before them, and their batches."""

    start: InnerState
    masks: Tensor
    batches: list[Batch]


class Checkpointed(ReverseUnroll):
    """Segments of about √K steps, run without a graph and again with one in the backward pass."""

    def prepare(self) -> None:
        segments = isqrt(self.last - 1) + 1
        self.length = ceil(self.last / segments)
        self.segments: list[Segment] = []

    def graph_step(self, batch: Batch) -> tuple[InnerState, Tensor]:
        if (self.taken - self.first) % self.length == 0:
            masks = self.trajectory.generator.get_state()  # a tensor on the host
            self.segments.append(Segment(self.point, masks, []))
        self.segments[-1].batches.append(batch)
        return self.trajectory.advance(
            self.point,
            self.hypers,
            batch,
            create_graph=False,
            decomposed=True,
            settings=self.settings,
        )

    def pull(self, cotangents: Vectors) -> Vectors:
        generator = self.trajectory.generator
        now, total = generator.get_state(), [torch.zeros_like(leaf) for leaf in self.leaves]
        memory = len(self.point.tensors()) - len(cotangents)
        adjoint = [*cotangents, *[None] * memory]  # L_V does not depend on the optimizer's memory
        for segment in reversed(self.segments):
            generator.set_state(segment.masks)
            moving = segment is not self.segments[0]
            start = segment.start.replaced(
                t.detach().requires_grad_(moving) for t in segment.start.tensors()
            )
            end = start
            for batch in segment.batches:
                end, _ = self.trajectory.advance(
                    end,
                    self.hypers,
                    batch,
                    create_graph=True,
                    decomposed=True,
                    settings=self.settings,
                )
            inputs = [*self.leaves, *(start.tensors() if moving else ())]
            arrived = partial_vjp(end.tensors(), adjoint, inputs)
            total = [t if g is None else t + g for t, g in zip(total, arrived, strict=False)]
            adjoint = list(arrived[len(self.leaves) :])
            if moving:
                self.growth = growth_of(adjoint[: len(cotangents)], cotangents)
        generator.set_state(now)
        return total


class _Answer(torch.autograd.Function):
    """The identity of the weights, with `pull` as their derivative in λ."""

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
