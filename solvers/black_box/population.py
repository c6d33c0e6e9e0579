"""Population-based training: the worst of many trainings continue from the best, at a λ near it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import Data, Metrics, Problem, Solution, Solver, Space
from bilevel.checks.check_problem import check_laws
from bilevel.half_weights import for_weights, wide
from bilevel.params import detached, to_device
from bilevel.requirements import Trait
from bilevel.run.evaluation import evaluate
from bilevel.services import Services
from bilevel.solver import on_cpu
from bilevel.solvers.base.settings import InnerSettings
from bilevel.solvers.black_box.member import Best, Member, copied, set_settings
from bilevel.solvers.black_box.ranges import ranges_of
from bilevel.solvers.optim.optimized import Optimized, descend
from bilevel.solvers.optim.settings import configured, optimizer_settings
from bilevel.validate import at_least, between, positive, whole


@dataclass(kw_only=True, eq=False)
class PopulationBased(InnerSettings, Solver):
    """Members train side by side, each with its own w, optimizer and λ; the worst copy the best.

    Every `interval` epochs of each member, all are scored on the validation split. Each of the
    worst quarter then takes the weights, the optimizer's memory and λ of one of the best quarter,
    drawn at random (exploit), and moves λ (explore). Every coordinate is drawn anew from `ranges`
    with probability `resample`, and otherwise moves by ± `perturbation` of its scale in
    unconstrained coordinates. There u is log λ for small λ of a Positive or an Interval, so ± 0.2
    is the paper's factor of 1.2 or 0.8. A Simplex stays one. An Integer moves by parts of a whole
    number, which its rounding turns into a probability.

    The first member starts at the initial λ and at the initial weights of every solver, the others
    at λ drawn from `ranges` and at weights of their own. The solution is the member with the best
    score, weights included, as it was at that score; before there is a score, the first member.
    The population may lose it, the solution does not.

    A round trains one member, the next in turn, so a budget ends between rounds, not between
    generations. All take their batches from the one stream of training data. `inner_count` counts
    the steps of all members together, `outer_count` the decisions. In warm-up members are scored,
    and none is replaced. A learning-rate schedule follows the epochs of its member. If the learning
    rate itself is tuned, the schedule multiplies it.

    A member whose score is not finite is replaced like one of the worst. If no score is finite, the
    run has diverged. Scoring reads numbers on the host, and waits for the device once per member
    and interval; no other round does. Memory: `population` copies of w and of the optimizer's
    memory, gradients of one, and one copy of the best.

    Source: Jaderberg et al., 2017 (arXiv:1711.09846), with its truncation selection. Here a
    generation decides together, and in the paper each worker for itself, so that a run is the same
    every time.

    Attributes:
        population: the number of members.
        interval: epochs of a member between scores.
        perturbation: the step of a move, as a multiple of each hyperparameter's `scale`.
        resample: the probability of a fresh draw, for each coordinate.
        ranges: [low, high] of the draws by hyperparameter, in its own units; `ranges_of` gives the
            others. A move may leave them.
        inner_steps: training batches of one member per round.
        members: the trainings, after `setup`.
        best: the solution, or None before there is a score.

    Raises:
        BilevelError: a value out of its range.
    """

    traits = frozenset({Trait.TUNES_OPTIMIZER})

    population: int = 8
    interval: float = 1
    perturbation: float = 0.2
    resample: float = 0.25
    ranges: Mapping[str, Sequence[float]] | None = None

    def __post_init__(self) -> None:
        self.check_inner()
        whole(2, population=self.population)
        positive(interval=self.interval)
        at_least(0, perturbation=self.perturbation)
        between(0, 1, resample=self.resample)

    def refuse(self, problem: Problem, data: Data, device: torch.device) -> None:
        """Refuse a problem whose objectives cannot be trained on, or ranges that do not fit."""
        check_laws(self, problem, data, device)
        ranges_of(problem.space, self.ranges)

    def setup(
        self,
        problem: Problem,
        data: Data,
        device: torch.device,
        generator: torch.Generator,
        services: Services | None = None,
    ) -> None:
        self.check(problem, data, device)
        self.problem = for_weights(problem, problem.init(on_cpu(generator, 0))[0])
        self.data = data
        self.device = device
        self.generator = generator
        self.services = services or Services()
        self.box = ranges_of(problem.space, self.ranges)
        # Decisions fall on the host, the same whatever the device.
        self.draws = on_cpu(generator, self.population)
        self.generation_steps = max(1, round(self.interval * data.train.steps_per_epoch))
        self.generations = 0
        self.best: Best | None = None
        self.members = [self.born(i) for i in range(self.population)]

    def born(self, i: int) -> Member:
        """Return member `i` at its initial weights and λ."""
        space = self.problem.space
        params, carry = to_device(self.problem.init(on_cpu(self.generator, i)), self.device)
        like = next(iter(params.values()))
        u = space.init(torch.float64) if i == 0 else self.box.draw(self.draws)
        u = u.to(like.device, wide(like.dtype))
        settings = optimizer_settings(space, space.constrain(u))
        optimizer = configured(self.inner_optimizer, settings, list(params))
        return Member(Optimized(params, optimizer, self.inner_scheduler, self.clip_norm), carry, u)

    def memory_settings(self, space: Space) -> list[str]:
        return [f"a smaller solver.population (now {self.population}, each with a copy of w)"]

    # --- training ---

    def step(self, *, warmup: bool = False, limit: int | None = None) -> Metrics:
        member = min(self.members, key=lambda m: m.steps)  # the first of those that are behind
        left = (self.generations + 1) * self.generation_steps - member.steps
        with self.services.phase("inner"):
            losses = [
                self.descend(member)
                for _ in range(min(left, self.inner_steps, left if limit is None else limit))
            ]
            metrics = {"inner_loss": torch.stack(losses).mean()}
        if all(m.steps == (self.generations + 1) * self.generation_steps for m in self.members):
            self.generations += 1
            with self.services.phase("outer"):
                metrics |= self.score()
                if not warmup:
                    self.outer_count += 1
                    self.decide()
        return metrics

    def descend(self, member: Member) -> Tensor:
        """Take one step of a member; return L_T, [], unwatched: a bad member is replaced."""
        batch = self.services.next_batch(self.data.train)
        self.inner_count += 1
        member.steps += 1
        hypers = self.problem.space.constrain(member.u, self.generator)
        loss, carry = self.problem.inner_loss(
            hypers, member.weights.tensors, member.carry, batch, self.generator
        )
        descend(loss, member.weights)
        member.carry = detached(carry)
        if member.steps % self.data.train.steps_per_epoch == 0:
            member.weights.epoch_ended(member.score)
        return loss.detach()

    # --- a generation ends ---

    def score(self) -> Metrics:
        """Score every member on the validation split, and keep the best so far."""
        scores = []
        for member in self.members:
            solution = self.solution_of(member)
            self.data.valid.count(self.data.valid.size)
            member.score = evaluate(self.problem, solution, self.data.valid)["loss"]
            if math.isfinite(member.score):
                scores.append(member.score)
                if self.best is None or member.score < self.best.score:
                    params, carry = copied(solution.params), copied(solution.carry)
                    self.best = Best(member.u.clone(), params, carry, member.score)
        if not scores:
            bad = torch.tensor(math.nan, device=self.device)
            self.services.watch(bad, self.inner_count)
        named = {
            "lost_members": 1 - len(scores) / len(self.members),
            **(
                {"outer_loss": min(scores), "score_range": max(scores) - min(scores)}
                if scores
                else {}
            ),
        }
        return {name: torch.tensor(value, device=self.device) for name, value in named.items()}

    def decide(self) -> None:
        """Let the worst quarter, and every lost member, continue from the best quarter."""
        ranked = sorted(self.members, key=lambda m: m.rank)
        finite = [m for m in ranked if m.rank < math.inf]
        quarter = max(1, self.population // 4)
        donors = finite[:quarter]
        if not donors:
            return
        worst = max(len(donors), min(len(finite), self.population - quarter))
        for member in ranked[worst:]:
            donor = donors[int(torch.randint(len(donors), (), generator=self.draws))]
            self.exploit(member, donor)
            self.explore(member)

    def exploit(self, member: Member, donor: Member) -> None:
        """Let a member continue from the donor."""
        member.copy_from(donor)

    def explore(self, member: Member) -> None:
        """Move λ, and with it the settings of the optimizer that it holds."""
        space, h = self.problem.space, member.u.numel()
        sign = 2.0 * torch.randint(2, (h,), generator=self.draws) - 1
        moved = member.u.cpu().double() + self.perturbation * space.initial_scales() * sign
        anew = torch.rand(h, generator=self.draws) < self.resample
        before = optimizer_settings(space, space.constrain(member.u))
        member.u.copy_(torch.where(anew, self.box.draw(self.draws), moved))
        set_settings(member.weights, before, optimizer_settings(space, space.constrain(member.u)))

    # --- what the runner asks for ---

    def solution(self) -> Solution:
        if self.best is None:  # before the first scores
            alive = (member for member in self.members if member.is_finite)
            return self.solution_of(next(alive, self.members[0]))
        return Solution(
            self.problem.space.constrain(self.best.u), self.best.params, self.best.carry
        )

    def solution_of(self, member: Member) -> Solution:
        """Return λ, w and carry of a member."""
        return Solution(
            self.problem.space.constrain(member.u), member.weights.detached(), member.carry
        )

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        if not metrics.get("lost_members", 0.0) > 0:
            return {}
        return {
            "lost_members": (
                f"PopulationBased: {metrics['lost_members']:.0%} of the members had a loss that is "
                "not finite and are replaced, so their training is wasted; narrow ranges, lower "
                "the learning rate, or clip gradients"
            )
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "members": [member.state_dict() for member in self.members],
            "best": None if self.best is None else dict(vars(self.best)),
            "generations": self.generations,
            "generator": self.generator.get_state(),
            "draws": self.draws.get_state(),
            "inner_count": self.inner_count,
            "outer_count": self.outer_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for member, saved in zip(self.members, state["members"], strict=True):
            member.load_state_dict(saved)
        self.best = None if state["best"] is None else Best(**to_device(state["best"], self.device))
        self.generations = state["generations"]
        self.generator.set_state(state["generator"].cpu())
        self.draws.set_state(state["draws"].cpu())
        self.inner_count, self.outer_count = state["inner_count"], state["outer_count"]
