"""Per-example weights W(b) = W₀ + diag(s_b) W₁, never formed, and the registry of their rules."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from bilevel import BilevelError
from bilevel.params import PerExampleWeight
from bilevel.solvers.response.row_counts import PER_BATCH, Counted, Counter

with warnings.catch_warnings():
    # the first dual of a process loads PyTorch's decompositions, which use deprecated functions
    for category in (FutureWarning, DeprecationWarning):  # torch 2.11 has the second
        warnings.simplefilter("ignore", category)
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))

RULES: dict[Any, Callable[..., Any]] = {}
"""The response rule of each torch function; `rule` adds to it."""


def rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a response rule for `functions`.

    The rule takes the arguments of the function, at least one of which is a `ResponseWeight`.
    Where the function is linear in the weight, the rule calls `add_response`. Where the weight is
    small (a gain, a shift), it may use the weights of all examples in full, `dense()`.

    Example:
        >>> import torch.nn.functional as F
        >>> @rule(F.bilinear)
        ... def bilinear(x, z, weight, bias=None):
        ...     first, second = primal(x), primal(z)
        ...     out = F.bilinear(x, z, weight.base, None if bias is None else bias.base)
        ...     units = F.bilinear(first, second, weight.response)
        ...     out = weight.add_response(out, units, weight.scale)
        ...     return out if bias is None else bias.add_response(out, bias.response, bias.scale)
    """

    def register(apply: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            RULES[function] = apply
        return apply

    return register


class MissingRule(BilevelError):
    """Raised when a function without a response rule receives a per-example weight."""


def getters(*names: str) -> set[Any]:
    """Return the functions that `__torch_function__` receives when these attributes are read."""
    return {getattr(Tensor, name).__get__ for name in names}


METADATA = getters(
    "shape",
    "ndim",
    "dtype",
    "device",
    "requires_grad",
    "is_cuda",
    "layout",
    "is_nested",
    "is_sparse",
    "grad_fn",
) | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.is_floating_point,
    Tensor.__len__,
    Tensor.stride,
    torch.is_floating_point,
    torch.numel,
}


