"""Runs read from their directories: each file once, and its columns as arrays."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.comparison.labels import label
from bilevel.comparison.record_columns import Array, columns_of, finite
from bilevel.comparison.run_files import (
    CONFIG,
    Warn,
    find_runs,
    parse_records,
    read_config,
    read_object,
)
from bilevel.loggers.records import DESCRIPTION, METRICS, SUMMARY, Record
from bilevel.text import describe


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, read from its directory.

    Attributes:
        label: the solver, and the settings in which its runs differ; see
            `bilevel.comparison.labels`.
        columns: the records by name, each [evaluations], or [evaluations, entries] for a
            hyperparameter with several entries; NaN where a record lacks the name. For a large
            hyperparameter `name` is the mean, beside `name.min` and `name.max`.
        summary: the summary of a finished run; None for a run that is in progress or was killed.
        config: settings of the run; {} where they are missing.
        description: `run.json`: problem, solver, seed and the hyperparameters' domains; {} without
            it.
        status: `finished`, `diverged`, `interrupted` or `running`.
    """

    directory: Path
    problem: str
    solver: str
    label: str
    seed: int | None
    columns: dict[str, Array] = field(repr=False)
    summary: Record | None = field(default=None, repr=False)
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    description: Record = field(default_factory=dict, repr=False)
    status: str = "running"

    @cached_property
    def records(self) -> list[Record]:
        """Return the lines of `metrics.jsonl`, read again; `columns` serves many runs."""
        return parse_records(self.directory / METRICS)[0]

    def column(self, name: str) -> Array:
        """Return one column, [evaluations] or [evaluations, entries]; NaN where it is missing."""
        found = self.columns.get(name)
        return np.full(self.evaluations, np.nan) if found is None else found

    @property
    def evaluations(self) -> int:
        """Return the number of records."""
        return len(next(iter(self.columns.values()), ()))

    @cached_property
    def best(self) -> int | None:
        """Return the best evaluation of the records; None where no validation loss is finite.

        It is that of the summary (`runner.select`), or before it that of the lowest loss. Records
        of refits are not among them.
        """
        own = self.candidates.get("run", self.summary or {}).get("best")
        losses = self.column("valid_loss")
        step = finite(own.get("step")) if isinstance(own, dict) else None
        ended = self.status != "running" and step is not None and "step" in self.columns
        if ended and np.isfinite(losses).any():
            at = np.flatnonzero(self.columns["step"] == step)
            if len(at):
                return int(at[0])
        return int(np.nanargmin(losses)) if np.isfinite(losses).any() else None

    @cached_property
    def candidates(self) -> dict[str, Record]:
        """Return the run itself and its refits, by name, from the summary; {} without refits."""
        found = self._refits.get("candidates")
        found = found.items() if isinstance(found, dict) else ()
        return {name: entry for name, entry in found if isinstance(entry, dict)}

    @cached_property
    def refit(self) -> str | None:
        """Return the name of the refit whose result is that of the run; None if it is its own."""
        chosen = self._refits.get("chosen")
        known = isinstance(chosen, str) and chosen in self.candidates
        return str(chosen) if known and chosen != "run" else None

    def of_refits(self, name: str) -> float | None:
        """Return a part of the total that refits took; None without refits."""
        return finite(self._refits.get(name))

    @property
    def _refits(self) -> Record:
        found = (self.summary or {}).get("refit")
        return found if isinstance(found, dict) else {}

    def at_best(self, name: str) -> float | None:
        """Return a number at the best evaluation, from the records or from the summary.

        Only the summary has the scores of the test split, and those of a refit that was chosen.
        """
        if self.refit is not None:
            return self._from_summary("best", name)
        if self.best is not None and name in self.columns and self.columns[name].ndim == 1:
            return finite(self.columns[name][self.best])
        return self._from_summary("best", name)

    def at_end(self, name: str) -> float | None:
        """Return a number at the last evaluation, from the records or from the summary."""
        if self.refit is not None:
            return self._from_summary("last", name)
        if self.evaluations and name in self.columns and self.columns[name].ndim == 1:
            return finite(self.columns[name][-1])
        return self._from_summary("last", name)

    def total(self, name: str) -> float | None:
        """Return a total from the summary, or the highest value so far.

        Totals are `seconds`, `examples`, `outer_steps` and `peak_memory_bytes`; the summary counts
        refits too.
        """
        if self.summary and self.status != "running":
            total = finite(self.summary.get(name))
            if total is not None:
                return total
        column = self.columns.get("step" if name == "steps" else name)
        return (
            finite(np.nanmax(column)) if column is not None and np.isfinite(column).any() else None
        )

    def _from_summary(self, record: str, name: str) -> float | None:
        """Return a number in a record of the summary."""
        found = (self.summary or {}).get(record)
        return finite(found.get(name)) if isinstance(found, dict) else None

    def part(self, prefix: str) -> list[str]:
        """Return the names under `prefix` without it, in the order of the records.

        Prefixes are `hypers.`, `scales.` and others.
        """
        names = [name.removeprefix(prefix) for name in self.columns if name.startswith(prefix)]
        return [
            name for name in names if not (name.endswith((".min", ".max")) and name[:-4] in names)
        ]


