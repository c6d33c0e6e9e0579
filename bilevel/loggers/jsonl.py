"""The files of a run: run.json, metrics.jsonl and, last of all, summary.json."""

import hashlib
import io
import json
import os
import warnings
from contextlib import suppress
from typing import Any

from bilevel.errors import BilevelError, FaultWarning, Unwritable
from bilevel.files import strict_json, write_atomically
from bilevel.loggers.logger import Logger, RunInfo
from bilevel.loggers.records import DESCRIPTION, METRICS, SUMMARY, Record
from bilevel.loggers.space_json import space_to_json
from bilevel.untrusted_files import open_regular, read_bytes

REPLACED = "metrics-replaced.jsonl"
"""The copy of a `metrics.jsonl` that did not fit its checkpoint."""


class JsonLines(Logger):
    """Writes `run.json` first, then a line of `metrics.jsonl` per evaluation.

    A resumed run cuts `metrics.jsonl` at its checkpoint, so no line appears twice. If the file was
    changed or is missing, the run keeps the lines that can be read, and warns. Lines that cannot be
    written, for example on a full disk, are kept in memory and in the checkpoints until they can
    be.
    """

    vital = True

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        path = self.path = run.directory / METRICS
        self.lines = state.get("lines", 0)
        self.durable = state.get("bytes", 0)  # size of the file that is on disk for good
        try:
            # the checkpoint decides: a resumed run without this file continues too
            fresh = not state or not path.exists()
            self.file = open_regular(path, write=True, new=fresh)
        except OSError as error:
            raise BilevelError(
                f"cannot write {path} ({error.strerror or error}); choose another directory"
            ) from None
        known = self.file.read(self.durable) if state else b""
        self.digest = hashlib.sha256(known)
        if state and self.digest.hexdigest() != state["digest"]:
            self._repair()
        self.file.truncate()
        self.pending = [line.encode() for line in state.get("held", [])]  # after the durable bytes
        self.written = 0  # number of pending lines that are in the file
        self.warned = False
        if run.resumed:
            (run.directory / SUMMARY).unlink(missing_ok=True)  # the run has not ended yet
            _renew_environment(run)
        else:
            description = {
                "problem": run.problem,
                "solver": run.solver,
                "seed": run.seed,
                "environment": dict(run.environment),
                "epochs": run.epochs,
                "warmup_epochs": run.warmup_epochs,
                "tuned_epochs": run.tuned_epochs,
                "space": space_to_json(run.space),
                **({"origin": run.config["origin"]} if "origin" in run.config else {}),
            }
            _describe(run, description)

    def log(self, record: Record) -> None:
        self.pending.append(strict_json(record).encode() + b"\n")
        self._write()

    def finish(self, summary: Record) -> None:
        if (error := self._write()) is not None:
            lines = len(self.pending) - self.written
            raise Unwritable(
                f"{lines} lines cannot be written to {self.path} ({error.strerror or error}), but "
                "the checkpoint has them; free some space and continue with "
                f"resume={self.path.parent}"
            )

    def close(self) -> None:
        self.file.close()

    def state(self) -> dict[str, Any]:
        """Return the size of the durable file and the lines beyond it, for the checkpoint."""
        if self._write() is None:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                self._fall_back(error)
            else:
                for line in self.pending:
                    self.digest.update(line)
                self.lines += len(self.pending)
                self.durable = self.file.tell()
                self.pending = []
                self.written = 0
        pending = [line.decode() for line in self.pending]
        return {
            "bytes": self.durable,
            "lines": self.lines,
            "digest": self.digest.hexdigest(),
            "held": pending,
        }

    def _repair(self) -> None:
        """Keep the lines that can be read, at most as many as the checkpoint knows, and warn."""
        self.file.seek(0)
        content = self.file.readall() if isinstance(self.file, io.RawIOBase) else self.file.read()
        before, copy = self.lines, self.path.with_name(REPLACED)
        if content:
            write_atomically(copy, lambda file: file.write(content), mode="wb")
        kept = [line.rstrip(b"\r") for line in content.split(b"\n")[:-1]]
        kept = [line for line in kept if _is_record(line)][:before]
        whole = b"".join(line + b"\n" for line in kept)
        self.file.seek(0)
        self.file.write(whole)
        self.digest, self.lines = hashlib.sha256(whole), len(kept)
        self.durable = len(whole)
        lost = f"lacks {before - len(kept)} of" if len(kept) < before else "differs from"
        warnings.warn(
            f"{self.path} {lost} the {before} lines that its checkpoint knows; the run continues "
            f"from the checkpoint{f', and {REPLACED} keeps the old file' if content else ''}",
            FaultWarning,
            stacklevel=3,
        )

    def _write(self) -> OSError | None:
        """Write the pending lines; return the error where that fails."""
        try:
            for line in self.pending[self.written :]:
                left = memoryview(line)
                while left:  # a disk that is nearly full takes a part
                    left = left[self.file.write(left) :]
                self.written += 1
        except OSError as error:
            self._fall_back(error)
            return error
        self.warned = False
        return None

    def _fall_back(self, error: OSError) -> None:
        """Return to the durable end of the file.

        The next attempt writes the same lines to the same place again.
        """
        self.written = 0
        with suppress(OSError):  # the next write fails again
            self.file.seek(self.durable)
        if not self.warned:
            self.warned = True
            message = (
                f"cannot write {self.path} ({error.strerror or error}); the run continues "
                "and keeps its lines until it can"
            )
            warnings.warn(message, FaultWarning, stacklevel=2)


class SummaryFile(Logger):
    """Writes `summary.json` after all loggers have finished.

    A run that is killed before is not finished: it continues, and its loggers finish again.
    """

    vital = True

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        self.path = run.directory / SUMMARY

    def log(self, record: Record) -> None:
        """Do nothing: the summary is written at the end."""

    def finish(self, summary: Record) -> None:
        text = strict_json(summary, indent=2) + "\n"
        write_atomically(self.path, lambda file: file.write(text))


def _describe(run: RunInfo, description: Record) -> None:
    text = strict_json(description, indent=2) + "\n"
    write_atomically(run.directory / DESCRIPTION, lambda file: file.write(text))


def _renew_environment(run: RunInfo) -> None:
    """Write the environment of this session into `run.json`; a damaged one stays as it is."""
    try:
        known = json.loads(read_bytes(run.directory / DESCRIPTION))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(known, dict):
        _describe(run, known | {"environment": dict(run.environment)})


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
