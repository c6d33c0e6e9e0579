"""Where a hyperparameter lives, where it starts, and the map between its own units and unconstrained coordinates."""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel.errors import BilevelError
from bilevel.text import near

OPTIMIZER_SETTINGS = ("lr", "momentum", "beta1", "beta2", "alpha", "eps", "weight_decay")
"""What may be tuned of the inner optimizer, under PyTorch's names; Adam's `betas` are two."""


@dataclass(frozen=True, kw_only=True)
class Domain(ABC):
    """One hyperparameter: where it lives, where it starts, how it is perturbed.

    Attributes:
        init: initial value in its own units, a number or nested lists of shape `shape`.
        scale: initial σ of the perturbation, in unconstrained coordinates (the paper: 1).
        shape: of the hyperparameter; () for a number.
        differentiable: whether ∂L_T/∂λ exists; False where the problem samples with it or rounds it.
        per_example: whether a perturbed value may differ from example to example within a batch.
        frozen: a constant; it is no coordinate of u.
        optimizer: the setting of the inner optimizer that it is (`lr`, `momentum`, …), None for one that the problem reads;
            such a one is a number for all examples.
    """

    init: Any
    scale: float = 1.0
    shape: tuple[int, ...] = ()
    differentiable: bool = True
    per_example: bool = True
    frozen: bool = False
    optimizer: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.shape, Sequence) or not all(
            type(n) is int and n >= 0 for n in self.shape
        ):
            raise BilevelError(
                f"shape={self.shape!r} is no shape; give a tuple of whole numbers, () for a single value"
            )
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.optimizer is not None:
            if self.optimizer not in OPTIMIZER_SETTINGS:
                raise BilevelError(
                    f"optimizer={self.optimizer!r}{near(str(self.optimizer), OPTIMIZER_SETTINGS)} is no setting of an inner "
                    f"optimizer; there are {', '.join(OPTIMIZER_SETTINGS)}"
                )
            if self.shape:
                raise BilevelError(
                    f"a setting of the inner optimizer is one number, not of shape {self.shape}"
                )
            object.__setattr__(self, "per_example", False)  # there is one optimizer for all of them
        for name in ("differentiable", "per_example", "frozen"):
            if not isinstance(getattr(self, name), bool):
                raise BilevelError(
                    f"{name}={getattr(self, name)!r} is neither true nor false; give one of the two"
                )
        try:
            if _holds_truth(self.init):
                raise TypeError
            value = torch.as_tensor(self.init, dtype=torch.float64)
            value.expand(self.shape)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise BilevelError(
                f"init={_brief(self.init)} is not a number, or numbers of shape {self.shape}; give one value per entry"
            ) from None
        if not bool(torch.isfinite(value).all()):
            raise BilevelError(
                f"init={_brief(self.init)} is not finite; give a finite initial value"
            )
        if not (_is_finite(self.scale) and self.scale > 0):
            raise BilevelError(
                f"scale={self.scale!r} is no standard deviation; give a positive number (the paper uses 1)"
            )
        self._check(value)

    @property
    def numel(self) -> int:
        """Coordinates in u."""
        return math.prod(self.shape)

    def initial(self) -> Tensor:
        """The initial value as a float64 tensor of `shape`."""
        return torch.as_tensor(self.init, dtype=torch.float64).expand(self.shape).clone()

    @abstractmethod
    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        """From unconstrained coordinates to the hyperparameter's own units, elementwise (over the last axis for a simplex)."""

    @abstractmethod
    def unconstrain(self, value: Tensor) -> Tensor:
        """The inverse of `constrain`."""

    def _check(self, value: Tensor) -> None:
        """Raise where the initial value lies outside; on the edge, where u is infinite, a frozen one may lie."""


@dataclass(frozen=True, kw_only=True)
class Real(Domain):
    """Any real number: λ = u."""

    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        return u

    def unconstrain(self, value: Tensor) -> Tensor:
        return value


@dataclass(frozen=True, kw_only=True)
class Positive(Domain):
    """λ = low + softplus(u), above `low`."""

    low: float = 0.0

    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.low + F.softplus(
            u, threshold=40.0
        )  # the default, 20, is off by 2e-9 there: too much in float64

    def unconstrain(self, value: Tensor) -> Tensor:
        return softplus_inverse(value - self.low)

    def _check(self, value: Tensor) -> None:
        _check_bounds(low=self.low)
        if self.frozen and bool((value < self.low).any()):
            raise BilevelError(
                f"init={_brief(self.init)} is below {self.low:g}; choose one that is not"
            )
        if not self.frozen and bool((value <= self.low).any()):
            raise BilevelError(
                f"init={_brief(self.init)} is not above {self.low:g}, where u = -∞; choose one a little above it"
            )


