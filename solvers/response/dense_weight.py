"""Small per-example weights in full, W(b) = W₀ + ΔW(b), while a network reshapes them.

A position table, a class token or a bias of attention is expanded, sliced, reshaped or looked up
by fixed indices before it meets an input with an example axis. Such a function moves entries only,
so it acts on W₀ and on every ΔW(b) alike. Where the weight is expanded along its first axis, or
meets an input, its examples take the place of that axis.
"""

from collections.abc import Callable
from functools import partial
from numbers import Number
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import BilevelError
from bilevel.solvers.response.per_example_weight import (
    METADATA,
    ResponseWeight,
    dense,
    getters,
    missing,
    rule,
    tangent,
)
from bilevel.solvers.response.row_counts import PER_BATCH, SHARED, Counted, Counter

MOVES = {
    *(Tensor.reshape, Tensor.view, Tensor.flatten, Tensor.unflatten, Tensor.contiguous),
    *(Tensor.unsqueeze, Tensor.squeeze, Tensor.permute, Tensor.transpose, Tensor.movedim),
    *(Tensor.__getitem__, Tensor.index_select, Tensor.select, Tensor.narrow, Tensor.clone),
    *(Tensor.to, Tensor.float, Tensor.double, Tensor.type_as),
    *(torch.reshape, torch.flatten, torch.unflatten, torch.unsqueeze, torch.squeeze),
    *(torch.permute, torch.transpose, torch.movedim, torch.index_select, torch.select),
    *(torch.narrow, torch.clone),
    *getters("T", "mT"),
}
"""Functions of one tensor that move or cast its entries."""

RULES: dict[Any, Callable[..., Any]] = {}
"""The other functions of a `DenseWeight`."""


