"""The interface of loggers: what a run passes to them, and when."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bilevel.loggers.records import Record
from bilevel.space import Space


class Place(NamedTuple):
    """A run's place in a sweep: the sweep's name, the run's number from 1, and how many there are, where that is known."""

    sweep: str
    run: int
    runs: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What loggers know of a run before it begins.

    Attributes:
        initial: every hyperparameter before training, by name.
        best: the best record so far of a run that is resumed; {} otherwise.
        patience: as the runner's.
        place: in the sweep that the run is part of, if it is.
    """

    directory: Path
    problem: str
    solver: str
    seed: int
    space: Space
    config: Mapping[str, Any] = field(default_factory=dict)
    epochs: float | None = None
    warmup_epochs: float = 0
    initial: Record = field(default_factory=dict)
    best: Record = field(default_factory=dict)
    resumed: bool = False
    patience: int | None = None
    place: Place | None = None


class Progress(NamedTuple):
    """Where a run is between two evaluations.

    `fraction` is the part of the budget that is spent, `stalled` the evaluations since the best one that patience counts.
    """

    step: int
    epoch: float
    fraction: float
    stalled: int = 0


class Logger(ABC):
    """Receives what a run tells; several compose in a list. It must not touch the numbers that it is given.

    First comes `start`, then `log` and `advance`, then `finish` unless the run raised, and at last `close`.
    """

    takes_pictures: bool = False
    """Whether it wants `show_pictures` to be called."""
    vital: bool = False
    """Whether a run ends where it raises; otherwise that is told in a sentence, and the run goes on without it."""

    @abstractmethod
    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        """The run begins, or resumes with the `state` of its checkpoint ({} otherwise)."""

    @abstractmethod
    def log(self, record: Record) -> None:
        """An evaluation was made."""

    def advance(self, progress: Progress) -> None:  # optional, as the next two
        """A round is over; called often, so it must be quick."""

    def show_pictures(self, pictures: Mapping[str, Tensor]) -> None:
        """`Problem.pictures` on the CPU, at some evaluations, just before their `log`."""

    def finish(self, summary: Record) -> None:
        """The run ended in order, interrupted and diverged ones included."""

    def close(self) -> None:
        """Release what `start` took."""

    def state(self) -> dict[str, Any]:
        """What `start` needs in order to go on from this checkpoint: numbers, strings and containers of them."""
        return {}
