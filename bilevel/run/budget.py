"""The budgets of a run, its warm-up and its evaluation times, counted in inner steps."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

Phase: TypeAlias = Literal["plain", "warmup", "tuning", "frozen"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The plan of one run; a budget that is None never ends it.

    Example:
        >>> budget = Budget(steps_per_epoch=10, steps=25, warmup_steps=12, evaluate_every=0.5)
        >>> budget.limit(0), budget.limit(10), budget.limit(12), budget.evaluations(25)
        (12, 2, 13, 5)

    Attributes:
        steps: the epochs budget, in inner steps.
        plain_steps: plain training at the initial λ up to this step.
        warmup_steps: warm-up up to this step; λ is tuned from there.
        tuned_steps: λ is tuned up to this step, and then frozen; None never freezes it.
        examples: budget of training and validation examples together.
        evaluate_every: interval between evaluations, in epochs.
    """

    steps_per_epoch: int
    steps: int | None = None
    seconds: float | None = None
    examples: int | None = None
    plain_steps: int = 0
    warmup_steps: int = 0
    tuned_steps: int | None = None
    evaluate_every: float = 1

    def limit(self, step: int) -> int | None:
        """Return how many inner steps the round at `step` may take.

        The limit makes every phase and the epochs budget end exactly.
        """
        ends = (self.plain_steps, self.warmup_steps, self.tuned_steps, self.steps)
        return min((end - step for end in ends if end is not None and end > step), default=None)

    def phase(self, step: int) -> Phase:
        """Return the phase of the round at `step`.

        Example:
            >>> budget = Budget(steps_per_epoch=1, plain_steps=2, warmup_steps=3, tuned_steps=5)
            >>> [budget.phase(step) for step in range(1, 6)]
            ['plain', 'warmup', 'tuning', 'tuning', 'frozen']
        """
        if step < self.plain_steps:
            return "plain"
        if step < self.warmup_steps:
            return "warmup"
        return "tuning" if self.tuned_steps is None or step < self.tuned_steps else "frozen"

    def evaluations(self, step: int) -> int:
        """Return how many evaluations are due up to `step`, without the one before training."""
        return math.floor(step / (self.evaluate_every * self.steps_per_epoch) + 1e-9)

    def spent(self, step: int, seconds: float, examples: int) -> dict[str, float]:
        """Return the spent fraction of each budget; the run ends when one of them reaches 1."""
        budgets = {
            "epochs": (step, self.steps),
            "seconds": (seconds, self.seconds),
            "examples": (examples, self.examples),
        }
        return {name: used / whole for name, (used, whole) in budgets.items() if whole is not None}
