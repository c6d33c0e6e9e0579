"""What fails around a run while it goes: a logger, a disk. The run goes on where no work is lost by that."""

import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bilevel.checkpoint.checkpoints import CHECKPOINT
from bilevel.errors import FaultWarning, Unwritable
from bilevel.loggers.logger import Logger

GRACE = 3600.0
"""Seconds for which a run goes on though its checkpoints cannot be written: the most that a full disk can cost."""
AT_THE_END = 60.0
"""Seconds for which a run that has ended waits for room, asking again every `PAUSE`."""
PAUSE = 5.0
ROOM = 4
"""Checkpoints of the size of the last one that should find room: it may be replaced while the others are kept, and grows."""


class Loggers:
    """The loggers of a run: only a vital one that fails ends it; of another one that is told once, in a sentence."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = list(loggers)
        self._told: set[int] = set()
        self._states: dict[str, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[Logger]:
        return iter(self._loggers)

    def tell(self, event: str, *arguments: Any) -> None:
        """Call a method of all of them."""
        for logger in self:
            self.tell_one(logger, event, *arguments)

    def tell_one(self, logger: Logger, event: str, *arguments: Any) -> Any:
        """Call a method of one of them; what it returns, or None where it failed."""
        try:
            return getattr(logger, event)(*arguments)
        except Exception as error:
            if logger.vital:
                raise
            if id(logger) not in self._told:
                self._told.add(id(logger))
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(
                    f"{type(logger).__name__} failed to {event} ({type(error).__name__}: {said}); the run goes on, and "
                    "metrics.jsonl has what is missing there",
                    FaultWarning,
                    stacklevel=3,
                )
            return None

    def state(self) -> dict[str, dict[str, Any]]:
        """By name; of one that fails, its last."""
        for logger in self:
            if (state := self.tell_one(logger, "state")) is not None:
                self._states[type(logger).__name__] = state
        return dict(self._states)


class Saving:
    """Saves checkpoints; one that cannot be written is owed, and tried again at every evaluation.

    The first one must be written, before any work is done. Of a later one that cannot be, the run warns and goes on, for
    `GRACE` seconds at most; at its end it waits `AT_THE_END` seconds for room. The checkpoint before stays whole throughout.

    Attributes:
        owed: whether the last attempt failed.
    """

    def __init__(self, save: Callable[[dict[str, Any]], None], directory: Path) -> None:
        self.save, self.directory = save, directory
        self.owed = False
        self.step: int | None = None  # of the last one that was written
        self._since = 0.0
        self._warned = False

    def resumed(self, step: int) -> None:
        """There is one already, of `step`."""
        self.step = step

    def __call__(self, state: dict[str, Any], *, last: bool = False) -> None:
        """Save, now or later.

        Raises:
            Unwritable: it is the first, or the last, or has been owed for too long.
        """
        deadline = time.monotonic() + AT_THE_END
        while True:
            try:
                self.save(state)
            except Unwritable as error:
                self._failed(error, last=last, final=last and time.monotonic() >= deadline)
                if not last:
                    return
                time.sleep(PAUSE)
            else:
                self.owed, self.step = False, state["step"]
                self._look_for_room()
                return

    def _failed(self, error: Unwritable, *, last: bool, final: bool) -> None:
        if self.step is None:
            raise error
        if not self.owed:
            self.owed, self._since = True, time.monotonic()
            now = "the run goes on, tries again at every evaluation, and ends when that fails for an hour"
            at_the_end = f"the run is over, and waits {AT_THE_END:g} s for room"
            warnings.warn(f"{error}; {at_the_end if last else now}", FaultWarning, stacklevel=3)
        elif final or time.monotonic() - self._since > GRACE:
            lost = f"the run ends, and what follows step {self.step}, its last checkpoint, is lost"
            raise Unwritable(f"{error}; {lost}") from None

    def _look_for_room(self) -> None:
        if self._warned:
            return
        with suppress(OSError):  # it warns ahead of a failure, and is none
            size, free = (
                (self.directory / CHECKPOINT).stat().st_size,
                shutil.disk_usage(self.directory).free,
            )
            if free < ROOM * size:
                self._warned = True
                warnings.warn(
                    f"a checkpoint takes {_mib(size)} and {self.directory} has {_mib(free)} left: free some space, lower "
                    "runner.keep_checkpoints, or move the run",
                    FaultWarning,
                    stacklevel=3,
                )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
