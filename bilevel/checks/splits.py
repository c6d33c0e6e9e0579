"""The check that a problem can take the data of its splits, and the search for wrong data later."""

import re
import time
from collections.abc import Iterable, Iterator

import torch

from bilevel.checks.data_reasons import ALIKE, difference
from bilevel.checks.finding import Finding
from bilevel.checks.first_batch import FirstBatch
from bilevel.checks.trial import Trial
from bilevel.data.fields import largest, not_finite, tensors
from bilevel.data.stream import Stream
from bilevel.data.tensor_stream import Data, TensorStream
from bilevel.errors import BilevelError
from bilevel.params import Batch, count_examples
from bilevel.problem import Problem
from bilevel.problem_wrapper import of_one_process
from bilevel.text import describe, first_line

ROWS = 32
"""Rows of the test split that are tried: its own batches may have one row each."""
LARGE = 1e6
"""Size of a value that most likely makes a run diverge."""
LARGE_REMEDY = "look for very large values, for targets that are all ignored, and for log(0) or 0/0"
SECONDS = 20.0
"""Time after which a search through the batches of loaders ends."""


def splits(case: FirstBatch) -> Iterator[Finding]:
    """A batch of each split passes the network, the objectives and the metrics.

    A loss that is not finite is an error only where the batch itself holds NaN or infinity.
    """
    found: list[list[Trial]] = []
    for trial in _trials(case):
        if trial.flaw is not None:
            known = next((trials for trials in found if _alike(trials[0], trial)), None)
            if known is None:
                found.append([trial])
            else:
                known.append(trial)
    for trials in found:
        first, cause = trials[0], trials[0].error
        names = " and ".join(trial.split for trial in trials)
        text = str(first.flaw)
        if text.startswith(f"{first.split} data"):
            text = f"{names}{text.removeprefix(first.split)}"
        yield Finding("error", text, "" if cause is None else first_line(cause))


def _alike(one: Trial, other: Trial) -> bool:
    """Return whether two sentences differ only by the name of the split, and by its length.

    A number may follow from the length: [20, 4] becomes [16, 5], and [10, 4] becomes [8, 5].
    """
    parts = [re.split(r"(\d+)", str(t.flaw).removeprefix(f"{t.split} data")) for t in (one, other)]
    first, second = (count_examples(trial.batch) for trial in (one, other))
    return len(parts[0]) == len(parts[1]) and all(
        a == b or (a.isdigit() and b.isdigit() and int(a) * second == int(b) * first)
        for a, b in zip(*parts, strict=True)
    )


def check_splits(problem: Problem, data: Data, device: torch.device) -> None:
    """Refuse data that the problem cannot take.

    Raises:
        BilevelError: a batch of a split has another form, shape or type than the problem takes, a
            class or an index out of range, or NaN that reaches a loss.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for trial in _trials(FirstBatch(of_one_process(problem), data, device)):
            if trial.flaw is not None:
                raise BilevelError(trial.flaw) from trial.error


def wrong_data(problem: Problem, data: Data, device: torch.device, *, numbers: bool) -> str | None:
    """Return a sentence about data that explain a failure in a run, or None.

    It goes through all splits, so it may take as long as an evaluation of them, and stops after
    `SECONDS`.

    Args:
        problem: the problem.
        data: its streams.
        device: the device of the run.
        numbers: whether the failure is a loss that is not finite, and not an error.
    """
    case = FirstBatch(of_one_process(problem), data, device)
    end = time.monotonic() + SECONDS
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for name, stream in _named(data):
                if (flaw := _flaw(case, name, stream, end, numbers=numbers)) is not None:
                    return flaw
    except Exception:  # a loader, or a device that an error has left unusable
        return None
    return None


def unlike_splits(data: Data, error: Exception) -> str | None:
    """Return a sentence about an error, if a split has fields of other types or axes than train."""
    train = {"train": data.train.peek()}
    for name, stream in _named(data)[1:]:
        if (found := difference(stream.peek(), train, lengths=False)) is not None:
            return f"{name} data{found} ({describe(error)}); {ALIKE}"
    return None


def _flaw(case: FirstBatch, name: str, stream: Stream, end: float, *, numbers: bool) -> str | None:
    rows: Iterable[Batch] = _until(end, stream.once())
    tried: Iterable[Batch] = _until(end, stream.once())
    if isinstance(stream, TensorStream):
        rows, tried = [stream.tensors], [stream.telling(ROWS)]
    if numbers and (bad := not_finite(rows)) is not None:
        return f"{name} data, {bad}"
    for batch in tried:
        trial = Trial(case, name, batch).run({}, watch=numbers)
        if trial.flaw is not None:
            return trial.flaw
        if trial.begins is not None:
            return f"{trial.begins}; {LARGE_REMEDY}"
    return _large(name, stream) if numbers else None


def _large(name: str, stream: Stream) -> str | None:
    """Return a sentence about values that most likely make a run diverge."""
    known = stream.tensors if isinstance(stream, TensorStream) else stream.peek()
    for field, t in tensors(known).items():
        if (size := largest(t)) > LARGE:
            return f"{name} data, {field} holds values up to {size:.3g}; scale it"
    return None


def _trials(case: FirstBatch) -> list[Trial]:
    """Return a trial of each split, those without an error first, so that they can be compared."""
    trials = [_trial(case, name, stream) for name, stream in _named(case.data)]
    passed = {trial.split: trial.batch for trial in trials if trial.run({}).flaw is None}
    return [trial if trial.split in passed else trial.run(passed) for trial in trials]


def _trial(case: FirstBatch, name: str, stream: Stream) -> Trial:
    if isinstance(stream, TensorStream):
        batch = stream.telling(ROWS if name == "test" else 1)
        return Trial(case, name, batch, whole=stream.tensors)
    return Trial(case, name, stream.peek())


def _named(data: Data) -> list[tuple[str, Stream]]:
    return [(name, stream) for name, stream in data._asdict().items() if stream is not None]


def _until(end: float, batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        if time.monotonic() > end:
            return
