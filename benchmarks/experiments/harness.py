"""Make an experiment: kept runs of `bilevel -m`, a pool of processes, and a page's block."""

import importlib
import multiprocessing
import pkgutil
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel import BilevelError
from bilevel.loggers.tables import duration

if TYPE_CHECKING:
    from benchmarks.experiments.jobs import Job, Outcome
    from bilevel.comparison.runs import Run

ROOT = Path(__file__).parent.parent.parent
FEW = 3
"""Largest number of failed runs that a block lists openly; a longer list is folded."""


@dataclass(frozen=True)
class Sweep:
    """The overrides of a `bilevel -m` command line, and replacements at reduced size."""

    overrides: tuple[str, ...]
    quick: tuple[str, ...] = ()

    def jobs(self, quick: bool) -> list[tuple[str, ...]]:
        """Return the overrides of each run of the sweep."""
        from benchmarks.experiments.jobs import expand, replaced

        return expand(replaced(self.overrides, self.quick) if quick else self.overrides)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One block of a page.

    Attributes:
        page: the page below `docs/`, such as `experiments/ablation.md`.
        sweeps: its command lines by name.
        report: the Markdown of the block; saves pictures beside the page.
    """

    page: str
    sweeps: Mapping[str, Sweep] = field(default_factory=dict)
    report: Callable[["Context"], str]


def find(*names: str) -> dict[str, Experiment]:
    """Return every `EXPERIMENT` of this package by the name of its module, or the named ones.

    Raises:
        BilevelError: there is none of that name.
    """
    package = importlib.import_module(__package__)
    known = sorted(
        module.name
        for module in pkgutil.iter_modules(package.__path__)
        if module.name != "__main__"
    )
    if unknown := [name for name in names if name not in known]:
        raise BilevelError(
            f"no experiment is called {', '.join(unknown)}; there are {', '.join(find())}"
        )
    modules = {name: importlib.import_module(f"{__package__}.{name}") for name in names or known}
    found = {
        name: module.EXPERIMENT for name, module in modules.items() if hasattr(module, "EXPERIMENT")
    }
    if helpers := [name for name in names if name not in found]:
        raise BilevelError(
            f"{', '.join(helpers)} holds no experiment; there are {', '.join(find())}"
        )
    return found


class Context:
    """Run and read the runs of one experiment; a context manager that owns the processes.

    Attributes:
        quick: whether the size is the reduced one.
        figures: the folder of the page, for its pictures.
        workers: the number of processes of one thread each; 0 runs all in this process.
        data: the folder that holds MNIST/raw and the like, where one was given.
    """

    def __init__(
        self,
        name: str,
        experiment: Experiment,
        *,
        figures: Path,
        runs: Path,
        workers: int = 1,
        quick: bool = False,
        data: Path | None = None,
    ) -> None:
        from benchmarks.experiments.jobs import job

        self.name, self.figures, self.workers, self.quick, self.data = (
            name,
            figures,
            workers,
            quick,
            data,
        )
        self._jobs = {
            sweep: [job(overrides, runs / name / sweep) for overrides in command.jobs(quick)]
            for sweep, command in experiment.sweeps.items()
        }
        self._all = list(dict.fromkeys(job for sweep in self._jobs.values() for job in sweep))
        self._outcomes: dict[Job, Outcome] = {}
        self._mapped, self._mapped_seconds = 0, 0.0

    def __enter__(self) -> "Context":
        return self

    def __exit__(self, *_: object) -> None:
        if "_pool" in self.__dict__:
            self._pool.shutdown(cancel_futures=True)

    @cached_property
    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread
        )

    def missing(self) -> str | None:
        """Return a sentence about missing data, or None if all data are present."""
        from benchmarks.experiments.jobs import where

        lacking = [job.data for job in self._all if where(self.data, job.data) is None]
        if not lacking:
            return None
        place = self.data or "data"
        return f"since {lacking[0]} is not in {place}; give --data PATH of a folder that holds it"

    def run(self) -> None:
        """Run every job that has not ended yet."""
        from benchmarks.experiments.jobs import outcome_of, run_job

        self._outcomes = {job: outcome for job in self._all if (outcome := outcome_of(job))}
        todo = [job for job in self._all if job not in self._outcomes]
        for number, (job, outcome) in enumerate(
            self._completed(partial(run_job, data=self.data), todo), start=1
        ):
            self._outcomes[job] = outcome
            told = f"{number} of {len(todo)}, {duration(outcome.wall_seconds)}"
            failure = f": {outcome.failure}" if outcome.failure else ""
            print(f"{self.name}: {told}, {' '.join(job.overrides)}{failure}", flush=True)

    def check(self) -> None:
        """Raise an error if no run can be reported, so that the page keeps its block.

        Raises:
            BilevelError: there are runs, and all of them failed.
        """
        failures = [outcome.failure for outcome in self._outcomes.values()]
        if failures and all(failures):
            raise BilevelError(
                f"none of its {len(failures)} runs left anything; the first: {failures[0]}"
            )

    def runs(self, sweep: str) -> "list[Run]":
        """Return the runs of a sweep in its order, labelled; `colophon` lists the failed ones."""
        from bilevel.comparison.runs import label_runs, read_run

        read = (
            read_run(job.directory) for job in self._jobs[sweep] if not self._outcomes[job].failure
        )
        return label_runs(run for run in read if run)

    def _completed(
        self, function: "Callable[[Job], Outcome]", jobs: "list[Job]"
    ) -> "Iterator[tuple[Job, Outcome]]":
        """Yield each job with its outcome in the order of completion."""
        if not self.workers:
            yield from ((job, function(job)) for job in jobs)
            return
        waiting = {self._pool.submit(function, job): job for job in jobs}
        yield from ((waiting[future], future.result()) for future in as_completed(waiting))

    def map(self, function: Callable[..., Any], jobs: Iterable[Any]) -> list[Any]:
        """Return `[function(job) for job in jobs]`, computed by the processes."""
        jobs = list(jobs)
        start = time.perf_counter()
        made = list(self._pool.map(function, jobs) if self.workers else map(function, jobs))
        self._mapped, self._mapped_seconds = (
            self._mapped + len(jobs),
            self._mapped_seconds + time.perf_counter() - start,
        )
        return made

    def colophon(self) -> str:
        """Return the number, the cost and the machine of the runs, and the list of failures."""
        from bilevel.comparison.runs import read_run

        lines = []
        for job, outcome in self._outcomes.items():
            if outcome.failure:
                lines.append(f"- `{' '.join(job.overrides)}` left no run: {outcome.failure}")
            elif (run := read_run(job.directory)) and run.status != "finished":
                message = str((run.summary or {}).get("message")).partition(";")[0]
                lines.append(f"- `{' '.join(job.overrides)}` {message}")
        told = "\n".join(lines)
        if len(lines) > FEW:
            head = f"<summary>{len(lines)} runs did not finish</summary>"
            told = f"<details>{head}\n\n{told}\n\n</details>"
        return "\n\n".join([f"*{self._made()}.*", *([told] if told else [])])

    def _made(self) -> str:
        import torch

        size = (
            "Reduced size (`--quick`): these are not the numbers of the protocol. "
            if self.quick
            else ""
        )
        wall = sum(outcome.wall_seconds for outcome in self._outcomes.values())
        parts = (
            [f"{len(self._outcomes)} runs, {duration(wall)} of one core"] if self._outcomes else []
        )
        parts += (
            [
                f"{self._mapped} computation{'s' if self._mapped > 1 else ''} in "
                f"{duration(self._mapped_seconds)}"
            ]
            if self._mapped
            else []
        )
        parts += [f"{processor()}, one thread a process, {max(1, self.workers)} at once"]
        parts += [f"PyTorch {torch.__version__}".partition("+")[0], date.today().isoformat()]
        return f"{size}{'; '.join(parts)}"


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def processor() -> str:
    """Return the model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
