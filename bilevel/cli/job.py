"""One run of the command line or of a sweep, in whichever process a launcher puts it."""

import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bilevel.checkpoint.checkpoints import CheckpointWarning
from bilevel.checks.check_problem import ProblemWarning
from bilevel.cli import input_errors, sweep, targets, user_modules
from bilevel.cli.resume import AUTO, CONFIG, continued, repeated, stored_config
from bilevel.cli.standard_streams import say
from bilevel.errors import BilevelError, DirectoryLocked, FaultWarning, SpeedWarning
from bilevel.files import write_atomically
from bilevel.loggers.logger import Logger, Place, RunInfo
from bilevel.loggers.records import Record
from bilevel.parallel.torchrun import Launch
from bilevel.problem import Problem
from bilevel.run.loop import SolverWarning
from bilevel.run.runner import Runner
from bilevel.run.signals import SUBMITIT, OutOfTime, requeue, time_limit_signals
from bilevel.solver import Solver

BUILT = ("problem", "solver", "runner")
OPEN_GROUPS = (*BUILT, "wandb", "tensorboard")
"""Nodes whose keys are arguments of a constructor: those that the YAML leaves at their default can be set too."""
TOLD = (ProblemWarning, SolverWarning, CheckpointWarning, FaultWarning, SpeedWarning)
"""Warnings that are printed as a line."""


class Job:
    """What Hydra calls for every run; a launcher may pickle it and call it in another process.

    A run that fails is told here, so that the other runs of a sweep go on, and counts as infinity.

    Args:
        traceback_wanted: whether an error is raised instead.

    Attributes:
        launch: this process among those of `torchrun`.
        failures: runs that failed in this process.
    """

    stopped = False
    """Of a process that works for a sweep: whether a signal has ended its run, so that it begins no other."""

    def __init__(self, traceback_wanted: bool = False) -> None:
        self.traceback_wanted, self.process, self.failures = traceback_wanted, os.getpid(), 0
        self.launch = Launch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        add_resolvers()  # Hydra resolves the directory of the run before it calls us
        user_modules.add_working_directory()

    @property
    def is_worker(self) -> bool:
        """Whether this is one of several processes that share a terminal."""
        return os.getpid() != self.process and SUBMITIT not in os.environ

    def __call__(self, composed: DictConfig) -> float:
        """One run; its best validation loss, for Hydra's sweepers.

        Raises:
            KeyboardInterrupt: the run was interrupted, and so is the sweep that it may be part of.
        """
        if self.is_worker and Job.stopped:
            return math.nan
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show(warnings.showwarning, self.launch)
                value = self._run(composed)
            sweep.forget_failure()
            return value
        except Exception as error:
            if not self.told(error):
                raise
            sweep.note_failure(_said(error))
            return math.inf
        except OutOfTime:
            if SUBMITIT in os.environ:
                signal.raise_signal(
                    time_limit_signals()[-1]
                )  # all is saved: submitit's own handler requeues the job
            return self._leave()
        except KeyboardInterrupt:
            return self._leave()

    def told(self, error: Exception) -> bool:
        """Print what is wrong in a sentence, unless the traceback is wanted."""
        self.failures += 1
        self.launch.failed = True
        if not self.traceback_wanted and self.launch.prints(_said(error)):
            say(f"bilevel: {_said(error)}", sys.stderr)
        return not self.traceback_wanted

    def _leave(self) -> float:
        """Hand the interruption on; not from a launcher's worker, since one that raises has the others killed."""
        if not self.is_worker:
            raise  # called from the clause that caught it
        Job.stopped = True
        return math.nan

    def _run(self, composed: DictConfig) -> float:
        config, hydra = _plain(composed), HydraConfig.get()
        directory = self.launch.directory(Path(hydra.runtime.output_dir))
        asked, config["resume"], resumed = config["resume"], None, False
        ended: Record | None = None
        try:
            if hydra.mode is RunMode.MULTIRUN or asked == AUTO:
                resumed, ended = repeated(config, directory)
            elif asked is not None:
                resumed = True
                overridden = [
                    input_errors.parse(text).key_or_group for text in hydra.overrides.task
                ]
                config = continued(stored_config(directory), config, overridden, directory)
            summary = ended or run(
                config, directory, resumed=resumed, place=sweep.place(), quiet=self.is_worker
            )
        except OutOfTime:  # before the first round
            if config["runner"].get("requeue"):
                requeue()
            raise
        except DirectoryLocked:  # the directory belongs to the other run, even while it is empty
            raise
        except Exception:  # whatever it was is raised again
            with suppress(OSError):  # something is in it
                directory.rmdir()  # Hydra made it; a run that did not begin leaves nothing
            raise
        if summary["diverged"]:
            raise BilevelError(summary["message"])
        if summary["interrupted"]:
            raise (
                OutOfTime
                if summary["signal"] in [s.name for s in time_limit_signals()]
                else KeyboardInterrupt
            )
        best = summary["best"]
        said = (
            f"{directory} is finished: valid loss {best['valid_loss']:.4g} at step {best['step']}"
        )
        if (ended or self.is_worker) and self.launch.prints(said):
            say(said, sys.stdout)
        return float(best["valid_loss"])


