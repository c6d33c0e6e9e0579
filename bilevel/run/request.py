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
from bilevel.validate import seed_of


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The arguments of `Runner.run`, which describes them.

    Raises:
        BilevelError: an argument has another type, a resumed run is given weights, or the solver
            has already taken steps.
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
        self._check_types()
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

    def _check_types(self) -> None:
        for name, kind, advice in (
            ("problem", Problem, "a problem, for example bilevel.Classifier(…)"),
            ("solver", Solver, "a solver, for example bilevel.solvers.delta_stn()"),
            ("config", Mapping, "a dictionary of settings"),
            ("loggers", Sequence, "a list of loggers"),
        ):
            if not isinstance(value := getattr(self, name), kind) or isinstance(value, str):
                shown = getattr(value, "__name__", type(value).__name__)
                raise BilevelError(f"{name}={shown} is not a {kind.__name__}; pass {advice}")
        if self.params is not None and not isinstance(self.params, Mapping):
            raise BilevelError(
                f"params={type(self.params).__name__} must map names to tensors; pass for example "
                "model.state_dict()"
            )
        if strange := [logger for logger in self.loggers if not isinstance(logger, Logger)]:
            raise BilevelError(
                f"loggers holds a {type(strange[0]).__name__}; pass instances of "
                "bilevel.loggers.logger.Logger"
            )
        if self.names is not None and (isinstance(self.names, str) or len(self.names) != 2):
            raise BilevelError(
                f"names={self.names!r} must be two names; pass (name of problem, name of solver)"
            )
        seed_of(self.seed)

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
