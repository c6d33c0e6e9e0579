"""A run from its settings to its summary."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from bilevel.checkpoint.checkpoints import Checkpoints, Identity, kept
from bilevel.checks.check_problem import check_setup
from bilevel.device.device import choose_device, cpu_threads, deterministic
from bilevel.device.precision import at_precision, check_precision, matmul_precision
from bilevel.errors import BilevelError
from bilevel.loggers.display import DISPLAYS, display
from bilevel.loggers.jsonl import JsonLines
from bilevel.loggers.logger import Logger, Place, RunInfo
from bilevel.loggers.plot import CurvesPlot
from bilevel.loggers.records import METRICS, Record, brief
from bilevel.parallel.process_group import Ranks, device_of_rank, open_ranks
from bilevel.problem import Problem
from bilevel.run.budget import Schedule
from bilevel.run.cuda_graph import Capture
from bilevel.run.directory_lock import Alone
from bilevel.run.distributed import SavingTogether, spread
from bilevel.run.hypergradient_error import Probe
from bilevel.run.initial_params import StartingFrom, read_params
from bilevel.run.loop import Loop
from bilevel.run.out_of_memory import Explained
from bilevel.run.signals import Interrupts, requeue
from bilevel.run.summary import summarize
from bilevel.solver import Solver
from bilevel.text import near


@dataclass(frozen=True, kw_only=True)
class Runner:
    """How long a solver runs, and what is measured, shown and saved meanwhile.

    The run ends at whichever budget is reached first. Epochs are counted by inner steps, so that warm-up and the epochs budget
    end exactly; the other budgets end the run after the round that reaches them.

    Attributes:
        epochs: budget in passes over the training split.
        seconds: budget of training time; evaluation, checkpoints and set-up are not counted.
        examples: budget of training and validation examples together.
        warmup_epochs: epochs before the first outer step (the paper: 5).
        evaluate_every: epochs between evaluations; at most 1 where a `ReduceLROnPlateau` is to read one every epoch.
        patience: evaluations after warm-up without a new lowest validation loss that end the run; None never ends it so.
        checkpoint_every: evaluations between checkpoints; the end of a run, Ctrl-C included, always leaves one.
        keep_checkpoints: how many of them stay, the newest included; an older one stands in for one that is damaged.
        device: `auto` (CUDA, else CPU) or a name of PyTorch's; of several processes on a machine each takes a GPU of its own.
        threads: of the CPU; by default one for fewer than a million weights, where threads wait for each other longer than they
            work, and PyTorch's own number otherwise.
        precision: of the products on CUDA, `fp32` or `tf32`; or `bf16` anywhere: `predict` under autocast, all else in float32.
        capture: record a training step once as a CUDA graph and replay it, which spares its launches; where that cannot be
            done, a sentence says why, and the run goes on step by step. Schedules of the learning rate are followed.
        deterministic: refuse operations whose bits may differ from one run to the next; they do so on CUDA alone, where this
            costs time. An operation without a deterministic form ends the run, and is named.
        requeue: where a signal announces a time limit (SLURM's USR1), ask SLURM to run the job again when all is saved.
        progress: `live` display, `plain` lines, `none`, or `auto`: live in a terminal.
        initial_params: weights to start from, names and shapes as the problem has them: a file of
            `torch.save(model.state_dict(), …)`, or the directory of a run, for its weights at its lowest validation loss.
        picture: whether the run ends by drawing `curves.png`.

    Raises:
        BilevelError: no budget, or a value out of its range.
    """

    epochs: float | None = None
    seconds: float | None = None
    examples: int | None = None
    warmup_epochs: float = 5
    evaluate_every: float = 1
    patience: int | None = None
    checkpoint_every: int = 1
    keep_checkpoints: int = 3
    device: str = "auto"
    threads: int | None = None
    precision: str = "fp32"
    capture: bool = False
    deterministic: bool = False
    requeue: bool = False
    progress: str = "auto"
    initial_params: str | None = None
    picture: bool = True

    def __post_init__(self) -> None:
        if self.epochs is None and self.seconds is None and self.examples is None:
            raise BilevelError("the runner has no budget; give epochs, seconds or examples")
        whole = ("checkpoint_every", "keep_checkpoints")
        for name in (
            "epochs",
            "seconds",
            "examples",
            "evaluate_every",
            "patience",
            "threads",
            *whole,
        ):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise BilevelError(f"runner.{name}={value!r} must be above zero")
            if name in whole and not isinstance(value, int):
                raise BilevelError(f"runner.{name}={value!r} is no count; give 1, 2, …")
        if not (_is_number(self.warmup_epochs) and self.warmup_epochs >= 0):
            raise BilevelError(f"runner.warmup_epochs={self.warmup_epochs!r} must be zero or above")
        check_precision(self.precision)
        if self.progress not in DISPLAYS:
            known = ", ".join(DISPLAYS)
            raise BilevelError(
                f"runner.progress={self.progress!r}{near(str(self.progress), DISPLAYS)} is none of {known}"
            )

    def run(
        self,
        problem: Problem,
        solver: Solver,
        *,
        directory: str | Path,
        seed: int = 0,
        names: tuple[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        loggers: Sequence[Logger] = (),
        resume: bool = False,
        params: Mapping[str, Tensor] | None = None,
        place: Place | None = None,
    ) -> Record:
        """Run `solver` on `problem` and leave records, `summary.json`, `checkpoint.pt` and `curves.png` in `directory`.

        Args:
            problem: what to solve.
            solver: a fresh one; it is set up here.
            directory: made where it is missing; it must not hold a run yet, unless `resume`.
            seed: of the data's order, the initial weights and the solver's own draws.
            names: what records call the problem and the solver; by default their classes.
            config: what loggers record as the run's settings.
            loggers: told of everything beside the runner's own.
            resume: go on from the directory's checkpoint, as if the run had never stopped.
            params: weights to start from, in place of `initial_params`.
            place: in the sweep that the run is part of, for displays and dashboards.

        Returns:
            The summary. `diverged` and `interrupted` tell an early end, `message` explains it.

        Raises:
            BilevelError: the solver refuses the problem, the directory cannot be used, or what is resumed does not fit.
        """
        if resume and params is not None:
            raise BilevelError(
                "a resumed run goes on from its own weights; leave params out, or start a new run from them"
            )
        if solver.inner_count:
            taken = f"this {type(solver).__name__} has {solver.inner_count} steps behind it"
            raise BilevelError(f"{taken}; give every run a solver of its own")
        device, directory = choose_device(device_of_rank(self.device)), Path(directory)
        explaining = Explained(problem, solver, device, self.precision)
        with (
            deterministic(self.deterministic),
            open_ranks(device) as ranks,
            Alone() as alone,
            explaining as explained,
        ):
            summary, out_of_time = self._run(
                problem,
                solver,
                device,
                explained,
                ranks,
                alone,
                directory=ranks.on_first(lambda: directory),
                seed=seed,
                names=names,
                config=config or {},
                loggers=loggers,
                resume=resume,
                params=params,
                place=place,
            )
        if (
            out_of_time and self.requeue
        ):  # when all is saved and closed: SLURM may end this process at once
            requeue()
        return summary

    def _run(
        self,
        problem: Problem,
        solver: Solver,
        device: torch.device,
        explained: Explained,
        ranks: Ranks,
        alone: Alone,
        *,
        directory: Path,
        seed: int,
        names: tuple[str, str] | None,
        config: Mapping[str, Any],
        loggers: Sequence[Logger],
        resume: bool,
        params: Mapping[str, Tensor] | None,
        place: Place | None,
    ) -> tuple[Record, bool]:
        """The summary, and whether the run has ended for a time limit ahead."""
        identity = Identity(*(names or (type(problem).__name__, type(solver).__name__)), seed)
        checkpoints = Checkpoints(directory, identity, self.keep_checkpoints)
        state: dict[str, Any] = {}
        if not resume:
            ranks.on_first(lambda: _claim(directory))
        ranks.on_first(lambda: alone.take(directory))
        if resume:
            state = ranks.on_first(checkpoints.load)
        else:
            if params is None and self.initial_params is not None:
                params = read_params(self.initial_params)
            if params is not None:
                problem = StartingFrom(problem, params)

        streams, draws = _generators(seed, device)
        data = problem.data(device, streams)
        problem = at_precision(spread(problem, data, device, ranks), solver, self.precision, device)
        check_setup(problem, data, device)
        probe = Probe.of(problem, solver, device)
        solver.setup(problem, data, device, draws)
        explained.data = data
        told = (
            [
                JsonLines(),
                *([CurvesPlot()] if self.picture else []),
                *loggers,
                *display(self.progress),
            ]
            if ranks.first
            else []
        )
        loop = Loop(
            problem=problem,
            solver=solver,
            data=data,
            device=device,
            schedule=self.schedule(data.train.steps_per_epoch),
            loggers=told,  # the table comes when all is saved
            save=SavingTogether(checkpoints.save, directory, ranks),
            patience=self.patience,
            checkpoint_every=self.checkpoint_every,
            probe=probe,
            ranks=ranks,
        )
        if resume:
            loop.load_state_dict(state)
        solver.capture = Capture.of(solver, device, draws, ranks.world) if self.capture else None
        info = RunInfo(
            directory=directory,
            problem=identity.problem,
            solver=identity.solver,
            seed=seed,
            space=problem.space,
            config=config,
            epochs=self.epochs,
            warmup_epochs=self.warmup_epochs,
            initial={name: brief(leaf) for name, leaf in loop.initial.items()},
            best=loop.best["record"] if loop.best else {},
            resumed=resume,
            patience=self.patience,
            place=place,
        )
        with ExitStack() as stack:
            interrupts = stack.enter_context(Interrupts())
            stack.enter_context(matmul_precision(self.precision))
            stack.enter_context(cpu_threads(self.threads, solver.solution().params))
            for logger in loop.loggers:
                logger.start(info, state.get("loggers", {}).get(type(logger).__name__, {}))
                stack.callback(loop.loggers.tell_one, logger, "close")
            reason = loop.run(lambda: interrupts.received)
            [number] = ranks.maximum(interrupts.number or 0)  # whichever process was told
            interrupts.number = Signals(int(number)) if number else None
            summary = summarize(loop, info, reason, signal=interrupts.number)
            loop.loggers.tell("finish", summary)
        return summary, bool(summary["interrupted"] and interrupts.of_time and ranks.first)

    def schedule(self, steps_per_epoch: int) -> Schedule:
        """The plan of a run in inner steps."""
        return Schedule(
            steps_per_epoch=steps_per_epoch,
            steps=None if self.epochs is None else max(1, round(self.epochs * steps_per_epoch)),
            seconds=self.seconds,
            examples=self.examples,
            warmup_steps=round(self.warmup_epochs * steps_per_epoch),
            evaluate_every=self.evaluate_every,
        )


def _claim(directory: Path) -> None:
    """Make the directory of a new run and see that it can be written, before any work is lost."""
    begun = directory / METRICS
    # one line is the evaluation before the first step: a run that was killed before its first checkpoint begins anew
    if kept(directory) or (begun.exists() and begun.read_bytes().count(b"\n") > 1):
        raise BilevelError(
            f"{directory} holds a run already; continue it with resume, or choose another directory"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise BilevelError(
            f"cannot write in {directory}: {error.strerror or error}; choose another directory"
        ) from None


def _generators(seed: int, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
    """One for the data's order, the same whatever the device and the solver; one, on the device, for the solver's draws."""
    seeds = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.Generator().manual_seed(seeds[0]), torch.Generator(device=device).manual_seed(
        seeds[1]
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