class ConfigFile(Logger):
    """`config.yaml`: written when set-up has succeeded, so that a refused run leaves nothing."""

    vital = True

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        text = OmegaConf.to_yaml(OmegaConf.create(dict(run.config)))
        write_atomically(run.directory / CONFIG, lambda file: file.write(text))

    def log(self, record: Record) -> None:
        """Nothing: the configuration stays as it is."""


def run(
    config: dict[str, Any],
    directory: Path,
    *,
    resumed: bool,
    place: Place | None = None,
    quiet: bool = False,
) -> Record:
    """One run from a resolved configuration, in its directory; its summary.

    Args:
        config: of the run, as `config.yaml` keeps it.
        directory: of the run.
        resumed: whether it goes on there.
        place: in its sweep.
        quiet: whether `progress=auto` shows nothing: several runs would write over each other.
    """
    targets.check_type(config.get("seed"), int, "seed")
    if not -(2**63) <= config["seed"] < 2**64:
        raise BilevelError(
            f"seed={config['seed']} has more than the 64 bits of a seed; give one from 0 to 2⁶⁴ − 1"
        )
    # We own the process, so torch's own generator is ours to seed: modules and loaders of a user's own may draw from it.
    torch.manual_seed(config["seed"])
    loggers = _loggers(
        config
    )  # the first to be built: they are quick, and what they lack is told before data are read
    nodes = {node: config.get(node) for node in BUILT}
    if (
        quiet
        and isinstance(nodes["runner"], dict)
        and nodes["runner"].get("progress", "auto") == "auto"
    ):
        nodes["runner"] = nodes["runner"] | {"progress": "none"}
    problem, solver, runner = (targets.build(nodes[node], node) for node in BUILT)
    for built, kind, node in zip(
        (problem, solver, runner), (Problem, Solver, Runner), BUILT, strict=True
    ):
        if not isinstance(built, kind):
            raise BilevelError(
                f"`{node}` is a {type(built).__name__}; give {node}._target_=the path of a {kind.__name__}"
            )
    return runner.run(
        problem,
        solver,
        directory=directory,
        seed=config["seed"],
        names=(str(config["names"]["problem"]), str(config["names"]["solver"])),
        config=config,
        loggers=[ConfigFile(), *loggers],
        resume=resumed,
        place=place,
    )


def _loggers(config: dict[str, Any]) -> list[Logger]:
    """Those that are on, each from the node of its name.

    Raises:
        BilevelError: a logger has settings and is not on, or is on and has none.
    """
    wanted = config.get("loggers", {"wandb": True})  # of runs from before there was a choice
    if not isinstance(wanted, dict):
        raise BilevelError(
            f"`loggers` = {wanted!r} says of no logger whether it is on; write loggers.NAME=true or false"
        )
    for name, chosen in wanted.items():
        targets.check_type(chosen, bool, f"loggers.{name}")
    on = [name for name, chosen in wanted.items() if chosen]
    for name in OPEN_GROUPS:
        if name not in (*BUILT, *wanted) and config.get(name):
            raise BilevelError(
                f"`{name}` is set, and the loggers are {', '.join(on) or 'none'}; add it, logger=[{','.join([*on, name])}], or "
                f"leave {name}.… out"
            )
    loggers = [targets.build(config.get(name), name) for name in on]
    for name, logger in zip(on, loggers, strict=True):
        if not isinstance(logger, Logger):
            raise BilevelError(
                f"`{name}` is a {type(logger).__name__}; a logger is a subclass of bilevel.loggers.logger.Logger"
            )
    return loggers


def add_resolvers() -> None:
    """Teach OmegaConf what `${bilevel.…}` means in the configuration."""
    OmegaConf.register_new_resolver("bilevel.resumed", _directory, replace=True)
    OmegaConf.register_new_resolver("bilevel.ablation", _ablation, replace=True)
    OmegaConf.register_new_resolver(
        "bilevel.times", lambda factor, value: factor * value, replace=True
    )


def _directory(resumed: str | None, fresh: str) -> str:
    if resumed == AUTO:
        raise BilevelError(
            f"resume={AUTO} goes on in the directory of the run; name it: hydra.run.dir=runs/mine"
        )
    return resumed or fresh


def _said(error: BaseException) -> str:
    return input_errors.sentence(error) or input_errors.unexpected(error)


def _show(otherwise: Callable[..., None], launch: Launch) -> Callable[..., None]:
    """Print a warning about the problem or the solver in a line; hand others on."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, TOLD):
            if launch.prints(str(message)):
                say(f"bilevel: warning: {message}", sys.stderr)
        else:
            otherwise(message, category, *place, **more)

    return show


def _ablation(overrides: Sequence[str]) -> str:
    """What tells the runs of a sweep apart beside names and seed: `-linearize-false`, of letters that `resume=` can read."""
    own = [
        text.lstrip("+~")
        for text in overrides
        if text.lstrip("+~").startswith(("problem.", "solver.", "lr."))
    ]
    label = "".join("-" + text.split(".", 1)[1] for text in own)
    return re.sub(r"[^\w.-]+", "-", label)[:80]


def _plain(composed: DictConfig) -> dict[str, Any]:
    config = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}
