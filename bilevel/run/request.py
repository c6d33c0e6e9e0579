"""The arguments of `Runner.run`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel.checkpoint.checkpoints import Identity
from bilevel.errors import BilevelError
from bilevel.loggers.logger import Logger, Place
from bilevel.problem import Problem
from bilevel.solver import Solver
from bilevel.text import file_name


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The arguments of `Runner.run`, which describes them.

    Raises:
        BilevelError: a resumed run is given weights, or the solver has already taken steps.
    """

    problem: Problem
    solver: Solver
    directory: Path | None
    seed: int
    names: tuple[str, str] | None
    config: Mapping[str, Any]
    loggers: Sequence[Logger]
    resume: bool
    params: Mapping[str, Tensor] | None
    place: Place | None

    def __post_init__(self) -> None:
        if self.resume and self.directory is None:
            raise BilevelError(
                "directory=None holds no run to continue; give the directory of the run, or leave "
                "resume out"
            )
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
    def place_on_disk(self) -> Path:
        """The run directory; by default a new name in `runs`, as that of the command."""
        if self.directory is not None:
            return self.directory
        problem, solver, seed = self.identity
        time = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        return Path("runs") / f"{file_name(problem)}-{file_name(solver)}-seed{seed}-{time}"

    @property
    def identity(self) -> Identity:
        """The names and the seed that a checkpoint of this run must carry."""
        names = self.names or (type(self.problem).__name__, type(self.solver).__name__)
        return Identity(*names, self.seed)
