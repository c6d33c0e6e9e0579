"""The arguments of `Runner.run`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel.checkpoint.checkpoints import Identity
from bilevel.errors import BilevelError
from bilevel.loggers.logger import Logger, Place
from bilevel.problem import Problem
from bilevel.solver import Solver


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The arguments of `Runner.run`, which describes them.

    Raises:
        BilevelError: a resumed run is given weights, or the solver has already taken steps.
    """

    problem: Problem
    solver: Solver
    directory: Path
    seed: int
    names: tuple[str, str] | None
    config: Mapping[str, Any]
    loggers: Sequence[Logger]
    resume: bool
    params: Mapping[str, Tensor] | None
    place: Place | None

    def __post_init__(self) -> None:
        if self.resume and self.params is not None:
            raise BilevelError(
                "resume=True continues from the run's own weights; leave params out, or start a "
                "new run from them"
            )
        if count := self.solver.inner_count:
            name = type(self.solver).__name__
            raise BilevelError(
                f"this {name} has already taken {count} steps; make a new solver for every run"
            )

    @property
    def identity(self) -> Identity:
        """The names and the seed that a checkpoint of this run must carry."""
        names = self.names or (type(self.problem).__name__, type(self.solver).__name__)
        return Identity(*names, self.seed)
