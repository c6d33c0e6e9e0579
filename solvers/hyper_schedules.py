"""Hyperparameters that training is given rather than tunes: constant, perturbed, along a wave, or as another run had them."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import BilevelError, Hypers, Interval, Positive, Refused, Simplex, Space
from bilevel.domains import Domain
from bilevel.loggers.hyper_schedule import RecordedSchedule, read
from bilevel.text import near

MARGIN = 1e-3
"""How near to an edge of its domain a shifted value may come, in widths of an interval, in initial values of a positive one."""


class HyperSchedule(ABC):
    """A rule for λ at every inner step; what it moves are hyperparameters that are not frozen.

    Attributes:
        space: the problem's.
        u: [h], the initial values.
    """

    space: Space
    u: Tensor

    def setup(self, space: Space, like: Tensor) -> None:
        """Prepare the rule for `space`, on the device and in the dtype of `like`.

        Raises:
            Refused: it does not fit.
        """
        self.space, self.u = space, space.init(like.dtype).to(like)
        self.prepare(space, like)

    def prepare(self, space: Space, like: Tensor) -> None:
        """Make the tensors of the rule, or raise `Refused`."""

    @abstractmethod
    def at(self, step: int) -> Hypers:
        """λ after `step` inner steps, without randomness: what is recorded, and goes with w."""

    @abstractmethod
    def draw(self, step: int, examples: int, generator: torch.Generator) -> Hypers:
        """λ of the inner step that follows `step` others; a leaf may be one value per example."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise where it did change."""


class Constant(HyperSchedule):
    """The initial values."""

    def at(self, step: int) -> Hypers:
        return self.space.constrain(self.u)

    def draw(self, step: int, examples: int, generator: torch.Generator) -> Hypers:
        return self.space.constrain(self.u, generator)


class Gaussian(HyperSchedule):
    """The initial values plus noise, drawn at every step and, as self-tuning solvers do it, for every example.

        λ = λ₀ + std · n, kept inside the domain;    or, `unconstrained`,  u = u₀ + std · n;    n ~ N(0, I)

    A hyperparameter that may not differ within a batch gets one draw for all of it. What is recorded is λ₀.

    Args:
        std: of all hyperparameters, or by name; those without one are constant.
        unconstrained: whether it is a deviation of u rather than of λ in its own units.

    Source: MacKay et al., ICLR 2019, Table 1.

    Raises:
        BilevelError: a deviation that is not zero or above.
    """

    def __init__(self, std: float | Mapping[str, float], *, unconstrained: bool = False) -> None:
        _check("std", std)
        self.std, self.unconstrained = std, unconstrained

    def prepare(self, space: Space, like: Tensor) -> None:
        self._std = _by_coordinate("std", self.std, space, own_units=not self.unconstrained).to(
            like
        )
        self._shift = _Shift(space, like)

    def at(self, step: int) -> Hypers:
        return self.space.constrain(self.u)

    def draw(self, step: int, examples: int, generator: torch.Generator) -> Hypers:
        size = (examples, len(self.u))
        noise = self._std * torch.randn(
            size, generator=generator, device=self.u.device, dtype=self.u.dtype
        )
        return self.space.constrain(
            self.u + noise if self.unconstrained else self._shift(noise), generator
        )


class Sinusoidal(HyperSchedule):
    """The initial values plus a sine of the number of inner steps n, kept inside the domain.

        λ(n) = λ₀ + amplitude · sin(2π n / period)

    Args:
        amplitude: in a hyperparameter's own units: of all, or by name; those without one are constant.
        period: in inner steps.

    Source: MacKay et al., ICLR 2019, Table 1.

    Raises:
        BilevelError: an amplitude that is not zero or above, or a period that is not positive.
    """

    def __init__(self, amplitude: float | Mapping[str, float], period: float) -> None:
        _check("amplitude", amplitude)
        if not 0 < period < math.inf:
            raise BilevelError(
                f"period={period} is no number of inner steps; choose a positive one"
            )
        self.amplitude, self.period = amplitude, period

    def prepare(self, space: Space, like: Tensor) -> None:
        self._amplitude = _by_coordinate("amplitude", self.amplitude, space, own_units=True).to(
            like
        )
        self._shift = _Shift(space, like)

    def at(self, step: int) -> Hypers:
        return self.space.constrain(self._moved(step))

    def draw(self, step: int, examples: int, generator: torch.Generator) -> Hypers:
        return self.space.constrain(self._moved(step), generator)

    def _moved(self, step: int) -> Tensor:
        return self._shift(self._amplitude * math.sin(2 * math.pi * step / self.period))


