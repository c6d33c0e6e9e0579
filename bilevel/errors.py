"""Errors and warnings that a user can act on: each message is one sentence."""


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
