"""One run of the command line or of a sweep, in any process that a launcher chooses."""

import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bilevel.checkpoint.checkpoints import CheckpointWarning
from bilevel.checks.check_problem import ProblemWarning
from bilevel.cli import input_errors, sweep, user_modules
from bilevel.cli.named_optimizers import with_named_optimizers
from bilevel.cli.resume import AUTO, continued, repeated, stored_config
from bilevel.cli.run_config import run_config
from bilevel.cli.setting_types import check_type
from bilevel.cli.standard_streams import print_line
from bilevel.cli.study import with_study
from bilevel.errors import (
    BilevelError,
    DataWarning,
    DirectoryLocked,
    FaultWarning,
    SolverWarning,
    SpeedWarning,
)
from bilevel.loggers.records import Record
from bilevel.parallel.slurm import SUBMITIT
from bilevel.parallel.torchrun import Launch
from bilevel.run.signals import OutOfTime, requeue, time_limit_signals
from bilevel.text import file_name

PRINTED = (
    ProblemWarning,
    SolverWarning,
    CheckpointWarning,
    FaultWarning,
    SpeedWarning,
    DataWarning,
)
"""Warnings that are printed as one line."""


class Job:
    """The function that Hydra calls for every run; a launcher may pickle it for another process.

    A run that fails prints a sentence and counts as infinity, so that the other runs of a sweep
    continue.

    Args:
        traceback_wanted: whether a run that fails raises its error instead.

    Attributes:
        launch: this process among those of `torchrun`.
        failures: the number of runs that failed in this process.
    """

    stopped = False
    """In a worker of a sweep: whether a signal ended its run, so that it starts no other one."""

    def __init__(self, traceback_wanted: bool = False) -> None:
        self.traceback_wanted = traceback_wanted
        self.process = os.getpid()
        self.failures = 0
        self.launch = Launch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        add_resolvers()  # Hydra resolves the run directory before it calls the job
        user_modules.add_working_directory()

    @property
    def is_worker(self) -> bool:
        """Return whether this is one of several processes that share a terminal."""
        return os.getpid() != self.process and SUBMITIT not in os.environ

    def __call__(self, composed: DictConfig) -> float:
        """Run, and return the best validation loss for Hydra's sweepers.

        Raises:
            KeyboardInterrupt: the run was interrupted; this ends the sweep too.
        """
        if self.is_worker and Job.stopped:
            return math.nan
        try:
            with printed_warnings(self.launch):
                value = self._run(composed)
            sweep.forget_failure()
            return value
        except Exception as error:
            if not self.report(error):
                raise
            sweep.note_failure(_sentence(error))
            return math.inf
        except OutOfTime:
            if SUBMITIT in os.environ:
                # everything is saved, and the handler of submitit requeues the job
                signal.raise_signal(time_limit_signals()[-1])
            return self._leave()
        except KeyboardInterrupt:
            return self._leave()

    def report(self, error: Exception) -> bool:
        """Print an error as a sentence and return True, or return False for a traceback."""
        self.failures += 1
        self.launch.failed = True
        sentence = _sentence(error)
        if not self.traceback_wanted and self.launch.prints(sentence):
            print_line(f"bilevel: {sentence}", sys.stderr)
        return not self.traceback_wanted

    def _leave(self) -> float:
        """Raise the interruption again, except in a worker: it would kill the other workers."""
        if not self.is_worker:
            raise  # called from the clause that caught it
        Job.stopped = True
        return math.nan

    def _run(self, composed: DictConfig) -> float:
        config, hydra = _plain(composed), HydraConfig.get()
        directory = self.launch.directory(Path(hydra.runtime.output_dir))
        asked, config["resume"], resumed = config["resume"], None, False
        check_type(config["trust"], bool, "trust")
        trust, config["trust"] = config["trust"], False
        ended: Record | None = None
        try:
            if asked in (None, AUTO):
                config = with_study(config)
            if hydra.mode is RunMode.MULTIRUN or asked == AUTO:
                resumed, ended = repeated(config, directory)
            elif asked is not None:
                resumed = True
                overridden = [
                    input_errors.parse(text).key_or_group for text in hydra.overrides.task
                ]
                stored = stored_config(directory)
                config = continued(stored, config, overridden, directory, trust=trust)
            summary = ended or run_config(
                config, directory, resumed=resumed, place=sweep.place(), quiet=self.is_worker
            )
        except OutOfTime:  # raised before the first round
            if config["runner"].get("requeue"):
                requeue()
            raise
        except DirectoryLocked:  # the directory belongs to the other run, even while it is empty
            raise
        except Exception:  # cleaned up, and raised again
            with suppress(OSError):  # the directory is not empty
                directory.rmdir()  # Hydra made it; a run that did not start leaves nothing
            raise
        if summary["diverged"]:
            raise BilevelError(summary["message"])
        if summary["interrupted"]:
            of_time = summary["signal"] in [s.name for s in time_limit_signals()]
            raise OutOfTime if of_time else KeyboardInterrupt
        best = summary["best"]
        line = (
            f"{directory} is finished: valid loss {best['valid_loss']:.4g} at step {best['step']}"
        )
        if (ended or self.is_worker) and self.launch.prints(line):
            print_line(line, sys.stdout)
        return float(best["valid_loss"])


def add_resolvers() -> None:
    """Register the resolvers `${bilevel.…}` of the configuration with OmegaConf."""
    OmegaConf.register_new_resolver("bilevel.resumed", _directory, replace=True)
    OmegaConf.register_new_resolver("bilevel.name", file_name, replace=True)
    OmegaConf.register_new_resolver("bilevel.ablation", _ablation, replace=True)
    OmegaConf.register_new_resolver(
        "bilevel.times", lambda factor, value: factor * value, replace=True
    )


def _directory(resumed: str | None, fresh: str) -> str:
    if resumed == AUTO:
        raise BilevelError(
            f"resume={AUTO} needs the directory of the run; add hydra.run.dir=runs/mine"
        )
    return resumed or fresh


def _sentence(error: BaseException) -> str:
    return input_errors.sentence(error) or input_errors.unexpected(error)


@contextmanager
def printed_warnings(launch: Launch) -> Iterator[None]:
    """Print warnings of a run as one line each within a block."""
    with warnings.catch_warnings():
        warnings.showwarning = _show(warnings.showwarning, launch)
        yield


def _show(otherwise: Callable[..., None], launch: Launch) -> Callable[..., None]:
    """Print our own warnings as one line each, and pass on all others."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, PRINTED):
            if launch.prints(str(message)):
                print_line(f"bilevel: warning: {message}", sys.stderr)
        else:
            otherwise(message, category, *place, **more)

    return show


def _ablation(overrides: Sequence[str]) -> str:
    """Return the part of a directory name that only this run of a sweep has: `-linearize-false`."""
    plain = [text.lstrip("+~") for text in overrides]
    own = [text for text in plain if text.startswith(("problem.", "solver.", "lr."))]
    label = "".join("-" + text.split(".", 1)[1] for text in own)
    return re.sub(r"[^\w.-]+", "-", label)[:80]  # letters that `resume=` can read


def _plain(composed: DictConfig) -> dict[str, Any]:
    config = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(config, dict)
    return with_named_optimizers({str(key): value for key, value in config.items()})
