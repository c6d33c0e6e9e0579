"""The stages of a run before its summary: claim the directory, build the loop, train."""

import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from bilevel.checkpoint.checkpoints import Checkpoints, kept
from bilevel.checks.check_problem import check_setup
from bilevel.checks.last_batch import check_last_batch
from bilevel.checks.splits import check_splits, unlike_splits, wrong_data
from bilevel.device.device import threads_for
from bilevel.device.precision import at_precision
from bilevel.errors import BilevelError, DirectoryLost
from bilevel.loggers.display import display
from bilevel.loggers.jsonl import JsonLines, SummaryFile
from bilevel.loggers.logger import Logger, RunInfo
from bilevel.loggers.plot import CurvesPlot
from bilevel.loggers.records import METRICS, brief
from bilevel.run.cuda_graph import Capture
from bilevel.run.distributed import FirstRankSaver
from bilevel.run.environment import environment
from bilevel.run.hypergradient_check import HypergradientCheck
from bilevel.run.hypergradient_error import HypergradientError
from bilevel.run.initial_params import keep_params, read_params
from bilevel.run.loop import Loop, on_cpu
from bilevel.run.out_of_memory import ran_out
from bilevel.run.provenance import settings_of
from bilevel.run.result import Result
from bilevel.run.session import Session
from bilevel.run.summary import summarize
from bilevel.run.surroundings import WRAPPERS
from bilevel.selection import Selection
from bilevel.services import Services
from bilevel.solver import Solution, Solver
from bilevel.timers import Timers

DATA_ERRORS = (RuntimeError, LookupError, ValueError, TypeError)
"""Errors that PyTorch raises for data of the wrong form."""


def claim(run: Session) -> None:
    """Take the run directory, and read the checkpoint or the weights that the run starts from.

    Raises:
        BilevelError: the directory cannot be used, or what should be read does not fit.
    """
    request, first = run.request, run.ranks.on_first
    run.directory = first(lambda: request.place_on_disk)
    if not request.resume:
        first(lambda: _make_directory(run.directory))
    first(lambda: run.lock.take(run.directory))
    run.checkpoints = Checkpoints(
        run.directory,
        request.identity,
        run.settings.keep_checkpoints,
        request.config,
        settings_of(request.problem, request.solver),
        environment(run.device),
    )
    if request.resume:
        run.checkpoint = first(run.checkpoints.load)
    elif request.params is not None:
        run.params = request.params
    elif run.settings.initial_params is not None:
        run.params = read_params(run.settings.initial_params)
    if run.params is not None and run.settings.refits:
        params = dict(run.params)
        first(lambda: keep_params(run.directory, params))


def build(run: Session) -> None:
    """Make the data, wrap the problem, set up the solver, and make the loop.

    Raises:
        BilevelError: the solver refuses the problem, or the checkpoint does not fit.
    """
    request, settings, device = run.request, run.settings, run.device
    problem, solver = request.problem, request.solver
    for_data, for_solver = generators(request.seed, device)
    run.data = problem.data(device, for_data)
    check_splits(at_precision(problem, solver, settings.precision, device), run.data, device)
    for wrap in WRAPPERS:
        problem = wrap(problem, run)
    run.problem = problem
    error = HypergradientError.of(problem, solver, device)
    check = HypergradientCheck.of(settings, problem, solver, device, request.seed)
    services = Services(Timers(device))
    with _wrong_data_named(run):
        check_setup(problem, run.data, device, solver)
        check_last_batch(problem, run.data, device)
        _check_takes_services(solver)
        solver.setup(problem, run.data, device, for_solver, services)
    run.set_up = True
    run.loop = Loop(
        problem=problem,
        solver=solver,
        services=services,
        data=run.data,
        device=device,
        budget=settings.budget(run.data.train.steps_per_epoch),
        loggers=_loggers(run) if run.ranks.first else [],
        save=FirstRankSaver(lambda state: _save(run, state), run.directory, run.ranks),
        select=Selection(settings.select),
        patience=settings.patience,
        checkpoint_every=settings.checkpoint_every,
        hypergradient_error=error,
        hypergradient_check=check,
        ranks=run.ranks,
    )
    if request.resume:
        run.loop.load_state_dict(run.checkpoint)
    if settings.capture is True or (settings.capture == "auto" and device.type == "cuda"):
        services.capture = Capture.of(solver, device, for_solver, run.ranks.world)
    threads = threads_for(settings.threads, solver.solution().params)
    run.checkpoints.environment |= {"threads": threads}
    run.info = _info(run)