def read_runs(*places: str | os.PathLike[str], warn: Warn = lambda sentence: None) -> list[Run]:
    """Return all runs in the directories, at any depth, sorted by name.

    `warn` receives a sentence for every file that cannot be read.

    Example:
        >>> read_runs("no/such/place", warn=print)
        no/such/place does not exist; give the directory of a run, or one with runs in it
        []
    """
    directories: dict[Path, Path] = {}
    for place in map(Path, places):
        if not place.is_dir():
            fault = "is a file" if place.exists() else "does not exist"
            warn(f"{place} {fault}; give the directory of a run, or one with runs in it")
            continue
        found = list(find_runs(place, warn))
        if not found:
            warn(
                f"{place} holds no run, since it has no {METRICS} at any depth; give the directory "
                "of a run"
            )
        directories |= {directory.resolve(): directory for directory in found}
    runs = []
    for directory in directories.values():
        try:
            run = read_run(directory, warn=warn)
        except Exception as error:  # the other runs are still read
            warn(f"{directory} cannot be read ({describe(error)}); this run is left out")
            continue
        if run is not None:
            runs.append(run)
    without = [run for run in runs if not run.config]
    if without:
        more = f" and {len(without) - 1} more have" if len(without) > 1 else " has"
        warn(
            f"{without[0].directory}{more} no settings in {CONFIG}; such runs are grouped by "
            "problem and solver alone"
        )
    return label_runs(runs)


def read_run(directory: Path, *, warn: Warn = lambda sentence: None) -> Run | None:
    """Return the run in `directory`; None, after a warning, where none of it can be used."""
    records: list[Record] = []
    try:
        records, skipped = parse_records(directory / METRICS)
        if skipped:
            warn(
                f"{directory / METRICS} has {skipped} damaged "
                f"{'line' if skipped == 1 else 'lines'}, which {'is' if skipped == 1 else 'are'} "
                "left out"
            )
    except OSError as error:
        warn(f"cannot read {directory / METRICS} ({error.strerror or error}); its summary is used")
    summary, description = (read_object(directory / name, warn) for name in (SUMMARY, DESCRIPTION))
    config = read_config(directory / CONFIG, warn)
    columns = columns_of(records)
    usable = np.isfinite(columns["valid_loss"]).any() if "valid_loss" in columns else False
    if not records and not summary:
        warn(f"{directory} has no evaluation in {METRICS} yet; this run is left out")
        return None
    if not usable and not summary:
        warn(f"{directory} has no evaluation with a finite validation loss; its row has no loss")
    names = config.get("names") if isinstance(config.get("names"), dict) else {}
    known = {**{"seed": config.get("seed")}, **(names or {}), **description, **(summary or {})}
    problem, solver = (str(known.get(part) or f"unknown {part}") for part in ("problem", "solver"))
    return Run(
        directory=directory,
        problem=problem,
        solver=solver,
        label=solver,
        seed=known["seed"] if isinstance(known.get("seed"), int) else None,
        columns=columns,
        summary=summary or None,
        config=config,
        description=description,
        status=_status(summary, columns),
    )


def label_runs(runs: Iterable[Run]) -> list[Run]:
    """Return the runs with labels that distinguish their groups, in the same order."""
    runs = list(runs)
    labels = label([(run.problem, run.solver, run.config) for run in runs])
    return [replace(run, label=text) for run, text in zip(runs, labels, strict=True)]


def group_runs(runs: Iterable[Run]) -> dict[str, dict[str, list[Run]]]:
    """Return the runs by problem and label."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.problem, {}).setdefault(run.label, []).append(run)
    return groups


def _status(summary: Record, columns: dict[str, Array]) -> str:
    if not summary:
        return "running"
    steps, ended = columns.get("step"), finite(summary.get("steps"))
    if summary.get("interrupted") and steps is not None and ended is not None and steps[-1] > ended:
        return "running"  # resumed, and the summary describes its first part
    return next((word for word in ("diverged", "interrupted") if summary.get(word)), "finished")
