"""What goes wrong on the user's side, said in one sentence."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class BilevelError(Exception):
    """A mistake that its user can mend: the message says what, why and what next.

    The command line prints the message alone and exits with status 1; a library user sees an ordinary exception.
    """


class Refused(BilevelError):
    """A solver cannot tune this problem: raised at set-up, before any work is lost."""


class Taken(BilevelError):
    """Another process is running where this one was to run."""


class SpeedWarning(UserWarning):
    """An option that would make a run quicker has no effect here; the run goes on without it."""


class Unwritable(BilevelError):
    """A file cannot be written now: the disk is full, say. It may be possible later, and the runner tries again."""


class FaultWarning(UserWarning):
    """Something around a run failed, and the run goes on without it."""


def near(word: str, known: Iterable[Any]) -> str:
    """', did you mean …' for the words of `known` that are close to `word`, or nothing."""
    close = get_close_matches(word, [str(k) for k in known], n=3)
    return f" (did you mean {' or '.join(f'`{c}`' for c in close)}?)" if close else ""
