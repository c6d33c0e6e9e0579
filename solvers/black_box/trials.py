"""The trials of a search as a plain record, from which every suggestion of a sampler and every verdict of a pruner follows."""

import math
from statistics import median_low
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from bilevel.solvers.black_box.ranges import Ranges
from bilevel.solvers.black_box.samplers import Pruner, Sampler, quiet

if TYPE_CHECKING:
    import optuna


class Trial(TypedDict):
    """The record of one trial."""

    z: list[float]
    """Where it was drawn, by coordinate."""
    scores: list[float]
    """After each of its epochs."""
    state: str
    """`running`, `complete`, `pruned` or `failed`."""


class Trials:
    """The trials so far, as a plain record, of which every suggestion and every pruning is a function.

    A suggestion comes from a fresh sampler, with a seed of its own, that is told the record. The values that it is told end at
    m + 3 (m − b), where m is their median and b the best of them: a trial that blew up, which is most trials with too large a
    learning rate, would leave a Gaussian process nothing else to see. A failed trial counts as one at that end, so that the
    sampler keeps away from there.

    Args:
        sampler: proposes.
        pruner: ends trials early; None ends none.
        ranges: what is drawn from.
        epochs: of a complete trial.
        early_stopping: whether a trial's value is its lowest score, rather than its last.
    """

    def __init__(
        self,
        sampler: Sampler,
        pruner: Pruner | None,
        ranges: Ranges,
        epochs: int,
        *,
        early_stopping: bool = True,
    ) -> None:
        self.sampler, self.pruner, self.ranges, self.epochs = sampler, pruner, ranges, epochs
        self.early_stopping = early_stopping
        self.replay([])

    def begin(self, seed: int, z: Tensor | None = None) -> Tensor:
        """The z of a new trial: as given, or as the sampler proposes it."""
        with quiet():
            z = (
                self.ranges.suggest(self._study_of_record(seed).ask())
                if z is None
                else z.clamp(self.ranges.low, self.ranges.high)
            )
        self._add({"z": z.tolist(), "scores": [], "state": "running"})
        return z

    def score(self, score: float) -> bool:
        """Note the running trial's score after one more epoch; whether the pruner ends it here."""
        scores = self.record[-1]["scores"]
        scores.append(score)
        if self.pruner is None:
            return False
        with quiet():
            self._live.report(score, len(scores))
            return len(scores) < self.epochs and self._live.should_prune()

    def end(self, state: str) -> None:
        """The running trial is `complete`, `pruned` or `failed`."""
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
        """What a trial that has ended is worth: +∞ if it failed."""
        if trial["state"] == "failed":
            return math.inf
        return min(trial["scores"]) if self.early_stopping else trial["scores"][-1]

    def count(self, state: str) -> int:
        """Trials in `state`."""
        return sum(trial["state"] == state for trial in self.record)

    def replay(self, record: list[Trial]) -> None:
        """Start again from a record: what a pruner remembers comes back when it is asked the same again."""
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
                self._live = (
                    self._study.ask()
                )  # for its scores alone: pruners do not look at parameters

    def _study_of_record(self, seed: int) -> "optuna.Study":
        """A study of the trials so far, with a fresh sampler."""
        import optuna

        study = optuna.create_study(study_name="search", sampler=self.sampler.make(seed))
        if not self.sampler.learns:
            return study
        states, distributions = optuna.trial.TrialState, self.ranges.distributions()
        for trial, value in zip(
            self.record, bounded([self.value(trial) for trial in self.record]), strict=True
        ):
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


def bounded(values: list[float]) -> list[float]:
    """The values, those above m + 3 (m − b) brought down to it: m the median of the finite ones, b the best.

    Example:
        >>> bounded([1.0, 2.0, 3.0, 1e30, math.inf])
        [1.0, 2.0, 3.0, 5.0, 5.0]
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return [0.0] * len(values)
    middle = median_low(finite)
    end = min(middle + 3 * (middle - min(finite)), max(finite))
    return [min(value, end) for value in values]
