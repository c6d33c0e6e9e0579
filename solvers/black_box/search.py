"""Black-box search: a trial trains at a fixed λ, a sampler proposes the next one, the best wins."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import Batch, Data, Metrics, Problem, Refused, Solution, Solver
from bilevel.checks.check_problem import check_laws
from bilevel.half_weights import wide
from bilevel.params import Hypers, detached, to_device
from bilevel.requirements import Trait
from bilevel.run.evaluation import evaluate
from bilevel.services import Services
from bilevel.solver import initial_state, on_cpu
from bilevel.solvers.base.core import Core, averaged
from bilevel.solvers.base.settings import InnerSettings
from bilevel.solvers.black_box.history import past_trials
from bilevel.solvers.black_box.ranges import Ranges, ranges_of
from bilevel.solvers.black_box.samplers import GP, TPE, Pruner, RandomSearch, Sampler
from bilevel.solvers.black_box.trials import Trials
from bilevel.solvers.optim.optimized import descend
from bilevel.solvers.optim.settings import configured, optimizer_settings
from bilevel.validate import whole

MANY = 30
"""Coordinates of λ from which on a search warns."""


@dataclass(kw_only=True, eq=False)
class Search(InnerSettings, Solver):
    """Random search, TPE or Gaussian-process Bayesian optimization: trainings at one λ each.

    The first trial is at the initial λ. All trials begin at the same initial weights, with a fresh
    optimizer and schedule, so that λ makes the difference between them. The order of batches and
    the masks continue from trial to trial. After every epoch a trial is scored by the `loss` of
    `problem.metrics` on the validation split, whose examples are counted. Then its schedule steps,
    and the pruner decides.

    With `early_stopping`, the value of a trial is its lowest score, and the solution is λ and w at
    the lowest score of all trials. Without, it is the score after the last epoch, as the bilevel
    problem asks for w*(λ), and only a complete trial can be the solution. Before there is one, the
    solution is the initial λ and w. A trial whose loss is not finite fails, and the search
    continues.

    A round ends at the end of an epoch of a trial at the latest. There it reads the score and so
    waits for the device once an epoch, because the score decides whether the trial continues.
    There is no difference during warm-up: a trial trains.

    Attributes:
        sampler: proposes λ: `RandomSearch` (None), `TPE` or `GP`.
        pruner: ends trials early: `Median` or `Hyperband`; None ends none.
        trial_epochs: epochs of a trial.
        early_stopping: the value of a trial is its lowest score, otherwise its last.
        ranges: [low, high] by hyperparameter, in its own units; `ranges_of` gives the defaults.
        history: earlier trials for the sampler, from `bilevel.studies.history`.
        core: problem, data and weights (`core.weights`) of the running trial, after `setup`.
        u: of the running trial, [h].
        hypers: λ of the running trial.
        trials: the record of all trials, from which the sampler learns.
        best: score, u, w and carry of the solution, or None.

    Example:
        >>> import torch
        >>> from bilevel.problems import Ridge
        >>> from bilevel.solvers.black_box.search import Search
        >>> problem, device = Ridge.synthetic(), torch.device("cpu")
        >>> solver = Search(trial_epochs=2)
        >>> data = problem.data(device, torch.Generator())
        >>> solver.setup(problem, data, device, torch.Generator())
        >>> for _ in range(4):
        ...     _ = solver.step()
        >>> solver.outer_count, [len(trial["scores"]) for trial in solver.trials.record]
        (2, [2, 2, 0])
    """

    traits = frozenset({Trait.TUNES_OPTIMIZER})

    sampler: Sampler | None = None
    pruner: Pruner | None = None
    trial_epochs: int = 10
    early_stopping: bool = True
    ranges: Mapping[str, Sequence[float]] | None = None
    history: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.check_inner()
        whole(1, trial_epochs=self.trial_epochs)
        self._sampler = RandomSearch() if self.sampler is None else self.sampler

    # --- set-up ---

    def setup(
        self,
        problem: Problem,
        data: Data,
        device: torch.device,
        generator: torch.Generator,
        services: Services | None = None,
    ) -> None:
        self.check(problem, data, device)
        self.services = services or Services()
        self.core = Core(self, problem, data, device, generator, self.services)
        self.box: Ranges = ranges_of(problem.space, self.ranges)
        self.trials = Trials(
            self._sampler,
            self.pruner,
            self.box,
            self.trial_epochs,
            early_stopping=self.early_stopping,
            past=past_trials(self.history, self.box, self._sampler),
        )
        self.best: dict[str, Any] | None = None
        self._propose()

    def refuse(self, problem: Problem, data: Data, device: torch.device) -> None:
        """Refuse ranges or a pruner that do not fit, and more coordinates than a sampler takes."""
        check_laws(self, problem, data, device)
        past_trials(self.history, ranges_of(problem.space, self.ranges), self._sampler)
        if self.pruner is not None:
            self.pruner.make(self.trial_epochs)
        if problem.space.numel > self._sampler.most:
            raise Refused(
                f"{type(self._sampler).__name__} proposes at most {self._sampler.most} numbers a "
                f"trial and λ has {problem.space.numel}, in which a search without gradients finds "
                "nothing; use a gradient-based solver (self-tuning, unrolled, implicit), or freeze "
                "some hyperparameters"
            )

    # --- a round ---

    def step(self, *, warmup: bool = False, limit: int | None = None) -> Metrics:
        """Take at most `limit` inner steps of the running trial, up to the end of its epoch."""
        left = self.core.data.train.steps_per_epoch - self.epoch_steps
        steps = min(self.inner_steps, left, left if limit is None else limit)
        with self.services.phase("inner"):
            metrics = averaged(self._next_step() for _ in range(steps))
        self.epoch_steps += steps
        with self.services.phase("outer"):
            return metrics if steps < left else metrics | self._end_epoch()

    def _next_step(self) -> Metrics:
        self.inner_count += 1
        self.core.inner_count = self.inner_count
        return self.inner_step(*self.core.next_batches(["train"]))

    def inner_step(self, batch: Batch) -> Metrics:
        """Take one step of w on L_T(λ, ·) at the λ of the trial, whole numbers rounded.

        A loss that is not finite fails the trial, not the run: the services do not watch it.
        """
        core = self.core
        loss, carry = core.problem.inner_loss(
            self.hypers, core.weights.tensors, core.carry, batch, core.generator
        )
        self.failing: Tensor = self.failing | ~torch.isfinite(loss.detach())
        descend(loss, core.weights)
        core.carry = detached(carry)
        return {"inner_loss": loss.detach()}

    # --- trials ---

    def _propose(self) -> None:
        """Begin the next trial: the first at the initial λ, every other one at the sampler's."""
        space, number = self.core.problem.space, len(self.trials.record)
        own = on_cpu(self.core.generator, 1)  # draw 0 gave the initial weights
        # The seed of the trial; a generator for every trial would repeat seeds of the next run.
        seed = int(torch.randint(2**31, (number + 1,), generator=own)[number])
        if number == 0:
            self.trials.begin(seed, self.box.to_z(space.init(torch.float64)))
            self._train_at(self._initial_u(self.core.weights.tensors))
        else:
            z = self.trials.begin(seed, None)
            self._train_at(self.box.to_u(z).to(self.u))

    def _train_at(self, u: Tensor) -> None:
        """Take fresh weights, optimizer and schedule at λ(u)."""
        core = self.core
        params, core.carry = initial_state(core.problem, core.device, core.generator)
        self.u = u
        self.hypers: Hypers = core.problem.space.constrain(u)
        settings = optimizer_settings(core.problem.space, self.hypers)
        optimizer = configured(self.inner_optimizer, settings, list(params))
        core.weights = core.optimized(params, optimizer)
        self.epoch_steps = 0
        self.failing = torch.zeros((), dtype=torch.bool, device=core.device)

    def _initial_u(self, params: Mapping[str, Tensor]) -> Tensor:
        like = next(iter(params.values()))
        return self.core.problem.space.init(wide(like.dtype)).to(like.device)

    def _end_epoch(self) -> Metrics:
        """Score the trial, step its schedule, and end it if it is complete, pruned or failed."""
        core, number = self.core, len(self.trials.record) - 1
        valid, at = core.data.valid, Solution(self.hypers, core.weights.detached(), core.carry)
        score = evaluate(core.problem, at, valid)["loss"]
        valid.count(valid.size)
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
        return {n: torch.tensor(float(value), dtype=torch.float64) for n, value in values.items()}

    def _scored(self, score: float) -> str | None:
        """Keep the best, step the schedule, ask the pruner; return how the trial ends, or None."""
        core = self.core
        ended = len(self.trials.record[-1]["scores"]) + 1 == self.trial_epochs
        if (ended or self.early_stopping) and (self.best is None or score < self.best["score"]):
            params, carry = (
                {name: t.detach().clone() for name, t in tensors.items()}
                for tensors in (core.weights.tensors, core.carry)
            )
            self.best = {"score": score, "u": self.u, "params": params, "carry": carry}
        core.weights.epoch_ended(score)
        if self.trials.score(score):
            return "pruned"
        return "complete" if ended else None

    # --- what the runner asks for ---

    def solution(self) -> Solution:
        core, best = self.core, self.best
        space = core.problem.space
        if best is not None:
            return Solution(space.constrain(best["u"]), best["params"], best["carry"])
        params, carry = initial_state(core.problem, core.device, core.generator)
        return Solution(space.constrain(self._initial_u(params)), params, carry)

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        found, h, failed = {}, self.core.problem.space.numel, self.trials.count("failed")
        if h > MANY:
            found["dimensions"] = (
                f"Search: λ has {h} coordinates, and black-box search needs many trials for each; "
                "compare a gradient-based solver"
            )
        if failed >= 5 and 2 * failed > self.outer_count:
            found["failures"] = (
                f"Search: {failed} of {self.outer_count} trials had a loss that was not finite; "
                "narrow solver.ranges, or clip gradients"
            )
        return found

    def lost(self) -> str | None:
        failed = self.trials.count("failed")
        running = bool(self.trials.record[-1]["scores"])
        if self.best is not None or running or failed == 0 or failed < self.outer_count:
            return None
        every = "the only trial" if failed == 1 else f"each of the {failed} trials"
        return f"{every} had a loss that was not finite, so the solution is the untrained start"

    def state_dict(self) -> dict[str, Any]:
        return {
            "core": self.core.state_dict(),
            "trials": self.trials.record,
            "best": self.best,
            "u": self.u,
            "epoch_steps": self.epoch_steps,
            "failing": self.failing,
            "inner_count": self.inner_count,
            "outer_count": self.outer_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trials.replay(state["trials"])
        self._train_at(state["u"].to(self.u))
        self.core.load_state_dict(state["core"])
        self.inner_count, self.outer_count = state["inner_count"], state["outer_count"]
        self.core.inner_count = self.inner_count
        self.epoch_steps = state["epoch_steps"]
        self.failing = state["failing"].to(self.core.device)
        self.best = to_device(state["best"], self.core.device)


def random_search(**options: Any) -> Search:
    """Return random search (Bergstra & Bengio, 2012)."""
    return Search(**{"sampler": RandomSearch()} | options)


def tpe(**options: Any) -> Search:
    """Return the tree-structured Parzen estimator (Bergstra et al., 2011)."""
    return Search(**{"sampler": TPE()} | options)


def gp(**options: Any) -> Search:
    """Return Gaussian-process Bayesian optimization with expected improvement.

    Source: Jones et al., 1998; Ament et al., 2023.
    """
    return Search(**{"sampler": GP()} | options)
