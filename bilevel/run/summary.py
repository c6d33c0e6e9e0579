"""The end of a run: the content of `summary.json`."""

import math
import warnings
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from bilevel.checkpoint.large_values import LargeValues
from bilevel.checks.splits import wrong_data
from bilevel.errors import FaultWarning
from bilevel.loggers.logger import RunInfo
from bilevel.loggers.records import Record
from bilevel.params import Hypers, to_device
from bilevel.requirements import Trait
from bilevel.run.evaluation import evaluate
from bilevel.run.loop import Loop
from bilevel.run.sensitivities import sensitivities
from bilevel.solver import Solution
from bilevel.text import describe


def summarize(
    loop: Loop,
    run: RunInfo,
    reason: str,
    signal: Signals | None = None,
    outer: Path | None = None,
    *,
    with_sensitivities: bool = True,
) -> Record:
    """Return the summary of a run; unless the run was interrupted, evaluate the test split.

    `hypers` and `scales` are those of the last step, `initial` those before the first step;
    `best.hypers` belong to the best step. Large ones are written to `hypers.pt`
    (`bilevel.checkpoint.large_values`), and the summary describes them.

    Args:
        loop: the loop after its last round.
        run: the names and settings of the run.
        reason: what ended the run, as `Loop.run` returns it.
        signal: the signal that interrupted the run, if one did.
        outer: the directory of the run that this one is a part of; None for a run of its own.
        with_sensitivities: whether to measure `bilevel.run.sensitivities` of a finished run.

    Raises:
        Unwritable: large hyperparameters cannot be written.
    """
    values = LargeValues()

    def plain(part: str, hypers: Hypers) -> dict[str, Any]:
        return {name: values.entry(part, name, leaf) for name, leaf in hypers.items()}

    finished = reason not in ("interrupted", "diverged")
    measured = _sensitivities(loop) if finished and with_sensitivities else {}
    solution, scales = loop.solver.solution(), loop.solver.scales()
    best: Record = {}
    if loop.best is not None:
        held = Solution(**to_device(loop.best["solution"], loop.device))
        test = {} if reason == "interrupted" else _test(loop, held)
        best = {
            **loop.best["record"],
            **test,
            "hypers": plain("best.hypers", loop.best["solution"]["hypers"]),
        }
    last = {**(loop.last or {}), **(_test(loop, solution) if finished else {})}
    summary = {
        "problem": run.problem,
        "solver": run.solver,
        "seed": run.seed,
        "environment": dict(run.environment),
        "best": _outcome(best),
        "last": _outcome(last),
        "initial": plain("initial", loop.initial),
        "hypers": plain("hypers", solution.hypers),
        "scales": plain("scales", scales),
        "sensitivities": measured,
        "seconds": loop.meter.seconds,
        "examples": loop.examples,
        "steps": loop.step,
        "outer_steps": loop.solver.outer_count,
        "evaluations": loop.evaluations,
        "peak_memory_bytes": loop.meter.peak_memory,
        "stopped": reason,
        "diverged": reason == "diverged",
        "interrupted": reason == "interrupted",
        "signal": signal.name if reason == "interrupted" and signal is not None else None,
        "message": _message(loop, run, reason, signal, outer or run.directory),
    }
    if loop.ranks.first:
        values.write(run.directory, run.environment)
    return summary


def _message(
    loop: Loop, run: RunInfo, reason: str, signal: Signals | None, resume: Path
) -> str | None:
    if reason == "diverged":
        return loop.diverged
    if reason == "interrupted":
        by = "" if signal in (None, Signals.SIGINT) else f" by {signal.name}"
        return (
            f"the run was interrupted{by} at step {loop.step}; "
            f"continue with: bilevel resume={resume}"
        )
    if Trait.TUNES_NOTHING not in loop.solver.traits and loop.solver.outer_count == 0:
        return (
            "nothing was tuned: the run ended before its first outer step (trial, generation), "
            f"with runner.warmup_epochs={run.warmup_epochs:g}; lower it, or run longer"
        )
    return None


def _test(loop: Loop, solution: Solution) -> dict[str, float]:
    if loop.data.test is None:
        return {}

    def wrong_test_data(*, numbers: bool) -> str | None:
        return wrong_data(loop.problem, loop.data, loop.device, numbers=numbers)

    try:
        measured = evaluate(loop.problem, solution, loop.data.test)
    except Exception as error:  # the run has ended, and a bad test split must not take its summary
        if loop.ranks.world > 1:
            raise  # the other ranks wait in a collective operation
        flaw = wrong_test_data(numbers=False) or "look at its labels and types"
        warnings.warn(
            f"the test split cannot be evaluated ({describe(error)}), so the summary has no test "
            f"figures; {flaw}; evaluate `best_solution` of the run",
            FaultWarning,
            stacklevel=3,
        )
        return {}
    if not math.isfinite(measured["loss"]):
        flaw = wrong_test_data(numbers=True) or "look at its labels, and for log(0) and 0/0"
        warnings.warn(
            f"the test loss is {measured['loss']}; {flaw}; evaluate `best_solution` of the run",
            FaultWarning,
            stacklevel=3,
        )
    return {f"test_{name}": value for name, value in measured.items()}


def _sensitivities(loop: Loop) -> Record:
    """Return the sensitivities of a solver that tunes; they draw from no global generator."""
    if Trait.TUNES_NOTHING in loop.solver.traits:
        return {}
    cuda = [loop.device] if loop.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            return sensitivities(loop.solver, loop.problem, loop.data, loop.initial)
    except Exception as error:  # the run has ended, and its summary must not be lost
        if loop.ranks.world > 1:
            raise  # the other ranks wait in a collective operation
        warnings.warn(
            f"the sensitivities cannot be measured ({describe(error)}), so the summary has none; "
            "set runner.sensitivities=false to leave them out",
            FaultWarning,
            stacklevel=3,
        )
        return {}


def _outcome(record: Record) -> Record:
    """Return the part of a record that compares two steps; an unknown value is None."""
    known = dict.fromkeys(("step", "valid_loss", "valid_accuracy", "test_loss", "test_accuracy"))
    names = (*known, "epoch", "seconds", "examples", "hypers")
    measured = ("train_", "valid_", "test_", "exact.")
    return known | {
        name: value for name, value in record.items() if name in names or name.startswith(measured)
    }
