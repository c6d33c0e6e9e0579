"""Evolution strategies: hypergradients from the losses of perturbed trainings alone, without any derivative in λ.

Sources: Vicol, Metz & Sohl-Dickstein, ICML 2021 (persistent evolution strategies, PES, Algorithm 2); Salimans et al., 2017
(antithetic pairs, common random numbers).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel import Batch, Data, Hypers, Metrics, Params, Problem, Space
from bilevel.params import count_examples, to_device
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.base.training import above_zero, at_least
from bilevel.solvers.optim.functional import FunctionalOptimizer, Moments
from bilevel.solvers.optim.optimized import RMSPROP, SGD, MakeOptimizer, MakeScheduler, descend
from bilevel.solvers.unroll.trajectory import InnerState, Trajectory

LARGE = 100
"""So many times the central loss is more than λ's effect explains."""

_CALM = "lower spread, or the learning rate (its initial value, if it is tuned), or clip gradients"


class EvolutionStrategies(Descent):
    """Pairs of particles train at u₀ ± ε on the same batches with the same masks; λ follows the difference of their losses.

    With ε ~ N(0, diag σ²), one unroll of K = `inner_steps` steps a round, and ξ_i the sum of a particle's perturbations since
    it left the central weights,

        ĝ = 1/(2P) Σ_i σ⁻² ∘ ξ_i (L_i⁺ − L_i⁻),    E[ĝ] = Σ_τ d/du_τ E_ε[L_V]  over the unrolls τ since then

    since ∇_u E[L(u + ε)] = E[σ⁻² ∘ ε L(u + ε)] holds for the perturbation of every unroll, and ξ is their sum. Nothing of λ is
    differentiated, so that sampled and rounded hyperparameters, and the inner optimizer's own settings, are tuned as well. The
    central weights train at u₀, with the masks of their particles, and are the solution.

    `persistent` particles keep their weights, their optimizer's memory and ξ from round to round, and go back to the central
    weights after `horizon` inner steps: the estimate has no truncation bias up to then. The paper goes back to the initial
    weights, since it tunes one training for many to come; in a run that tunes λ while it trains, what counts is λ's effect from
    here on. Otherwise particles leave the central weights anew every round (ξ = ε), and an effect of λ that takes more than K
    steps is not seen.

    Common random numbers leave no noise in the difference of a pair but ε's own, so that σ may be small. What is descended is
    the loss smoothed over N(u, diag σ²); with σ = 1 (that of self-tuning networks, which fit a response over that range)
    a decay is smoothed over a factor of e either way, and its optimum moves. A sampled rate in turn needs σ large enough that
    the masks of a pair differ.

    A pair of which a loss is not finite is left out of the estimate; it is reported, and a persistent one stays out until it
    starts again. 2P + 1 trainings run one after the other; their batches are all counted as examples. Persistent particles hold
    2P copies of the weights and of the optimizer's memory from round to round, the others within a round.

    Args:
        pairs: P.
        persistent: whether particles go on from round to round.
        horizon: inner steps after which persistent particles start again.
        spread: σ as a multiple of each hyperparameter's `scale`.
        inner_steps: K, training batches per round.
        inner_optimizer: for w, one that has a twin (`bilevel.solvers.optim.functional`).
        inner_scheduler: its learning-rate schedule, stepped every epoch.
        clip_norm: largest gradient norm.
        outer_optimizer: for u.

    Attributes:
        particles: where they stand, the first of every pair and then the second of every pair.
        places: u₀ ± ε, where they have trained in this round; [] between rounds.
        total: ξ of the first of every pair, [P, h]; that of the second is −ξ.
        age: inner steps since they left the central weights.
    """

    tunes_optimizer = True
    perturbs = True
    subtracts = True
    twin: FunctionalOptimizer
    trajectory: Trajectory
    particles: list[InnerState]
    places: list[Tensor]
    total: Tensor
    age: int

    def __init__(
        self,
        *,
        pairs: int = 2,
        persistent: bool = True,
        horizon: int = 100,
        spread: float = 0.3,
        inner_steps: int = 5,
        inner_optimizer: MakeOptimizer = SGD,
        inner_scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
        outer_optimizer: MakeOptimizer = RMSPROP,
    ) -> None:
        super().__init__(
            inner_steps=inner_steps,
            inner_optimizer=inner_optimizer,
            inner_scheduler=inner_scheduler,
            clip_norm=clip_norm,
            outer_optimizer=outer_optimizer,
        )
        at_least(pairs=pairs, horizon=horizon, least=1)
        above_zero(spread=spread)
        self.pairs, self.persistent, self.horizon, self.spread = pairs, persistent, horizon, spread

    def memory_settings(self, space: Space) -> list[str]:
        return [f"fewer solver.pairs (now {self.pairs}, each of two copies of w)"]

    # --- a round: the particles and the centre on the same batches ---

    def inner_phase(self, steps: int, *, warmup: bool) -> Metrics:
        batches = [self.next_batch(self.data.train) for _ in range(steps)]
        if not warmup:
            with self.phase("response"):
                self.explore(batches)
        if self.twin.tuned:
            return self.train_by_twin(batches)
        totals = [self.descend_counted(batch)["inner_loss"] for batch in batches]
        return {"inner_loss": torch.stack(totals).mean()}

    def descend_counted(self, batch: Batch) -> Metrics:
        self.inner_count += 1
        return self.inner_step(batch)

    def train_by_twin(self, batches: list[Batch]) -> Metrics:
        """The central weights under settings of the optimizer that are tensors: reading them would wait for the device."""
        point, losses = InnerState(*self.twin.read(), self.carry), []
        for batch in batches:
            self.inner_count += 1
            point, loss = self.trajectory.step(point, self.belief.centre, batch, create_graph=False)
            self.watch(loss)
            losses.append(loss)
        self.twin.write(point.params, point.moments)
        self.carry = point.carry
        return {"inner_loss": torch.stack(losses).mean()}

    def explore(self, batches: list[Batch]) -> None:
        """Every particle trains on `batches` at u₀ ± ε; the generator is left such that the centre has the same masks."""
        if not self.persistent or self.age >= self.horizon or not self.particles:
            start = InnerState(*self.twin.read(), self.carry)
            start = start.replaced(
                t.clone() for t in start.tensors()
            )  # the centre's own change in place
            self.particles, self.age = [start] * (2 * self.pairs), 0
            self.total.zero_()
        noise = self.noise()
        self.total += noise
        self.places = list(self.belief.centre + torch.cat([noise, -noise]))
        masks = self.generator.get_state()  # it lies on the host
        for i, (u, point) in enumerate(zip(self.places, self.particles, strict=True)):
            self.generator.set_state(masks)
            for batch in batches:
                point, _ = self.trajectory.step(point, u, batch, create_graph=False)
            self.particles[i] = point
        self.generator.set_state(masks)
        self.age += len(batches)
        self.data.train.count(len(self.particles) * sum(count_examples(batch) for batch in batches))

    def noise(self) -> Tensor:
        """ε ~ N(0, diag σ²) of every pair, [P, h]."""
        like = self.total
        return self.sigma * torch.randn(
            like.shape, generator=self.generator, device=like.device, dtype=like.dtype
        )

    # --- the estimate ---

    def outer_loss(self, batch: Batch) -> Tensor:
        """L_V at λ₀ and the central weights, with ĝ for its derivative in u."""
        return self.estimate(batch)[0]

    def outer_step(self, batch: Batch) -> Metrics:
        """u descends L_V along ĝ."""
        loss, metrics = self.estimate(batch)
        self.watch(loss)
        gradient = descend(loss, self.belief.mean)[0]
        assert gradient is not None
        return {"outer_loss": loss.detach(), "hypergradient_norm": gradient.norm(), **metrics}

    def estimate(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The surrogate L + ĝᵀ(u − stop(u)), and what is reported of the particles' losses.

        Between rounds no particle has a loss to be judged by: they train on the next batches first.
        """
        if not self.places:
            self.explore([self.next_batch(self.data.train) for _ in range(self.inner_steps)])
        with torch.no_grad():
            losses = torch.stack(
                [
                    self.judge(u, point, batch)
                    for u, point in zip(self.places, self.particles, strict=True)
                ]
            )
            centre = self.judge(
                self.belief.centre, InnerState(*self.twin.read(), self.carry), batch
            )
            self.data.valid.count(len(losses) * count_examples(batch))
            up, down = losses.chunk(2)
            kept = torch.isfinite(up - down)
            count = kept.sum().clamp(min=1)
            difference = torch.where(kept, up - down, 0.0)
            gradient = (self.total * difference[:, None]).sum(0) / (2 * count * self.sigma**2)
            finite = torch.where(kept, torch.stack([up, down]), 0.0)
            deviation = torch.where(kept, finite - finite.sum() / (2 * count), 0.0)
        metrics = {
            "particle_spread": (deviation.square().sum() / (2 * count)).sqrt(),
            "lost_pairs": 1 - kept.to(losses.dtype).mean(),
        }
        return centre + gradient @ (self.belief.u - self.belief.u.detach()), metrics

    def judge(self, u: Tensor, point: InnerState, batch: Batch) -> Tensor:
        """L_V(λ(u), w) for a particle's w."""
        carry = self.problem.fresh_carry(point.carry, batch)
        return self.problem.outer_loss(self.problem.space.constrain(u), point.params, carry, batch)[
            0
        ]

    def outer_phase(self) -> Metrics:
        metrics = super().outer_phase()
        self.places = []
        if not self.persistent:
            self.particles = []
        return metrics

    def respond(self, offset: Tensor) -> Params:
        """The central weights, as a constant: λ's effect on them is estimated, not differentiated."""
        return self.weights.detached()

    def doubts(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Say so where particles diverge, or are about to."""
        doubts = {}
        if metrics.get("lost_pairs", 0.0) > 0:
            doubts["lost_pairs"] = (
                f"{metrics['lost_pairs']:.0%} of the pairs of particles had a loss that is not finite, and were left out of "
                f"the hypergradient; {_CALM}"
            )
        spread, loss = metrics.get("particle_spread", 0.0), metrics.get("outer_loss", math.inf)
        if spread > LARGE * abs(loss):
            doubts["particle_spread"] = (
                f"the losses of the particles vary by {spread:.3g} where that of the central weights is {loss:.3g}: the "
                f"hypergradient is that of a few that all but diverge; {_CALM}"
            )
        return doubts

    @property
    def sigma(self) -> Tensor:
        """[h], σ of the perturbation."""
        return self.spread * self.belief.sigma

    def scales(self) -> Hypers:
        return self.problem.space.by_name(self.sigma.detach())

    # --- set-up and state ---

    def rehearse(self) -> None:
        self.pairs, self.total = 1, self.total[:1]  # the others do the same
        super().rehearse()

    def build(
        self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator
    ) -> None:
        super().build(problem, data, device, generator)
        self.twin = FunctionalOptimizer(self.weights, problem.space)
        self.trajectory = Trajectory(problem, self.twin, generator)
        self.total = self.belief.u.new_zeros(self.pairs, problem.space.numel)
        self.particles, self.places, self.age = [], [], 0

    def state_dict(self) -> dict[str, Any]:
        particles = [
            {"params": p, "slots": m.slots, "steps": m.steps, "carry": c}
            for p, m, c in self.particles
        ]
        return super().state_dict() | {"particles": particles, "total": self.total, "age": self.age}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        points = to_device(state["particles"], self.device)
        self.particles = [
            InnerState(p["params"], Moments(p["slots"], p["steps"]), p["carry"]) for p in points
        ]
        self.total.copy_(state["total"])
        self.age, self.places = state["age"], []
