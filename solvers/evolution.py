"""Evolution strategies: hypergradients from losses of perturbed trainings, with no derivative in λ.

Sources: Vicol, Metz & Sohl-Dickstein, ICML 2021 (persistent evolution strategies, PES,
Algorithm 2); Salimans et al., 2017 (antithetic pairs, common random numbers).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel import Batch, Hypers, Metrics, Space
from bilevel.params import count_examples, to_device
from bilevel.requirements import Trait
from bilevel.solvers.base.core import Core
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.base.method import WrittenHypergradient
from bilevel.solvers.optim.functional import FunctionalOptimizer, Moments
from bilevel.solvers.unroll.trajectory import InnerState, Trajectory
from bilevel.validate import at_least, positive, whole

LARGE = 100
"""A spread of the particles' losses above so many central losses is not an effect of λ alone."""

_CALM = "lower spread, or the learning rate (its initial value, if it is tuned), or clip gradients"


@dataclass(kw_only=True, eq=False)
class EvolutionStrategies(Descent):
    """Pairs of particles train at u₀ ± ε; λ follows the difference of their validation losses.

    With ε ~ N(0, diag σ²), one unroll of K = `inner_steps` steps a round, and ξ_i the sum of a
    particle's perturbations since it left the central weights,

        ĝ = 1/(2P) Σ_i σ⁻² ∘ ξ_i (L_i⁺ − L_i⁻),    E[ĝ] = Σ_τ d/du_τ E_ε[L_V]  over the unrolls τ

    since ∇_u E[L(u + ε)] = E[σ⁻² ∘ ε L(u + ε)] holds for the perturbation of every unroll, and ξ is
    their sum. Nothing is differentiated in λ. So sampled and rounded hyperparameters, and settings
    of the inner optimizer, are tuned as well. The central weights train at u₀ on the same batches
    with the same masks as the particles, and are the solution.

    `persistent` particles keep their weights, the optimizer's memory and ξ from round to round, and
    return to the central weights after `horizon` inner steps. Up to there the estimate has no
    truncation bias. The paper returns to the initial weights, because it tunes one training for
    many to come; a run that tunes λ while it trains needs the effect of λ from here on. Otherwise
    particles leave the central weights in every round (ξ = ε), and an effect of λ that takes more
    than K steps is not seen.

    Common random numbers leave no noise in the difference of a pair but that of ε, so σ may be
    small. The descended loss is smoothed over N(u, diag σ²). With σ = 1, as in self-tuning
    networks, a decay is smoothed over a factor of e either way, and its optimum moves. A sampled
    rate needs a σ so large that the masks of a pair differ.

    A pair with a loss that is not finite is left out of the estimate and reported; a persistent one
    stays out until it starts again. 2P + 1 trainings run one after the other, and all their batches
    count as examples. Persistent particles hold 2P copies of w and of the optimizer's memory from
    round to round, the others within a round. The optimizer of w must be SGD, Adam, AdamW or
    RMSprop.

    Attributes:
        pairs: P.
        persistent: continue particles from round to round.
        horizon: inner steps after which persistent particles start again.
        spread: σ as a multiple of each hyperparameter's `scale`.
    """

    traits = frozenset({Trait.TUNES_OPTIMIZER, Trait.SUBTRACTS})

    pairs: int = 2
    persistent: bool = True
    horizon: int = 100
    spread: float = 0.3
    outer_steps: int = field(init=False, default=1)
    follow_statistics: bool = field(init=False, default=False)

    def start(self, core: Core) -> "EvolutionMethod":
        """Return the method without particles."""
        return EvolutionMethod(self, core)

    def check_settings(self) -> None:
        whole(1, pairs=self.pairs)
        at_least(1, horizon=self.horizon)
        positive(spread=self.spread)

    def memory_settings(self, space: Space) -> list[str]:
        return [f"fewer solver.pairs (now {self.pairs}, each of two copies of w)"]


