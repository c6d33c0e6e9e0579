"""The search distribution N(u, diag σ²) of λ, in unconstrained coordinates."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import Hypers, Params, Space
from bilevel.domains import softplus_inverse
from bilevel.half_weights import wide
from bilevel.solvers.optim.optimized import MakeOptimizer, MakeScheduler, Optimized


class SearchDistribution:
    """N(u, diag σ²) with σ = softplus(s); an outer phase moves u, while u₀ stays where u began.

    Args:
        space: the hyperparameters.
        optimizer: for u.
        scheduler: makes the learning-rate schedules of u and s; None for none.
        like: a weight, for device and dtype; u and σ are in float32 at least.

    Attributes:
        mean: u and its optimizer.
        u: [h], the mean.
        u0: [h], u₀: the value of u when the outer phase began.
        scale: s and its optimizer, after `train_scale`; before, σ stays as it is and an outer step
            draws no perturbation.
    """

    def __init__(
        self,
        space: Space,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        *,
        like: Tensor,
    ) -> None:
        self.space = space
        self._scheduler = scheduler
        kind = wide(like.dtype)
        self.mean = self._optimized({"u": space.init(kind).to(like.device)}, optimizer)
        self.u = self.mean.tensors["u"]
        self.u0 = self.u.detach().clone()
        self.scale: Optimized | None = None
        self._fixed_s = softplus_inverse(space.initial_scales()).to(self.u)
        self._most_s: float | None = None
        self._per_example: Tensor | None = None

    def train_scale(self, optimizer: MakeOptimizer, most: float | None = None) -> None:
        """Train s, and so σ, beside u; σ is at most `most`, if that is given."""
        if most is not None:
            self._most_s = float(softplus_inverse(torch.tensor(most, dtype=torch.float64)))
        self.scale = self._optimized({"s": self._fixed_s}, optimizer)
        self.cap_scale()

    @torch.no_grad()
    def cap_scale(self) -> None:
        """Lower σ to its largest value, in place, where a step of s has passed it."""
        if self._most_s is not None and self.scale is not None:
            self.scale.tensors["s"].clamp_(max=self._most_s)

    def _optimized(self, tensors: Params, optimizer: MakeOptimizer) -> Optimized:
        made = Optimized(tensors, optimizer, self._scheduler)
        if made.scheduler is not None:
            # without gradients this step changes nothing; a schedule that steps in warm-up warns
            # of an optimizer without a step
            made.optimizer.step()
        return made

    def vary_per_example(self) -> None:
        """Draw one perturbation for each example where the space allows that."""
        if bool(self.space.per_example.any()):
            self._per_example = self.space.per_example.to(self.u.device)

    @property
    def varies_per_example(self) -> bool:
        """Return whether a perturbation varies from example to example."""
        return self._per_example is not None

    @property
    def s(self) -> Tensor:
        """[h], σ = softplus(s)."""
        return self._fixed_s if self.scale is None else self.scale.tensors["s"]

    @property
    def sigma(self) -> Tensor:
        """[h], the standard deviation of every coordinate."""
        return F.softplus(self.s)

    def noise(self, examples: int, generator: torch.Generator) -> Tensor:
        """Return standard normal numbers, [B, h], or [h] if no coordinate varies within a batch.

        A coordinate that may not vary within a batch has one value for all examples.
        """
        size = (1 if self._per_example is None else examples, self.u.numel())
        n = torch.randn(size, generator=generator, device=self.u.device, dtype=self.u.dtype)
        return n[0] if self._per_example is None else torch.where(self._per_example, n, n[:1])

    def perturbation(self, examples: int, generator: torch.Generator) -> Tensor:
        """Return ε ~ N(0, diag σ²) as a constant, for an inner step."""
        return self.sigma.detach() * self.noise(examples, generator)

    def offset(self, examples: int, generator: torch.Generator) -> Tensor:
        """Return δ = u − u₀ + ε for an outer step, differentiable in u and s; ε = 0 for fixed σ."""
        moved = self.u - self.u0
        return moved if self.scale is None else moved + self.sigma * self.noise(examples, generator)

    def entropy(self) -> Tensor:
        """Return H[N(u, diag σ²)] = Σ_k log(σ_k √(2πe)), in nats."""
        return torch.log(self.sigma).sum() + 0.5 * self.u.numel() * math.log(2 * math.pi * math.e)

    def trained(self) -> list[Optimized]:
        """Return the tensors that an outer step trains: u, and s if σ is tuned."""
        return [self.mean] if self.scale is None else [self.mean, self.scale]

    def displace(self, offset: Tensor) -> None:
        """Move u and u₀ by `offset`, [h]."""
        with torch.no_grad():
            self.u.add_(offset.to(self.u))
            self.u0.add_(offset.to(self.u0))

    def recentre(self) -> None:
        """Set u₀ ← u, at the end of an outer phase."""
        self.u0.copy_(self.u.detach())

    def scales(self) -> Hypers:
        """Return σ by hyperparameter."""
        return self.space.by_name(self.sigma.detach())

    def state_dict(self) -> dict[str, Any]:
        """Return u, s, u₀ and the state of both optimizers."""
        scale = None if self.scale is None else self.scale.state_dict()
        return {"mean": self.mean.state_dict(), "scale": scale, "u0": self.u0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.mean.load_state_dict(state["mean"])
        if self.scale is not None:
            self.scale.load_state_dict(state["scale"])
        self.u0.copy_(state["u0"])
