"""What proposes the next λ and what ends a hopeless trial: Optuna's samplers and pruners, by value."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bilevel import BilevelError
from bilevel.validate import whole

if TYPE_CHECKING:
    import optuna


class Sampler(ABC):
    """What proposes λ."""

    most: ClassVar[int]
    """Coordinates that it can be asked for; `Search` refuses more."""
    learns: ClassVar[bool] = True
    """Whether it looks at earlier trials at all."""
    learns_from_pruned: ClassVar[bool] = False
    """Whether it knows what a pruned trial is; another one is told that it was complete."""

    @abstractmethod
    def make(self, seed: int) -> "optuna.samplers.BaseSampler":
        """Optuna's."""


@dataclass(frozen=True, kw_only=True)
class RandomSearch(Sampler):
    """Uniform draws from the ranges.

    Source: Bergstra & Bengio, JMLR 2012.
    """

    most: ClassVar[int] = 10_000
    learns: ClassVar[bool] = False

    def make(self, seed: int) -> "optuna.samplers.BaseSampler":
        import optuna

        return optuna.samplers.RandomSampler(seed=seed)


@dataclass(frozen=True, kw_only=True)
class TPE(Sampler):
    """Tree-structured Parzen estimator: the candidate with the largest ratio of the densities of good and of other trials.

    The densities are joint ones over all coordinates. A pruned trial counts by how far it came, and after the complete ones.

    Attributes:
        startup: trials before the first proposal, drawn uniformly.
        candidates: draws from the density of good trials, of which the best is proposed.

    Source: Bergstra et al., NeurIPS 2011; Watanabe, arXiv:2304.11127.
    """

    startup: int = 10
    candidates: int = 24
    most: ClassVar[int] = 1_000
    learns_from_pruned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole(1, startup=self.startup, candidates=self.candidates)

    def make(self, seed: int) -> "optuna.samplers.BaseSampler":
        import optuna

        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=self.startup,
            n_ei_candidates=self.candidates,
            multivariate=True,
            constant_liar=False,
        )


@dataclass(frozen=True, kw_only=True)
class GP(Sampler):
    """Gaussian process (Matérn 5/2, one length scale per coordinate) with the logarithm of expected improvement.

    Attributes:
        startup: trials before the first proposal, drawn uniformly.

    Source: Ament et al., NeurIPS 2023 (LogEI), as Optuna has it.
    """

    startup: int = 10
    most: ClassVar[int] = 100

    def __post_init__(self) -> None:
        whole(1, startup=self.startup)

    def make(self, seed: int) -> "optuna.samplers.BaseSampler":
        import optuna

        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=self.startup)


class Pruner(ABC):
    """What ends a trial early."""

    @abstractmethod
    def make(self, trial_epochs: int) -> "optuna.pruners.BasePruner":
        """Optuna's, for trials of so many epochs at most."""


@dataclass(frozen=True, kw_only=True)
class Median(Pruner):
    """A trial ends where its best score is above the median of what complete trials had at the same epoch.

    Attributes:
        startup: complete trials before any is pruned.
        warmup_epochs: after so many epochs of its own, or fewer, a trial is not pruned.

    Source: Golovin et al., KDD 2017, section 3.2.
    """

    startup: int = 5
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        whole(0, startup=self.startup, warmup_epochs=self.warmup_epochs)

    def make(self, trial_epochs: int) -> "optuna.pruners.BasePruner":
        import optuna

        return optuna.pruners.MedianPruner(
            n_startup_trials=self.startup, n_warmup_steps=self.warmup_epochs + 1
        )


@dataclass(frozen=True, kw_only=True)
class Hyperband(Pruner):
    """Brackets of successive halving: at min_epochs · reductionᵏ a trial goes on if it is in the best 1/`reduction` there.

    Attributes:
        min_epochs: of a trial before it can be ended.
        reduction: η of the paper.

    Source: Li et al., JMLR 2018, in the asynchronous form of Optuna.
    """

    min_epochs: int = 1
    reduction: int = 3

    def __post_init__(self) -> None:
        whole(1, min_epochs=self.min_epochs)
        whole(2, reduction=self.reduction)

    def make(self, trial_epochs: int) -> "optuna.pruners.BasePruner":
        import optuna

        if trial_epochs < self.min_epochs:
            raise BilevelError(
                f"trials of {trial_epochs} epochs leave nothing to prune after min_epochs={self.min_epochs}; "
                "make trial_epochs larger, or min_epochs smaller"
            )
        return optuna.pruners.HyperbandPruner(
            min_resource=self.min_epochs, max_resource=trial_epochs, reduction_factor=self.reduction
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, Optuna's log and its experimental warnings are held back; after it they are as they were."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
