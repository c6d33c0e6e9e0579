"""The hyperparameter space: named domains, and the map between λ in its own units and unconstrained coordinates u."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel.errors import BilevelError
from bilevel.params import Hypers


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
    """

    init: Any
    scale: float = 1.0
    shape: tuple[int, ...] = ()
    differentiable: bool = True
    per_example: bool = True
    frozen: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        try:
            value = torch.as_tensor(self.init, dtype=torch.float64)
            value.expand(self.shape)
        except (TypeError, ValueError, RuntimeError):
            raise BilevelError(
                f"init={self.init!r} is not a number, or numbers of shape {self.shape}; give one value per entry"
            ) from None
        if not bool(torch.isfinite(value).all()):
            raise BilevelError(f"init={self.init!r} is not finite; give a finite initial value")
        if not (isinstance(self.scale, (int, float)) and 0 < self.scale < math.inf):
            raise BilevelError(f"scale={self.scale!r} is no standard deviation; give a positive number (the paper uses 1)")
        if not self.frozen:
            self._check_init(value)

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

    def _check_init(self, value: Tensor) -> None:
        """Raise where the initial value has no finite unconstrained coordinate."""


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
        return self.low + F.softplus(u, threshold=40.0)  # the default, 20, is off by 2e-9 there: too much in float64

    def unconstrain(self, value: Tensor) -> Tensor:
        return softplus_inverse(value - self.low)

    def _check_init(self, value: Tensor) -> None:
        if bool((value <= self.low).any()):
            raise BilevelError(f"init={self.init!r} is not above {self.low:g}, where u = -∞; choose one a little above it")


