"""What a run tells as it goes, to whom, and what it leaves on disk."""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from bilevel.errors import Unwritable
from bilevel.loggers.space_json import LARGE
from bilevel.params import Hypers
from bilevel.space import Space

Record: TypeAlias = dict[str, Any]
"""One evaluation: plain numbers by name; see `make_record`."""

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
DESCRIPTION = "run.json"


class Place(NamedTuple):
    """A run's place in a sweep: the sweep's name, the run's number from 1, and how many there are, where that is known."""

    sweep: str
    run: int
    runs: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What loggers know of a run before it begins.

    Attributes:
        initial: every hyperparameter before training, by name.
        best: the best record so far of a run that is resumed; {} otherwise.
        patience: as the runner's.
        place: in the sweep that the run is part of, if it is.
    """

    directory: Path
    problem: str
    solver: str
    seed: int
    space: Space
    config: Mapping[str, Any] = field(default_factory=dict)
    epochs: float | None = None
    warmup_epochs: float = 0
    initial: Record = field(default_factory=dict)
    best: Record = field(default_factory=dict)
    resumed: bool = False
    patience: int | None = None
    place: Place | None = None


class Progress(NamedTuple):
    """Where a run is between two evaluations.

    `fraction` is the part of the budget that is spent, `stalled` the evaluations since the best one that patience counts.
    """

    step: int
    epoch: float
    fraction: float
    stalled: int = 0


class Logger(ABC):
    """Receives what a run tells; several compose in a list. It must not touch the numbers that it is given.

    First comes `start`, then `log` and `advance`, then `finish` unless the run raised, and at last `close`.
    """

    takes_pictures: bool = False
    """Whether it wants `show_pictures` to be called."""
    vital: bool = False
    """Whether a run ends where it raises; otherwise that is told in a sentence, and the run goes on without it."""

    @abstractmethod
    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        """The run begins, or resumes with the `state` of its checkpoint ({} otherwise)."""

    @abstractmethod
    def log(self, record: Record) -> None:
        """An evaluation was made."""

    def advance(self, progress: Progress) -> None:  # optional, as the next two
        """A round is over; called often, so it must be quick."""

    def show_pictures(self, pictures: Mapping[str, Tensor]) -> None:
        """`Problem.pictures` on the CPU, at some evaluations, just before their `log`."""

    def finish(self, summary: Record) -> None:
        """The run ended in order, interrupted and diverged ones included."""

    def close(self) -> None:
        """Release what `start` took."""

    def state(self) -> dict[str, Any]:
        """What `start` needs in order to go on from this checkpoint: numbers, strings and containers of them."""
        return {}


def make_record(
    *,
    step: int,
    epoch: float,
    seconds: float,
    examples: int,
    train: Mapping[str, float],
    valid: Mapping[str, float],
    hypers: Hypers,
    scales: Hypers,
    metrics: Mapping[str, float],
    peak_memory_bytes: int | None,
    phases: Mapping[str, float] | None = None,
    exact: Mapping[str, float] | None = None,
    hypergradient: Mapping[str, float] | None = None,
) -> Record:
    """One flat line: `train_loss`, `valid_loss`, …, `hypers.<name>`, `scales.<name>`, the solver's own step metrics, and
    `exact.<name>` where the problem knows the truth.

    `seconds` are those of training; `seconds.<phase>` their parts, as the solver tells them apart, and `seconds.evaluation`,
    which is no part of them. `hypergradient.<name>` compares the solver's with the exact one, as `bilevel.run.hypergradient_error` does.

    Example:
        >>> import torch
        >>> record = make_record(step=3, epoch=1.0, seconds=0.1, examples=6, train={"loss": 1.0}, valid={"loss": 2.0},
        ...                      hypers={"decay": torch.tensor(0.5)}, scales={}, metrics={}, peak_memory_bytes=None)
        >>> record["valid_loss"], record["hypers.decay"]
        (2.0, 0.5)
    """
    return {
        "step": step,
        "epoch": epoch,
        "seconds": seconds,
        **{f"seconds.{name}": value for name, value in (phases or {}).items()},
        "examples": examples,
        **{f"train_{name}": value for name, value in train.items()},
        **{f"valid_{name}": value for name, value in valid.items()},
        **{f"hypers.{name}": brief(leaf) for name, leaf in hypers.items()},
        **{f"scales.{name}": brief(leaf) for name, leaf in scales.items()},
        **{f"exact.{name}": value for name, value in (exact or {}).items()},
        **{f"hypergradient.{name}": value for name, value in (hypergradient or {}).items()},
        **metrics,
        "peak_memory_bytes": peak_memory_bytes,
    }


def strict_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that every parser reads: a number that is not finite becomes null.

    Example:
        >>> strict_json({"valid_loss": float("nan")})
        '{"valid_loss": null}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a `metrics.jsonl`; a last line that a killed run left unfinished is skipped."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def write_atomically(path: Path, write: Any, mode: str = "w") -> None:
    """Call `write(file)` such that `path` holds either what it held or all of the new content, a power failure included.

    Raises:
        Unwritable: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename is durable once the directory is
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except (OSError, RuntimeError) as error:
        reason = (
            error if isinstance(error, OSError) else error.__context__
        )  # torch.save hides what the file system said
        if not isinstance(reason, OSError):
            raise
        with suppress(OSError):  # what could not be written is said below
            temporary.unlink(missing_ok=True)
        raise Unwritable(
            f"cannot write {path}: {reason.strerror or reason}; free some space or move the run"
        ) from None


def brief(leaf: Tensor) -> Any:
    """A hyperparameter as a number or nested lists; a large one as its mean, min and max."""
    if leaf.numel() <= LARGE:
        return leaf.tolist()
    leaf = leaf.double()
    return {"mean": leaf.mean().item(), "min": leaf.min().item(), "max": leaf.max().item()}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
