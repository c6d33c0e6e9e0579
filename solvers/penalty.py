"""A penalty method that needs gradients alone: F2SA.

Source: Kwon, Kwon, Wright & Nowak, ICML 2023 (arXiv 2301.10945), Algorithm 1.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel import Batch, BilevelError, Carry, Data, Metrics, Need, Params, Problem
from bilevel.params import count_examples, detached, to_device
from bilevel.solvers.base.explicit import Explicit
from bilevel.solvers.base.training import at_least
from bilevel.solvers.optim.optimized import (
    RMSPROP,
    SGD,
    MakeOptimizer,
    MakeScheduler,
    Optimized,
    descend,
)


class Penalty(Explicit):
    """min_{λ, y} L_V(λ, y) + σ (L_T(λ, y) − min_z L_T(λ, z)): what L_V may gain, it pays for in L_T.

        z descends L_T(λ, ·),    y descends L_V(λ, ·)/σ + L_T(λ, ·),
        λ descends ∂_λ L_V(λ, y) + σ (∂_λ L_T(λ, y) − ∂_λ L_T(λ, z))

    With both at their minima the last is the hypergradient up to O(1/σ); σ, the paper's λ_k, begins at `weight` and grows by
    `growth` after every round, up to `weight_max`, where a bias of O(1/weight_max) remains. An error of z or y counts σ-fold:
    σ should grow more slowly than they follow, and in float32 the difference of the two gradients loses its digits above 1e4.

    The two descend on the same batches with the same masks, and so do the two gradients of λ, so that their difference has no
    noise but that of y − z itself. The paper's direction of y, ∇L_V + σ∇L_T, is divided by σ: y's step size is then z's own,
    where the paper lets it fall as 1/σ. It moves by an optimizer of its own, which begins as z's does; one that normalizes its
    gradient (Adam, RMSprop) moves y and z apart by noise that σ multiplies. y descends during warm-up too, at the first σ, and
    looks at a validation batch at every inner step, which is counted.

    The weights of the solution are z: y has been trained on validation data, and would look better there than it is.

    Args:
        weight: σ in the first round.
        growth: what σ gains in a round, the paper's δ_k.
        weight_max: the largest σ.
        inner_steps: training batches per round.
        outer_steps: validation batches per round, for λ.
        inner_optimizer: for z and for y.
        inner_scheduler: learning-rate schedule of both, stepped every epoch.
        clip_norm: largest gradient norm of z, and of y.
        outer_optimizer: for u.

    Raises:
        BilevelError: a `weight` that is not positive, above `weight_max`, or a negative `growth`.

    Example:
        >>> from bilevel.problems import Quadratic
        >>> problem, device = Quadratic.random(seed=1), torch.device("cpu")
        >>> solver = Penalty()
        >>> solver.setup(problem, problem.data(device, torch.Generator()), device, torch.Generator())
        >>> solver.hypergradient().shape
        torch.Size([3])
    """

    needs = frozenset({Need.INNER_DERIVATIVE})
    penalized: Optimized
    """y."""
    penalized_carry: Carry
    sigma: float
    """σ of this round."""
    recent: tuple[Batch, Carry, Carry] | None = None
    """The last training batch, and the carries that z and y met it with."""

    def __init__(
        self,
        *,
        weight: float = 1.0,
        growth: float = 0.1,
        weight_max: float = 1e3,
        inner_steps: int = 5,
        outer_steps: int = 1,
        inner_optimizer: MakeOptimizer = SGD,
        inner_scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
        outer_optimizer: MakeOptimizer = RMSPROP,
    ) -> None:
        if not 0 < weight <= weight_max:
            raise BilevelError(
                f"weight={weight} does not lie in (0, weight_max={weight_max}]; choose one that does"
            )
        at_least(growth=growth, least=0)
        super().__init__(
            inner_steps=inner_steps,
            outer_steps=outer_steps,
            inner_optimizer=inner_optimizer,
            inner_scheduler=inner_scheduler,
            clip_norm=clip_norm,
            outer_optimizer=outer_optimizer,
        )
        self.weight, self.growth, self.weight_max = float(weight), growth, weight_max

    def inner_step(self, batch: Batch) -> Metrics:
        """z, then y, takes one step, on one training batch and with the same masks."""
        self.recent = batch, self.carry, self.penalized_carry
        self.data.train.count(count_examples(batch))  # which y looks at too
        masks = self.generator.get_state()  # lies on the host, whatever the device
        metrics = self.descend_inner(self.belief.centre, batch)
        self.generator.set_state(masks)
        with self.phase("response"):
            return metrics | {"penalized_loss": self.descend_penalized(batch)}

    def descend_penalized(self, batch: Batch) -> Tensor:
        """y takes one step on L_T + L_V/σ; that loss, []."""
        y = self.penalized.tensors
        hypers = self.problem.space.constrain(self.belief.centre, self.generator)
        inner, carry = self.problem.inner_loss(
            hypers, y, self.penalized_carry, batch, self.generator
        )
        valid = self.next_batch(self.data.valid)
        held = self.problem.space.constrain(self.belief.centre)
        with self._without_cudnn():
            outer, _ = self.problem.outer_loss(
                held, y, self.problem.fresh_carry(self.penalized_carry, valid), valid
            )
        loss = inner + outer / self.sigma
        self.watch(loss)
        descend(loss, self.penalized)
        self.penalized_carry = detached(carry)
        return loss.detach()

    def outer_phase(self) -> Metrics:
        metrics = super().outer_phase() | {
            "penalty_weight": torch.full((), self.sigma, device=self.device)
        }
        self.sigma = min(self.sigma + self.growth, self.weight_max)
        return metrics

    def differentiate(self, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        """L_V(λ, y) on `batch`, the hypergradient [h] on it and on the last training batch, and what was measured."""
        y, z = self.penalized.detached(), self.weights.detached()
        loss, _, direct = self.outer_gradients(batch, y, self.penalized_carry)
        training, z_carry, y_carry = self.recent or (
            self.data.train.peek(),
            self.carry,
            self.penalized_carry,
        )
        self.data.train.count(count_examples(training))
        masks = self.generator.get_state()
        of_y, at_y = self.inner_gradient(y, y_carry, training)
        self.generator.set_state(masks)
        of_z, at_z = self.inner_gradient(z, z_carry, training)
        return loss, direct + self.sigma * (at_y - at_z), {"inner_gap": of_y - of_z}

    def inner_gradient(self, params: Params, carry: Carry, batch: Batch) -> tuple[Tensor, Tensor]:
        """L_T and ∂_u L_T, [h]."""
        u = self.belief.u.detach().requires_grad_()
        loss, _ = self.problem.inner_loss(
            self.problem.space.constrain(u, self.generator), params, carry, batch, self.generator
        )
        if not loss.requires_grad:
            return loss, torch.zeros_like(u)
        return loss.detach(), torch.autograd.grad(loss, u, materialize_grads=True)[0]

    def respond(self, offset: Tensor) -> Params:
        """The weights y, as constants: `outer_loss` adds what they do to the hypergradient."""
        return self.penalized.detached()

    def doubts(self, metrics: Mapping[str, float]) -> dict[str, str]:
        if metrics.get("inner_gap", 0.0) >= 0:
            return {}
        return {
            "inner_gap": "Penalty: L_T is lower at y, which L_V pulls away, than at z, which should minimize it: z is far from "
            "its minimum, and the penalty multiplies what it lacks; take more inner_steps, or let the weight grow more slowly"
        }

    def build(
        self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator
    ) -> None:
        super().build(problem, data, device, generator)
        self.penalized = self.trained_with(self.weights.detached(), self.configured_optimizer)
        self.penalized_carry, self.sigma, self.recent = self.carry, self.weight, None

    def trained(self) -> dict[str, Optimized]:
        return super().trained() | {"penalized": self.penalized}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"penalized_carry": self.penalized_carry, "sigma": self.sigma}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.penalized_carry = to_device(state["penalized_carry"], self.device)
        self.sigma, self.recent = state["sigma"], None
