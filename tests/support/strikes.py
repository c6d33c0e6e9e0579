"""Loggers that do something at a step of a run, or of its refits."""

from bilevel.loggers.logger import Logger


class Killed(Exception):
    pass


def kill():
    raise Killed


class Act(Logger):
    """Calls `act` after the round that ends at `step`, in the run itself or in each refit."""

    vital = True

    def __init__(self, act, step, *, in_refit=False):
        self.act, self.step, self.waits = act, step, in_refit

    def start(self, run, state):
        pass

    def log(self, record):
        pass

    def advance(self, progress):
        if progress.step == self.step and not self.waits:
            self.act()

    def nested(self):
        return Act(self.act, self.step) if self.waits else None
