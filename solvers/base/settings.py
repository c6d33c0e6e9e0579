"""The settings that solvers share, spelled once: of the inner steps and of the outer steps."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from bilevel.solver import Solver
from bilevel.solvers.optim.optimized import RMSPROP, SGD, MakeOptimizer, MakeScheduler
from bilevel.text import near
from bilevel.validate import positive, whole, wrong


@dataclass(kw_only=True, eq=False)
class InnerSettings:
    """Settings of the steps on w.

    Attributes:
        inner_steps: training batches per round.
        inner_optimizer: makes the optimizer of w.
        inner_scheduler: makes its learning-rate schedule, which steps every epoch; None for none.
        clip_norm: largest gradient norm; None for no clipping.
    """

    inner_steps: int = 5
    inner_optimizer: MakeOptimizer = SGD
    inner_scheduler: MakeScheduler | None = None
    clip_norm: float | None = None

    def check_inner(self) -> None:
        """Raise if a setting of the inner steps is wrong."""
        whole(1, inner_steps=self.inner_steps)
        if self.clip_norm is not None:
            positive("set it to null for no clipping", clip_norm=self.clip_norm)


@dataclass(kw_only=True, eq=False)
class OuterSettings:
    """Settings of the steps on λ.

    Attributes:
        outer_steps: validation batches per round.
        outer_optimizer: makes the optimizer of u.
        outer_scheduler: the learning-rate schedule of u and σ. "inner": that of w, so that each
            rate is multiplied by the factor that the rate of w has reached. None: constant rates. A
            function of the optimizer makes a schedule of its own, which steps every epoch.
        follow_statistics: take the batch-norm statistics of L_V as functions of w, as they are of
            the last training batch (`Problem.statistics`). False, and self-tuning with a
            perturbation per example, takes them as constants.
    """

    outer_steps: int = 1
    outer_optimizer: MakeOptimizer = RMSPROP
    outer_scheduler: Literal["inner"] | MakeScheduler | None = "inner"
    follow_statistics: bool = True

    def check_outer(self) -> None:
        """Raise if a setting of the outer steps is wrong."""
        whole(1, outer_steps=self.outer_steps)
        schedule = self.outer_scheduler
        if schedule is not None and schedule != "inner" and not callable(schedule):
            raise wrong(
                "outer_scheduler",
                schedule,
                f"is unknown{near(str(schedule), ['inner', 'null'])}",
                "choose inner or null, or give a function of the optimizer (in YAML: `_target_` "
                "with `_partial_: true`)",
            )


_PLAIN: list[Callable[..., Solver]] = []
"""The solver of plain training, which registers itself: its module imports this one."""

Made = TypeVar("Made", bound=Callable[..., Solver])


def trains_plainly(solver: Made) -> Made:
    """Register the class that `plain_training` makes."""
    _PLAIN[:] = [solver]
    return solver


def plain_training(settings: InnerSettings) -> Solver:
    """Return a solver that takes the inner steps of `settings` at constant λ.

    Example:
        >>> from bilevel.solvers import delta_stn
        >>> plain = plain_training(delta_stn(inner_steps=3))
        >>> type(plain).__name__, plain.inner_steps
        ('Fixed', 3)
    """
    [make] = _PLAIN
    return make(**{field.name: getattr(settings, field.name) for field in fields(InnerSettings)})
