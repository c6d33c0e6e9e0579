"""Where black-box methods draw λ from: a range for every coordinate, in which a uniform draw is a sensible one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import BilevelError, Domain, Integer, Interval, Positive, Real, Simplex, Space
from bilevel.domains import softplus_inverse
from bilevel.text import near

MARGIN = 1e-3
"""How far inside an interval's edges, where u is infinite, its draws stay: this part of its width."""
DECADES = 3
"""A positive hyperparameter is drawn from so many decades below and above its initial value."""
SCALES = 5
"""A real one from so many of its scales below and above."""
LOGIT = 3.0
"""The logits of a simplex from −LOGIT to LOGIT."""


@dataclass(frozen=True)
class Ranges:
    """The box that z, one number for each coordinate, is drawn from uniformly, and the map between z and u.

    z is λ itself for an Interval, an Integer or a Real, log(λ − low) for a Positive, a logit for a Simplex.

    Attributes:
        space: of the problem.
        low: [h] in float64.
        high: [h] in float64.
        names: of the coordinates, `dropout1` or `log_decay[3]`.
        whole: of the coordinates, whether z is a whole number.
    """

    space: Space
    low: Float[Tensor, " h"]
    high: Float[Tensor, " h"]
    names: tuple[str, ...]
    whole: tuple[bool, ...]

    def draw(self, generator: torch.Generator) -> Float[Tensor, " h"]:
        """A uniform draw, as u in float64 on the device of `generator`."""
        part = torch.rand(
            len(self.low), generator=generator, device=generator.device, dtype=torch.float64
        )
        low, high, whole = (
            self.low.to(part),
            self.high.to(part),
            torch.tensor(self.whole, device=part.device),
        )
        drawn = torch.floor(low + part * (high + 1 - low)).minimum(
            high
        )  # each whole number as often as any other
        return self.to_u(torch.where(whole, drawn, low + part * (high - low)))

    def distributions(self) -> dict[str, Any]:
        """Optuna's, by the names of the coordinates."""
        from optuna.distributions import FloatDistribution, IntDistribution

        return {
            name: IntDistribution(int(low), int(high)) if whole else FloatDistribution(low, high)
            for name, low, high, whole in zip(
                self.names, self.low.tolist(), self.high.tolist(), self.whole, strict=True
            )
        }

    def suggest(self, trial: Any) -> Float[Tensor, " h"]:
        """z as an `optuna.Trial` suggests it."""
        z = [
            trial.suggest_int(name, int(low), int(high))
            if whole
            else trial.suggest_float(name, low, high)
            for name, low, high, whole in zip(
                self.names, self.low.tolist(), self.high.tolist(), self.whole, strict=True
            )
        ]
        return torch.tensor(z, dtype=torch.float64)

    def named(self, z: Float[Tensor, " h"]) -> dict[str, int | float]:
        """z by the names of the coordinates, as Optuna takes it."""
        return {
            name: int(value) if whole else value
            for name, value, whole in zip(self.names, z.tolist(), self.whole, strict=True)
        }

    def to_u(self, z: Float[Tensor, " h"]) -> Float[Tensor, " h"]:
        """u from z."""
        return torch.cat(
            [
                _to_u(self.space[name], part).reshape(-1)
                for name, part in self.space.by_name(z).items()
            ]
        )

    def to_z(self, u: Float[Tensor, " h"]) -> Float[Tensor, " h"]:
        """z from u: the inverse, but that a whole number forgets how it was rounded."""
        parts = self.space.by_name(u.double())
        return torch.cat([_to_z(self.space[name], part) for name, part in parts.items()])


def ranges_of(space: Space, ranges: Mapping[str, Sequence[float]] | None = None) -> Ranges:
    """For every tuned hyperparameter, the range that black-box methods draw from.

    | domain   | drawn                                                   | from                                      |
    |----------|---------------------------------------------------------|-------------------------------------------|
    | Interval | uniformly                                               | low to high, a thousandth inside the edges |
    | Integer  | uniformly                                               | its whole numbers                         |
    | Positive | with uniform log(λ − low)                               | a thousandth to a thousandfold of init − low |
    | Real     | uniformly                                               | init ± 5 scale                            |
    | Simplex  | as the softmax of uniform logits                        | −3 to 3                                   |

    An array is drawn entry by entry. A default range is widened where the initial value lies outside.

    Args:
        space: of the problem.
        ranges: [low, high] in the hyperparameter's own units, for all of its entries, in place of the default.

    Example:
        >>> from bilevel import Positive, Space
        >>> box = ranges_of(Space(decay=Positive(init=0.1)), {"decay": [1e-4, 1.0]})
        >>> u = box.draw(torch.Generator().manual_seed(0))
        >>> round(box.space.constrain(u)["decay"].item(), 5)
        0.75895

    Raises:
        BilevelError: a range for something that is not tuned, one that is empty, or one outside the domain.
    """
    given = {} if ranges is None else ranges
    if not isinstance(given, Mapping):
        raise BilevelError(
            f"ranges={ranges!r} names no hyperparameter; give a mapping of names to [low, high]"
        )
    for name in given:
        if name not in space.tuned:
            what = (
                "is frozen"
                if name in space
                else f"is no hyperparameter{near(str(name), space.tuned)}"
            )
            raise BilevelError(
                f"`{name}` in ranges {what}; those that are tuned are {', '.join(space.tuned)}"
            )
    lows, highs, names, whole = [], [], [], []
    for name in space.tuned:
        domain, init = (
            space[name],
            _to_z(space[name], space[name].unconstrain(space[name].initial())),
        )
        low, high = (
            _default_range(domain, init)
            if given.get(name) is None
            else _user_range(name, domain, init, given[name])
        )
        lows.append(low.expand_as(init))
        highs.append(high.expand_as(init))
        names += [name + _index(i, domain.shape) for i in range(domain.numel)]
        whole += [isinstance(domain, Integer)] * domain.numel
    return Ranges(space, torch.cat(lows), torch.cat(highs), tuple(names), tuple(whole))


