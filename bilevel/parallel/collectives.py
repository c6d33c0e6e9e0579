"""From what all ranks hold to what each works on, and back: two operators that are each other's derivative.

    enter: replicated → local,   forward x ↦ x,                  backward ḡ ↦ Σ_ranks ḡ
    leave: local → replicated,   forward x ↦ Σ_ranks x,          backward ḡ ↦ ḡ

The derivative of either is the other, so that any number of derivatives is right by itself: a product with the Hessian is
summed over ranks inside a linear solve, and an unrolled step may be pulled back through. In forward mode both are linear, and
act on primal and tangent alike.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from bilevel.parallel.process_group import ProcessGroup


def enter(ranks: ProcessGroup, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, whose cotangents are summed over ranks in the backward pass: in one flat all-reduce for all of them.

    What needs no gradient is handed on as it is, and costs nothing.
    """
    return _through_duals(lambda parts: _moving(_Enter, ranks, parts), tensors)


def leave(ranks: ProcessGroup, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Σ over ranks of every tensor, in one flat all-reduce."""
    return _through_duals(lambda parts: list(_Leave.apply(ranks, *parts)), tensors)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.ranks = ranks
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        return None, *_some(_Leave, ctx.ranks, cotangents)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.ranks = ranks
        return tuple(_summed(ranks, tensors))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        return None, *_some(_Enter, ctx.ranks, cotangents)


def _some(
    operator: Any, ranks: ProcessGroup, cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The operator on those that are there: of what a loss does not depend on, there is no cotangent on any rank."""
    present = [g for g in cotangents if g is not None]
    moved = iter(operator.apply(ranks, *present) if present else ())
    return [None if g is None else next(moved) for g in cotangents]


def _moving(operator: Any, ranks: ProcessGroup, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The operator on those that need a gradient; the others as they are."""
    needed = [torch.is_grad_enabled() and t.requires_grad for t in tensors]
    moving = [t for t, wanted in zip(tensors, needed, strict=True) if wanted]
    moved = iter(operator.apply(ranks, *moving) if moving else ())
    return [next(moved) if wanted else t for t, wanted in zip(tensors, needed, strict=True)]


def _through_duals(
    act: Callable[[list[Tensor]], list[Tensor]], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """A linear `act` on primals and tangents.

    Written out, since a formula for forward mode on the functions themselves could not be differentiated again.
    """
    duals = [forward_ad.unpack_dual(t) for t in tensors]
    tangents = [dual.tangent for dual in duals if dual.tangent is not None]
    if not tangents:
        return act(list(tensors))
    acted = act([*(dual.primal for dual in duals), *tangents])
    moved = iter(acted[len(duals) :])
    return [
        primal if dual.tangent is None else forward_ad.make_dual(primal, next(moved))
        for primal, dual in zip(acted, duals, strict=False)
    ]


def _summed(ranks: ProcessGroup, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over ranks, of one buffer for each type."""
    out: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        buffer = torch.cat([tensors[i].reshape(-1) for i in places])
        ranks.sum(buffer)
        for i, part in zip(places, buffer.split([tensors[i].numel() for i in places]), strict=True):
            out[i] = part.view(tensors[i].shape)
    return out
