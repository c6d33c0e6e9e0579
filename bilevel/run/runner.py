"""A run from its settings to its summary: claim, build, train, summarize."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel.device.device import choose_device
from bilevel.loggers.logger import Logger, Place
from bilevel.parallel.process_group import device_of_rank
from bilevel.problem import Problem
from bilevel.run.refit import check_refit, with_refits
from bilevel.run.request import RunRequest
from bilevel.run.result import Result
from bilevel.run.session import Session
from bilevel.run.settings import RunSettings
from bilevel.run.stages import build, claim, conclude, train
from bilevel.run.surroundings import AROUND_RUN, AROUND_TRAINING
from bilevel.run.tune_fraction import check_phases
from bilevel.solver import Solver
from bilevel.validate import path_of


@dataclass(frozen=True, kw_only=True)
class Runner(RunSettings):
    """Run solvers on problems; the settings are those of `RunSettings`.

    Example:
        >>> Runner(epochs=20, progress="none").warmup_epochs
        5

    Raises:
        BilevelError: there is no budget, or a value is out of its range.
    """

    def run(
        self,
        problem: Problem,
        solver: Solver,
        *,
        directory: str | Path | None = None,
        seed: int = 0,
        names: tuple[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        loggers: Sequence[Logger] = (),
        resume: bool = False,
        params: Mapping[str, Tensor] | None = None,
        place: Place | None = None,
    ) -> Result:
        """Run `solver` on `problem`, and write everything to `directory`.

        The directory then holds the records, `summary.json`, `checkpoint.pt` and `curves.png`.

        Args:
            problem: the problem to solve.
            solver: a new solver; the run sets it up.
            directory: the run directory. It is made if it is missing. Unless `resume`, it must not
                hold a run. The default is `runs/<problem>-<solver>-seed<seed>-<time>`.
            seed: of the order of the data, the initial weights and the draws of the solver.
            names: the names of problem and solver in records; the default is their classes.
            config: the settings of the run, for loggers to record.
            loggers: more loggers beside those of the runner.
            resume: continue from the checkpoint in the directory, as if the run had never stopped.
            params: initial weights, in place of `initial_params`.
            place: the place of the run in a sweep, for displays and dashboards.

        Returns:
            The summary as a dictionary, with the network and the schedule; with refits, those of
            the best candidate. `diverged` and `interrupted` mark an early end; `message` explains
            it.

        Raises:
            BilevelError: the solver refuses the problem, the directory cannot be used, or the
                checkpoint does not fit.
        """
        request = RunRequest(
            problem=problem,
            solver=solver,
            directory=None if directory is None else path_of(directory=directory),
            seed=seed,
            names=names,
            config=config or {},
            loggers=loggers,
            resume=resume,
            params=params,
            place=place,
        )
        run = Session(self, request, choose_device(device_of_rank(self.device)))
        check_refit(self, solver)
        check_phases(self, solver)
        with ExitStack() as stack:
            for surrounding in AROUND_RUN:
                stack.enter_context(surrounding(run))
            claim(run)
            build(run)
            for surrounding in AROUND_TRAINING:
                stack.enter_context(surrounding(run))
            train(run)
            result = with_refits(run, conclude(run))
            run.loop.loggers.call("finish", result)
        return result