class ResponseWeight(PerExampleWeight, Counted, Tensor):
    """The weight W₀ + diag(s_b) W₁ of every example b; s_b scales one axis of the weight.

    It has the shape of the ordinary weight, so that a module accepts it as a parameter. Functions
    act on it by the rules in `RULES`. A function without a rule raises `MissingRule`; nothing is
    ever computed with W₀ alone.

    Attributes:
        base: W₀, [*shape].
        response: W₁, [*shape].
        scale: s, [B, n], with n = shape[axis]; [B, 1] for a scalar weight.
        axis: the axis of the weight that s scales: 0 for output units, 1 for the columns of an
            embedding.
        tangent: True for the linearization at W₀, a forward-mode dual with primal W₀ and tangent
            diag(s) W₁.
    """

    base: Tensor
    response: Tensor
    scale: Tensor
    axis: int
    tangent: bool

    @staticmethod
    def of(
        base: Tensor,
        response: Tensor,
        scale: Tensor,
        axis: int = 0,
        *,
        tangent: bool = False,
        label: str = "a weight",
        counter: Counter | None = None,
    ) -> "ResponseWeight":
        """Return the weight with these parts; error messages use `label`."""
        self = base.detach().as_subclass(ResponseWeight)
        self.base = base
        self.response = response
        self.scale = scale
        self.examples = scale.shape[0]
        self.axis = axis
        self.tangent = tangent
        self.label = label
        self.counter = Counter() if counter is None else counter
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RULES:
            return RULES[func](*args, **kwargs)
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        raise missing(func, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"ResponseWeight({self.label}, {tuple(self.base.shape)}, "
            f"scale={tuple(self.scale.shape)}, tangent={self.tangent})"
        )

    def add_response(self, out: Tensor, units: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return out + scale ∘ units; for a linearization, only the tangent of `out` changes.

        The primal of a linearization carries no graph of the response, because its scale is zero.

        Args:
            out: the output of the function at W₀.
            units: the output of the function at W₁.
            scale: s, in a shape that broadcasts against `units`; None for 1.
        """
        # under autocast, products have a narrower dtype than what is added to them
        units = units.to(out.dtype)
        scale = None if scale is None else scale.to(out.dtype)
        examples, rows = self.examples, out.shape[0]
        if rows > examples > 1:  # the k rows of each example share its scale, without copies of it
            out, units = (by_example(t, rows, rows // examples) for t in (out, units))
            scale = None if scale is None else by_example(scale, rows, rows // examples)
            return self.add_response(out, units, scale).flatten(0, 1)
        if not self.tangent:
            return out + units if scale is None else torch.addcmul(out, scale, units)
        value, dot = forward_ad.unpack_dual(out)
        if dot is None:
            change = units if scale is None else scale * units
        else:
            change = dot + units if scale is None else torch.addcmul(dot, scale, units)
        if change.shape[0] > rows:  # all examples share the input
            value = value.expand(change.shape[0], *value.shape[1:]).contiguous()
        return forward_ad.make_dual(value, change.expand_as(value))

    def broadcast_scale(self, ndim: int, axis: int) -> Tensor:
        """Return s as a view with `ndim` axes: examples first, the scaled units at `axis`."""
        shape = [1] * ndim
        shape[0], shape[axis] = self.scale.shape
        return self.scale.reshape(shape)

    def scale_inputs(self, x: Tensor, axis: int) -> Tensor:
        """Return s ∘ x, with the scaled units at `axis` of x."""
        scale, rows, examples = self.broadcast_scale(x.ndim, axis), len(x), self.examples
        if not rows > examples > 1:
            return scale * x
        return (scale[:, None] * by_example(x, rows, rows // examples)).flatten(0, 1)

    def change(self) -> Tensor:
        """Return diag(s_b) W₁ of every example, [B, *shape]."""
        if not self.base.ndim:
            return self.scale[:, 0] * self.response
        return self.broadcast_scale(self.base.ndim + 1, 1 + self.axis) * self.response

    def dense(self, k: int = 1) -> Tensor:
        """Return the weights in full, [B·k, *shape]; a dual for a linearization.

        Use it for small weights only, such as gains and shifts.

        Args:
            k: the number of rows for each example.
        """
        return dense(self.base, self.change(), k, tangent=self.tangent)

    def parts(self) -> tuple[Tensor, ...]:
        return self.base, self.response, self.scale

    def with_parts(self, *parts: Tensor) -> "ResponseWeight":
        base, response, scale = parts
        return self._like(base, response, scale, self.axis)

    def transposed(self) -> "ResponseWeight":
        """Return the transpose of a matrix; the scale moves to the other axis."""
        return self._like(self.base.t(), self.response.t(), self.scale, 1 - self.axis)

    def as_row(self) -> "ResponseWeight":
        """Return a vector as the only row of a matrix."""
        return self._like(self.base[None], self.response[None], self.scale, 1)

    def rows(self, some: slice) -> "ResponseWeight":
        """Return some rows along the first axis."""
        scale = self.scale[:, some] if self.axis == 0 else self.scale
        return self._like(self.base[some], self.response[some], scale, self.axis)

    def masked(self, mask: Tensor) -> "ResponseWeight":
        """Return M ∘ W for a mask M [*shape] that all examples share (DropConnect).

        W₀ and W₁ get the same mask.
        """
        return self._like(self.base * mask, self.response * mask, self.scale, self.axis)

    def _like(self, base: Tensor, response: Tensor, scale: Tensor, axis: int) -> "ResponseWeight":
        options: dict[str, Any] = {
            "tangent": self.tangent,
            "label": self.label,
            "counter": self.counter,
        }
        return ResponseWeight.of(base, response, scale, axis, **options)


def missing(func: Any, args: Any, kwargs: Any) -> MissingRule:
    """Return the error that `func` has no rule, with the names of its per-example weights."""
    return MissingRule(
        f"there is no response rule for `{getattr(func, '__name__', func)}`, which acts on "
        f"{_labels(args, kwargs)}; register one with bilevel.solvers.rule, {PER_BATCH}, or use "
        "another layer"
    )


def by_example(t: Tensor, rows: int, k: int) -> Tensor:
    """Return a tensor of B·k rows as [B, k, …], and one of B rows or of one row as [·, 1, …]."""
    return t.unflatten(0, (-1, k)) if t.shape[0] == rows else t.unsqueeze(1)


def dense(base: Tensor, change: Tensor, k: int = 1, *, tangent: bool) -> Tensor:
    """Return W₀ + ΔW(b), [B·k, *shape], or the dual (W₀, ΔW(b)), from ΔW [B, *shape]."""
    if k > 1:
        change = change[:, None].expand(-1, k, *change.shape[1:]).flatten(0, 1)
    base = base.expand_as(change)
    return forward_ad.make_dual(base.contiguous(), change) if tangent else base + change


def primal(x: Tensor) -> Tensor:
    """Return the primal of a dual tensor; return any other tensor unchanged."""
    return forward_ad.unpack_dual(x).primal


def tangent(x: Tensor) -> Tensor | None:
    """Return the tangent of a dual tensor, or None."""
    return forward_ad.unpack_dual(x).tangent


def _labels(args: Any, kwargs: Any) -> str:
    leaves = [
        a
        for part in (*args, *kwargs.values())
        for a in (part if isinstance(part, (list, tuple)) else [part])
    ]
    return " and ".join(f"`{a.label}`" for a in leaves if hasattr(a, "label"))
