"""Errors and warnings that a user can act on; every message is one sentence."""


class BilevelError(Exception):
    """A mistake that the user can correct; the message has the setting, the reason and the remedy.

    The command line prints the message alone and exits with status 1.
    """


class Refused(BilevelError):
    """A solver cannot tune this problem; raised at set-up, before any work is lost."""


class DirectoryLocked(BilevelError):
    """Another process is running in the run directory."""


class DirectoryLost(BilevelError):
    """The run directory was moved, removed or taken by another run during the run."""


class Unwritable(BilevelError):
    """A file cannot be written now, for example on a full disk; the runner tries again."""


class SpeedWarning(UserWarning):
    """A setting that would make a run faster has no effect here; the run continues without it."""


class SolverWarning(UserWarning):
    """A solver reports a problem with its result; the run continues."""


class FaultWarning(UserWarning):
    """Something around a run failed, and the run continues without it."""


class DataWarning(UserWarning):
    """The data differ from what they say of themselves, for example in their length."""
