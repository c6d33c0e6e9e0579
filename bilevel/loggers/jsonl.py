"""The lines of a run on disk, which outlive a disk that is full for a while."""

import hashlib
import os
import warnings
from contextlib import suppress
from typing import Any

from bilevel.errors import BilevelError, FaultWarning, Unwritable
from bilevel.files import strict_json, write_atomically
from bilevel.loggers.logger import Logger, RunInfo
from bilevel.loggers.records import DESCRIPTION, METRICS, SUMMARY, Record
from bilevel.loggers.space_json import space_to_json


class JsonLines(Logger):
    """`run.json` at the start, `metrics.jsonl` with a line per evaluation, and `summary.json` at the end.

    A resumed run cuts the file at its checkpoint, so that lines written after it are not there twice. Lines that cannot be
    written are held, in the checkpoints too, until they can be.
    """

    vital = True

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        path = self.path = run.directory / METRICS
        self.lines, self.durable = state.get("lines", 0), state.get("bytes", 0)
        try:
            self.file = open(path, "r+b" if state else "wb", buffering=0)  # noqa: SIM115  # closed by `close`
        except OSError as error:
            raise BilevelError(
                f"cannot write {path}: {error.strerror or error}; choose another directory"
            ) from None
        self.digest = hashlib.sha256(self.file.read(self.durable) if state else b"")
        if state and self.digest.hexdigest() != state["digest"]:
            self.file.close()
            raise BilevelError(
                f"{path} does not begin with the {state['lines']} lines that its checkpoint was saved after: "
                "one of the two was cut or replaced; start a new run"
            )
        self.file.truncate()
        self.held = [
            line.encode() for line in state.get("held", [])
        ]  # what follows the durable bytes
        self.written, self.told = 0, False  # how many of these lines are in the file
        if run.resumed:
            (run.directory / SUMMARY).unlink(missing_ok=True)  # the run has not ended yet
        else:
            told = {
                "problem": run.problem,
                "solver": run.solver,
                "seed": run.seed,
                "epochs": run.epochs,
            }
            told |= {"warmup_epochs": run.warmup_epochs, "space": space_to_json(run.space)}
            write_atomically(
                run.directory / DESCRIPTION,
                lambda file: file.write(strict_json(told, indent=2) + "\n"),
            )

    def log(self, record: Record) -> None:
        self.held.append(strict_json(record).encode() + b"\n")
        self._write()

    def finish(self, summary: Record) -> None:
        if (error := self._write()) is not None:
            lines = len(self.held) - self.written
            raise Unwritable(
                f"{lines} lines could not be written to {self.path}: {error.strerror or error}; the checkpoint has them: free "
                f"some space, and resume={self.path.parent} writes them"
            )
        write_atomically(
            self.path.with_name(SUMMARY),
            lambda file: file.write(strict_json(summary, indent=2) + "\n"),
        )

    def close(self) -> None:
        self.file.close()

    def state(self) -> dict[str, Any]:
        """What is on disk for good, and the lines beyond: a checkpoint vouches for both."""
        if self._write() is None:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                self._fall_back(error)
            else:
                for line in self.held:
                    self.digest.update(line)
                self.lines, self.durable = self.lines + len(self.held), self.file.tell()
                self.held, self.written = [], 0
        held = [line.decode() for line in self.held]
        return {
            "bytes": self.durable,
            "lines": self.lines,
            "digest": self.digest.hexdigest(),
            "held": held,
        }

    def _write(self) -> OSError | None:
        """Bring the file up to date; the error where that cannot be done."""
        try:
            for line in self.held[self.written :]:
                left = memoryview(line)
                while left:  # a disk that fills up takes a part
                    left = left[self.file.write(left) :]
                self.written += 1
        except OSError as error:
            self._fall_back(error)
            return error
        self.told = False
        return None

    def _fall_back(self, error: OSError) -> None:
        """To what is durable: the same lines are written to the same place again, over what was begun."""
        self.written = 0
        with suppress(OSError):  # the next write meets it again
            self.file.seek(self.durable)
        if not self.told:
            self.told = True
            message = f"cannot write {self.path}: {error.strerror or error}; the run goes on, and holds its lines until it can"
            warnings.warn(message, FaultWarning, stacklevel=2)
