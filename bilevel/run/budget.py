"""When a run warms up, evaluates and ends, counted in inner steps."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The plan of one run; a budget that is None does not bind.

    Example:
        >>> plan = Schedule(steps_per_epoch=10, steps=25, warmup_steps=12, evaluate_every=0.5)
        >>> plan.limit(0), plan.limit(10), plan.limit(12), plan.evaluations(25)
        (12, 2, 13, 5)

    Attributes:
        steps: the epochs budget.
        examples: budget of training and validation examples together.
        evaluate_every: in epochs.
    """

    steps_per_epoch: int
    steps: int | None = None
    seconds: float | None = None
    examples: int | None = None
    warmup_steps: int = 0
    evaluate_every: float = 1

    def limit(self, step: int) -> int | None:
        """Inner steps that the round at `step` may take, so that warm-up and budget end exactly."""
        ends = [
            end - step for end in (self.warmup_steps, self.steps) if end is not None and end > step
        ]
        return min(ends, default=None)

    def evaluations(self, step: int) -> int:
        """Evaluations that are due up to `step`, the one before training left out."""
        return math.floor(step / (self.evaluate_every * self.steps_per_epoch) + 1e-9)

    def spent(self, step: int, seconds: float, examples: int) -> dict[str, float]:
        """The spent part of each budget that binds; the run ends when one of them reaches 1."""
        budgets = {
            "epochs": (step, self.steps),
            "seconds": (seconds, self.seconds),
            "examples": (examples, self.examples),
        }
        return {name: used / whole for name, (used, whole) in budgets.items() if whole is not None}
