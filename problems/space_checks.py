"""Checks of a hyperparameter space after the changes of a user."""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from bilevel import BilevelError, Interval, Space

SpaceChanges: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Changes of fields by hyperparameter, as in `Space.override`."""


def require_within(
    space: Space, limits: Mapping[str, tuple[float, float]], condition: str = ""
) -> Space:
    """Return the space, after a check that its intervals stay within limits.

    Args:
        space: the hyperparameters; those without limits are not checked.
        limits: the lowest and the highest value that has a meaning, by name.
        condition: what the limits depend on, such as "with 8 × 8 pixels"; it ends the first clause
            of the error.

    Example:
        >>> space = Space(rate=Interval(low=0.0, high=2.0, init=0.1))
        >>> require_within(space, {"rate": (0.0, 1.0)})
        Traceback (most recent call last):
        bilevel.errors.BilevelError: space.rate goes from 0 to 2 and must stay between 0 and 1;
        set space.rate.low and space.rate.high accordingly

    Raises:
        BilevelError: an interval leaves its limits.
    """
    for name, (low, high) in limits.items():
        domain = space.get(name)
        if isinstance(domain, Interval) and not (low <= domain.low and domain.high <= high):
            allowed = f"between {low:g} and {high:g}" if math.isfinite(high) else f"above {low:g}"
            raise BilevelError(
                f"space.{name} goes from {domain.low:g} to {domain.high:g} and must stay {allowed}"
                f"{' ' * bool(condition)}{condition}; "
                f"set space.{name}.low and space.{name}.high accordingly"
            )
    return space


def require_per_batch(space: Space, names: Mapping[str, str]) -> Space:
    """Return the space, after a check that some hyperparameters are perturbed per batch.

    Args:
        space: the hyperparameters.
        names: names of hyperparameters that all examples of a batch share, each with the reason.

    Raises:
        BilevelError: one of them is perturbed per example.
    """
    for name, reason in names.items():
        if name in space and space[name].per_example:
            raise BilevelError(
                f"space.{name}.per_example=true is not possible, because `{name}` {reason}; "
                f"set space.{name}.per_example=false"
            )
    return space
