"""What is believed of λ: a Gaussian N(u, diag σ²) in unconstrained coordinates, centred at u₀ while an outer phase lasts."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import Hypers, Space
from bilevel.domains import softplus_inverse
from bilevel.solvers.optim.optimized import MakeOptimizer, Optimized


class Belief:
    """N(u, diag σ²) with σ = softplus(s); u and s are trained, each by an optimizer of its own.

    Args:
        space: the hyperparameters.
        optimizer: for u.
        scale_optimizer: for s, or None where σ stays as it began; then an outer step draws no perturbation.
        per_example: whether the response can follow a perturbation that varies within a batch.
        like: a weight, for device and dtype.

    Attributes:
        centre: u₀, [h]: u as it was when the outer phase began.
    """

    def __init__(
        self,
        space: Space,
        optimizer: MakeOptimizer,
        scale_optimizer: MakeOptimizer | None,
        *,
        per_example: bool,
        like: Tensor,
    ) -> None:
        self.space = space
        self.mean = Optimized({"u": space.init(like.dtype).to(like)}, optimizer)
        self.u = self.mean.tensors["u"]
        self.centre = self.u.detach().clone()
        self.tune_scale = scale_optimizer is not None
        self._fixed_s = softplus_inverse(space.initial_scales()).to(like)
        self.spread = (
            Optimized({"s": self._fixed_s}, scale_optimizer)
            if scale_optimizer is not None
            else None
        )
        self._per_example = (
            space.per_example.to(like.device)
            if per_example and bool(space.per_example.any())
            else None
        )

    @property
    def s(self) -> Tensor:
        """[h], σ = softplus(s)."""
        return self._fixed_s if self.spread is None else self.spread.tensors["s"]

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of every coordinate: [h]."""
        return F.softplus(self.s)

    def noise(self, examples: int, generator: torch.Generator) -> Tensor:
        """Standard normal, [B, h], with one value for the whole batch in per-batch coordinates; [h] where all are per batch."""
        rows = 1 if self._per_example is None else examples
        n = torch.randn(
            rows, self.u.numel(), generator=generator, device=self.u.device, dtype=self.u.dtype
        )
        return n[0] if self._per_example is None else torch.where(self._per_example, n, n[:1])

    def perturbation(self, examples: int, generator: torch.Generator) -> Tensor:
        """ε ~ N(0, diag σ²) as a constant: what the inner phase perturbs λ₀ by."""
        return self.sigma.detach() * self.noise(examples, generator)

    def offset(self, examples: int, generator: torch.Generator) -> Tensor:
        """u − u₀ + ε, differentiable in u and s: where the outer phase looks; ε only where σ is tuned."""
        moved = self.u - self.centre
        return moved + self.sigma * self.noise(examples, generator) if self.tune_scale else moved

    def entropy(self) -> Tensor:
        """H[N(u, diag σ²)] = Σ_k log(σ_k √(2πe)), in nats."""
        return torch.log(self.sigma).sum() + 0.5 * self.u.numel() * math.log(2 * math.pi * math.e)

    def trained(self) -> list[Optimized]:
        """What an outer step descends."""
        return [self.mean] if self.spread is None else [self.mean, self.spread]

    def recentre(self) -> None:
        """u₀ ← u, at the end of an outer phase."""
        self.centre.copy_(self.u.detach())

    def scales(self) -> Hypers:
        """σ by hyperparameter."""
        return self.space.by_name(self.sigma.detach())

    def state_dict(self) -> dict[str, Any]:
        """u, s, u₀ and both optimizers."""
        spread = None if self.spread is None else self.spread.state_dict()
        return {"mean": self.mean.state_dict(), "spread": spread, "centre": self.centre}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.mean.load_state_dict(state["mean"])
        if self.spread is not None:
            self.spread.load_state_dict(state["spread"])
        self.centre.copy_(state["centre"])
