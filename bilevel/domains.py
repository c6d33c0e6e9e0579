"""Domains of hyperparameters, and the maps to and from unconstrained coordinates."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel.errors import BilevelError
from bilevel.name_patterns import Patterns
from bilevel.validate import finite, one_of, positive, wrong

OPTIMIZER_SETTINGS = ("lr", "momentum", "beta1", "beta2", "alpha", "eps", "weight_decay")
"""Tunable settings of the inner optimizer, by PyTorch's names; Adam's `betas` are two settings."""


@dataclass(frozen=True, kw_only=True)
class Domain(ABC):
    """One hyperparameter: its domain, its initial value and its perturbation.

    Attributes:
        init: initial value in the hyperparameter's own units, a number or nested lists of shape
            `shape`.
        scale: initial σ of the perturbation, in unconstrained coordinates (the paper: 1).
        shape: shape of the hyperparameter; () for a number.
        differentiable: True where ∂L_T/∂λ exists; False where the problem samples with it or rounds
            it.
        per_example: True where a perturbed value may differ from example to example within a batch.
        frozen: True for a constant, which has no coordinate in u.
        optimizer: the setting of the inner optimizer that the hyperparameter sets (`lr`,
            `momentum`, …), or None for a hyperparameter that the problem reads. Such a setting is
            one number for all examples.
        params: patterns of the names of weights, for a `weight_decay` of the optimizer that acts on
            these weights only (`"*.weight"`); None for all.

    Raises:
        BilevelError: a field is invalid, or `init` lies outside the domain.
    """

    init: Any
    scale: float = 1.0
    shape: tuple[int, ...] = ()
    differentiable: bool = True
    per_example: bool = True
    frozen: bool = False
    optimizer: str | None = None
    params: Patterns | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.shape, Sequence) or not all(
            type(n) is int and n >= 0 for n in self.shape
        ):
            raise wrong(
                "shape", self.shape, "must be a tuple of whole numbers", "use () for a single value"
            )
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.optimizer is not None:
            one_of(OPTIMIZER_SETTINGS, optimizer=self.optimizer)
            if self.shape:
                what = "must be () for a setting of the inner optimizer, which is one number"
                raise wrong("shape", self.shape, what, "leave shape out")
            object.__setattr__(self, "per_example", False)  # all examples share one optimizer
        if self.params is not None:
            if self.optimizer != "weight_decay":
                what = "selects weights for a weight decay of the inner optimizer only"
                raise wrong("params", self.params, what, 'set optimizer="weight_decay" too')
            if not isinstance(self.params, str):
                object.__setattr__(self, "params", tuple(self.params))
        for name in ("differentiable", "per_example", "frozen"):
            if not isinstance(getattr(self, name), bool):
                raise wrong(name, getattr(self, name), "must be true or false", "choose one")
        init = f"init={_brief(self.init)}"
        try:
            if _contains_bool(self.init):
                raise TypeError
            value = torch.as_tensor(self.init, dtype=torch.float64)
            value.expand(self.shape)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise BilevelError(
                f"{init} must be a number, or numbers of shape {self.shape}; give one for each "
                "entry"
            ) from None
        if not bool(torch.isfinite(value).all()):
            raise BilevelError(f"{init} must be finite; give a finite initial value")
        positive("choose a standard deviation above 0 (the paper uses 1)", scale=self.scale)
        self._check(value)

    @property
    def numel(self) -> int:
        """Return the number of coordinates in u."""
        return math.prod(self.shape)

    def initial(self) -> Tensor:
        """Return the initial value as a float64 tensor of `shape`."""
        return torch.as_tensor(self.init, dtype=torch.float64).expand(self.shape).clone()

    @abstractmethod
    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        """Map unconstrained coordinates to the hyperparameter's own units.

        The map acts on each entry; that of a simplex acts on the last axis.
        """

    @abstractmethod
    def unconstrain(self, value: Tensor) -> Tensor:
        """Apply the inverse of `constrain`."""

    def _check(self, value: Tensor) -> None:
        """Raise where the initial value lies outside the domain.

        On the edge u is infinite, so only a frozen value may lie there.
        """


@dataclass(frozen=True, kw_only=True)
class Real(Domain):
    """Any real number: λ = u. `Real(0.0)` is `Real(init=0.0)`."""

    init: Any = field(kw_only=False)

    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        return u

    def unconstrain(self, value: Tensor) -> Tensor:
        return value


@dataclass(frozen=True, kw_only=True)
class Positive(Domain):
    """A number above `low`: λ = low + softplus(u). `Positive(0.1)` is `Positive(init=0.1)`."""

    init: Any = field(kw_only=False)
    low: float = 0.0

    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        # the default threshold, 20, is off by 2e-9 there, too much in float64
        return self.low + F.softplus(u, threshold=40.0)

    def unconstrain(self, value: Tensor) -> Tensor:
        return softplus_inverse(value - self.low)

    def _check(self, value: Tensor) -> None:
        finite(low=self.low)
        init = f"init={_brief(self.init)}"
        if self.frozen and bool((value < self.low).any()):
            raise BilevelError(f"{init} must not be below low={self.low:g}; choose a larger value")
        if not self.frozen and bool((value <= self.low).any()):
            raise BilevelError(
                f"{init} must be above low={self.low:g}, where u = -∞; choose a slightly larger "
                "value"
            )


@dataclass(frozen=True, kw_only=True)
class Interval(Domain):
    """A number inside (low, high): λ = low + (high − low) sigmoid(u).

    All fields are passed by name: a first number could be `low` as well as `init`.
    """

    low: float
    high: float

    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(u)

    def unconstrain(self, value: Tensor) -> Tensor:
        return torch.log(value - self.low) - torch.log(self.high - value)

    def _check(self, value: Tensor) -> None:
        finite(low=self.low, high=self.high)
        if not self.low < self.high:
            raise wrong(
                "low", self.low, f"must be below high={self.high}", "swap or move the bounds"
            )
        init, interval = f"init={_brief(self.init)}", f"({self.low:g}, {self.high:g})"
        if bool(((value < self.low) | (value > self.high)).any()):
            raise BilevelError(f"{init} lies outside {interval}; choose a value inside")
        if not self.frozen and bool(((value == self.low) | (value == self.high)).any()):
            inside = self.low + 0.05 * (self.high - self.low)
            raise BilevelError(
                f"{init} lies on the edge of {interval}, where u is infinite; "
                f"choose a value strictly inside, for example {inside:g}"
            )


@dataclass(frozen=True, kw_only=True)
class Integer(Interval):
    """A whole number in [low, high]: an interval that is rounded stochastically.

    A value is rounded up with a probability equal to its fraction, so the mean of the rounded
    values is the value itself. Rounding down instead would keep a value just below a whole number
    from reaching it. Without a generator the value is rounded to the nearest whole number.
    """

    differentiable: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound != int(bound):
                raise wrong(name, bound, "must be a whole number for an Integer", "round it")
        if self.frozen and bool((self.initial() != self.initial().round()).any()):
            raise BilevelError(
                f"init={_brief(self.init)} must be a whole number for a frozen Integer, "
                "which is not rounded; round it"
            )
        if self.differentiable:
            raise BilevelError(
                "differentiable=True is impossible for an Integer, whose rounding has no "
                "derivative; leave differentiable=False, or use an Interval"
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

    init: Any = field(kw_only=False)
    per_example: bool = False

    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.softmax(u, dim=-1)

    def unconstrain(self, value: Tensor) -> Tensor:
        logits = torch.log(value)
        return logits - logits.mean(dim=-1, keepdim=True)

    def _check(self, value: Tensor) -> None:
        value = value.expand(self.shape)
        if not self.shape:
            raise wrong("shape", self.shape, "must be (…, n) for a Simplex", "give n weights")
        outside = value < 0 if self.frozen else value <= 0
        total = value.sum(-1)
        if bool(outside.any()) or not torch.allclose(total, torch.ones_like(total), atol=1e-6):
            raise BilevelError(
                f"init={_brief(self.init)} must be positive weights that sum to one; "
                f"give 1/{self.shape[-1]} each, for example"
            )
        if self.per_example:
            raise BilevelError(
                "per_example=True is impossible for a Simplex, which is perturbed per batch; "
                "leave per_example=False"
            )


def _brief(value: Any) -> str:
    """Return the value as text for an error; a long text is cut."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} …"


def _contains_bool(value: Any) -> bool:
    """Return whether the value contains a bool, which PyTorch would take for 1 or 0."""
    if isinstance(value, (list, tuple)):
        return any(map(_contains_bool, value))
    return isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)


def softplus_inverse(y: Tensor) -> Tensor:
    """Return log(e^y − 1) for y > 0.

    The form neither overflows for large y nor loses digits for small y.
    """
    return y + torch.log(-torch.expm1(-y))


def optimizer_setting(setting: str, **fields: Any) -> Domain:
    """Return the domain of a setting of the inner optimizer.

    `lr`, `eps` and `weight_decay` are positive; all other settings lie in (0, 1).

    Example:
        >>> rate = optimizer_setting("lr", init=0.1)
        >>> momentum = optimizer_setting("momentum", init=0.9)
        >>> rate.optimizer, type(momentum).__name__
        ('lr', 'Interval')
    """
    if setting in ("lr", "eps", "weight_decay"):
        return Positive(optimizer=setting, **fields)
    return Interval(**{"low": 0.0, "high": 1.0} | fields, optimizer=setting)
