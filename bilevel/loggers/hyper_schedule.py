"""The hyperparameter schedule of a run, to be replayed: `python -m bilevel.loggers.hyper_schedule RUN`."""

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
from bilevel.loggers.records import METRICS, SUMMARY, read_metrics

SCHEDULE = "schedule.json"


@dataclass(frozen=True)
class RecordedSchedule:
    """What every hyperparameter was, in its own units, after so many inner steps; it holds until the next entry.

        λ(n) = λ_k    for the largest k with steps[k] ≤ n,    and λ_0 before the first

    Records are made between rounds, and λ moves at the end of a round alone: of a run that is evaluated after every round
    this is the schedule exactly, of others it lags by less than one interval between evaluations.

    Attributes:
        steps: inner steps, ascending.
        hypers: by name, one value (a number or nested lists) for each of `steps`.
        origin: which run it is of: problem, solver, seed; {} where that is not known.

    Example:
        >>> schedule = RecordedSchedule([0, 10, 20], {"dropout": [0.1, 0.3, 0.4]})
        >>> [schedule.at(n)["dropout"] for n in (0, 9, 10, 500)]
        [0.1, 0.1, 0.3, 0.4]

    Raises:
        BilevelError: steps that do not ascend, or other than one finite value for each.
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
                "a schedule's `steps` are whole numbers of inner steps, one at least; give such a list"
            )
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise BilevelError(
                "a schedule's `steps` must ascend; sort them, and leave repeated ones out"
            )
        if not isinstance(self.hypers, Mapping) or not self.hypers:
            raise BilevelError(
                "a schedule needs the `hypers` by name, each with a list of values; give one at least"
            )
        for name, values in self.hypers.items():
            if (
                not isinstance(values, Sequence)
                or isinstance(values, str)
                or len(values) != len(steps)
            ):
                raise BilevelError(
                    f"the schedule of `{name}` must have {len(steps)} values, one for each of `steps`"
                )
            for step, value in zip(steps, values, strict=True):
                if not _finite(value):
                    raise BilevelError(
                        f"the schedule of `{name}` has no finite number at step {step}; cut it before that"
                    )

    def index(self, step: int) -> int:
        """K, the entry that holds after `step` inner steps."""
        return max(0, bisect_right(self.steps, step) - 1)

    def at(self, step: int) -> dict[str, Any]:
        """λ after `step` inner steps, by name."""
        return {name: values[self.index(step)] for name, values in self.hypers.items()}


def from_run(run: str | Path) -> RecordedSchedule:
    """The schedule of the run in a directory, from its `metrics.jsonl`; it may still be going on.

    Raises:
        BilevelError: the directory is not a run's, or its records do not say what every hyperparameter was.
    """
    run = Path(run)
    try:
        records = read_metrics(run / METRICS)
    except OSError as error:
        raise BilevelError(
            f"{run / METRICS} cannot be read ({error.strerror}); give the directory of a run"
        ) from None
    except ValueError:
        raise BilevelError(
            f"{run / METRICS} is damaged: a line is no JSON; give the directory of another run"
        ) from None
    names = [key for key in (records[0] if records else {}) if key.startswith("hypers.")]
    if not names:
        raise BilevelError(
            f"{run / METRICS} records no hyperparameter; give the directory of a run that has some"
        )
    if large := [name for name in names if isinstance(records[0][name], Mapping)]:
        raise BilevelError(
            f"`{large[0].removeprefix('hypers.')}` has so many entries that {run / METRICS} keeps mean, min and max alone; "
            "replay a run with fewer"
        )
    hypers = {name.removeprefix("hypers."): [record[name] for record in records] for name in names}
    try:
        return RecordedSchedule([record["step"] for record in records], hypers, _origin(run))
    except BilevelError as error:
        raise BilevelError(f"{run / METRICS}: {error}") from None


def export(run: str | Path, path: str | Path | None = None) -> Path:
    """Write the schedule of the run in a directory as JSON, by default to its `schedule.json`; where it is.

    Raises:
        BilevelError: see `from_run`; or the file cannot be written.
    """
    schedule = from_run(run)
    path = Path(run) / SCHEDULE if path is None else Path(path)
    content = {"origin": schedule.origin or {}, "steps": schedule.steps, "hypers": schedule.hypers}
    write_atomically(path, lambda file: file.write(strict_json(content, indent=1) + "\n"))
    return path


def read(path: str | Path) -> RecordedSchedule:
    """The schedule in a file that `export` wrote, or that of a run's directory.

    Raises:
        BilevelError: it is missing, or no schedule.
    """
    path = Path(path)
    if path.is_dir():
        return from_run(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BilevelError(
            f"cannot read the schedule {path} ({error.strerror}); give a schedule.json, or the directory of a run"
        ) from None
    except ValueError:
        raise BilevelError(
            f"{path} is no JSON; write one with: python -m bilevel.loggers.hyper_schedule RUN"
        ) from None
    if not isinstance(content, dict) or not {"steps", "hypers"} <= content.keys():
        raise BilevelError(
            f"{path} has no `steps` and `hypers`; write one with: python -m bilevel.loggers.hyper_schedule RUN"
        )
    try:
        return RecordedSchedule(content["steps"], content["hypers"], content.get("origin"))
    except BilevelError as error:
        raise BilevelError(f"{path}: {error}") from None


def _origin(run: Path) -> dict[str, Any]:
    try:
        summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run that goes on has none yet
        return {}
    return {key: summary.get(key) for key in ("problem", "solver", "seed")}


def _finite(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_finite(entry) for entry in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def main(arguments: Sequence[str]) -> int:
    """Export the schedule of every run that is named, and say where."""
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