class Replayed(HyperSchedule):
    """What another run had at the same step, as `bilevel.loggers.hyper_schedule` tells it; after its end the last value holds.

    Frozen hyperparameters must have been constant there, and the same.

    Args:
        path: a `schedule.json`, or the directory of a run.
        final: the last value alone, from the first step on.

    Source: MacKay et al., ICLR 2019, Table 1.

    Raises:
        BilevelError: there is no schedule at `path`.
    """

    def __init__(self, path: str | Path, *, final: bool = False) -> None:
        self.path, self.schedule = path, read(path)
        if final:
            self.schedule = RecordedSchedule(
                [0], {name: values[-1:] for name, values in self.schedule.hypers.items()}
            )

    def prepare(self, space: Space, like: Tensor) -> None:
        recorded = self.schedule.hypers
        if missing := [name for name in space if name not in recorded and not space[name].frozen]:
            raise Refused(
                f"the schedule {self.path} has no `{missing[0]}`{near(missing[0], recorded)}; it has {', '.join(recorded)}: "
                f"freeze `{missing[0]}`, or give the schedule of a run that has it"
            )
        if unknown := [name for name in recorded if name not in space]:
            raise Refused(
                f"the schedule {self.path} has `{unknown[0]}`{near(unknown[0], space)}, which the problem lacks; it has "
                f"{', '.join(space)}: give the schedule of a run of this problem"
            )
        _refuse_settings(space, space.tuned)
        leaves = {name: self._values(name, space[name]) for name in recorded}
        fixed = {name: leaf for name, leaf in space.constrain(self.u).items() if space[name].frozen}
        self._entries = [
            {name: fixed[name] if name in fixed else leaves[name][k].to(like) for name in space}
            for k in range(len(self.schedule.steps))
        ]

    def at(self, step: int) -> Hypers:
        return self._entries[self.schedule.index(step)]

    def draw(self, step: int, examples: int, generator: torch.Generator) -> Hypers:
        return self.at(step)

    def state_dict(self) -> dict[str, Any]:
        content = json.dumps(
            [list(self.schedule.steps), dict(self.schedule.hypers)], sort_keys=True
        )
        return {"schedule": hashlib.sha256(content.encode()).hexdigest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("schedule") != self.state_dict()["schedule"]:
            raise BilevelError(
                f"the schedule {self.path} is not the one that this run began with; restore that one, or start a new run"
            )

    def _values(self, name: str, domain: Domain) -> Tensor:
        """Float64, one [*shape] for each entry of the schedule."""
        try:
            values = torch.tensor(self.schedule.hypers[name], dtype=torch.float64)
        except (TypeError, ValueError):  # lists of several lengths
            values = torch.zeros(0)
        if values.shape != (len(self.schedule.steps), *domain.shape):
            raise Refused(
                f"`{name}` is of shape {list(domain.shape)}, but not in {self.path}; replay it where it fits"
            )
        for step, value in zip(self.schedule.steps, values, strict=True):
            if domain.frozen and not torch.allclose(value, domain.initial(), rtol=1e-5, atol=0.0):
                raise Refused(
                    f"`{name}` is frozen at {domain.init} and is {value.tolist()} in {self.path} at step {step}; freeze it at "
                    "that value, or let it follow the schedule (frozen=false)"
                )
            if not _inside(domain, value):
                raise Refused(
                    f"`{name}` is {value.tolist()} in {self.path} at step {step}, outside its domain; widen the domain"
                )
        return values


class _Shift:
    """From a change [h] or [B, h] in a hyperparameter's own units to coordinates of the initial values so changed."""

    def __init__(self, space: Space, like: Tensor) -> None:
        self.sizes, self.parts = [space[name].numel for name in space.tuned], []
        for name in space.tuned:
            domain, initial = space[name], space[name].initial()
            self.parts.append((domain, initial.reshape(-1).to(like), *_bounds(domain, initial)))

    def __call__(self, change: Tensor) -> Tensor:
        moved = []
        for part, (domain, initial, low, high) in zip(
            change.split(self.sizes, dim=-1), self.parts, strict=True
        ):
            value = initial + part
            if isinstance(
                domain, Simplex
            ):  # not moved, see `_by_coordinate`; its map is not elementwise
                value = value.reshape(*part.shape[:-1], *domain.shape)
            moved.append(domain.unconstrain(value.clamp(low, high)).reshape(part.shape))
        return torch.cat(moved, dim=-1) if moved else change


def _bounds(domain: Domain, initial: Tensor) -> tuple[float, float]:
    """How far a shifted value may go; the initial value itself is always allowed."""
    if isinstance(domain, Interval):
        margin = MARGIN * (domain.high - domain.low)
        return min(domain.low + margin, float(initial.min())), max(
            domain.high - margin, float(initial.max())
        )
    if isinstance(domain, Positive):
        return domain.low + MARGIN * (float(initial.min()) - domain.low), math.inf
    return -math.inf, math.inf


def _inside(domain: Domain, value: Tensor) -> bool:
    """Whether a recorded value lies in the closure of the domain."""
    if isinstance(domain, Interval):
        slack = 1e-6 * (domain.high - domain.low)  # of float32
        return bool((value >= domain.low - slack).all() and (value <= domain.high + slack).all())
    if isinstance(domain, Positive):
        return bool((value >= domain.low).all())
    if isinstance(domain, Simplex):
        return bool((value >= 0).all()) and torch.allclose(
            value.sum(-1), torch.ones_like(value.sum(-1)), atol=1e-4
        )
    return True


def _check(argument: str, sizes: float | Mapping[str, float]) -> None:
    for size in sizes.values() if isinstance(sizes, Mapping) else [sizes]:
        if not (isinstance(size, (int, float)) and 0 <= size < math.inf):
            raise BilevelError(
                f"{argument}={size!r} is no size; give a number, zero or above, or one for each hyperparameter by name"
            )


def _by_coordinate(
    argument: str, sizes: float | Mapping[str, float], space: Space, *, own_units: bool
) -> Tensor:
    """One size for every coordinate of u: [h] in float64."""
    named = sizes if isinstance(sizes, Mapping) else dict.fromkeys(space.tuned, sizes)
    for name in named:
        if name not in space.tuned:
            why = "is frozen" if name in space else f"is no hyperparameter{near(name, space)}"
            raise Refused(
                f"`{name}` {why} and cannot get {argument}={named[name]}; there are {', '.join(space.tuned)}"
            )
        if own_units and isinstance(space[name], Simplex) and named[name]:
            raise Refused(
                f"`{name}` must sum to one, which {argument} in its own units breaks; give {argument} by name, without it"
            )
    _refuse_settings(space, [name for name, size in named.items() if size])
    parts = [
        torch.full((space[name].numel,), float(named.get(name, 0.0)), dtype=torch.float64)
        for name in space.tuned
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _refuse_settings(space: Space, names: Iterable[str]) -> None:
    """The optimizer got its settings when it was made."""
    for name in names:
        if (setting := space[name].optimizer) is not None:
            raise Refused(
                f"`{name}` is the inner optimizer's {setting}, which fixed training sets once; freeze it, or schedule it with "
                "inner_scheduler"
            )
