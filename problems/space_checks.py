"""What a hyperparameter can mean, whatever interval a user's change of the space gives it."""

import math
from collections.abc import Mapping

from bilevel import BilevelError, Interval, Space


def within(space: Space, limits: Mapping[str, tuple[float, float]], why: str = "here") -> Space:
    """The space as it is.

    Args:
        space: the hyperparameters; those without limits are not looked at.
        limits: the lowest and the highest value that means something, by name.
        why: what the limits depend on, for the sentence.

    Example:
        >>> within(Space(rate=Interval(low=0.0, high=2.0, init=0.1)), {"rate": (0.0, 1.0)})
        Traceback (most recent call last):
        bilevel.errors.BilevelError: hyperparameter `rate` goes from 0 to 2, and here it may go from 0 to 1; give space.rate.low
        and space.rate.high within that

    Raises:
        BilevelError: an interval that leaves its limits.
    """
    for name, (low, high) in limits.items():
        domain = space.get(name)
        if isinstance(domain, Interval) and not (low <= domain.low and domain.high <= high):
            room = f"from {low:g} to {high:g}" if math.isfinite(high) else f"from {low:g} up"
            raise BilevelError(
                f"hyperparameter `{name}` goes from {domain.low:g} to {domain.high:g}, and {why} it may go {room}; "
                f"give space.{name}.low and space.{name}.high within that"
            )
    return space


def shared(space: Space, names: Mapping[str, str]) -> Space:
    """The space as it is.

    Args:
        space: the hyperparameters.
        names: those that all examples of a batch share, with the reason.

    Raises:
        BilevelError: one of them is to be perturbed per example.
    """
    for name, why in names.items():
        if name in space and space[name].per_example:
            raise BilevelError(
                f"`{name}` {why}, which all examples share; leave {name}.per_example=false"
            )
    return space
