"""Samplers, which propose the next λ, and pruners, which end hopeless trials; Optuna runs them."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bilevel.validate import whole, wrong

if TYPE_CHECKING:
    import optuna


class Sampler(ABC):
    """A method that proposes the next λ."""

    most: ClassVar[int]
    """The largest number of coordinates; `Search` refuses more."""
    learns: ClassVar[bool] = True
    """True if the proposals depend on earlier trials."""
    learns_from_pruned: ClassVar[bool] = False
    """True if it distinguishes pruned trials; for others, a pruned trial counts as complete."""

    @abstractmethod
    def make(self, seed: int) -> "optuna.samplers.BaseSampler":
        """Return the sampler of Optuna."""


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
    """Tree-structured Parzen estimator, with densities of good and of other trials.

    It proposes the candidate with the largest ratio of the two densities, which are joint densities
    over all coordinates. A pruned trial ranks after all complete trials, by the epochs that it
    reached.

    Attributes:
        startup: the number of uniform draws before the first proposal.
        candidates: the number of candidates, which are drawn from the density of good trials.

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
    """Gaussian process with the logarithm of the expected improvement (LogEI).

    The kernel is Matérn 5/2 with one length scale per coordinate.

    Attributes:
        startup: the number of uniform draws before the first proposal.

    Source: Ament et al., NeurIPS 2023, as implemented in Optuna.
    """

    startup: int = 10
    most: ClassVar[int] = 100

    def __post_init__(self) -> None:
        whole(1, startup=self.startup)

    def make(self, seed: int) -> "optuna.samplers.BaseSampler":
        import optuna

        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=self.startup)


class Pruner(ABC):
    """A method that ends trials early."""

    @abstractmethod
    def make(self, trial_epochs: int) -> "optuna.pruners.BasePruner":
        """Return the pruner of Optuna, for trials of at most `trial_epochs` epochs."""


@dataclass(frozen=True, kw_only=True)
class Median(Pruner):
    """Median pruning: end a trial that is worse than the median of the complete trials.

    It compares the best score of the trial with those of the complete trials at the same epoch.

    Attributes:
        startup: the number of complete trials before any trial is pruned.
        warmup_epochs: the number of epochs in which a trial is not pruned.

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
    """Hyperband: brackets of successive halving.

    After min_epochs · reductionᵏ epochs, a trial continues if it is among the best 1/`reduction` of
    the trials there.

    Attributes:
        min_epochs: the number of epochs before a trial can end.
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
            what = f"leaves nothing to prune after min_epochs={self.min_epochs}"
            raise wrong("trial_epochs", trial_epochs, what, "raise it, or lower min_epochs")
        return optuna.pruners.HyperbandPruner(
            min_resource=self.min_epochs, max_resource=trial_epochs, reduction_factor=self.reduction
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Open a context without Optuna's log and its warnings about experimental features."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
