"""Hyperparameter schedules: constant, perturbed, sinusoidal, or replayed from another run."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import BilevelError, Hypers, Interval, Positive, Refused, Simplex, Space
from bilevel.domains import Domain
from bilevel.half_weights import wide
from bilevel.loggers.hyper_schedule import RecordedSchedule, read
from bilevel.solvers.base.domain_shift import (
    DomainShift,
    check_sizes,
    refuse_optimizer_settings,
    size_by_coordinate,
)
from bilevel.text import near
from bilevel.validate import positive


class HyperSchedule(ABC):
    """A rule for λ at every inner step; frozen hyperparameters stay constant.

    Attributes:
        space: the space of the problem.
        u: the initial values, [h].
    """

    space: Space
    u: Tensor

    def setup(self, space: Space, like: Tensor) -> None:
        """Prepare the rule for `space`, on the device of `like`, in its type or float32.

        Raises:
            Refused: the rule does not fit to the space.
        """
        self.space = space
        self.u = space.init(wide(like.dtype)).to(like.device)
        self.prepare(space, self.u)

    def prepare(self, space: Space, like: Tensor) -> None:
        """Make the tensors of the rule, or raise `Refused`."""

    def constants(self, space: Space) -> Hypers:
        """Return settings of the optimizer that hold throughout in place of the initial ones."""
        return {}

    @abstractmethod
    def at(self, step: int) -> Hypers:
        """Return λ after `step` inner steps without its noise, for records and the solution."""

    @abstractmethod
    def draw(self, step: int, examples: int, generator: torch.Generator) -> Hypers:
        """Return λ for the inner step that follows `step` others.

        A leaf may have one value per example.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must find unchanged."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise `BilevelError` if it has changed."""


class Constant(HyperSchedule):
    """The initial values."""

    def at(self, step: int) -> Hypers:
        return self.space.constrain(self.u)

    def draw(self, step: int, examples: int, generator: torch.Generator) -> Hypers:
        return self.space.constrain(self.u, generator)


class Gaussian(HyperSchedule):
    """The initial values plus Gaussian noise, as in self-tuning: one draw per step and example.

        λ = λ₀ + std · n, clipped to the domain, or `unconstrained` u = u₀ + std · n;  n ~ N(0, I)

    A hyperparameter that must not vary within a batch gets one draw per batch. Records show λ₀.

    Args:
        std: one standard deviation for all hyperparameters, or one by name; 0 where there is none.
        unconstrained: perturb u, and not λ in its own units.

    Source: MacKay et al., ICLR 2019, Table 1.

    Raises:
        BilevelError: a standard deviation is negative.
    """

    def __init__(self, std: float | Mapping[str, float], *, unconstrained: bool = False) -> None:
        check_sizes("std", std)
        self.std = std
        self.unconstrained = unconstrained

    def prepare(self, space: Space, like: Tensor) -> None:
        sizes = size_by_coordinate("std", self.std, space, own_units=not self.unconstrained)
        self._std = sizes.to(like)
        self._shift = DomainShift(space, like)

    def at(self, step: int) -> Hypers:
        return self.space.constrain(self.u)

    def draw(self, step: int, examples: int, generator: torch.Generator) -> Hypers:
        size = (examples, len(self.u))
        noise = self._std * torch.randn(
            size, generator=generator, device=self.u.device, dtype=self.u.dtype
        )
        u = self.u + noise if self.unconstrained else self._shift(noise)
        return self.space.constrain(u, generator)


class Sinusoidal(HyperSchedule):
    """The initial values plus a sine of the number n of inner steps, clipped to the domain.

        λ(n) = λ₀ + amplitude · sin(2π n / period)

    Args:
        amplitude: one amplitude for all hyperparameters, or one by name, in their own units; 0
            where there is none.
        period: the number of inner steps of one period.

    Source: MacKay et al., ICLR 2019, Table 1.

    Raises:
        BilevelError: an amplitude is negative, or the period is not positive.
    """

    def __init__(self, amplitude: float | Mapping[str, float], period: float) -> None:
        check_sizes("amplitude", amplitude)
        positive(period=period)
        self.amplitude = amplitude
        self.period = period

    def prepare(self, space: Space, like: Tensor) -> None:
        sizes = size_by_coordinate("amplitude", self.amplitude, space, own_units=True)
        self._amplitude = sizes.to(like)
        self._shift = DomainShift(space, like)

    def at(self, step: int) -> Hypers:
        return self.space.constrain(self._moved(step))

    def draw(self, step: int, examples: int, generator: torch.Generator) -> Hypers:
        return self.space.constrain(self._moved(step), generator)

    def _moved(self, step: int) -> Tensor:
        return self._shift(self._amplitude * math.sin(2 * math.pi * step / self.period))


