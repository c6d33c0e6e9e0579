"""Signals that end a run after its current round: Ctrl-C, SIGTERM, and an announced time limit."""

import os
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bilevel.errors import FaultWarning
from bilevel.parallel.process_group import is_distributed
from bilevel.parallel.slurm import SUBMITIT

EX_TEMPFAIL = 75
"""The exit status after a time limit, named in sysexits.h; the same command continues the run."""


TOGETHER = 2.0
"""Seconds within which the signals of a scheduler and of a launcher are one signal."""


class OutOfTime(KeyboardInterrupt):
    """A signal has announced a time limit."""


def time_limit_signals() -> list[signal.Signals]:
    """Return the signals that announce a time limit.

    They are SLURM's USR1 (`--signal=USR1@120`) and, in a job of submitit, the signal of submitit.
    """
    names = ["USR1"]
    if SUBMITIT in os.environ:
        names.append(os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))
    found = [f"SIG{name}" for name in names]
    return [getattr(signal, name) for name in found if hasattr(signal, name)]  # none on Windows


def end_signals() -> list[signal.Signals]:
    """Return the signals that end a run: Ctrl-C, SIGTERM, and a closed terminal.

    SIGHUP is left out where `nohup` ignores it. In a job of submitit SIGTERM is left to submitit,
    which waits for the signal of the time limit.
    """
    hangup = getattr(signal, "SIGHUP", None)
    ignored = hangup is None or signal.getsignal(hangup) is signal.SIG_IGN
    ends = [signal.SIGINT, *([] if SUBMITIT in os.environ else [signal.SIGTERM])]
    return ends if hangup is None or ignored else [*ends, hangup]


class Interrupts:
    """Note the first signal while the context is open; a second signal acts as usual.

    Among several processes, further signals within `TOGETHER` seconds count as the first one: a
    scheduler signals all processes, and their launcher passes its own signal on.

    Signal handlers belong to the main thread. In another thread nothing is installed or received.

    Args:
        signals: the signals to note; the default is all that end a run.

    Attributes:
        number: the signal that was received, or None.
    """

    def __init__(self, signals: Sequence[signal.Signals] | None = None) -> None:
        self.signals = signals
        self.number: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._since = 0.0

    @property
    def received(self) -> bool:
        """Return whether a signal was received."""
        return self.number is not None

    @property
    def of_time(self) -> bool:
        """Return whether the signal announced a time limit."""
        return self.number in time_limit_signals()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            every = [*end_signals(), *time_limit_signals()]
            signals = every if self.signals is None else self.signals
            self._previous = {s: signal.signal(s, self._note) for s in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._previous.items():
            # None is a handler that was not installed from Python; it cannot be put back
            signal.signal(s, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since >= (TOGETHER if is_distributed() else 0.0):
            self.__exit__()
            signal.raise_signal(number)


@contextmanager
def time_limit_raises() -> Iterator[None]:
    """Raise `OutOfTime` on SIGUSR1 while no run notes it: before the first round, between runs."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    usr1 = getattr(signal, "SIGUSR1", None)
    in_main = threading.current_thread() is threading.main_thread()
    if usr1 is None or SUBMITIT in os.environ or not in_main:
        yield
        return
    previous = signal.signal(usr1, leave)
    try:
        yield
    finally:
        signal.signal(usr1, signal.SIG_DFL if previous is None else previous)


@contextmanager
def requeued(wanted: Callable[[], bool]) -> Iterator[None]:
    """Requeue the job after the context, if it raised nothing and `wanted` returns true.

    This context is the outermost one: SLURM may end the process at once, so all must be saved.
    """
    yield
    if wanted():
        requeue()


def requeue() -> None:
    """Ask SLURM to run this job again (`scontrol requeue`); warn if that fails."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        problem = "this is not a job of SLURM (SLURM_JOB_ID is not set)"
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
            reason = (done.stderr or done.stdout).strip() or done.returncode
            problem = f"`scontrol requeue {job}` failed: {reason}"
    warnings.warn(
        f"the job was not requeued: {problem}; start the same command again",
        FaultWarning,
        stacklevel=2,
    )