@contextmanager
def _wrong_data_named(run: Session) -> Iterator[None]:
    """Raise a sentence about the data where they explain an error of PyTorch within the block.

    The first batches have passed; a later one may be wrong, or a solver takes no such batches.
    """
    try:
        yield
    except DATA_ERRORS as error:
        if ran_out(error):
            raise
        flaw = wrong_data(run.problem, run.data, run.device, numbers=False)
        if (flaw := flaw or unlike_splits(run.data, error)) is None:
            raise
        raise BilevelError(flaw) from error


def _check_takes_services(solver: Solver) -> None:
    taken = inspect.signature(solver.setup).parameters.values()
    if not any(p.name == "services" or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in taken):
        name = type(solver).__name__
        raise BilevelError(
            f"{name}.setup does not take `services`; add the argument `services=None` and the line "
            "`self.services = services or Services()`"
        )


def train(run: Session) -> str:
    """Train until something ends the run, and return what did.

    Raises:
        DirectoryLost: the run directory was moved or removed. The last checkpoint moves with it.
    """
    with _wrong_data_named(run):
        run.reason = run.loop.run(lambda: run.interrupts.received or run.lock.is_lost())
    check_place(run)
    share_signal(run)
    return run.reason


def share_signal(run: Session) -> bool:
    """Return whether a signal asks for the end of the run; it may have reached one rank alone."""
    [number] = run.ranks.maximum(run.interrupts.number or 0)
    run.interrupts.number = Signals(int(number)) if number else None
    return run.interrupts.received


def check_place(run: Session) -> None:
    """Check that the run directory is where it was.

    Raises:
        DirectoryLost: it was moved or removed. The last checkpoint moves with it.
    """
    place = run.ranks.on_first(lambda: run.lock.place(run.directory))
    if place != run.directory:
        raise DirectoryLost(
            f"{run.directory} was moved to {place} during the run; the run ended at step "
            f"{run.loop.step}, and its checkpoint is there; continue with: bilevel resume={place}"
        )


def conclude(run: Session) -> Result:
    """Return the result of a run that has ended, without refits."""
    assert run.reason is not None
    signal = run.interrupts.number
    summary = summarize(
        run.loop,
        run.info,
        run.reason,
        signal,
        run.outer,
        with_sensitivities=run.settings.sensitivities,
    )
    best = run.loop.best
    return Result(
        summary,
        problem=run.problem,
        best=None if best is None else Solution(**best["solution"]),
        last=on_cpu(run.loop.solver.solution()),
        directory=run.directory,
    )


def _save(run: Session, state: dict[str, Any]) -> None:
    """Save a checkpoint where the run directory is now."""
    run.checkpoints.directory = run.lock.place(run.directory)
    run.checkpoints.save(state)


def generators(seed: int, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
    """Return a generator for the order of the data and one for the draws of the solver.

    The first lies on the CPU and does not depend on device or solver. The second lies on `device`.
    """
    seeds = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    data = torch.Generator().manual_seed(seeds[0])
    return data, torch.Generator(device=device).manual_seed(seeds[1])


def _make_directory(directory: Path) -> None:
    """Make a directory for a new run, and write a temporary file in it before any work is done."""
    records = directory / METRICS
    try:
        # a single line is the evaluation before the first step: such a run was killed before its
        # first checkpoint, and may begin again
        begun = records.exists() and records.read_bytes().count(b"\n") > 1
        if kept(directory) or begun:
            raise BilevelError(
                f"{directory} already holds a run; continue it with resume, or choose another "
                "directory"
            )
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise BilevelError(
            f"{directory} is not writable ({reason}); choose another directory"
        ) from None


def _loggers(run: Session) -> list[Logger]:
    own = [JsonLines(), *([CurvesPlot()] if run.settings.picture else [])]
    # the display comes last: its final table appears when everything is saved
    return [*own, *run.request.loggers, SummaryFile(), *display(run.settings.progress)]


def _info(run: Session) -> RunInfo:
    request, settings, loop = run.request, run.settings, run.loop
    return RunInfo(
        directory=run.directory,
        problem=request.identity.problem,
        solver=request.identity.solver,
        seed=request.seed,
        space=run.problem.space,
        config=request.config,
        epochs=settings.epochs,
        warmup_epochs=settings.first_tuning_epoch,
        tuned_epochs=settings.last_tuning_epoch,
        initial={name: brief(leaf) for name, leaf in loop.initial.items()},
        best=loop.best["record"] if loop.best else {},
        resumed=request.resume,
        select=Selection(settings.select),
        patience=settings.patience,
        place=request.place,
        environment=run.checkpoints.environment,
    )
