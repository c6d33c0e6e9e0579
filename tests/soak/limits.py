"""A limit of time for one case of a soak."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

LIMIT = 120
"""Seconds within which every case must have ended."""


class TooLong(BaseException):
    """A case has not ended in time; nothing between may take it for an error."""


@contextmanager
def soon() -> Iterator[None]:
    """Raise if the block lasts longer than `LIMIT`: most likely a bad value was not refused."""

    def ring(*_: object) -> None:
        raise TooLong(f"not ended after {LIMIT} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
