"""Black-box search: a trial is a training run at a fixed λ, a sampler proposes the next, and the best so far is the answer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel import Batch, Data, Metrics, Problem, Refused, Solution
from bilevel.params import Hypers, detached, to_device
from bilevel.run.evaluation import evaluate
from bilevel.solver import on_cpu
from bilevel.solvers.base.training import Training, at_least
from bilevel.solvers.black_box.ranges import Ranges, ranges_of
from bilevel.solvers.black_box.samplers import GP, TPE, Pruner, RandomSearch, Sampler
from bilevel.solvers.black_box.trials import Trials
from bilevel.solvers.optim.functional import configured, optimizer_settings
from bilevel.solvers.optim.optimized import SGD, MakeOptimizer, MakeScheduler, Optimized, descend


class Search(Training):
    """Random search, TPE or Gaussian-process Bayesian optimization: one training run after the other, each at its own λ.

    The first trial is at the initial λ. All begin at the same initial weights, with a fresh optimizer and schedule, so that λ
    makes the difference between them; the order of batches and the masks go on from trial to trial. After every epoch a trial
    is scored by the `loss` of `problem.metrics` on the validation split (whose examples are counted), its schedule is stepped,
    and the pruner is asked. With `early_stopping`, its value is the lowest of its scores, and the solution is λ and w at the
    lowest score of all trials; without, it is the score after its last epoch, as the bilevel problem asks for w*(λ), and only a
    complete trial can be the solution. Before there is one, that is the initial λ and w. A trial whose loss is not finite has
    failed, and the search goes on.

    A round that ends an epoch of a trial reads its score: it waits for the device, once an epoch, since whether the trial goes
    on depends on it.

    Args:
        sampler: proposes λ: `RandomSearch`, `TPE` or `GP`.
        pruner: ends trials early, `Median` or `Hyperband`; None ends none.
        trial_epochs: of a trial.
        early_stopping: whether a trial is worth its lowest score, or its last.
        ranges: [low, high] by hyperparameter, in its own units, in place of the default (`bilevel.solvers.black_box.ranges.ranges_of`).
        inner_steps: training batches per round; a round ends at the end of an epoch.
        inner_optimizer: for w.
        inner_scheduler: its learning-rate schedule, begun anew in every trial and stepped at its epochs.
        clip_norm: largest gradient norm.

    Attributes:
        u: of the running trial.
        trials: the record of all trials, and what learns from it.
        best: score, u, w and carry of the solution, or None.

    Example:
        >>> import torch
        >>> from bilevel.problems import Ridge
        >>> from bilevel.solvers.black_box.search import Search
        >>> problem, device = Ridge.synthetic(), torch.device("cpu")
        >>> solver = Search(trial_epochs=2)
        >>> solver.setup(problem, problem.data(device, torch.Generator()), device, torch.Generator())
        >>> for _ in range(4):
        ...     _ = solver.step()
        >>> solver.outer_count, [len(trial["scores"]) for trial in solver.trials.record]
        (2, [2, 2, 0])
    """

    tunes_optimizer = True

    ranges: Ranges
    trials: Trials
    u: Tensor
    hypers: Hypers
    epoch_steps: int
    failing: Tensor
    best: dict[str, Any] | None

    def __init__(
        self,
        *,
        sampler: Sampler | None = None,
        pruner: Pruner | None = None,
        trial_epochs: int = 10,
        early_stopping: bool = True,
        ranges: Mapping[str, Sequence[float]] | None = None,
        inner_steps: int = 5,
        inner_optimizer: MakeOptimizer = SGD,
        inner_scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(
            inner_steps=inner_steps,
            inner_optimizer=inner_optimizer,
            inner_scheduler=inner_scheduler,
            clip_norm=clip_norm,
        )
        at_least(trial_epochs=trial_epochs, least=1)
        self.sampler, self.pruner = RandomSearch() if sampler is None else sampler, pruner
        self.trial_epochs, self.early_stopping, self.given_ranges = (
            trial_epochs,
            early_stopping,
            ranges,
        )

    def setup(
        self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator
    ) -> None:
        self.check(problem, data, device)
        super().setup(problem, data, device, generator)
        self.ranges = ranges_of(problem.space, self.given_ranges)
        self.trials = Trials(
            self.sampler,
            self.pruner,
            self.ranges,
            self.trial_epochs,
            early_stopping=self.early_stopping,
        )
        self.best = None
        self._propose()

    def check(self, problem: Problem, data: Data, device: torch.device) -> None:
        super().check(problem, data, device)
        ranges_of(problem.space, self.given_ranges)
        if self.pruner is not None:
            self.pruner.make(self.trial_epochs)
        if problem.space.numel > self.sampler.most:
            raise Refused(
                f"{type(self.sampler).__name__} proposes at most {self.sampler.most} numbers a trial and λ has "
                f"{problem.space.numel}, in which a search without gradients finds nothing; use a gradient-based solver "
                "(self-tuning, unrolled, implicit), or freeze some hyperparameters"
            )

    def inner_step(self, batch: Batch) -> Metrics:
        """w descends L_T(λ, ·) at the λ of the trial, its whole numbers whole."""
        loss, carry = self.problem.inner_loss(
            self.hypers, self.weights.tensors, self.carry, batch, self.generator
        )
        self.failing = self.failing | ~torch.isfinite(
            loss.detach()
        )  # fails the trial, not the run: `watch` is not told
        descend(loss, self.weights)
        self.carry = detached(carry)
        return {"inner_loss": loss.detach()}

    def step(self, *, warmup: bool = False, limit: int | None = None) -> Metrics:
        """Up to `inner_steps` inner steps of the running trial, not past the end of its epoch; a score where they reach it.

        There is no difference while `warmup`: a trial trains.
        """
        left = self.data.train.steps_per_epoch - self.epoch_steps
        steps = min(self.inner_steps, left, left if limit is None else limit)
        with self.phase("inner"):
            metrics = self.inner_phase(steps, warmup=warmup)
        self.epoch_steps += steps
        with self.phase("outer"):
            return metrics if steps < left else metrics | self._end_epoch()

    def solution(self) -> Solution:
        space = self.problem.space
        if self.best is not None:
            return Solution(
                space.constrain(self.best["u"]), self.best["params"], self.best["carry"]
            )
        params, carry = self.initial(self.problem, self.device, self.generator)
        return Solution(space.constrain(self._initial_u(params)), params, carry)

    def epoch_ended(self, valid_loss: float | None) -> None:
        """Nothing: schedules are stepped at the epochs of a trial, by its own score."""

    def doubts(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """That λ has too many coordinates for the trials of a run, and that most trials fail."""
        doubts, h, failed = {}, self.problem.space.numel, self.trials.count("failed")
        if h > MANY:
            doubts["dimensions"] = (
                f"λ has {h} coordinates, and black-box search needs many trials for each; compare a gradient-based solver"
            )
        if failed >= 5 and 2 * failed > self.outer_count:
            doubts["failures"] = (
                f"{failed} of {self.outer_count} trials had a loss that was not finite; narrow solver.ranges, or clip gradients"
            )
        return doubts

    def state_dict(self) -> dict[str, Any]:
        progress = {"epoch_steps": self.epoch_steps, "failing": self.failing}
        return super().state_dict() | {
            "trials": self.trials.record,
            "best": self.best,
            "u": self.u,
            **progress,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trials.replay(state["trials"])
        self._train_at(state["u"].to(self.u))
        super().load_state_dict(state)
        self.epoch_steps, self.failing = state["epoch_steps"], state["failing"].to(self.device)
        self.best = to_device(state["best"], self.device)

    def _propose(self) -> None:
        """Begin the next trial: the first at the initial λ, every other one where the sampler says."""
        number = len(self.trials.record)
        own = on_cpu(self.generator, 1)  # 0 drew the initial weights
        seed = torch.randint(2**31, (number + 1,), generator=own)[
            number
        ]  # the next generator's would be the next run's
        z = self.trials.begin(
            int(seed), None if number else self.ranges.to_z(self.problem.space.init(torch.float64))
        )
        like = self.weights.leaves[0]
        self._train_at(
            self.ranges.to_u(z).to(like) if number else self._initial_u(self.weights.tensors)
        )

    def _train_at(self, u: Tensor) -> None:
        """Fresh weights, optimizer and schedule at λ(u)."""
        params, self.carry = self.initial(self.problem, self.device, self.generator)
        self.u, self.hypers = u, self.problem.space.constrain(u)
        settings = optimizer_settings(self.problem.space, self.hypers)
        self.weights: Optimized = self.trained_with(
            params, configured(self.inner_optimizer, settings)
        )
        self.epoch_steps, self.failing = 0, torch.zeros((), dtype=torch.bool, device=self.device)

    def _initial_u(self, params: Mapping[str, Tensor]) -> Tensor:
        like = next(iter(params.values()))
        return self.problem.space.init(like.dtype).to(like.device)

    def _end_epoch(self) -> Metrics:
        """Score the trial, step its schedule, and end it where it is complete, pruned or failed."""
        valid = self.data.valid
        score = evaluate(
            self.problem, Solution(self.hypers, self.weights.detached(), self.carry), valid
        )["loss"]
        valid.count(valid.size)
        number = len(self.trials.record) - 1
        failed = bool(self.failing) or not math.isfinite(score)
        state = "failed" if failed else self._scored(score)
        self.epoch_steps = 0
        if state is not None:
            self.trials.end(state)
            self.outer_count += 1
            self._propose()
        values: dict[str, float] = {"trial": number}
        values |= {f"trials_{state}": self.trials.count(state) for state in ("pruned", "failed")}
        values |= {} if failed else {"trial_loss": score}
        values |= {} if self.best is None else {"best_loss": self.best["score"]}
        return {
            name: torch.tensor(float(value), dtype=torch.float64) for name, value in values.items()
        }

    def _scored(self, score: float) -> str | None:
        """Keep the best, step the schedule, ask the pruner; how the trial ends, or None."""
        ended = len(self.trials.record[-1]["scores"]) + 1 == self.trial_epochs
        if (ended or self.early_stopping) and (self.best is None or score < self.best["score"]):
            params, carry = (
                {name: t.detach().clone() for name, t in d.items()}
                for d in (self.weights.tensors, self.carry)
            )
            self.best = {"score": score, "u": self.u, "params": params, "carry": carry}
        self.weights.epoch_ended(score)
        if self.trials.score(score):
            return "pruned"
        return "complete" if ended else None


MANY = 30
"""Coordinates from which on a search is doubted."""


def random_search(**options: Any) -> Search:
    """Random search (Bergstra & Bengio, 2012)."""
    return Search(**{"sampler": RandomSearch()} | options)


def tpe(**options: Any) -> Search:
    """Tree-structured Parzen estimator (Bergstra et al., 2011)."""
    return Search(**{"sampler": TPE()} | options)


def gp(**options: Any) -> Search:
    """Gaussian-process Bayesian optimization with expected improvement (Jones et al., 1998; Ament et al., 2023)."""
    return Search(**{"sampler": GP()} | options)
