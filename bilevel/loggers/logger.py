"""The interface of loggers, and the facts about a run that they receive."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bilevel.loggers.records import Record
from bilevel.selection import Selection
from bilevel.space import Space


class Place(NamedTuple):
    """The place of a run in a sweep: name of the sweep, number from 1, total where it is known."""

    sweep: str
    run: int
    runs: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The facts about a run before it begins.

    Attributes:
        tuned_epochs: the epochs after which λ is constant; None for a λ that moves to the end.
        initial: every hyperparameter before training, by name.
        warmup_epochs: the epochs before the first outer step.
        tuned_epochs: the epochs after which λ is frozen; None if it never is.
        best: the best record so far of a resumed run; {} otherwise.
        select: the rule for the best evaluation.
        patience: the setting of the runner.
        place: the place in a sweep; None for a single run.
        environment: versions, commits, device and threads (`bilevel.run.environment`).
    """

    directory: Path
    problem: str
    solver: str
    seed: int
    space: Space
    config: Mapping[str, Any] = field(default_factory=dict)
    epochs: float | None = None
    warmup_epochs: float = 0
    tuned_epochs: float | None = None
    initial: Record = field(default_factory=dict)
    best: Record = field(default_factory=dict)
    resumed: bool = False
    select: Selection = field(default_factory=lambda: Selection("valid_loss"))
    patience: int | None = None
    place: Place | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)


class Progress(NamedTuple):
    """The state of a run between two evaluations.

    `fraction` is the spent part of the budget. `stalled` counts the evaluations since the best one,
    for patience.
    """

    step: int
    epoch: float
    fraction: float
    stalled: int = 0


class Logger(ABC):
    """Receives the records of a run and must not change them; several loggers form a list.

    The runner calls `start`, then `log` and `advance`, then `finish` unless the run raised, and
    `close`.
    """

    takes_pictures: bool = False
    """True where `show_pictures` should be called."""
    vital: bool = False
    """True where an error of this logger ends the run; otherwise it is a warning."""

    @abstractmethod
    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        """Begin a run, or resume one with the `state` of its checkpoint ({} otherwise)."""

    def again(self, directory: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Set aside what was logged of a finished run, and return the state to start anew with.

        `bilevel log` calls this method with the state of the last checkpoint ({} without one).
        """
        return {}

    @abstractmethod
    def log(self, record: Record) -> None:
        """Log the record of an evaluation."""

    def advance(self, progress: Progress) -> None:
        """Note the end of a round; this method is called often and must be fast."""

    def show_pictures(self, pictures: Mapping[str, Tensor]) -> None:
        """Show `Problem.pictures`, on the CPU, before the `log` of some evaluations."""

    def finish(self, summary: Record) -> None:
        """Log the end of a run in order, also of an interrupted or diverged one."""

    def close(self) -> None:
        """Release the resources that `start` acquired."""

    def nested(self) -> "Logger | None":
        """Return a new logger that shows a refit as a part of this run; None leaves it out."""
        return None

    def state(self) -> dict[str, Any]:
        """Return the state that `start` needs to continue from this checkpoint, in plain types."""
        return {}
