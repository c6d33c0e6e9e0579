"""The shared state of a run: its stages fill it, its surroundings read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel.checkpoint.checkpoints import Checkpoints
from bilevel.data.tensor_stream import Data
from bilevel.loggers.logger import RunInfo
from bilevel.parallel.process_group import SINGLE_PROCESS, Ranks
from bilevel.params import Hypers
from bilevel.problem import Problem
from bilevel.run.directory_lock import DirectoryLock
from bilevel.run.loop import Loop
from bilevel.run.request import RunRequest
from bilevel.run.settings import RunSettings
from bilevel.run.signals import Interrupts


@dataclass
class Session:
    """The state that stages and surroundings share.

    They are in `bilevel.run.stages` and `bilevel.run.surroundings`.

    Attributes:
        settings: the settings of the runner.
        request: the arguments of `Runner.run`.
        device: where the run computes.
        ranks: the processes of the run.
        lock: the lock on the run directory, which `claim` takes.
        interrupts: the signals that end the run, noted during training.
        directory: the run directory, the same on all ranks; set by `claim`.
        checkpoints: the files to resume from; set by `claim`.
        checkpoint: the state to resume from; {} for a new run.
        params: initial weights in place of random ones, or None.
        data: the streams; set by `build`.
        problem: the problem as the solver meets it, with all wrappers; set by `build`.
        set_up: whether the solver is set up.
        loop: the training loop; set by `build`.
        info: the facts about the run that loggers receive; set by `build`.
        reason: what ended the run; set by `train`.
        frozen: constant values of all hyperparameters in a refit; None in a run that tunes.
        outer: the directory of the run that a refit belongs to; None in a run of its own.
    """

    settings: RunSettings
    request: RunRequest
    device: torch.device
    ranks: Ranks = SINGLE_PROCESS
    lock: DirectoryLock = field(default_factory=DirectoryLock)
    interrupts: Interrupts = field(default_factory=Interrupts)
    directory: Path = field(init=False)
    checkpoints: Checkpoints = field(init=False)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    params: Mapping[str, Tensor] | None = None
    data: Data = field(init=False)
    problem: Problem = field(init=False)
    set_up: bool = False
    loop: Loop = field(init=False)
    info: RunInfo = field(init=False)
    reason: str | None = None
    frozen: Hypers | None = None
    outer: Path | None = None

    @property
    def data_after_setup(self) -> Data | None:
        """Return the streams once the solver is set up, and None before."""
        return self.data if self.set_up else None

    @property
    def out_of_time(self) -> bool:
        """Return whether a time limit interrupted the run; true on the first rank alone."""
        return self.reason == "interrupted" and self.interrupts.of_time and self.ranks.first
