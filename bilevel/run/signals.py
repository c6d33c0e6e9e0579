"""Signals as a wish to stop after the current round: Ctrl-C, an end from outside, a time limit ahead."""

import os
import signal
import subprocess
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bilevel.errors import FaultWarning

EX_TEMPFAIL = 75
"""The exit status of a command that a time limit ended: the same command goes on (of sysexits.h: "try again later")."""
SUBMITIT = "SUBMITIT_EXECUTOR"
"""The environment variable by which submitit's jobs know themselves."""


class OutOfTime(KeyboardInterrupt):
    """A time limit is ahead, and a signal has said so."""


def of_time_limit() -> list[signal.Signals]:
    """The signals that announce a time limit: SLURM's USR1 (`--signal=USR1@120`), and submitit's own in its jobs."""
    names = [
        "USR1",
        *([os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")] if SUBMITIT in os.environ else []),
    ]
    return [
        getattr(signal, f"SIG{name}") for name in names if hasattr(signal, f"SIG{name}")
    ]  # Windows has neither


def of_an_end() -> list[signal.Signals]:
    """The signals that end a run: Ctrl-C, SIGTERM, and a terminal that is closed, unless `nohup` has that ignored.

    Of submitit's jobs SIGTERM is submitit's: it waits for the signal of the time limit that follows.
    """
    hangup = getattr(signal, "SIGHUP", None)
    ignored = hangup is None or signal.getsignal(hangup) is signal.SIG_IGN
    ends = [signal.SIGINT, *([] if SUBMITIT in os.environ else [signal.SIGTERM])]
    return ends if hangup is None or ignored else [*ends, hangup]


class Interrupts:
    """While entered, the first signal is only noted; a second one, of any kind, acts as it would without.

    Handlers belong to the main thread: elsewhere nothing is installed, and nothing is received.

    Args:
        signals: those that are noted; by default all that end a run.

    Attributes:
        number: the signal that was received, or None.
    """

    def __init__(self, signals: Sequence[signal.Signals] | None = None) -> None:
        self.signals = signals
        self.number: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def received(self) -> bool:
        """Whether there was one."""
        return self.number is not None

    @property
    def of_time(self) -> bool:
        """Whether it announced a time limit."""
        return self.number in of_time_limit()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            signals = [*of_an_end(), *of_time_limit()] if self.signals is None else self.signals
            self._previous = {s: signal.signal(s, self._note) for s in signals}
        return self

    def __exit__(self, *_: object) -> None:
        # None stands for a handler that was not installed from Python and cannot be put back
        for s, handler in self._previous.items():
            signal.signal(s, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = signal.Signals(number)
        self.__exit__()


@contextmanager
def time_limit_raises() -> Iterator[None]:
    """Within it, SIGUSR1 raises `OutOfTime` where no run is there to note it: before its first round, and between two."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    usr1 = getattr(signal, "SIGUSR1", None)
    if (
        usr1 is None
        or SUBMITIT in os.environ
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    previous = signal.signal(usr1, leave)
    try:
        yield
    finally:
        signal.signal(usr1, signal.SIG_DFL if previous is None else previous)


def requeue() -> None:
    """Ask SLURM to run this job again, `scontrol requeue`; a sentence where that cannot be done."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        problem = "this is no job of SLURM (there is no SLURM_JOB_ID)"
    else:
        try:
            done = subprocess.run(
                ["scontrol", "requeue", job], capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = f"scontrol cannot be run ({error})"
        else:
            if done.returncode == 0:
                return
            problem = f"`scontrol requeue {job}` failed: {(done.stderr or done.stdout).strip() or done.returncode}"
    warnings.warn(
        f"the job was not requeued: {problem}; start the same command again",
        FaultWarning,
        stacklevel=2,
    )
