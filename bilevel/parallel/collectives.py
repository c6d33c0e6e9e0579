"""Two operators between tensors that all ranks hold and tensors that each rank computes.

    enter: replicated → local,   forward x ↦ x,                  backward ḡ ↦ Σ_ranks ḡ
    leave: local → replicated,   forward x ↦ Σ_ranks x,          backward ḡ ↦ ḡ

Each is the derivative of the other, so derivatives of any order are correct. A product with the
Hessian is summed over ranks inside a linear solve, and an unrolled step can be differentiated. In
forward mode both are linear, and act on primal and tangent alike.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from bilevel.parallel.process_group import ProcessGroup


def enter(ranks: ProcessGroup, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors; the backward pass sums their cotangents over ranks.

    One flat all-reduce serves all of them. Tensors that need no gradient are returned as they are.
    """
    return _through_duals(lambda parts: _moving(_Enter, ranks, parts), tensors)


def leave(ranks: ProcessGroup, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum over ranks of every tensor, in one flat all-reduce."""
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
    """Apply the operator to the cotangents that exist.

    A tensor that a loss does not depend on has no cotangent on any rank.
    """
    present = [g for g in cotangents if g is not None]
    moved = iter(operator.apply(ranks, *present) if present else ())
    return [None if g is None else next(moved) for g in cotangents]


def _moving(operator: Any, ranks: ProcessGroup, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Apply the operator to the tensors that need a gradient; return the others as they are."""
    needed = [torch.is_grad_enabled() and t.requires_grad for t in tensors]
    moving = [t for t, wanted in zip(tensors, needed, strict=True) if wanted]
    moved = iter(operator.apply(ranks, *moving) if moving else ())
    return [next(moved) if wanted else t for t, wanted in zip(tensors, needed, strict=True)]


def _through_duals(
    act: Callable[[list[Tensor]], list[Tensor]], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Apply a linear `act` to primals and tangents.

    A `jvp` formula of the autograd functions could not be differentiated again.
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
    """Return the sums over ranks, with one buffer per type."""
    out: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        buffer = torch.cat([tensors[i].reshape(-1) for i in places])
        ranks.sum(buffer)
        for i, part in zip(places, buffer.split([tensors[i].numel() for i in places]), strict=True):
            out[i] = part.view(tensors[i].shape)
    return out