class Replayed(HyperSchedule):
    """The values of another run at the same step; after its end, its last values.

    `bilevel.loggers.hyper_schedule` records them. Frozen hyperparameters must have the same values
    in the other run. A setting of the optimizer is set once, so it needs `final`.

    Args:
        path: a `schedule.json`, or the directory of a run.
        final: use the last values from the first step on.

    Source: MacKay et al., ICLR 2019, Table 1.

    Raises:
        BilevelError: there is no schedule at `path`.
    """

    def __init__(self, path: str | Path, *, final: bool = False) -> None:
        self.path = path
        self.schedule = read(path)
        if final:
            last = {name: values[-1:] for name, values in self.schedule.hypers.items()}
            self.schedule = RecordedSchedule([0], last)

    def constants(self, space: Space) -> Hypers:
        recorded = self.schedule.hypers
        return {
            name: self._values(name, space[name])[-1]
            for name in space.tuned
            if space[name].optimizer is not None and name in recorded
        }

    def prepare(self, space: Space, like: Tensor) -> None:
        recorded = self.schedule.hypers
        if missing := [name for name in space if name not in recorded and not space[name].frozen]:
            raise Refused(
                f"path={self.path} has no `{missing[0]}`{near(missing[0], recorded)}, only "
                f"{', '.join(recorded)}; freeze `{missing[0]}`, or give the schedule of a run that "
                "has it"
            )
        if unknown := [name for name in recorded if name not in space]:
            raise Refused(
                f"path={self.path} has `{unknown[0]}`{near(unknown[0], space)}, which the problem "
                f"lacks; give the schedule of a run of this problem, which has {', '.join(space)}"
            )
        if len(self.schedule.steps) > 1:
            remedy = "take the last values (final=true, or refit without --schedule)"
            refuse_optimizer_settings(space, space.tuned, remedy)
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
                f"path={self.path} has changed since this run began; restore the old schedule, or "
                "start a new run"
            )

    def _values(self, name: str, domain: Domain) -> Tensor:
        """Return the values of one hyperparameter, [entries, *shape] in float64."""
        try:
            values = torch.tensor(self.schedule.hypers[name], dtype=torch.float64)
        except (TypeError, ValueError):  # lists of different lengths
            values = torch.zeros(0)
        if values.shape != (len(self.schedule.steps), *domain.shape):
            raise Refused(
                f"path={self.path} has `{name}` in another shape than {list(domain.shape)}; give "
                "the schedule of a run of this problem"
            )
        for step, value in zip(self.schedule.steps, values, strict=True):
            if domain.frozen and not torch.allclose(value, domain.initial(), rtol=1e-5, atol=0.0):
                raise Refused(
                    f"`{name}` is frozen at {domain.init} and is {value.tolist()} in {self.path} "
                    f"at step {step}; freeze it at that value, or set frozen=false to let it "
                    "follow the schedule"
                )
            if not _inside(domain, value):
                raise Refused(
                    f"`{name}` is {value.tolist()} in {self.path} at step {step}, outside its "
                    "domain; widen the domain"
                )
        return values


def _inside(domain: Domain, value: Tensor) -> bool:
    """Return whether a recorded value is in the closure of the domain, up to float32 rounding."""
    if isinstance(domain, Interval):
        slack = 1e-6 * (domain.high - domain.low)
        return bool((value >= domain.low - slack).all() and (value <= domain.high + slack).all())
    if isinstance(domain, Positive):
        return bool((value >= domain.low).all())
    if isinstance(domain, Simplex):
        total = value.sum(-1)
        return bool((value >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-4)
    return True
