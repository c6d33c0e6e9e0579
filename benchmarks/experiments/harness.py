"""Make an experiment: kept runs of `bilevel -m`, a pool of processes, and a page's block."""

import importlib
import multiprocessing
import pkgutil
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
from bilevel.validate import one_of

if TYPE_CHECKING:
    from benchmarks.experiments.jobs import Job, Outcome
    from bilevel.comparison.runs import Run

ROOT = Path(__file__).parent.parent.parent
QUIET: dict[str, Any] = {
    "progress": "none",
    "picture": False,
    "checkpoint_every": 10**6,
    "threads": 1,
}
"""Settings of a `Runner` on one thread that prints nothing and saves no checkpoint on its way."""
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
        page: The page below `docs/`, such as `experiments/ablation.md`.
        sweeps: The command lines by name.
        report: Returns the Markdown of the block and saves pictures beside the page.
        shares: The experiment whose kept runs this one uses too, if sweeps are the same.
    """

    page: str
    sweeps: Mapping[str, Sweep] = field(default_factory=dict)
    shares: str | None = None
    report: Callable[["Context"], str]


def find(*names: str) -> dict[str, Experiment]:
    """Return every `EXPERIMENT` of this package by the name of its module, or the named ones.

    Raises:
        BilevelError: an experiment of that name does not exist.
    """
    package = importlib.import_module(__package__)
    known = sorted(
        module.name
        for module in pkgutil.iter_modules(package.__path__)
        if module.name != "__main__"
    )
    wanted = [name for name in names or known if name in known]
    modules = {name: importlib.import_module(f"{__package__}.{name}") for name in wanted}
    found = {
        name: module.EXPERIMENT for name, module in modules.items() if hasattr(module, "EXPERIMENT")
    }
    for name in names:
        if name not in found:
            one_of(find(), experiment=name)
    return found


def read_config(directory: Path) -> dict[str, Any]:
    """Return the configuration of a run."""
    import yaml

    return dict(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")))


class Context:
    """Run and read the runs of one experiment; a context manager that owns the processes.

    Attributes:
        quick: Run at reduced size.
        figures: The folder of the page, for its pictures.
        workers: The number of processes of one thread each; 0 runs all in this process.
        data: The folder that holds MNIST/raw and other data; None is `data`.
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

        self.name = name
        self.figures = figures
        self.workers = workers
        self.quick = quick
        self.data = data
        kept = runs / (experiment.shares or name)
        self._jobs = {
            sweep: [job(overrides, kept / sweep) for overrides in command.jobs(quick)]
            for sweep, command in experiment.sweeps.items()
        }
        self._all = list(dict.fromkeys(job for sweep in self._jobs.values() for job in sweep))
        self._outcomes: dict[Job, Outcome] = {}
        self._mapped = 0
        self._mapped_seconds = 0.0

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
        return f"{lacking[0]} is not in {place}; give --data a folder that holds it"

    def run(self) -> None:
        """Run every job that has not ended yet."""
        from benchmarks.experiments.jobs import outcome_of, run_job

        self._outcomes = {job: outcome for job in self._all if (outcome := outcome_of(job))}
        todo = [job for job in self._all if job not in self._outcomes]
        for number, (job, outcome) in enumerate(
            self._completed(partial(run_job, data=self.data), todo), start=1
        ):
            self._outcomes[job] = outcome
            progress = f"{number} of {len(todo)}, {duration(outcome.wall_seconds)}"
            failure = f": {outcome.failure}" if outcome.failure else ""
            print(f"{self.name}: {progress}, {' '.join(job.overrides)}{failure}", flush=True)

    def check(self) -> None:
        """Raise an error if no run can be reported, so that the page keeps its block.

        Raises:
            BilevelError: all runs failed.
        """
        failures = [outcome.failure for outcome in self._outcomes.values()]
        if failures and all(failures):
            raise BilevelError(
                f"all {len(failures)} runs failed; the first error is: {failures[0]}"
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
        self._mapped += len(jobs)
        self._mapped_seconds += time.perf_counter() - start
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
        failures = "\n".join(lines)
        if len(lines) > FEW:
            head = f"<summary>{len(lines)} runs did not finish</summary>"
            failures = f"<details>{head}\n\n{failures}\n\n</details>"
        return "\n\n".join([f"*{self._made()}.*", *([failures] if failures else [])])

    def _made(self) -> str:
        import torch

        from benchmarks.machine import processor

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
