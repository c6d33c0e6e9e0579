"""The ranges from which black-box methods draw λ, one for each coordinate."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import BilevelError, Domain, Integer, Interval, Positive, Real, Simplex, Space
from bilevel.domains import softplus_inverse
from bilevel.space import entry_names
from bilevel.text import near
from bilevel.validate import wrong

MARGIN = 1e-3
"""Draws from an interval stay this part of its width away from its edges, where u is infinite."""
DECADES = 3
"""Decades below and above the initial value, for a positive hyperparameter."""
SCALES = 5
"""Perturbation scales below and above the initial value, for a real hyperparameter."""
LOGIT = 3.0
"""The logits of a simplex lie between −LOGIT and LOGIT."""


@dataclass(frozen=True)
class Ranges:
    """A box from which z is drawn uniformly, and the map between z and u.

    z has one number for each coordinate: λ itself for an Interval, an Integer or a Real,
    log(λ − low) for a Positive, a logit for a Simplex.

    Attributes:
        space: the space of the problem.
        low: the lower ends, [h] in float64.
        high: the upper ends, [h] in float64.
        names: the names of the coordinates, such as `dropout1` or `log_decay[3]`.
        whole: for each coordinate, True if z is a whole number.
    """

    space: Space
    low: Float[Tensor, " h"]
    high: Float[Tensor, " h"]
    names: tuple[str, ...]
    whole: tuple[bool, ...]

    def draw(self, generator: torch.Generator) -> Float[Tensor, " h"]:
        """Return u of a uniform draw of z, in float64 on the device of `generator`."""
        part = torch.rand(
            len(self.low), generator=generator, device=generator.device, dtype=torch.float64
        )
        low, high = self.low.to(part), self.high.to(part)
        whole = torch.tensor(self.whole, device=part.device)
        # every whole number is equally likely
        count = torch.floor(low + part * (high + 1 - low)).minimum(high)
        return self.to_u(torch.where(whole, count, low + part * (high - low)))

    def _ends(self) -> Iterator[tuple[str, float, float, bool]]:
        """Yield the name, the ends and `whole` of every coordinate."""
        return zip(self.names, self.low.tolist(), self.high.tolist(), self.whole, strict=True)

    def distributions(self) -> dict[str, Any]:
        """Return the distributions of Optuna, by coordinate."""
        from optuna.distributions import FloatDistribution, IntDistribution

        return {
            name: IntDistribution(int(low), int(high)) if whole else FloatDistribution(low, high)
            for name, low, high, whole in self._ends()
        }

    def suggest(self, trial: Any) -> Float[Tensor, " h"]:
        """Return the z that an `optuna.Trial` suggests."""
        z = [
            trial.suggest_int(name, int(low), int(high))
            if whole
            else trial.suggest_float(name, low, high)
            for name, low, high, whole in self._ends()
        ]
        return torch.tensor(z, dtype=torch.float64)

    def named(self, z: Float[Tensor, " h"]) -> dict[str, int | float]:
        """Return z by coordinate, as Optuna expects it."""
        return {
            name: int(value) if whole else value
            for name, value, whole in zip(self.names, z.tolist(), self.whole, strict=True)
        }

    def to_u(self, z: Float[Tensor, " h"]) -> Float[Tensor, " h"]:
        """Return u of z."""
        return torch.cat(
            [
                _to_u(self.space[name], part).reshape(-1)
                for name, part in self.space.by_name(z).items()
            ]
        )

    def to_z(self, u: Float[Tensor, " h"]) -> Float[Tensor, " h"]:
        """Return z of u; for a whole number, this rounds u."""
        parts = self.space.by_name(u.double())
        return torch.cat([_to_z(self.space[name], part) for name, part in parts.items()])


def ranges_of(space: Space, ranges: Mapping[str, Sequence[float]] | None = None) -> Ranges:
    """Return the range of every tuned hyperparameter.

    | domain   | uniform draw of | default range                                |
    |----------|-----------------|----------------------------------------------|
    | Interval | λ               | low to high, a thousandth inside the edges   |
    | Integer  | λ               | all whole numbers of the domain              |
    | Positive | log(λ − low)    | λ − low from (init − low)/1000 to its 1000 × |
    | Real     | λ               | init ± 5 scale                               |
    | Simplex  | the logits      | −3 to 3                                      |

    Every entry of an array is drawn on its own. A default range that does not contain the initial
    value is widened.

    Args:
        space: the space of the problem.
        ranges: [low, high] by hyperparameter, in its own units and for all of its entries, in place
            of the default.

    Example:
        >>> from bilevel import Positive, Space
        >>> box = ranges_of(Space(decay=Positive(init=0.1)), {"decay": [1e-4, 1.0]})
        >>> u = box.draw(torch.Generator().manual_seed(0))
        >>> round(box.space.constrain(u)["decay"].item(), 5)
        0.75895

    Raises:
        BilevelError: a range is empty, leaves the domain, excludes the initial value, or belongs to
            a hyperparameter that is not tuned.
    """
    given = {} if ranges is None else ranges
    if not isinstance(given, Mapping):
        what = "must map names to ranges"
        raise wrong("ranges", ranges, what, "give a mapping such as {decay: [0.001, 0.1]}")
    for name in given:
        if name not in space.tuned:
            what = (
                f"has no effect, because `{name}` is frozen"
                if name in space
                else f"sets an unknown hyperparameter{near(str(name), space.tuned)}"
            )
            remedy = f"choose from {', '.join(space.tuned)}"
            raise wrong(f"ranges.{name}", given[name], what, remedy)
    lows, highs, names, whole = [], [], [], []
    for name in space.tuned:
        domain = space[name]
        init = _to_z(domain, domain.unconstrain(domain.initial()))
        if given.get(name) is None:
            low, high = _default_range(name, domain, init)
        else:
            low, high = _user_range(name, domain, init, given[name])
        lows.append(low.expand_as(init))
        highs.append(high.expand_as(init))
        names += entry_names(name, domain.shape)
        whole += [isinstance(domain, Integer)] * domain.numel
    return Ranges(space, torch.cat(lows), torch.cat(highs), tuple(names), tuple(whole))


def _default_range(name: str, domain: Domain, init: Tensor) -> tuple[Tensor, Tensor]:
    """Return the default range of z."""
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
        f"`{name}` is a {type(domain).__name__}, which has no default range; tune it with another "
        "solver"
    )


def _user_range(name: str, domain: Domain, init: Tensor, value: Any) -> tuple[Tensor, Tensor]:
    """Return the user's range as a range of z."""
    setting = f"ranges.{name}"
    if isinstance(domain, Simplex):
        what = "is set for a Simplex, which takes no range because its logits are drawn"
        raise wrong(setting, value, what, "leave it out")
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        raise wrong(setting, value, "must be two numbers", "give [low, high]") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        what = "must be finite and not empty"
        raise wrong(setting, value, what, "give two finite numbers, the lower one first")
    if isinstance(domain, Interval):
        if low < domain.low or high > domain.high:
            what = f"leaves its domain ({domain.low:g}, {domain.high:g})"
            raise wrong(setting, value, what, "choose a range inside")
        if isinstance(domain, Integer) and (low != int(low) or high != int(high)):
            raise wrong(setting, value, "must have whole numbers as ends", "round both ends")
        if not isinstance(domain, Integer):
            inside = MARGIN * (domain.high - domain.low)
            low = max(low, min(domain.low + inside, float(init.min())))
            high = min(high, max(domain.high - inside, float(init.max())))
    if isinstance(domain, Positive):
        if low <= domain.low:
            what = f"must begin above {domain.low:g}, because its logarithm is drawn"
            raise wrong(setting, value, what, "raise the lower end")
        low, high = math.log(low - domain.low), math.log(high - domain.low)
    if bool(((init < low - 1e-9) | (init > high + 1e-9)).any()):
        what = f"does not contain its initial value {domain.init}, where the first trial starts"
        raise wrong(setting, value, what, "widen it, or change init")
    return init.clamp(max=low), init.clamp(min=high)  # rounding may put init outside by 1e-9


def _to_z(domain: Domain, u: Tensor) -> Tensor:
    """Return z of u, flat."""
    if isinstance(domain, Positive):
        return torch.log(domain.constrain(u, None) - domain.low).reshape(-1)
    if isinstance(domain, (Integer, Interval)):
        return domain.constrain(u, None).reshape(-1)
    return u.reshape(-1)


def _to_u(domain: Domain, z: Tensor) -> Tensor:
    """Return u of z."""
    if isinstance(domain, Positive):
        return softplus_inverse(torch.exp(z))
    if isinstance(domain, Simplex):
        return z
    if isinstance(domain, Integer):
        # u is infinite at the ends; a hundredth inside is rounded to them as well
        return domain.unconstrain(z.clamp(domain.low + 0.01, domain.high - 0.01))
    return domain.unconstrain(z)
