"""Changes of hyperparameters in their own units, as changes of the unconstrained u."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bilevel import Interval, Positive, Refused, Simplex, Space
from bilevel.domains import Domain
from bilevel.text import near
from bilevel.validate import at_least, wrong

MARGIN = 1e-3
"""A shifted value stays this far inside its domain.

The unit is the width of an interval, or the distance of a positive initial value from its bound.
"""


class DomainShift:
    """The map from a change in own units, [h] or [B, h], to u of the changed initial values."""

    def __init__(self, space: Space, like: Tensor) -> None:
        self.sizes = [space[name].numel for name in space.tuned]
        self.parts = []
        for name in space.tuned:
            domain, initial = space[name], space[name].initial()
            self.parts.append((domain, initial.reshape(-1).to(like), *_bounds(domain, initial)))

    def __call__(self, change: Tensor) -> Tensor:
        moved = []
        for part, (domain, initial, low, high) in zip(
            change.split(self.sizes, dim=-1), self.parts, strict=True
        ):
            value = initial + part
            if isinstance(domain, Simplex):
                # its map is not elementwise; `size_by_coordinate` lets no simplex change
                value = value.reshape(*part.shape[:-1], *domain.shape)
            moved.append(domain.unconstrain(value.clamp(low, high)).reshape(part.shape))
        return torch.cat(moved, dim=-1) if moved else change


def _bounds(domain: Domain, initial: Tensor) -> tuple[float, float]:
    """Return the bounds of a shifted value; they contain the initial value."""
    if isinstance(domain, Interval):
        margin = MARGIN * (domain.high - domain.low)
        low = min(domain.low + margin, float(initial.min()))
        return low, max(domain.high - margin, float(initial.max()))
    if isinstance(domain, Positive):
        return domain.low + MARGIN * (float(initial.min()) - domain.low), math.inf
    return -math.inf, math.inf


def check_sizes(setting: str, sizes: float | Mapping[str, float]) -> None:
    """Require numbers that are not negative: one for all hyperparameters, or one by name."""
    named = sizes if isinstance(sizes, Mapping) else None
    for name, size in {setting: sizes}.items() if named is None else named.items():
        at_least(0, **{name if named is None else f"{setting}.{name}": size})


def size_by_coordinate(
    setting: str, sizes: float | Mapping[str, float], space: Space, *, own_units: bool
) -> Tensor:
    """Return the size of the change of every coordinate of u, [h] in float64.

    Args:
        setting: the name of the setting in errors.
        sizes: one size for all tuned hyperparameters, or sizes by name; 0 where there is none.
        space: the space of the problem.
        own_units: the changes are in the units of the hyperparameters, and not in those of u.

    Raises:
        Refused: a hyperparameter is unknown, frozen, a simplex, or an optimizer setting.
    """
    named = sizes if isinstance(sizes, Mapping) else dict.fromkeys(space.tuned, sizes)
    for name, size in named.items():
        if name not in space.tuned:
            what = (
                f"has no effect, because `{name}` is frozen"
                if name in space
                else f"names an unknown hyperparameter{near(name, space)}"
            )
            remedy = f"choose from {', '.join(space.tuned)}"
            raise Refused(str(wrong(f"{setting}.{name}", size, what, remedy)))
        if own_units and isinstance(space[name], Simplex) and size:
            what = f"cannot apply in own units, because `{name}` must sum to one"
            remedy = f"give {setting} by name and leave `{name}` out"
            raise Refused(str(wrong(f"{setting}.{name}", size, what, remedy)))
    refuse_optimizer_settings(space, [name for name, size in named.items() if size])
    parts = [
        torch.full((space[name].numel,), float(named.get(name, 0.0)), dtype=torch.float64)
        for name in space.tuned
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def refuse_optimizer_settings(
    space: Space,
    names: Iterable[str],
    remedy: str = "freeze it, or schedule it with inner_scheduler",
) -> None:
    """Raise `Refused` for a setting of the optimizer, which gets its settings once."""
    for name in names:
        if (setting := space[name].optimizer) is not None:
            raise Refused(
                f"`{name}` is the inner optimizer's {setting}, which `Fixed` sets once; {remedy}"
            )