class DenseWeight(Counted, Tensor):
    """A per-example weight whose ΔW is written out; it has the shape of the ordinary weight.

    Attributes:
        base: W₀, [*shape].
        change: ΔW, [B, *shape].
        tangent: True for the dual (W₀, ΔW).
    """

    base: Tensor
    change: Tensor
    tangent: bool

    @staticmethod
    def of(
        base: Tensor, change: Tensor, *, tangent: bool, label: str, counter: Counter
    ) -> "DenseWeight":
        """Return the weight with these parts; error messages use `label`."""
        self = base.detach().as_subclass(DenseWeight)
        self.base = base
        self.change = change
        self.examples = change.shape[0]
        self.tangent = tangent
        self.label = label
        self.counter = counter
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RULES:
            return RULES[func](*args, **kwargs)
        if func in MOVES and isinstance(args[0], DenseWeight):
            return args[0].moved(partial(_call, func, args[1:], kwargs))
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        raise missing(func, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DenseWeight({self.label}, {tuple(self.base.shape)}, tangent={self.tangent})"

    def dense(self, k: int = 1) -> Tensor:
        """Return the weights in full, [B·k, *shape]; a dual for a linearization."""
        return dense(self.base, self.change, k, tangent=self.tangent)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "DenseWeight":
        """Return the weight after a linear function of its entries."""
        return self.like(move(self.base), torch.vmap(move)(self.change))

    def like(self, base: Tensor, change: Tensor) -> "DenseWeight":
        """Return a weight of the same examples and name, with other parts."""
        named: dict[str, Any] = {"label": self.label, "counter": self.counter}
        return DenseWeight.of(base, change, tangent=self.tangent, **named)

    def beside(self, x: Tensor) -> Tensor:
        """Return the weights in full, with as many axes as x, so that they broadcast against it.

        Raises:
            BilevelError: x has no axis for the examples, or the weight has entries along it.
        """
        first = self.ndim == x.ndim and len(self) == 1
        if not (first or self.ndim < x.ndim):
            raise BilevelError(
                f"`{self.label}` varies per example and has the shape {tuple(self.shape)}, but its "
                f"partner of shape {tuple(x.shape)} has no example axis beside these axes; put "
                f"that axis first, use bilevel.squared_norm for a penalty, or {PER_BATCH}"
            )
        full = self.dense(self.check_examples(x))
        if first:
            full = full.squeeze(1)
        return full.reshape(len(full), *[1] * (x.ndim - full.ndim), *full.shape[1:])


def _call(func: Any, args: Any, kwargs: Any, t: Tensor) -> Tensor:
    return func(t, *args, **kwargs)


def written_out(weight: Any) -> DenseWeight:
    """Return any per-example weight with its ΔW written out."""
    if isinstance(weight, DenseWeight):
        return weight
    named: dict[str, Any] = {"label": weight.label, "counter": weight.counter}
    return DenseWeight.of(weight.base, weight.change(), tangent=weight.tangent, **named)


def is_per_example(x: Any) -> bool:
    """Return whether x is a per-example weight of either kind."""
    return isinstance(x, (ResponseWeight, DenseWeight))


def both(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a rule of both kinds of per-example weights."""

    def register(apply: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(functions, apply))
        return rule(*functions)(apply)

    return register


def _move(func: Any, weight: ResponseWeight, *args: Any, **kwargs: Any) -> Any:
    """Return a moved weight; a slice of rows, or a view of the same rows, is not written out."""
    if func is Tensor.__getitem__ and isinstance(args[0], slice):
        return weight.rows(args[0])
    return written_out(weight).moved(partial(_call, func, args, kwargs))


for _function in MOVES - getters("T", "mT"):
    rule(_function)(partial(_move, _function))


@both(Tensor.expand)
def expand(weight: Any, *sizes: Any) -> Tensor:
    """Return the weight along further axes, of which the first may be that of the examples.

    The first axis is new, or had one entry: a class token [1, 1, n] becomes [B, 1, n].
    """
    small = written_out(weight)
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    new = len(sizes) - small.ndim
    if new == 0 and (len(small) != 1 or sizes[0] == -1):
        return small.moved(lambda t: t.expand(sizes))
    k = small.count_rows(small, sizes[0], may_share=True)
    if k == SHARED:
        return small.moved(lambda t: t.expand(sizes))
    full = small.dense(k)
    full = full.squeeze(1) if new == 0 else full
    between = [1] * (len(sizes) - full.ndim)
    return full.reshape(len(full), *between, *full.shape[1:]).expand(sizes)


@both(Tensor.expand_as)
def expand_as(weight: Any, other: Tensor) -> Tensor:
    """Return the weight expanded to the shape of another tensor."""
    return expand(weight, tuple(other.shape))


@both(torch.broadcast_to, Tensor.broadcast_to)
def broadcast_to(weight: Any, size: Any) -> Tensor:
    """Return the weight expanded to `size`."""
    return expand(weight, tuple(size))


@both(Tensor.repeat)
def repeat(weight: Any, *repeats: Any) -> Tensor:
    """Return the weight repeated along its axes; the first may become that of the examples."""
    repeats = (
        tuple(repeats[0]) if len(repeats) == 1 and not isinstance(repeats[0], int) else repeats
    )
    new = len(repeats) - weight.ndim
    small = written_out(weight).moved(lambda t: t.reshape(*[1] * new, *t.shape))
    if len(small) == 1:
        k = small.count_rows(small, repeats[0], may_share=True)
        if k != SHARED:
            return small.dense(k).squeeze(1).repeat(1, *repeats[1:])
    return small.moved(lambda t: t.repeat(repeats))


@both(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(input: Any, other: Any, *, alpha: float = 1) -> Tensor:
    """Return X + b, for a per-example b that broadcasts against X: a bias, a position table."""
    if alpha != 1:
        raise BilevelError(f"alpha={alpha} of `add` has no response rule; write x + alpha * y")
    weight, x = (input, other) if is_per_example(input) else (other, input)
    if isinstance(weight, DenseWeight) and (is_per_example(x) or _is_constant(x, weight)):
        return _sum(weight, x)
    return torch.add(x, beside(weight, x, "add"))


@both(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def mul(input: Any, other: Any) -> Tensor:
    """Return X ∘ g, for a per-example g that broadcasts against X, or M ∘ W for a mask M.

    X ∘ g is a gain that is written out. A mask has the shape of W.
    """
    weight, x = (input, other) if is_per_example(input) else (other, input)
    if isinstance(weight, ResponseWeight) and _is_mask(x, weight):
        return weight.masked(x)
    if isinstance(weight, DenseWeight) and _is_constant(x, weight):
        return weight.moved(lambda t: t * x)
    return torch.mul(x, beside(weight, x, "mul"))


@both(Tensor.add_, Tensor.__iadd__)
def add_(input: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    """Add a per-example weight to X in place."""
    return input.add_(beside(other, input, "add_"), alpha=alpha)


@both(Tensor.mul_, Tensor.__imul__)
def mul_(input: Tensor, other: Any) -> Tensor:
    """Multiply X by a per-example weight in place."""
    return input.mul_(beside(other, input, "mul_"))


def _sum(weight: DenseWeight, x: Any) -> DenseWeight:
    """Return the sum of a small weight and of a constant, or of another small weight."""
    if not is_per_example(x):
        base = weight.base + x
        grown = [1] * (base.ndim - weight.ndim)
        change = weight.change.reshape(weight.examples, *grown, *weight.shape)
        return weight.like(base, change.expand(-1, *base.shape))
    x = written_out(x)
    return weight.like(weight.base + x.base, torch.vmap(torch.add)(weight.change, x.change))


def _is_constant(x: Any, weight: DenseWeight) -> bool:
    """Return whether x is a number, or a tensor that has no axis for the examples."""
    if isinstance(x, Number):
        return True
    plain = isinstance(x, Tensor) and not is_per_example(x) and tangent(x) is None
    return plain and not x.requires_grad and x.ndim < weight.ndim


def _is_mask(mask: Any, weight: ResponseWeight) -> bool:
    """Return whether `mask` is a constant of the shape of a weight with two or more axes."""
    plain = isinstance(mask, Tensor) and not is_per_example(mask) and tangent(mask) is None
    return plain and weight.ndim >= 2 and mask.shape == weight.shape


def beside(weight: Any, x: Any, name: str) -> Tensor:
    """Return a per-example weight in full, so that it broadcasts against an input x of `name`."""
    if not is_per_example(weight):
        raise missing(getattr(Tensor, name), (x,), {})
    if not isinstance(x, Tensor) or is_per_example(x):
        raise BilevelError(
            f"`{name}` combines `{weight.label}`, which varies per example, with "
            f"{type(x).__name__}, but only an input with an example axis has a response rule; "
            f"use bilevel.squared_norm for a penalty, or {PER_BATCH}"
        )
    return written_out(weight).beside(x)


@rule(F.embedding)
def embedding(input: Tensor, weight: ResponseWeight, *args: Any, **kwargs: Any) -> Tensor:
    """Return E₀[input] + s ∘ E₁[input], with one scale per embedding column.

    Ids without an example axis (positions) give a small weight.
    """
    if weight.axis != 1:
        raise BilevelError(
            f"embedding `{weight.label}` is scaled along its rows, but its response needs one "
            "scale per column; create the weight with axis=1"
        )
    rows = len(input) if input.ndim else 1
    k = weight.count_rows(input, rows, may_share=True)
    out = F.embedding(input, weight.base, *args, **kwargs)
    units = F.embedding(input, weight.response, *args, **kwargs)
    if k == SHARED:
        change = weight.broadcast_scale(out.ndim + 1, -1) * units
        named: dict[str, Any] = {"label": weight.label, "counter": weight.counter}
        return DenseWeight.of(out, change, tangent=weight.tangent, **named)
    return weight.add_response(out, units, weight.broadcast_scale(out.ndim, -1))