class EvolutionMethod(WrittenHypergradient):
    """The particles and the central weights (`core.weights`).

    Attributes:
        particles: where they stand: the first of every pair, then the second of every pair.
        places: u₀ ± ε, where they train in this round; empty between rounds.
        total: ξ of the first of every pair, [P, h]; that of the second is −ξ.
        age: inner steps since the particles left the central weights.
        centre: the central training, where λ holds settings of the optimizer; else None.
        losses: inner losses of the central weights in this round.
    """

    assumes_minimum = False
    plain_warmup: ClassVar[bool] = True

    def __init__(self, settings: EvolutionStrategies, core: Core) -> None:
        self.settings = settings
        self.core = core
        self.optimizer = FunctionalOptimizer(core.weights, core.problem.space)
        self.trajectory = Trajectory(core.problem, self.optimizer, core.generator)
        self.total = core.search.u.new_zeros(settings.pairs, core.problem.space.numel)
        self.particles: list[InnerState] = []
        self.places: list[Tensor] = []
        self.age = 0
        self.centre: InnerState | None = None
        self.losses: list[Tensor] = []

    @property
    def sigma(self) -> Tensor:
        """[h], σ of the perturbation."""
        return self.settings.spread * self.core.search.sigma

    # --- a round: particles and centre on the same batches with the same masks ---

    def begin_round(self, steps: int, *, warmup: bool) -> None:
        """Draw ε of this round; only the centre trains in warm-up."""
        self.places = []
        self.losses = []
        if not warmup:
            with self.core.services.phase("response"):
                self.perturb()
        # Settings that λ holds lie on the device, where the optimizer takes them without waiting.
        self.centre = self.here() if self.optimizer.tuned else None

    def perturb(self) -> None:
        """Place the particles at u₀ ± ε; those that are too old start at the central weights."""
        if not self.settings.persistent or self.age >= self.settings.horizon or not self.particles:
            start = self.here()
            start = start.replaced(t.clone() for t in start.tensors())  # the centre's change
            self.particles, self.age = [start] * (2 * len(self.total)), 0
            self.total.zero_()
        noise = self.noise()
        self.total += noise
        self.places = list(self.core.search.u0 + torch.cat([noise, -noise]))

    def noise(self) -> Tensor:
        """Return ε ~ N(0, diag σ²) of every pair, [P, h]."""
        like, draws = self.total, self.core.generator
        n = torch.randn(like.shape, generator=draws, device=like.device, dtype=like.dtype)
        return self.sigma * n

    def inner_step(self, *batches: Batch) -> Metrics:
        """Take one step of every particle and one of the centre, all with the same masks."""
        (batch,), core = batches, self.core
        masks = core.generator.get_state()  # lies on the host, whatever the device
        if self.places:
            with core.services.phase("response"):
                self.explore(batch)
            core.generator.set_state(masks)
        if self.centre is None:
            loss = core.descend_inner(core.hypers(), batch)["inner_loss"]
        else:
            u0 = core.search.u0
            self.centre, loss = self.trajectory.step(self.centre, u0, batch, create_graph=False)
            core.watch(loss)
        self.losses.append(loss)
        return {"inner_loss": loss}

    def explore(self, batch: Batch) -> None:
        """Take one step of every particle at its place, each with the next masks."""
        core = self.core
        masks = core.generator.get_state()
        for i, (u, point) in enumerate(zip(self.places, self.particles, strict=True)):
            core.generator.set_state(masks)
            self.particles[i], _ = self.trajectory.step(point, u, batch, create_graph=False)
        self.age += 1
        core.data.train.count(len(self.particles) * count_examples(batch))

    def inner_ended(self) -> Metrics:
        """Write the central training back to the optimizer of w; return its mean loss."""
        if self.centre is not None:
            self.optimizer.write(self.centre.params, self.centre.moments)
            self.core.carry = self.centre.carry
        loss = torch.stack(self.losses).mean()
        self.centre, self.losses = None, []
        return {"inner_loss": loss}

    def here(self) -> InnerState:
        """Return where the central training stands."""
        return InnerState(*self.optimizer.read(), self.core.carry)

    # --- ĝ = 1/(2P) Σ_i σ⁻² ∘ ξ_i (L_i⁺ − L_i⁻) ---

    def differentiate(self, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        """Return L_V of the central weights, ĝ, and metrics of the particles' losses.

        Between rounds the particles have no loss of this round. They train on the next batches
        first, as many as a round has.
        """
        core = self.core
        if not self.places:
            self.perturb()
            masks = core.generator.get_state()
            for _ in range(self.settings.inner_steps):
                self.explore(*core.next_batches(["train"]))
            core.generator.set_state(masks)
        with torch.no_grad():
            at = zip(self.places, self.particles, strict=True)
            losses = torch.stack([self.judge(u, point, batch) for u, point in at])
            centre = self.judge(core.search.u0, self.here(), batch)
            core.data.valid.count(len(losses) * count_examples(batch))
            up, down = losses.chunk(2)
            kept = torch.isfinite(up - down)
            count = kept.sum().clamp(min=1)
            difference = torch.where(kept, up - down, 0.0)
            difference = difference.to(self.total.dtype)  # of a score in float64, for example
            gradient = (self.total * difference[:, None]).sum(0) / (2 * count * self.sigma**2)
            finite = torch.where(kept, torch.stack([up, down]), 0.0)
            deviation = torch.where(kept, finite - finite.sum() / (2 * count), 0.0)
        metrics = {
            "particle_spread": (deviation.square().sum() / (2 * count)).sqrt(),
            "lost_pairs": 1 - kept.to(losses.dtype).mean(),
        }
        return centre, gradient, metrics

    def judge(self, u: Tensor, point: InnerState, batch: Batch) -> Tensor:
        """Return L_V(λ(u), w) for a particle's w."""
        problem = self.core.problem
        carry = problem.fresh_carry(point.carry, batch)
        return problem.outer_loss(problem.space.constrain(u), point.params, carry, batch)[0]

    def outer_ended(self) -> Metrics:
        """Forget the places; forget the particles too unless they persist."""
        self.places = []
        if not self.settings.persistent:
            self.particles = []
        return {}

    # --- what the runner asks for ---

    def scales(self) -> Hypers:
        return self.core.problem.space.by_name(self.sigma.detach())

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        found = {}
        if metrics.get("lost_pairs", 0.0) > 0:
            found["lost_pairs"] = (
                f"EvolutionStrategies: {metrics['lost_pairs']:.0%} of the pairs of particles had a "
                f"loss that is not finite and were left out of the hypergradient; {_CALM}"
            )
        spread, loss = metrics.get("particle_spread", 0.0), metrics.get("outer_loss", math.inf)
        if spread > LARGE * abs(loss):
            found["particle_spread"] = (
                f"EvolutionStrategies: the losses of the particles vary by {spread:.3g}, and that "
                f"of the central weights is {loss:.3g}, so a few particles that nearly diverge "
                f"make the hypergradient; {_CALM}"
            )
        return found

    def before_dry_run(self) -> None:
        """Keep one pair; the others do the same."""
        self.total = self.total[:1]

    def state_dict(self) -> dict[str, Any]:
        particles = [
            {"params": p, "slots": m.slots, "steps": m.steps, "carry": c}
            for p, m, c in self.particles
        ]
        return {"particles": particles, "total": self.total, "age": self.age}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        points = to_device(state["particles"], self.core.device)
        self.particles = [
            InnerState(p["params"], Moments(p["slots"], p["steps"]), p["carry"]) for p in points
        ]
        self.total.copy_(state["total"])
        self.age, self.places = state["age"], []