@dataclass(frozen=True, kw_only=True)
class Interval(Domain):
    """λ = low + (high − low) sigmoid(u), inside (low, high)."""

    low: float
    high: float

    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(u)

    def unconstrain(self, value: Tensor) -> Tensor:
        return torch.log(value - self.low) - torch.log(self.high - value)

    def _check_init(self, value: Tensor) -> None:
        if not self.low < self.high:
            raise BilevelError(f"({self.low:g}, {self.high:g}) is no interval; low must be below high")
        if bool(((value < self.low) | (value > self.high)).any()):
            raise BilevelError(f"init={self.init!r} is outside ({self.low:g}, {self.high:g}); choose one inside")
        if bool(((value == self.low) | (value == self.high)).any()):
            raise BilevelError(
                f"init={self.init!r} lies on the edge of ({self.low:g}, {self.high:g}), where u is infinite; "
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
            raise BilevelError(f"[{self.low:g}, {self.high:g}] does not begin and end at whole numbers; an Integer needs them")
        if self.differentiable:
            raise BilevelError("an Integer is rounded and has no derivative; leave differentiable=False, or use an Interval")

    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        value = super().constrain(u, generator)
        if generator is None:
            return torch.round(value)
        return torch.floor(value + torch.rand(value.shape, generator=generator, device=value.device, dtype=value.dtype))


@dataclass(frozen=True, kw_only=True)
class Simplex(Domain):
    """Weights that are positive and sum to one over the last axis of `shape`: λ = softmax(u)."""

    per_example: bool = False

    def constrain(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.softmax(u, dim=-1)

    def unconstrain(self, value: Tensor) -> Tensor:
        logits = torch.log(value)
        return logits - logits.mean(dim=-1, keepdim=True)

    def _check_init(self, value: Tensor) -> None:
        value = value.expand(self.shape)
        if not self.shape:
            raise BilevelError("a Simplex needs shape=(…, n), with n weights that sum to one")
        if bool((value <= 0).any()) or not torch.allclose(value.sum(-1), torch.ones_like(value.sum(-1)), atol=1e-6):
            raise BilevelError(
                f"init={self.init!r} is not inside the simplex; "
                f"give positive weights that sum to one (1/{self.shape[-1]} each, say)"
            )
        if self.per_example:
            raise BilevelError("a Simplex is perturbed per batch; leave per_example=False")


class Space(Mapping[str, Domain]):
    """Hyperparameters by name; solvers see u ∈ R^h, problems see `Hypers`.

    Coordinates follow the order of the names; frozen hyperparameters have none.

    Example:
        >>> space = Space(dropout=Interval(low=0.0, high=0.95, init=0.05), decay=Positive(init=1e-3))
        >>> u = space.init()
        >>> u.shape, round(u[0].item(), 3)
        (torch.Size([2]), -2.89)
        >>> {name: round(leaf.item(), 4) for name, leaf in space.constrain(u).items()}
        {'dropout': 0.05, 'decay': 0.001}
    """

    def __init__(self, **domains: Domain) -> None:
        for name, domain in domains.items():
            if not isinstance(domain, Domain):
                raise BilevelError(
                    f"hyperparameter `{name}` is a {type(domain).__name__}; give a Real, Positive, Interval, Integer or Simplex"
                )
        self._domains = domains
        self._slices: dict[str, slice] = {}
        for name, domain in domains.items():
            if not domain.frozen:
                self._slices[name] = slice(self.numel, self.numel + domain.numel)

    def __getitem__(self, name: str) -> Domain:
        return self._domains[name]

    def __iter__(self):
        return iter(self._domains)

    def __len__(self) -> int:
        return len(self._domains)

    def __repr__(self) -> str:
        return f"Space({', '.join(f'{name}={domain}' for name, domain in self.items())})"

    @property
    def numel(self) -> int:
        """h, the number of unconstrained coordinates."""
        return max((s.stop for s in self._slices.values()), default=0)

    @property
    def tuned(self) -> tuple[str, ...]:
        """Names of the hyperparameters that are not frozen, in the order of their coordinates."""
        return tuple(self._slices)

    @property
    def per_example(self) -> Tensor:
        """[h] bool: the coordinates whose perturbation may differ from example to example."""
        return self._per_coordinate([self[name].per_example for name in self.tuned], torch.bool)

    def init(self, dtype: torch.dtype | None = None) -> Tensor:
        """The coordinates u at the initial values: [h], computed in float64 and given in `dtype` (by default PyTorch's)."""
        u = self.unconstrain({name: self[name].initial() for name in self.tuned})
        return u.to(torch.get_default_dtype() if dtype is None else dtype)

    def initial_scales(self) -> Tensor:
        """σ of every coordinate at the start: [h] in float64."""
        return self._per_coordinate([float(self[name].scale) for name in self.tuned], torch.float64)

    def constrain(self, u: Tensor, generator: torch.Generator | None = None) -> Hypers:
        """λ in its own units from u, [h] or [B, h].

        Given [B, h], a leaf perturbed per example is [B, *shape]; one perturbed per batch is [*shape], taken from the first
        row. Integers are rounded stochastically with `generator`, to the nearest without.
        """
        hypers: Hypers = {}
        for name, domain in self.items():
            if domain.frozen:
                hypers[name] = domain.initial().to(u)
                continue
            part = u[..., self._slices[name]]
            if u.ndim == 2 and not domain.per_example:
                part = part[0]
            hypers[name] = domain.constrain(part.reshape(part.shape[:-1] + domain.shape), generator)
        return hypers

    def unconstrain(self, hypers: Hypers) -> Tensor:
        """u: [h] from unbatched hyperparameters; frozen ones are ignored.

        Raises:
            BilevelError: a tuned hyperparameter is missing.
        """
        if missing := [name for name in self.tuned if name not in hypers]:
            raise BilevelError(f"no value for hyperparameter `{missing[0]}`; give one for each of {', '.join(self.tuned)}")
        parts = [self[name].unconstrain(hypers[name]).expand(self[name].shape).reshape(-1) for name in self.tuned]
        return torch.cat(parts) if parts else torch.zeros(0)

    def split(self, v: Tensor) -> Hypers:
        """A vector over the coordinates, [h], as one leaf of its domain's shape per tuned hyperparameter; no change of
        units.
        """
        return {name: v[s].reshape(self[name].shape) for name, s in self._slices.items()}

    def override(self, changes: Mapping[str, Mapping[str, Any]]) -> "Space":
        """The same space with some fields of some hyperparameters changed, as configuration does it.

        Example:
            >>> Space(decay=Positive(init=1e-3)).override({"decay": {"init": 0.1}})["decay"].init
            0.1

        Raises:
            BilevelError: an unknown hyperparameter or field (with the near misses), or a value out of its domain.
        """
        domains = dict(self._domains)
        for name, change in changes.items():
            if name not in domains:
                raise BilevelError(f"there is no hyperparameter `{name}`{near(name, domains)}; there are {', '.join(domains)}")
            known = [field.name for field in fields(domains[name])]
            for field in change:
                if field not in known:
                    raise BilevelError(
                        f"hyperparameter `{name}` has no field `{field}`{near(field, known)}; it has {', '.join(known)}"
                    )
            try:
                domains[name] = replace(domains[name], **change)
            except BilevelError as error:
                raise BilevelError(f"hyperparameter `{name}`: {error}") from None
        return Space(**domains)

    def _per_coordinate(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        sizes = torch.tensor([self[name].numel for name in self.tuned], dtype=torch.long)
        return torch.repeat_interleave(torch.tensor(values, dtype=dtype), sizes)


def softplus_inverse(y: Tensor) -> Tensor:
    """log(e^y − 1) for y > 0, in a form that neither overflows for large y nor loses small ones."""
    return y + torch.log(-torch.expm1(-y))


def near(word: str, known: Any) -> str:
    """', did you mean …' for the words of `known` that are close to `word`, or nothing."""
    close = get_close_matches(word, [str(k) for k in known], n=3)
    return f" (did you mean {' or '.join(f'`{c}`' for c in close)}?)" if close else ""
