"""The files that a run resumes from: written atomically, several kept, checksummed, read with suspicion."""

import errno
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bilevel.checkpoint import file_format
from bilevel.errors import BilevelError, Unwritable
from bilevel.files import write_atomically
from bilevel.loggers.records import METRICS, read_metrics
from bilevel.solver import Solution

CHECKPOINT = "checkpoint.pt"

_OLDER = re.compile(r"checkpoint-step(\d+)\.pt")


class CheckpointWarning(UserWarning):
    """A checkpoint cannot be read, and an older one stands in for it."""


class Identity(NamedTuple):
    """Whose checkpoint it is: a run continues none but its own."""

    problem: str
    solver: str
    seed: int


class Checkpoints:
    """The checkpoints of a run: `checkpoint.pt`, and up to `keep` − 1 older ones beside it as `checkpoint-step<step>.pt`.

    Args:
        directory: of the run.
        identity: whose checkpoints they are.
        keep: how many, the newest included.
    """

    def __init__(self, directory: Path, identity: Identity, keep: int = 3) -> None:
        self.directory, self.identity, self.keep = directory, identity, keep
        self._newest: int | None = (
            None  # the step of `checkpoint.pt`, once that is known to be whole
        )
        self._readable = False

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the newest, which stays as an older one; a process killed at any moment leaves a whole one.

        Args:
            state: with `step`, the inner steps behind it.

        Raises:
            Unwritable: the file cannot be written; those before it stay.
            BilevelError: the first one could not be read again: a `state_dict` holds an object that is no tensor, number,
                string or container of them.
        """
        path, step = self.directory / CHECKPOINT, int(state["step"])
        content = {**self.identity._asdict(), "state": dict(state)}
        try:
            if self._newest is not None and self._newest < step:
                self._set_aside(path, self.directory / f"checkpoint-step{self._newest}.pt")
            write_atomically(path, lambda file: file_format.write(content, file), mode="wb")
        except Unwritable as error:
            if not (_is_full(error) and self._give_way()):
                raise
            write_atomically(path, lambda file: file_format.write(content, file), mode="wb")
        self._newest = step
        if not self._readable and (
            strange := torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        ):
            raise BilevelError(
                f"the run could not be resumed: a state_dict of the problem's data or of the solver holds {strange[0]}; "
                "keep tensors, numbers, strings and containers of them there"
            )
        self._readable = True
        self._forget()

    def load(self) -> dict[str, Any]:
        """As the function `load`; what is saved from now on follows it."""
        path, state = _newest_whole(self.directory, self.identity)
        self._newest = (
            int(state["step"]) if path.name == CHECKPOINT else None
        )  # what is damaged is not set aside
        return state

    def _set_aside(self, newest: Path, older: Path) -> None:
        """A second name, so that there is never a moment without the first."""
        temporary = older.with_name(f".{older.name}.tmp")
        try:
            older.unlink(
                missing_ok=True
            )  # of a run that was killed just after this, or of a future that it has left
            try:
                os.link(newest, older)
            except OSError:  # a file system without hard links
                shutil.copyfile(newest, temporary)
                os.replace(temporary, older)
        except OSError as error:
            with suppress(OSError):  # half of a copy would fill the disk further
                temporary.unlink(missing_ok=True)
            raise Unwritable(
                f"cannot write {older}: {error.strerror or error}; free some space or move the run"
            ) from None

    def _give_way(self) -> bool:
        """Remove the older ones: the newest is whole, and a newer one is worth more than they are. Whether there were any."""
        older = _older(self.directory) if self._newest is not None else []
        for path, _ in older:
            with suppress(OSError):  # the write that follows tells
                path.unlink()
        return bool(older)

    def _forget(self) -> None:
        """Remove what is beyond `keep`, and what is of steps that the run has yet to take (again)."""
        older = _older(self.directory)
        past = [path for path, step in older if self._newest is not None and step < self._newest]
        for path, _ in older:
            if path not in past[: self.keep - 1]:
                with suppress(OSError):  # one too many does no harm
                    path.unlink()


def kept(directory: Path) -> list[Path]:
    """The checkpoints in a directory, the newest first."""
    newest = directory / CHECKPOINT
    return [path for path in (newest, *(path for path, _ in _older(directory))) if path.is_file()]


def load(directory: Path, identity: Identity | None = None) -> dict[str, Any]:
    """The state of the newest checkpoint that is whole, on the CPU; one that is not is passed over with a `CheckpointWarning`.

    Raises:
        BilevelError: no run is there, or every file is truncated, damaged or foreign, or one is of another version, or not of
            the run `identity`.
    """
    return _newest_whole(directory, identity)[1]


def best_solution(directory: str | Path) -> Solution:
    """Hyperparameters, weights and carry of a run's best evaluation so far, on the CPU.

    Raises:
        BilevelError: the directory holds no readable checkpoint, or its run never had a finite validation loss.
    """
    best = load(Path(directory))["best"]
    if best is None:
        raise BilevelError(
            f"the run in {directory} never had a finite validation loss; look at its {METRICS}"
        )
    return Solution(**best["solution"])


def _newest_whole(directory: Path, identity: Identity | None) -> tuple[Path, dict[str, Any]]:
    files = kept(directory)
    if not files:
        reason = (
            f"{directory / CHECKPOINT} is missing"
            if directory.is_dir()
            else "there is no such directory"
        )
        raise BilevelError(
            f"{directory} is not a run that can be resumed: {reason}; give the directory of a run, or start a new one"
        )
    wrong = [] if files[0].name == CHECKPOINT else [f"{directory / CHECKPOINT} is missing"]
    for path in files:
        try:
            content = _read(path)
        except file_format.Unreadable as error:
            wrong.append(f"{path} {error}")
            continue
        _check_identity(path, content, identity)
        if wrong:
            warnings.warn(
                _stands_in(wrong, path, content["state"]["step"]), CheckpointWarning, stacklevel=2
            )
        return path, content["state"]
    raise BilevelError(
        f"{', and '.join(wrong)}; restore {'it' if len(wrong) == 1 else 'one'} from a copy, or start a new run"
    )


def _stands_in(wrong: list[str], path: Path, step: int) -> str:
    said = f"{', and '.join(wrong)}; {path.name}, of step {step}, stands in"
    try:
        lost = read_metrics(path.with_name(METRICS))[-1]["step"] - step
    except (OSError, ValueError, LookupError, TypeError):  # this is about another file
        lost = 0
    return (
        f"{said}, and {lost} steps or more are lost: they are taken again where the run goes on"
        if lost > 0
        else said
    )


def _check_identity(path: Path, content: dict[str, Any], identity: Identity | None) -> None:
    for name, ours in ({} if identity is None else identity._asdict()).items():
        if content[name] != ours:
            raise BilevelError(
                f"{path} is of a run with {name}={content[name]}, not {name}={ours}; resume it as it was, or start anew"
            )


def _is_full(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error is not None and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _older(directory: Path) -> list[tuple[Path, int]]:
    """The older checkpoints and their steps, the youngest first."""
    names = sorted(os.listdir(directory)) if directory.is_dir() else []
    found = [
        (directory / name, int(match[1])) for name in names if (match := _OLDER.fullmatch(name))
    ]
    return sorted(found, key=lambda pair: -pair[1])


def _read(path: Path) -> dict[str, Any]:
    content = file_format.read(path)
    if not (content.keys() >= {"state", *Identity._fields} and "step" in content["state"]):
        raise file_format.Unreadable(file_format.FOREIGN)
    return content
