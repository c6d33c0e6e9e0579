"""The checkpoints of a run: written atomically, checksummed, and several kept."""

import errno
import json
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
from bilevel.checkpoint.refit_directory import result_directory
from bilevel.errors import BilevelError, Unwritable
from bilevel.files import remove_temporaries, temporary_beside, write_atomically
from bilevel.loggers.records import METRICS, read_metrics
from bilevel.solver import Solution
from bilevel.validate import path_of

CHECKPOINT = "checkpoint.pt"

VERSIONS = ("bilevel", "torch", "python")
"""Entries of an environment on which the last digits of numbers depend."""

_OLDER = re.compile(r"checkpoint-step(\d+)\.pt")


class CheckpointWarning(UserWarning):
    """A checkpoint cannot be read, and an older one replaces it."""


class Identity(NamedTuple):
    """The run that a checkpoint belongs to; a run continues its own checkpoints only."""

    problem: str
    solver: str
    seed: int


class Checkpoints:
    """The checkpoints of a run.

    The newest one is `checkpoint.pt`. Up to `keep` − 1 older ones lie beside it as
    `checkpoint-step<step>.pt`.

    Args:
        directory: the run directory.
        identity: the run that they belong to.
        keep: the number of checkpoints to keep, the newest included.
        config: the configuration of the run, which replaces a lost `config.yaml`.
        settings: the settings that change its numbers, by name.
        environment: the versions of the software, the device and so on, by name.
    """

    def __init__(
        self,
        directory: Path,
        identity: Identity,
        keep: int = 3,
        config: Mapping[str, Any] | None = None,
        settings: Mapping[str, str] | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = directory
        self.identity = identity
        self.keep = keep
        self.config = json.dumps(dict(config or {}), default=str)
        self.settings = dict(settings or {})
        self.environment = dict(environment or {})
        self._newest: int | None = None  # the step of `checkpoint.pt` once it is known to be whole
        self._readable = False

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a new `checkpoint.pt`, and keep the previous one as an older one.

        A process that is killed at any moment leaves a whole checkpoint.

        Args:
            state: the state, with the number of inner steps as `step`.

        Raises:
            Unwritable: the file cannot be written; the previous checkpoints stay.
            BilevelError: the first checkpoint could not be loaded, because a `state_dict` holds an
                object other than tensors, numbers, strings and containers of them.
        """
        path, step = self.directory / CHECKPOINT, int(state["step"])
        content = {
            **self.identity._asdict(),
            "config": self.config,
            "settings": self.settings,
            "environment": self.environment,
            "state": dict(state),
        }
        try:
            if self._newest is not None and self._newest < step:
                self._set_aside(path, self.directory / f"checkpoint-step{self._newest}.pt")
            write_atomically(path, lambda file: file_format.write(content, file), mode="wb")
        except Unwritable as error:
            if not (_is_full(error) and self._give_way()):
                raise
            write_atomically(path, lambda file: file_format.write(content, file), mode="wb")
        self._newest = step
        if not self._readable:
            if strange := torch.serialization.get_unsafe_globals_in_checkpoint(str(path)):
                raise BilevelError(
                    f"a state_dict of the data or of the solver holds {strange[0]}, so the run "
                    "could not be resumed; keep only tensors, numbers, strings and containers of "
                    "them there"
                )
            self._readable = True
        self._forget()

    def load(self) -> dict[str, Any]:
        """Return what the function `load` returns; the next `save` continues from it.

        Raises:
            BilevelError: see the function; or the run had other settings.

        Warns:
            CheckpointWarning: the run had other versions of the software.
        """
        path, content = _newest_whole(self.directory, self.identity)
        state: dict[str, Any] = content["state"]
        _check_settings(path, content, self.settings)
        _compare_versions(path, content, self.environment)
        # a damaged `checkpoint.pt` is not kept as an older one
        self._newest = int(state["step"]) if path.name == CHECKPOINT else None
        return state

    def _set_aside(self, newest: Path, older: Path) -> None:
        """Give the newest a second name, so that the first name is never missing."""
        temporary = temporary_beside(older)
        try:
            # left by a run that was killed right here, or that was resumed from an earlier step
            older.unlink(missing_ok=True)
            try:
                os.link(newest, older)
            except OSError:  # a file system without hard links
                shutil.copyfile(newest, temporary)
                os.replace(temporary, older)
        except OSError as error:
            with suppress(OSError):  # half of a copy would fill the disk further
                temporary.unlink(missing_ok=True)
            raise Unwritable(
                f"{older} cannot be written ({error.strerror or error}); free some space, or move "
                "the run"
            ) from None

    def _give_way(self) -> bool:
        """Remove the older checkpoints for a newer one, and return whether there were any."""
        older = _older(self.directory) if self._newest is not None else []
        for path, _ in older:
            with suppress(OSError):  # the next write shows whether there is space
                path.unlink()
        return bool(older)

    def _forget(self) -> None:
        """Remove checkpoints beyond `keep` or of later steps, and leftovers of killed writes."""
        remove_temporaries(self.directory)
        older = _older(self.directory)
        past = [path for path, step in older if self._newest is not None and step < self._newest]
        for path, _ in older:
            if path not in past[: self.keep - 1]:
                with suppress(OSError):  # one too many is harmless
                    path.unlink()


def kept(directory: Path) -> list[Path]:
    """Return the checkpoints in a directory, the newest first."""
    newest = directory / CHECKPOINT
    return [path for path in (newest, *(path for path, _ in _older(directory))) if path.is_file()]


def load(directory: Path, identity: Identity | None = None) -> dict[str, Any]:
    """Return the state of the newest whole checkpoint, on the CPU.

    Raises:
        BilevelError: the directory holds no run, every file is truncated, damaged or foreign, or a
            file has another version or belongs to another run than `identity`.

    Warns:
        CheckpointWarning: a newer checkpoint is truncated, damaged, foreign or missing.
    """
    state: dict[str, Any] = _newest_whole(directory, identity)[1]["state"]
    return state


def load_config(directory: Path) -> dict[str, Any]:
    """Return the configuration in the newest whole checkpoint; {} if it holds none.

    Raises:
        BilevelError: see `load`.
    """
    content = _newest_whole(directory, None)[1]
    try:
        config = json.loads(content.get("config", "{}"))
    except (TypeError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def best_solution(directory: str | Path) -> Solution:
    """Return hyperparameters, weights and carry of a run's best evaluation so far, on the CPU.

    With refits they are those of the chosen candidate, once the run has ended.

    Raises:
        BilevelError: the directory holds no readable checkpoint, or its run never had a finite
            validation loss.
    """
    chosen = result_directory(path_of(directory=directory))
    return best_of(load(chosen), chosen)


def best_of(state: Mapping[str, Any], directory: str | Path) -> Solution:
    """Return the best solution in the state of a checkpoint; see `best_solution`."""
    best = state["best"]
    if best is None:
        raise BilevelError(
            f"{directory} holds a run that never had a finite validation loss; see its {METRICS}"
        )
    return Solution(**best["solution"])


def _newest_whole(directory: Path, identity: Identity | None) -> tuple[Path, dict[str, Any]]:
    newest, files = directory / CHECKPOINT, kept(directory)
    if not files:
        reason = f"{newest} is missing" if directory.is_dir() else "there is no such directory"
        reason = "it is a file" if directory.is_file() else reason
        raise BilevelError(
            f"{directory} is not a run that can be resumed ({reason}); give the directory of a "
            "run, or start a new one"
        )
    wrong = [] if files[0] == newest else [f"{newest} is missing"]
    for path in files:
        try:
            content = _read(path)
        except file_format.Unreadable as error:
            wrong.append(f"{path} {error}")
            continue
        _check_identity(path, content, identity)
        if wrong:
            sentence = _replacement(wrong, path, content["state"]["step"])
            warnings.warn(sentence, CheckpointWarning, stacklevel=2)
        return path, content
    one = "it" if len(wrong) == 1 else "one"
    raise BilevelError(f"{', and '.join(wrong)}; restore {one} from a copy, or start a new run")


def _replacement(wrong: list[str], path: Path, step: int) -> str:
    """Return the sentence about an older checkpoint in place of the newer ones in `wrong`."""
    sentence = f"{', and '.join(wrong)}; {path.name}, of step {step}, replaces it"
    try:
        lost = read_metrics(path.with_name(METRICS))[-1]["step"] - step
    except (OSError, ValueError, LookupError, TypeError):  # the metrics may be damaged too
        lost = 0
    return f"{sentence}, and the run repeats at least {lost} lost steps" if lost > 0 else sentence


def _check_identity(path: Path, content: dict[str, Any], identity: Identity | None) -> None:
    for name, ours in ({} if identity is None else identity._asdict()).items():
        if content[name] != ours:
            raise BilevelError(
                f"{path} belongs to a run with {name}={content[name]}, not {name}={ours}; resume "
                "it with its own settings, or start a new run"
            )


def _check_settings(path: Path, content: dict[str, Any], settings: Mapping[str, str]) -> None:
    before = content.get("settings")
    for name, then in before.items() if isinstance(before, dict) else ():
        if name in settings and settings[name] != then:
            raise BilevelError(
                f"{path} belongs to a run with {name}={then}, not {name}={settings[name]}; resume "
                "it with its own settings, or start a new run"
            )


def _compare_versions(path: Path, content: dict[str, Any], now: Mapping[str, Any]) -> None:
    before = content.get("environment", content.get("versions"))  # its name in older checkpoints
    changed = [
        f"{name} {then} (now {now[name]})"
        for name, then in (before.items() if isinstance(before, dict) else ())
        if name in VERSIONS and name in now and now[name] != then
    ]
    if changed:
        warnings.warn(
            f"{path} was written with {' and '.join(changed)}; the run continues, and its numbers "
            "may differ in their last digits from those of an unbroken run",
            CheckpointWarning,
            stacklevel=4,
        )


def _is_full(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error is not None and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _older(directory: Path) -> list[tuple[Path, int]]:
    """Return the older checkpoints and their steps, the newest first."""
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
