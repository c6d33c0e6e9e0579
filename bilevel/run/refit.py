"""Refits: after its tuning, a run trains w anew at constant λ, and its best candidate wins.

Each refit is a run of its own in a folder of the run, with its own records and checkpoints. So a
run that is killed in a refit continues there.
"""

import hashlib
import shutil
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from bilevel.checkpoint.checkpoints import kept, load_config
from bilevel.checkpoint.refit_directory import refit_directory
from bilevel.errors import BilevelError, DirectoryLost, SolverWarning
from bilevel.loggers.logger import Logger
from bilevel.loggers.records import Record
from bilevel.params import Hypers
from bilevel.requirements import Trait
from bilevel.run.initial_params import kept_params, read_params
from bilevel.run.loop import Loop
from bilevel.run.result import Result
from bilevel.run.session import Session
from bilevel.run.settings import RunSettings
from bilevel.run.stages import build, check_place, claim, conclude, share_signal, train
from bilevel.run.surroundings import AROUND_REFIT
from bilevel.selection import Selection
from bilevel.solver import Solver

OWN = "run"
"""The name of the run itself among its candidates."""
TOTALS = ("seconds", "examples", "steps", "evaluations")
COMPARED = ("valid_", "train_", "exact.")
"""Beginnings of the metrics that a run and its refits have in common."""


def check_refit(settings: RunSettings, solver: Solver) -> None:
    """Check before any work that a run can be refitted, if it should be.

    Raises:
        BilevelError: the solver has no plain training, or the candidates have no common metric.

    Warns:
        SolverWarning: the solver tunes nothing, so the run is not refitted.
    """
    if not settings.refits:
        return
    name, setting = type(solver).__name__, f"runner.refit={settings.refit}"
    if Trait.TUNES_NOTHING in solver.traits:
        warnings.warn(
            f"{setting} has no effect, since {name} tunes nothing; the run ends without a refit",
            SolverWarning,
            stacklevel=2,
        )
    elif solver.plain() is None:
        raise BilevelError(
            f"{setting} cannot follow {name}, which has no plain training (Solver.plain); leave it "
            "out, or run `bilevel refit RUN` afterwards"
        )
    elif not Selection(settings.select).name.startswith(COMPARED):
        raise BilevelError(
            f"{setting} cannot choose by runner.select={settings.select!r}, which belongs to the "
            "steps of one solver; choose a metric of the validation split, such as valid_loss"
        )


def with_refits(run: Session, own: Result) -> Result:
    """Refit a finished run as its settings ask, and return the best candidate with all summaries.

    Args:
        run: the run, after its training.
        own: its result without refits.
    """
    tuned = run.loop.solver.outer_count > 0  # otherwise a refit would repeat the run
    if own["diverged"] or own["interrupted"] or not tuned or not run.settings.refits:
        return own
    found = {OWN: own}
    for name in run.settings.refits:
        if share_signal(run):
            return _interrupted(run, found, "before " + refit_directory(name))
        found[name] = result = _refit(run, name)
        if result["interrupted"]:
            step = f"at step {result['steps']} of {refit_directory(name)}"
            return _interrupted(run, found, step)
    return _chosen(run, found)


def _refit(run: Session, name: str) -> Result:
    """Run one refit in its folder, or continue it."""
    hypers = _hypers(run.loop, name)
    directory, config = run.directory / refit_directory(name), _origin(run, name, hypers)
    resume = run.ranks.on_first(lambda: _continues(directory, config))
    identity = run.request.identity
    solver = run.request.solver.plain()
    assert solver is not None  # see `check_refit`
    request = replace(
        run.request,
        solver=solver,
        directory=directory,
        names=(identity.problem, f"{refit_directory(name)}-{identity.solver}"),
        config=config,
        loggers=_loggers(run),
        resume=resume,
        params=None if resume else _initial(run),
    )
    settings = replace(
        run.settings,
        refit="none",
        plain_epochs=0,
        hypergradient_check=None,
        warmup_epochs=0,
        tune_fraction=1.0,
        initial_params=None,
        progress="none",
        sensitivities=False,
    )
    refit = Session(
        settings,
        request,
        run.device,
        ranks=run.ranks,
        interrupts=run.interrupts,
        frozen=hypers,
        outer=run.directory,
    )
    try:
        with ExitStack() as stack:
            for surrounding in AROUND_REFIT:
                stack.enter_context(surrounding(refit))
            claim(refit)
            build(refit)
            states = refit.checkpoint.get("loggers", {})
            stack.enter_context(refit.loop.loggers.started(refit.info, states))
            train(refit)
            result = conclude(refit)
            refit.loop.loggers.call("finish", result)
    except DirectoryLost:
        check_place(run)  # it moved with the directory of the run, whose sentence is the right one
        raise
    return result


