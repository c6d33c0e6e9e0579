"""How a run ended: the content of `summary.json`."""

from signal import Signals
from typing import Any

from bilevel.loggers.logger import RunInfo
from bilevel.loggers.records import Record
from bilevel.params import Hypers, to_device
from bilevel.run.evaluation import evaluate
from bilevel.run.loop import Loop
from bilevel.solver import Solution


def summarize(loop: Loop, run: RunInfo, reason: str, signal: Signals | None = None) -> Record:
    """The summary of a run that ended for `reason`; looks at the test split unless the run was interrupted.

    `signal` is the one that interrupted it. `hypers` and `scales` are those of the last step, `initial` those before the first;
    `best.hypers` go with the best step.
    """
    solution, scales = loop.solver.solution(), loop.solver.scales()
    finished = reason not in ("interrupted", "diverged")
    best: Record = {}
    if loop.best is not None:
        test = (
            {}
            if reason == "interrupted"
            else _test(loop, Solution(**to_device(loop.best["solution"], loop.device)))
        )
        best = {**loop.best["record"], **test, "hypers": _lists(loop.best["solution"]["hypers"])}
    last = {**(loop.last or {}), **(_test(loop, solution) if finished else {})}
    told = "" if signal in (None, Signals.SIGINT) else f" by {signal.name}"
    message = {
        "diverged": loop.diverged,
        "interrupted": f"interrupted{told} at step {loop.step}; continue with: bilevel resume={run.directory}",
    }.get(reason)
    if message is None and loop.solver.tunes and loop.solver.outer_count == 0:
        message = (
            "nothing was tuned: the run ended before a first outer step (a trial, a generation), with "
            f"a warm-up of {run.warmup_epochs:g} epochs; lower runner.warmup_epochs, or run longer"
        )
    return {
        "problem": run.problem,
        "solver": run.solver,
        "seed": run.seed,
        "best": _outcome(best),
        "last": _outcome(last),
        "initial": _lists(loop.initial),
        "hypers": _lists(solution.hypers),
        "scales": _lists(scales),
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
        "message": message,
    }


def _test(loop: Loop, solution: Solution) -> dict[str, float]:
    if loop.data.test is None:
        return {}
    return {
        f"test_{name}": value
        for name, value in evaluate(loop.problem, solution, loop.data.test).items()
    }


def _outcome(record: Record) -> Record:
    """The part of a record that compares one step with another; what is not known is None."""
    known = dict.fromkeys(("step", "valid_loss", "valid_accuracy", "test_loss", "test_accuracy"))
    kept = (*known, "epoch", "seconds", "examples", "hypers")
    return {
        **known,
        **{
            name: value
            for name, value in record.items()
            if name in kept or name.startswith(_MEASURED)
        },
    }


_MEASURED = ("train_", "valid_", "test_", "exact.")


def _lists(hypers: Hypers) -> dict[str, Any]:
    return {name: leaf.tolist() for name, leaf in hypers.items()}