@dataclass(frozen=True, kw_only=True)
class Interval(Domain):
    """λ = low + (high − low) sigmoid(u), inside (low, high)."""

    low: float
    high: float

    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(u)

    def unconstrain(self, value: Tensor) -> Tensor:
        return torch.log(value - self.low) - torch.log(self.high - value)

    def _check(self, value: Tensor) -> None:
        _check_bounds(low=self.low, high=self.high)
        if not self.low < self.high:
            raise BilevelError(
                f"({self.low:g}, {self.high:g}) is no interval; low must be below high"
            )
        if bool(((value < self.low) | (value > self.high)).any()):
            raise BilevelError(
                f"init={_brief(self.init)} is outside ({self.low:g}, {self.high:g}); choose one inside"
            )
        if not self.frozen and bool(((value == self.low) | (value == self.high)).any()):
            raise BilevelError(
                f"init={_brief(self.init)} lies on the edge of ({self.low:g}, {self.high:g}), where u is infinite; "
                f"choose one strictly inside, {self.low + 0.05 * (self.high - self.low):g} say"
            )


@dataclass(frozen=True, kw_only=True)
class Integer(Interval):
    """A whole number in [low, high]: an interval rounded stochastically, up with probability equal to the fraction.

    The mean of the rounded values is the value itself, so that a value on a whole number does not collapse to the one below
    (as it does under floor). Without a generator it is rounded to the nearest.
    """

    differentiable: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low != int(self.low) or self.high != int(self.high):
            raise BilevelError(
                f"[{self.low:g}, {self.high:g}] does not begin and end at whole numbers; an Integer needs them"
            )
        if self.frozen and bool((self.initial() != self.initial().round()).any()):
            raise BilevelError(
                f"init={_brief(self.init)} is no whole number, and a frozen Integer is not rounded; give one"
            )
        if self.differentiable:
            raise BilevelError(
                "an Integer is rounded and has no derivative; leave differentiable=False, or use an Interval"
            )

    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        value = super().constrain(u, generator)
        if generator is None:
            return torch.round(value)
        draw = torch.rand(value.shape, generator=generator, device=value.device, dtype=value.dtype)
        # the sum of a value and a draw just below 1 may itself be rounded up
        return torch.floor(value + draw).clamp(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Simplex(Domain):
    """Weights that are positive and sum to one over the last axis of `shape`: λ = softmax(u)."""

    per_example: bool = False

    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.softmax(u, dim=-1)

    def unconstrain(self, value: Tensor) -> Tensor:
        logits = torch.log(value)
        return logits - logits.mean(dim=-1, keepdim=True)

    def _check(self, value: Tensor) -> None:
        value = value.expand(self.shape)
        if not self.shape:
            raise BilevelError("a Simplex needs shape=(…, n), with n weights that sum to one")
        outside = value < 0 if self.frozen else value <= 0
        if bool(outside.any()) or not torch.allclose(
            value.sum(-1), torch.ones_like(value.sum(-1)), atol=1e-6
        ):
            raise BilevelError(
                f"init={_brief(self.init)} is not inside the simplex; "
                f"give positive weights that sum to one (1/{self.shape[-1]} each, say)"
            )
        if self.per_example:
            raise BilevelError("a Simplex is perturbed per batch; leave per_example=False")


def _check_bounds(**bounds: Any) -> None:
    for name, bound in bounds.items():
        if not _is_finite(bound):
            raise BilevelError(f"{name}={bound!r} is no finite number; give one")


def _is_finite(value: Any) -> bool:
    """Whether it is a number, which true and false are not, that a float holds."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -sys.float_info.max <= value <= sys.float_info.max
    )


def _brief(value: Any) -> str:
    """What an error says of it: of a large one, its beginning."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} …"


def _holds_truth(value: Any) -> bool:
    """Whether true or false stands where a number should: PyTorch would take it for 1 or 0."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds_truth, value))
    return isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)


def softplus_inverse(y: Tensor) -> Tensor:
    """log(e^y − 1) for y > 0, in a form that neither overflows for large y nor loses small ones."""
    return y + torch.log(-torch.expm1(-y))


def optimizer_setting(setting: str, **fields: Any) -> Domain:
    """The domain of a setting of the inner optimizer: positive where it has no upper bound, else in (0, 1).

    Example:
        >>> optimizer_setting("lr", init=0.1).optimizer, type(optimizer_setting("momentum", init=0.9)).__name__
        ('lr', 'Interval')
    """
    if setting in ("lr", "eps", "weight_decay"):
        return Positive(optimizer=setting, **fields)
    return Interval(**{"low": 0.0, "high": 1.0} | fields, optimizer=setting)
