"""What goes wrong on the user's side, said in one sentence."""


class BilevelError(Exception):
    """A mistake that its user can mend: the message says what, why and what next.

    The command line prints the message alone and exits with status 1; a library user sees an ordinary exception.
    """


class Refused(BilevelError):
    """A solver cannot tune this problem: raised at set-up, before any work is lost."""
