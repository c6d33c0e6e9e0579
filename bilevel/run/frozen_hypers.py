"""A problem whose hyperparameters are constants, for training at values that a run has found."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from bilevel.loggers.space_json import LARGE
from bilevel.params import Hypers
from bilevel.problem import Problem
from bilevel.problem_wrapper import ProblemWrapper
from bilevel.space import Space


class FrozenHypers(ProblemWrapper):
    """`problem` with every hyperparameter frozen at a given value.

    A frozen value is taken as it is, also on the edge of its domain, where u is infinite.

    Args:
        problem: the problem.
        hypers: a value for each hyperparameter, as a `Solution` has them.
    """

    def __init__(self, problem: Problem, hypers: Hypers) -> None:
        super().__init__(problem)
        self.space = Space(
            **{
                name: replace(domain, init=_plain(hypers[name]), frozen=True)
                for name, domain in problem.space.items()
            }
        )


def _plain(value: Tensor) -> Any:
    """Return numbers, as a user writes them; a large array stays a tensor."""
    value = value.detach().cpu()
    return value.tolist() if value.numel() <= LARGE else value.double()
