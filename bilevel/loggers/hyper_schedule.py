"""The hyperparameter schedule of a run, for replaying it in another run.

Export with `python -m bilevel.loggers.hyper_schedule RUN`.
"""

import json
import math
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bilevel.errors import BilevelError
from bilevel.files import strict_json, write_atomically
from bilevel.loggers.records import METRICS, SUMMARY, environment_of, read_metrics
from bilevel.untrusted_files import read_bytes
from bilevel.validate import is_number

SCHEDULE = "schedule.json"


@dataclass(frozen=True)
class RecordedSchedule:
    """The values of all hyperparameters by inner steps; each holds until the next entry.

        λ(n) = λ_k    for the largest k with steps[k] ≤ n,    and λ_0 before the first

    Records are made between rounds, and λ moves only at the end of a round. For a run that is
    evaluated after every round this schedule is exact. For other runs it lags by less than one
    evaluation interval.

    Attributes:
        steps: inner steps, ascending.
        hypers: by name, one value (a number or nested lists) for each of `steps`.
        origin: problem, solver and seed of the run; {} where they are unknown.

    Example:
        >>> schedule = RecordedSchedule([0, 10, 20], {"dropout": [0.1, 0.3, 0.4]})
        >>> [schedule.at(n)["dropout"] for n in (0, 9, 10, 500)]
        [0.1, 0.1, 0.3, 0.4]

    Raises:
        BilevelError: the steps do not ascend, or a step lacks a finite value.
    """

    steps: Sequence[int]
    hypers: Mapping[str, Sequence[Any]]
    origin: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        steps = self.steps
        if (
            not isinstance(steps, Sequence)
            or not steps
            or any(type(n) is not int or n < 0 for n in steps)
        ):
            raise BilevelError(
                "steps of a hyperparameter schedule must be whole numbers of at least 0; give at "
                "least one"
            )
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise BilevelError(
                "steps of a hyperparameter schedule must ascend; sort them and remove repeated ones"
            )
        if not isinstance(self.hypers, Mapping) or not self.hypers:
            raise BilevelError(
                "hypers of a hyperparameter schedule must map names to lists of values; give at "
                "least one name"
            )
        for name, values in self.hypers.items():
            if (
                not isinstance(values, Sequence)
                or isinstance(values, str)
                or len(values) != len(steps)
            ):
                raise BilevelError(
                    f"hypers[{name!r}] must have {len(steps)} values; give one for each of `steps`"
                )
            for step, value in zip(steps, values, strict=True):
                if not _finite(value):
                    raise BilevelError(
                        f"hypers[{name!r}] must be finite at step {step}; cut the schedule before "
                        "it"
                    )

    def index(self, step: int) -> int:
        """Return k, the entry that holds after `step` inner steps."""
        return max(0, bisect_right(self.steps, step) - 1)

    def at(self, step: int) -> dict[str, Any]:
        """Return λ after `step` inner steps, by name."""
        return {name: values[self.index(step)] for name, values in self.hypers.items()}


def from_run(run: str | Path) -> RecordedSchedule:
    """Return the schedule of the run in a directory, from its `metrics.jsonl`.

    The run may still be in progress.

    Raises:
        BilevelError: the directory is not that of a run, or its records lack values of a
            hyperparameter.
    """
    run = Path(run)
    try:
        records = read_metrics(run / METRICS)
    except OSError as error:
        raise BilevelError(
            f"cannot read {run / METRICS} ({error.strerror}); give the directory of a run"
        ) from None
    except ValueError:
        raise BilevelError(
            f"{run / METRICS} is damaged, since a line is not JSON; give the directory of another "
            "run"
        ) from None
    return from_records(records, str(run / METRICS), origin_of(run))


def from_records(
    records: Sequence[Mapping[str, Any]], source: str, origin: Mapping[str, Any] | None = None
) -> RecordedSchedule:
    """Return the schedule in the records of a run.

    Args:
        records: the results of evaluations.
        source: their name in errors.
        origin: problem, solver and seed of the run.

    Raises:
        BilevelError: the records lack values of a hyperparameter.
    """
    names = [key for key in (records[0] if records else {}) if key.startswith("hypers.")]
    if not names:
        raise BilevelError(
            f"{source} records no hyperparameter; give the directory of a run with hyperparameters"
        )
    if large := [name for name in names if isinstance(records[0][name], Mapping)]:
        raise BilevelError(
            f"`{large[0].removeprefix('hypers.')}` is too large, so {source} keeps only its "
            "mean, min and max; replay a run with fewer entries"
        )
    hypers = {name.removeprefix("hypers."): [record[name] for record in records] for name in names}
    try:
        return RecordedSchedule([record["step"] for record in records], hypers, origin)
    except BilevelError as error:
        raise BilevelError(f"{source}: {error}") from None


def export(run: str | Path, path: str | Path | None = None) -> Path:
    """Write the schedule of a run as JSON, by default to its `schedule.json`; return the path.

    Raises:
        BilevelError: see `from_run`; or the file cannot be written.
    """
    schedule = from_run(run)
    path = Path(run) / SCHEDULE if path is None else Path(path)
    content = {
        "origin": schedule.origin or {},
        "environment": environment_of(run),
        "steps": schedule.steps,
        "hypers": schedule.hypers,
    }
    write_atomically(path, lambda file: file.write(strict_json(content, indent=1) + "\n"))
    return path


def read(path: str | Path) -> RecordedSchedule:
    """Return the schedule in a file that `export` wrote, or that of the run in a directory.

    Raises:
        BilevelError: the file is missing, or is not a schedule.
    """
    path = Path(path)
    if path.is_dir():
        return from_run(path)
    try:
        content = json.loads(read_bytes(path))
    except OSError as error:
        raise BilevelError(
            f"cannot read the schedule {path} ({error.strerror}); give a schedule.json or the "
            "directory of a run"
        ) from None
    except ValueError:
        raise BilevelError(
            f"{path} is not JSON; write a schedule with: python -m bilevel.loggers.hyper_schedule "
            "RUN"
        ) from None
    if not isinstance(content, dict) or not {"steps", "hypers"} <= content.keys():
        raise BilevelError(
            f"{path} lacks `steps` or `hypers`; write it with: python -m "
            "bilevel.loggers.hyper_schedule RUN"
        )
    try:
        return RecordedSchedule(content["steps"], content["hypers"], content.get("origin"))
    except BilevelError as error:
        raise BilevelError(f"{path}: {error}") from None


def origin_of(run: Path) -> dict[str, Any]:
    """Return problem, solver and seed of a finished run; {} for another one."""
    try:
        summary = json.loads(read_bytes(run / SUMMARY))
    except (OSError, ValueError):  # a run in progress has none
        return {}
    if not isinstance(summary, dict):
        return {}
    return {key: summary.get(key) for key in ("problem", "solver", "seed")}


def _finite(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_finite(entry) for entry in value)
    return is_number(value) and math.isfinite(value)


def main(arguments: Sequence[str]) -> int:
    """Export the schedule of every named run, and print its path."""
    if not arguments or arguments[0].startswith("-"):
        print(
            "usage: python -m bilevel.loggers.hyper_schedule RUN…    (writes RUN/schedule.json)",
            file=sys.stderr,
        )
        return 2
    try:
        for run in arguments:
            print(export(run))
    except BilevelError as error:
        print(f"bilevel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