def _hypers(loop: Loop, name: str) -> Hypers:
    """Return λ of a refit, on the CPU."""
    if name == "start":
        return loop.initial
    if name == "best" and loop.best is not None:
        best: Hypers = loop.best["solution"]["hypers"]
        return best
    return {key: leaf.detach().cpu() for key, leaf in loop.solver.solution().hypers.items()}


def _origin(run: Session, name: str, hypers: Hypers) -> Record:
    """Return the configuration of a refit, which its checkpoints and its `run.json` keep."""
    digest = hashlib.sha256()
    for key, leaf in sorted(hypers.items()):
        digest.update(f"{key} {leaf.dtype} {list(leaf.shape)}".encode())
        digest.update(leaf.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    origin = {"run": "..", "hypers": name, "on": "train", "weights": "new"}
    return {"origin": origin | {"sha256": digest.hexdigest()}}


def _continues(directory: Path, config: Record) -> bool:
    """Return whether a folder holds a part of this refit; remove one of another λ.

    The run may have been continued beyond the λ of an earlier refit.
    """
    try:
        same = bool(kept(directory)) and load_config(directory) == config
    except BilevelError:  # damaged, and a new one takes no more than a training
        same = False
    if not same and directory.is_dir():
        shutil.rmtree(directory)
    return same


def _initial(run: Session) -> Hypers | None:
    """Return the initial weights that the run was given, if any."""
    if run.params is not None:
        return dict(run.params)
    path = run.settings.initial_params
    kept_by_run = kept_params(run.directory)
    return read_params(path) if kept_by_run is None and path is not None else kept_by_run


def _loggers(run: Session) -> list[Logger]:
    """Return the loggers that show a refit as a part of the run."""
    found = [run.loop.loggers.call_one(logger, "nested") for logger in run.loop.loggers]
    return [logger for logger in found if logger is not None]


def _chosen(run: Session, found: dict[str, Result]) -> Result:
    """Return the best candidate by `select`; among equals the run itself, then the first."""
    select = Selection(run.settings.select)
    chosen = OWN
    for name, result in found.items():
        if not result["diverged"] and select.improves(result["best"], found[chosen]["best"]):
            chosen = name
    own, best = found[OWN], found[chosen]
    summary = _totals(found) | {"refit": _report(found, chosen)}
    if chosen != OWN:
        of = {"start": own["initial"], "best": own["best"]["hypers"], "end": own["hypers"]}
        before = list(found)[: list(found).index(chosen)]
        summary |= {
            "best": _after(best["best"], [found[name] for name in before], of[chosen]),
            "last": _after(best["last"], [found[name] for name in before]),
            "hypers": of[chosen],  # whose large values the run has written
            "scales": {},
        }
    return best.of_run(summary, directory=run.directory, candidates=found)


def _interrupted(run: Session, found: dict[str, Result], where: str) -> Result:
    """Return the summary of a run that a signal ended in its refits."""
    run.reason = "interrupted"
    number = run.interrupts.number
    summary = _totals(found) | {
        "stopped": "interrupted",
        "interrupted": True,
        "signal": None if number is None else number.name,
        "message": f"the run was interrupted {where}; continue with: "
        f"bilevel resume={run.directory}",
        "refit": _report(found, None),
    }
    return found[OWN].of_run(summary, directory=run.directory, candidates=found)


def _totals(found: dict[str, Result]) -> Record:
    """Return the summary of the run with the costs of all candidates together."""
    memory = [result["peak_memory_bytes"] or 0 for result in found.values()]
    return {
        **found[OWN],
        **{name: sum(result[name] for result in found.values()) for name in TOTALS},
        "peak_memory_bytes": max(memory) or None,
    }


def _report(found: dict[str, Result], chosen: str | None) -> Record:
    """Return the entry `refit` of the summary: the choice, the cost of refits, and all candidates.

    `chosen` is None until all have ended.
    """
    own = found[OWN]
    at = {OWN: own["hypers"], "start": own["initial"], "end": own["hypers"]}
    at["best"] = own["best"].get("hypers", {})
    refits = [result for name, result in found.items() if name != OWN]
    kept_entries = (*TOTALS, "stopped", "diverged", "message")
    candidates = {
        name: {
            "valid_loss": result["best"].get("valid_loss"),
            "test_loss": result["best"].get("test_loss"),
            "best": _without_hypers(result["best"]),
            "last": _without_hypers(result["last"]),
            "hypers": at[name],
            **{key: result[key] for key in kept_entries},
        }
        for name, result in found.items()
    }
    cost = {name: sum(result[name] for result in refits) for name in TOTALS}
    return {"chosen": chosen, **cost, "candidates": candidates}


def _without_hypers(record: Record) -> Record:
    return {name: value for name, value in record.items() if name != "hypers"}


def _after(record: Record, before: list[Result], hypers: Record | None = None) -> Record:
    """Return an evaluation with the whole cost up to it, and with λ as the run has written it."""
    moved = {
        name: record[name] + sum(result[name] for result in before)
        for name in ("seconds", "examples")
        if name in record
    }
    return record | moved | ({} if hypers is None else {"hypers": hypers})
