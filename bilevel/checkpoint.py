"""The file that a run resumes from: written atomically, read with suspicion."""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bilevel.errors import BilevelError
from bilevel.records import write_atomically
from bilevel.solver import Solution

CHECKPOINT = "checkpoint.pt"
FORMAT = "bilevel-checkpoint"
VERSION = 1


class Identity(NamedTuple):
    """Whose checkpoint it is: a run continues none but its own."""

    problem: str
    solver: str
    seed: int


def save(directory: Path, identity: Identity, state: dict[str, Any]) -> None:
    """Replace the directory's checkpoint: a process killed at any moment leaves the old one or the new one, whole.

    Raises:
        BilevelError: the file cannot be written, or the first one could not be read again: a `state_dict` holds an object
            that is no tensor, number, string or container of them.
    """
    path = directory / CHECKPOINT
    first = not path.exists()
    content = {"format": FORMAT, "version": VERSION, **identity._asdict(), "state": state}
    write_atomically(path, lambda file: torch.save(content, file), mode="wb")
    if first and (strange := torch.serialization.get_unsafe_globals_in_checkpoint(str(path))):
        raise BilevelError(
            f"the run could not be resumed: a state_dict of the problem's data or of the solver holds {strange[0]}; "
            "keep tensors, numbers, strings and containers of them there"
        )


def load(directory: Path, identity: Identity | None = None) -> dict[str, Any]:
    """The state that `save` was given, on the CPU.

    Raises:
        BilevelError: no run is there, or the file is truncated, foreign, of another version, or not of the run `identity`.
    """
    path = directory / CHECKPOINT
    if not path.is_file():
        reason = f"{path} is missing" if directory.is_dir() else "there is no such directory"
        raise BilevelError(
            f"{directory} is not a run that can be resumed: {reason}; give the directory of a run, or start a new one"
        )
    if not zipfile.is_zipfile(path):  # torch.save writes a zip, whose end marks it as whole
        with open(path, "rb") as file:
            truncated = file.read(2) in (b"PK", b"P", b"")
        what = "is truncated" if truncated else "is no checkpoint of bilevel"
        raise BilevelError(f"{path} {what}; restore it from a copy, or start a new run")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not look at the checksums
                raise BilevelError(f"{damaged} in it does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling what is damaged or foreign raises nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BilevelError(
            f"{path} is damaged, or no checkpoint of bilevel ({reason}); restore it from a copy, or start a new run"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BilevelError(f"{path} is no checkpoint of bilevel; give the directory of a run")
    if content["version"] != VERSION:
        raise BilevelError(
            f"{path} has version {content['version']} and this bilevel reads version {VERSION}; "
            "resume it with the bilevel that wrote it, or start a new run"
        )
    if identity is not None:
        for name, ours in identity._asdict().items():
            if content[name] != ours:
                raise BilevelError(
                    f"{path} is of a run with {name}={content[name]}, not {name}={ours}; resume it as it was, or start anew"
                )
    return content["state"]


def best_solution(directory: str | Path) -> Solution:
    """Hyperparameters, weights and carry of a run's best evaluation so far, on the CPU.

    Raises:
        BilevelError: the directory holds no readable checkpoint, or its run never had a finite validation loss.
    """
    best = load(Path(directory))["best"]
    if best is None:
        raise BilevelError(f"the run in {directory} never had a finite validation loss; look at its metrics.jsonl")
    return Solution(**best["solution"])