def _default_range(domain: Domain, init: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(domain, Integer):
        return init.new_tensor(domain.low), init.new_tensor(domain.high)
    if isinstance(domain, Interval):
        inside = MARGIN * (domain.high - domain.low)
        return init.clamp(max=domain.low + inside), init.clamp(min=domain.high - inside)
    if isinstance(domain, Simplex):
        return init.clamp(max=-LOGIT), init.clamp(min=LOGIT)
    if isinstance(domain, (Positive, Real)):
        reach = DECADES * math.log(10) if isinstance(domain, Positive) else SCALES * domain.scale
        return init - reach, init + reach
    raise BilevelError(
        f"a {type(domain).__name__} has no range of its own here; tune it with another solver"
    )


def _user_range(name: str, domain: Domain, init: Tensor, value: Any) -> tuple[Tensor, Tensor]:
    """A range of the user's, as the box of z."""
    if isinstance(domain, Simplex):
        raise BilevelError(
            f"`{name}` is a Simplex, drawn as a softmax of logits, and takes no range; leave it out of ranges"
        )
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        raise BilevelError(
            f"the range {value!r} of `{name}` is not two numbers; give [low, high]"
        ) from None
    said = f"the range [{low:g}, {high:g}] of `{name}`"
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise BilevelError(
            f"{said} is empty or without end; give finite numbers, the lower one first"
        )
    if isinstance(domain, Interval):
        if low < domain.low or high > domain.high:
            raise BilevelError(
                f"{said} leaves its domain ({domain.low:g}, {domain.high:g}); choose one inside"
            )
        if isinstance(domain, Integer) and (low != int(low) or high != int(high)):
            raise BilevelError(
                f"{said} does not begin and end at whole numbers; an Integer needs them"
            )
        if not isinstance(domain, Integer):
            inside = MARGIN * (domain.high - domain.low)
            low, high = (
                max(low, min(domain.low + inside, float(init.min()))),
                min(high, max(domain.high - inside, float(init.max()))),
            )
    if isinstance(domain, Positive):
        if low <= domain.low:
            raise BilevelError(
                f"{said} does not begin above {domain.low:g}, and its logarithm is what is drawn; begin above it"
            )
        low, high = math.log(low - domain.low), math.log(high - domain.low)
    if bool(((init < low - 1e-9) | (init > high + 1e-9)).any()):
        raise BilevelError(
            f"{said} does not contain its initial value {domain.init}, where the first trial begins; widen it, or change init"
        )
    return init.clamp(max=low), init.clamp(min=high)  # what rounding has left outside


def _to_z(domain: Domain, u: Tensor) -> Tensor:
    """z from u, flat."""
    if isinstance(domain, (Positive, Integer, Interval)):
        value = domain.constrain(u, None)
        return (torch.log(value - domain.low) if isinstance(domain, Positive) else value).reshape(
            -1
        )
    return u.reshape(-1)


def _to_u(domain: Domain, z: Tensor) -> Tensor:
    if isinstance(domain, Positive):
        return softplus_inverse(torch.exp(z))
    if isinstance(domain, Simplex):
        return z
    if isinstance(
        domain, Integer
    ):  # its edges lie at infinity: a hundredth inside is rounded to them all the same
        return domain.unconstrain(z.clamp(domain.low + 0.01, domain.high - 0.01))
    return domain.unconstrain(z)


def _index(i: int, shape: tuple[int, ...]) -> str:
    """'[3]' or '[1,2]' for the entry `i` of an array, '' for a number."""
    if not shape:
        return ""
    index = []
    for n in reversed(shape):
        i, k = divmod(i, n)
        index.append(str(k))
    return f"[{','.join(reversed(index))}]"
