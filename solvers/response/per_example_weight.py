"""Per-example weights W(b) = W₀ + diag(s_b) W₁, never formed, and the registry of their rules."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from bilevel import BilevelError
from bilevel.params import PerExampleWeight

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


_METADATA = getters(
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


class ResponseWeight(PerExampleWeight, Tensor):
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
        label: the name of the weight in error messages.
    """

    base: Tensor
    response: Tensor
    scale: Tensor
    axis: int
    tangent: bool
    label: str

    @staticmethod
    def of(
        base: Tensor,
        response: Tensor,
        scale: Tensor,
        axis: int = 0,
        *,
        tangent: bool = False,
        label: str = "a weight",
    ) -> "ResponseWeight":
        """Return the weight with these parts; error messages use `label`."""
        self = base.detach().as_subclass(ResponseWeight)
        self.base = base
        self.response = response
        self.scale = scale
        self.axis = axis
        self.tangent = tangent
        self.label = label
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RULES:
            return RULES[func](*args, **kwargs)
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", func)
        raise MissingRule(
            f"there is no response rule for `{name}`, which acts on {_labels(args, kwargs)}; "
            "register one with bilevel.solvers.rule, set per_example=False on every "
            "hyperparameter, or use another layer"
        )

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
        if not self.tangent:
            return out + units if scale is None else torch.addcmul(out, scale, units)
        value, dot = forward_ad.unpack_dual(out)
        if dot is None:
            change = units if scale is None else scale * units
            return forward_ad.make_dual(value, change.expand_as(value))
        dot = dot + units if scale is None else torch.addcmul(dot, scale, units)
        return forward_ad.make_dual(value, dot)

    def broadcast_scale(self, ndim: int, axis: int) -> Tensor:
        """Return s as a view with `ndim` axes: examples first, the scaled units at `axis`."""
        shape = [1] * ndim
        shape[0], shape[axis] = self.scale.shape
        return self.scale.reshape(shape)

    def dense(self) -> Tensor:
        """Return the weights in full, [B, *shape]; a dual for a linearization.

        Use it for small weights only, such as gains and shifts.
        """
        ndim = self.base.ndim + 1
        change = (
            self.broadcast_scale(ndim, 1 + self.axis) * self.response
            if self.base.ndim
            else self.scale[:, 0] * self.response
        )
        base = self.base.expand_as(change)
        if not self.tangent:
            return base + change
        return forward_ad.make_dual(base.contiguous(), change)

    def parts(self) -> tuple[Tensor, ...]:
        return self.base, self.response, self.scale

    def with_parts(self, *parts: Tensor) -> "ResponseWeight":
        base, response, scale = parts
        return ResponseWeight.of(
            base, response, scale, self.axis, tangent=self.tangent, label=self.label
        )

    def transposed(self) -> "ResponseWeight":
        """Return the transpose of a matrix; the scale moves to the other axis."""
        return ResponseWeight.of(
            self.base.t(),
            self.response.t(),
            self.scale,
            1 - self.axis,
            tangent=self.tangent,
            label=self.label,
        )

    def masked(self, mask: Tensor) -> "ResponseWeight":
        """Return M ∘ W for a mask M [*shape] that all examples share (DropConnect).

        W₀ and W₁ get the same mask.
        """
        return ResponseWeight.of(
            self.base * mask,
            self.response * mask,
            self.scale,
            self.axis,
            tangent=self.tangent,
            label=self.label,
        )

    def check_examples(self, x: Tensor) -> None:
        """Require one row of the input `x` for each example.

        Raises:
            BilevelError: the first axis of `x` is not the example axis.
        """
        if x.ndim == 0 or x.shape[0] != self.scale.shape[0]:
            raise BilevelError(
                f"`{self.label}` is perturbed for {self.scale.shape[0]} examples, but its input "
                f"has the shape {tuple(x.shape)}; keep the example axis first, or set "
                "per_example=False on every hyperparameter (for a network that folds time or "
                "patches into this axis)"
            )


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
    return " and ".join(f"`{a.label}`" for a in leaves if isinstance(a, ResponseWeight))
