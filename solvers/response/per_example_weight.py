"""Weights that vary from example to example without ever being formed: W(ε) = W₀ + diag(s) W₁, one row of s per example."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from bilevel import BilevelError
from bilevel.params import PerExampleWeight

with warnings.catch_warnings():  # the first dual of a process loads PyTorch's decompositions, which warn of their own deprecated parts
    warnings.simplefilter("ignore", FutureWarning)
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))

RULES: dict[Any, Callable[..., Any]] = {}
"""How a torch function acts on a responding weight; `rule` adds to it."""


def rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register how `functions` act when one of their arguments is a `ResponseWeight`.

    The rule takes the function's own arguments. It answers with `responding` where the function is linear in its weight, or
    works on the dense `per_example` weights where those are small.

    Example:
        >>> import torch.nn.functional as F
        >>> @rule(F.bilinear)
        ... def bilinear(x, z, weight, bias=None):
        ...     first, second = primal(x), primal(z)
        ...     out = F.bilinear(x, z, weight.base, None if bias is None else bias.base)
        ...     out = weight.add_response(out, F.bilinear(first, second, weight.response), weight.scale)
        ...     return out if bias is None else bias.add_response(out, bias.response, bias.scale)
    """

    def register(apply: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            RULES[function] = apply
        return apply

    return register


class MissingRule(BilevelError):
    """A function met a weight that varies per example, and nobody has said what it does then."""


def getters(*names: str) -> set[Any]:
    """What `__torch_function__` is called with when an attribute of a tensor is read."""
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
    """W₀ + diag(s_b) W₁ for every example b, along `axis` of the weight.

    Its shape is the weight's own, so that a module takes it for its parameter. Functions act on it by the rules of `RULES`;
    one without a rule raises `MissingRule`, never computes with W₀ alone.

    Attributes:
        base: W₀, [*shape].
        response: W₁, [*shape].
        scale: s, [B, n], with n = shape[axis]; [B, 1] for a scalar weight.
        axis: which axis of the weight s scales: 0 for output units, the last for the columns of an embedding.
        tangent: read as a forward-mode dual with primal W₀ and tangent diag(s) W₁: the linearization at W₀.
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
        """Make one; `label` is what errors call it."""
        self = base.detach().as_subclass(ResponseWeight)
        self.base, self.response, self.scale = base, response, scale
        self.axis, self.tangent, self.label = axis, tangent, label
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RULES:
            return RULES[func](*args, **kwargs)
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        raise MissingRule(
            f"there is no response rule for `{getattr(func, '__name__', func)}`, which acts on {_labels(args, kwargs)}; "
            "register one with bilevel.solvers.response.per_example_weight.rule, perturb per batch (per_example=False on every hyperparameter), "
            "or use another layer"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # its stub names no argument
        return f"ResponseWeight({self.label}, {tuple(self.base.shape)}, scale={tuple(self.scale.shape)}, tangent={self.tangent})"

    def add_response(self, out: Tensor, units: Tensor, scale: Tensor | None = None) -> Tensor:
        """`out` + scale ∘ units: added to the value itself, or to its tangent alone when this is a linearization.

        The primal of a linearization carries no graph of the response: its scale is zero there.
        """
        units = units.to(
            out.dtype
        )  # under autocast, products are narrower than what is added to them
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
        """s as a view that broadcasts over an output of `ndim` axes: examples first, the scaled units at `axis`."""
        shape = [1] * ndim
        shape[0], shape[axis] = self.scale.shape
        return self.scale.reshape(shape)

    def dense(self) -> Tensor:
        """The weights in full, [B, *shape] (a dual when linearized): for elementwise weights, which are small."""
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
        """The transpose of a matrix: the scale moves to the other axis."""
        return ResponseWeight.of(
            self.base.t(),
            self.response.t(),
            self.scale,
            1 - self.axis,
            tangent=self.tangent,
            label=self.label,
        )

    def masked(self, mask: Tensor) -> "ResponseWeight":
        """M ∘ W for a mask [*shape] that all examples share (DropConnect): W₀ and W₁ are masked alike."""
        return ResponseWeight.of(
            self.base * mask,
            self.response * mask,
            self.scale,
            self.axis,
            tangent=self.tangent,
            label=self.label,
        )

    def check_examples(self, x: Tensor) -> None:
        """Raise where the first axis of the input is not the example axis."""
        if x.ndim == 0 or x.shape[0] != self.scale.shape[0]:
            raise BilevelError(
                f"{self.label} was perturbed for {self.scale.shape[0]} examples, but acts on an input of {tuple(x.shape)}; "
                "keep the example axis first (a network that folds time or patches into it cannot be perturbed per example: "
                "use per_example=False)"
            )


def primal(x: Tensor) -> Tensor:
    """The value of a dual tensor without its tangent; any other tensor as it is."""
    return forward_ad.unpack_dual(x).primal


def tangent(x: Tensor) -> Tensor | None:
    """The tangent of a dual tensor, if it has one."""
    return forward_ad.unpack_dual(x).tangent


def _labels(args: Any, kwargs: Any) -> str:
    leaves = [
        a
        for part in (*args, *kwargs.values())
        for a in (part if isinstance(part, (list, tuple)) else [part])
    ]
    return " and ".join(f"`{a.label}`" for a in leaves if isinstance(a, ResponseWeight))
