"""Failures around a run (a logger, a full disk) that it survives while no work is lost."""

import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from bilevel.checkpoint.checkpoints import CHECKPOINT
from bilevel.errors import FaultWarning, Unwritable
from bilevel.loggers.logger import Logger, RunInfo
from bilevel.text import byte_size, describe

GRACE = 3600.0
"""Seconds for which a run continues without writing checkpoints: a full disk costs this at most."""
AT_THE_END = 60.0
"""Seconds for which a finished run waits for free space; it tries again every `PAUSE` seconds."""
AFTER_SIGNAL = 10.0
"""Seconds for which a run waits for free space after a signal: SLURM kills 30 s after SIGTERM."""
PAUSE = 2.0
ROOM = 4
"""Free space that a run wants, in sizes of its checkpoint: a new one is written before the old one
goes, older ones are kept, and checkpoints grow."""


class Loggers:
    """The loggers of a run.

    A vital logger that fails ends the run. Any other one causes a warning, once.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = list(loggers)
        self._warned: set[int] = set()
        self._states: dict[str, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[Logger]:
        return iter(self._loggers)

    @contextmanager
    def started(self, run: RunInfo, states: Mapping[str, dict[str, Any]]) -> Iterator[None]:
        """Start every logger with its state from a checkpoint, and close them all at the end."""
        with ExitStack() as stack:
            for logger in self:
                logger.start(run, states.get(type(logger).__name__, {}))
                stack.callback(self.call_one, logger, "close")
            yield

    def call(self, event: str, *arguments: Any) -> None:
        """Call a method of every logger."""
        for logger in self:
            self.call_one(logger, event, *arguments)

    def call_one(self, logger: Logger, event: str, *arguments: Any) -> Any:
        """Call a method of one logger, and return its result, or None if it failed."""
        try:
            return getattr(logger, event)(*arguments)
        except Exception as error:
            if logger.vital:
                raise
            if id(logger) not in self._warned:
                self._warned.add(id(logger))
                warnings.warn(
                    f"{type(logger).__name__} failed to {event} ({describe(error)}); the run "
                    "continues, and metrics.jsonl holds the missing values, which `bilevel log "
                    "RUN` logs again",
                    FaultWarning,
                    stacklevel=3,
                )
            return None

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the state of every logger by name; for one that fails, its last state."""
        for logger in self:
            if (state := self.call_one(logger, "state")) is not None:
                self._states[type(logger).__name__] = state
        return dict(self._states)


class CheckpointSaver:
    """Save checkpoints, and try a failed write again at every evaluation.

    The first checkpoint must be written before any work is done. If a later write fails, the run
    warns and continues for `GRACE` seconds at most. A finished run waits `AT_THE_END` seconds for
    free space. The previous checkpoint stays whole throughout.

    Attributes:
        owed: whether the last attempt failed.
        step: the inner step of the last checkpoint on disk, or None.
    """

    def __init__(self, save: Callable[[dict[str, Any]], None], directory: Path) -> None:
        self.save = save
        self.directory = directory
        self.owed = False
        self.step: int | None = None
        self._since = 0.0
        self._warned = False

    def resumed(self, step: int) -> None:
        """Note that a checkpoint of `step` is on disk."""
        self.step = step

    def __call__(
        self,
        state: dict[str, Any],
        *,
        last: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Save now, or note that a later call must.

        Args:
            state: the state of the run.
            last: whether the run has ended.
            interrupted: returns whether a signal has come, which shortens the wait for free space.

        Raises:
            Unwritable: the first or the last write failed, or writes have failed for too long.
        """
        deadline, hurried = time.monotonic() + AT_THE_END, False
        while True:
            if not hurried and interrupted():
                hurried, deadline = True, min(deadline, time.monotonic() + AFTER_SIGNAL)
            try:
                self.save(state)
            except Unwritable as error:
                self._failed(error, last=last, final=last and time.monotonic() >= deadline)
                if not last:
                    return
                time.sleep(PAUSE)
            else:
                self.owed, self.step = False, state["step"]
                self._check_free_space()
                return

    def _failed(self, error: Unwritable, *, last: bool, final: bool) -> None:
        if self.step is None:
            raise error
        if not self.owed:
            self.owed, self._since = True, time.monotonic()
            then = (
                f"the run has ended, and waits {AT_THE_END:g} s for free space ({AFTER_SIGNAL:g} s "
                "after a signal)"
                if last
                else "the run continues, tries again at every evaluation, and ends after an hour "
                "of failures"
            )
            warnings.warn(f"{error}; {then}", FaultWarning, stacklevel=3)
        elif final or time.monotonic() - self._since > GRACE:
            raise Unwritable(
                f"{error}; the run ends, and the work since step {self.step}, its last "
                "checkpoint, is lost"
            ) from None

    def _check_free_space(self) -> None:
        """Warn once if the disk may soon be full."""
        if self._warned:
            return
        with suppress(OSError):  # this is only an early warning
            size = (self.directory / CHECKPOINT).stat().st_size
            free = shutil.disk_usage(self.directory).free
            if free < ROOM * size:
                self._warned = True
                warnings.warn(
                    f"{self.directory} has {byte_size(free)} left, and a checkpoint takes "
                    f"{byte_size(size)}; free some space, lower runner.keep_checkpoints, or move "
                    "the run",
                    FaultWarning,
                    stacklevel=3,
                )
