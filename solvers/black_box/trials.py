"""The trials of a search: a plain record that determines every proposal and every pruning."""

import math
from collections.abc import Sequence
from statistics import median_low
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor

from bilevel.solvers.black_box.ranges import Ranges
from bilevel.solvers.black_box.samplers import Pruner, Sampler, quiet

if TYPE_CHECKING:
    import optuna


class Trial(TypedDict):
    """The record of one trial."""

    z: list[float]
    """The drawn point, by coordinate."""
    scores: list[float]
    """The score after each epoch."""
    state: str
    """`running`, `complete`, `pruned` or `failed`."""


class Past(NamedTuple):
    """A complete trial from before the search: its point z, by coordinate, and its value."""

    z: list[float]
    value: float


class Trials:
    """The trials so far; every proposal and every pruning is a function of their record.

    A proposal comes from a fresh sampler with a seed of its own, which receives the record. The
    values in it are capped at m + 3 (m − b), where m is their median and b the best of them. A
    trial with a much too large learning rate would otherwise dominate a Gaussian process. A failed
    trial gets this cap as its value, so that the sampler avoids its neighbourhood.

    Args:
        sampler: proposes points.
        pruner: ends trials early; None ends none.
        ranges: the box of the points.
        epochs: the length of a complete trial.
        early_stopping: the value of a trial is its lowest score, and not its last.
        past: points and values from before the search; the sampler receives them first.
    """

    def __init__(
        self,
        sampler: Sampler,
        pruner: Pruner | None,
        ranges: Ranges,
        epochs: int,
        *,
        early_stopping: bool = True,
        past: Sequence[Past] = (),
    ) -> None:
        self.sampler = sampler
        self.pruner = pruner
        self.ranges = ranges
        self.epochs = epochs
        self.early_stopping = early_stopping
        self.past = past
        self.replay([])

    def begin(self, seed: int, z: Tensor | None = None) -> Tensor:
        """Begin a trial at z, or at the proposal of the sampler, and return its point."""
        with quiet():
            z = self._propose(seed) if z is None else z.clamp(self.ranges.low, self.ranges.high)
        self._add({"z": z.tolist(), "scores": [], "state": "running"})
        return z

    def score(self, score: float) -> bool:
        """Record a score of the running trial; return whether the pruner ends the trial."""
        scores = self.record[-1]["scores"]
        scores.append(score)
        if self.pruner is None:
            return False
        with quiet():
            self._live.report(score, len(scores))
            return len(scores) < self.epochs and self._live.should_prune()

    def end(self, state: str) -> None:
        """End the running trial as `complete`, `pruned` or `failed`."""
        self.record[-1]["state"] = state
        if self.pruner is None:
            return
        import optuna

        with quiet():
            if state == "complete":
                self._study.tell(self._live, self.value(self.record[-1]))
            else:
                ends = {
                    "pruned": optuna.trial.TrialState.PRUNED,
                    "failed": optuna.trial.TrialState.FAIL,
                }
                self._study.tell(self._live, state=ends[state])

    def value(self, trial: Trial) -> float:
        """Return the value of a trial that has ended, +∞ for a failed one."""
        if trial["state"] == "failed":
            return math.inf
        return min(trial["scores"]) if self.early_stopping else trial["scores"][-1]

    def count(self, state: str) -> int:
        """Return the number of trials in `state`."""
        return sum(trial["state"] == state for trial in self.record)

    def replay(self, record: list[Trial]) -> None:
        """Restore a record; the same questions restore the memory of the pruner."""
        import optuna

        self.record: list[Trial] = []
        if self.pruner is not None:
            with quiet():  # Hyperband assigns trials to brackets by the study's name
                self._study = optuna.create_study(
                    study_name="search", pruner=self.pruner.make(self.epochs)
                )
        for trial in record:
            self._add({"z": list(trial["z"]), "scores": [], "state": "running"})
            for score in trial["scores"]:
                self.score(score)
            if trial["state"] != "running":
                self.end(trial["state"])

    def _add(self, trial: Trial) -> None:
        self.record.append(trial)
        if self.pruner is not None:
            with quiet():
                self._live = self._study.ask()  # for the scores only: pruners read no parameters

    def _propose(self, seed: int) -> Tensor:
        return self.ranges.suggest(self._study_of_record(seed).ask())

    def _study_of_record(self, seed: int) -> "optuna.Study":
        """Return a study of the trials so far, with a fresh sampler."""
        import optuna

        study = optuna.create_study(study_name="search", sampler=self.sampler.make(seed))
        if not self.sampler.learns:
            return study
        states, distributions = optuna.trial.TrialState, self.ranges.distributions()
        earlier: list[Trial] = [{"z": z, "scores": [], "state": "complete"} for z, _ in self.past]
        values = capped([v for _, v in self.past] + [self.value(trial) for trial in self.record])
        for trial, value in zip([*earlier, *self.record], values, strict=True):
            pruned = trial["state"] == "pruned" and self.sampler.learns_from_pruned
            study.add_trial(
                optuna.trial.create_trial(
                    state=states.PRUNED if pruned else states.COMPLETE,
                    value=value,
                    params=self.ranges.named(torch.tensor(trial["z"], dtype=torch.float64)),
                    distributions=distributions,
                    intermediate_values=dict(enumerate(trial["scores"], 1)),
                )
            )
        return study


def capped(values: list[float]) -> list[float]:
    """Return the values, capped at m + 3 (m − b).

    m is the median of the finite values, and b is the lowest.

    Example:
        >>> capped([1.0, 2.0, 3.0, 1e30, math.inf])
        [1.0, 2.0, 3.0, 5.0, 5.0]
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return [0.0] * len(values)
    middle = median_low(finite)
    end = min(middle + 3 * (middle - min(finite)), max(finite))
    return [min(value, end) for value in values]
