"""Self-tuning networks: STN, centered STN and Δ-STN as three flags of one solver.

Notation (papers → code): λ in unconstrained coordinates u, held at u₀ (`belief.centre`); ε ~ N(0, diag σ²); w₀ (`weights`) the
base weights; Θ (`theta`) the best-response Jacobian, ΔW(ε) = Θε.

Sources: MacKay et al., ICLR 2019 (STN); Bae & Grosse, NeurIPS 2020 (Δ-STN). Departures from the official code are listed in
docs/decisions.md.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel import (
    Batch,
    BilevelError,
    Carry,
    Data,
    Hypers,
    Metrics,
    Params,
    Prediction,
    Problem,
    Space,
)
from bilevel.params import count_examples, detached, to_device
from bilevel.requirements import check_space
from bilevel.solver import on_cpu
from bilevel.solvers.autodiff.linearization import double_backward, forward_mode
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.base.dry_run import check_response, largest, units, without_last
from bilevel.solvers.optim.optimized import (
    RMSPROP,
    SGD,
    MakeOptimizer,
    MakeScheduler,
    Optimized,
    descend,
)
from bilevel.solvers.response.jacobian import Dense, Response, Structured

MOST_DIRECTIONS = 500
"""Coordinates of λ above which a response is doubted: each step shows it one of so many directions."""


class SelfTuning(Descent):
    """A network that answers how it would have been trained under other hyperparameters, and so tunes them while it trains.

    | | centered | regularized_w0 | linearize |
    |---|---|---|---|
    | Δ-STN | yes | yes | yes |
    | centered STN | yes | yes | no |
    | STN | no | no | no |

    Args:
        centered: the response is taken at ε = u − u₀; otherwise at u.
        regularized_w0: w₀ takes its own step, unperturbed, and Θ its own, w₀ held; otherwise one joint step under perturbed λ.
        linearize: Θ is fitted through the prediction linearized at w₀, under the convex objective (needs `centered`).
        response: how Θ is held; `Structured()` by default.
        inner_steps: training batches per round (the paper's T_train).
        outer_steps: validation batches per round (T_valid).
        inner_optimizer: for w₀.
        response_optimizer: for Θ; as for w₀ by default.
        inner_scheduler: learning-rate schedule of both, stepped every epoch.
        clip_norm: largest gradient norm of w₀, and of Θ.
        outer_optimizer: for u.
        scale_optimizer: for s, σ = softplus(s).
        tune_scale: whether σ is tuned; otherwise the outer phase draws no perturbation.
        entropy_weight: τ.

    Raises:
        BilevelError: `linearize` without `centered`.
    """

    theta: Optimized
    response_carry: Carry
    perturbs = True

    def __init__(
        self,
        *,
        centered: bool = True,
        regularized_w0: bool = True,
        linearize: bool = True,
        response: Response | None = None,
        inner_steps: int = 5,
        outer_steps: int = 1,
        inner_optimizer: MakeOptimizer = SGD,
        response_optimizer: MakeOptimizer | None = None,
        inner_scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
        outer_optimizer: MakeOptimizer = RMSPROP,
        scale_optimizer: MakeOptimizer = RMSPROP,
        tune_scale: bool = True,
        entropy_weight: float = 1e-3,
    ) -> None:
        if linearize and not centered:
            raise BilevelError(
                "linearize=true needs centered=true: the linearization at w₀ is only close where the response is small, and an "
                "uncentered response is taken at u, however large; set linearize=false or centered=true"
            )
        super().__init__(
            inner_steps=inner_steps,
            outer_steps=outer_steps,
            inner_optimizer=inner_optimizer,
            inner_scheduler=inner_scheduler,
            clip_norm=clip_norm,
            outer_optimizer=outer_optimizer,
            scale_optimizer=scale_optimizer if tune_scale else None,
            entropy_weight=entropy_weight,
        )
        self.centered, self.regularized_w0, self.linearize = centered, regularized_w0, linearize
        self.response = copy.copy(response) if response is not None else Structured()
        self.per_example = self.response.per_example
        self.response_optimizer = response_optimizer or inner_optimizer

    def beside(self) -> Params:
        return {f"Θ of {name}": tensor for name, tensor in self.theta.detached().items()}

    def memory_settings(self, space: Space) -> list[str]:
        dense = (
            ["response=null (Dense holds Θ as h copies of w)"]
            if isinstance(self.response, Dense)
            else []
        )
        return [*dense, f"fewer hyperparameters (now h = {space.numel}, and Θ grows with it)"]

    # --- one training batch ---

    def inner_step(self, batch: Batch) -> Metrics:
        return self.separate_step(batch) if self.regularized_w0 else self.joint_step(batch)

    def separate_step(self, batch: Batch) -> Metrics:
        """w₀ descends L_T(λ₀, w₀); then Θ descends E_ε L_T(λ₀ + ε, w₀ + Θε) with w₀ held where that step left it."""
        hypers = self.problem.space.constrain(self.belief.centre, self.generator)
        loss, carry = self.problem.inner_loss(
            hypers, self.unperturbed_weights(), self.carry, batch, self.generator
        )
        descend(loss, self.weights)
        with self.phase("response"):
            response_loss, response_carry = self.perturbed_loss(
                self.weights.detached(), self.response_carry, batch
            )
            descend(response_loss, self.theta)
        self.watch(loss + response_loss.detach())
        # Statistics are those of the pass that trains w₀; recurrent state is kept apart for the two passes.
        self.carry, self.response_carry = detached(carry), response_carry
        return {"inner_loss": loss.detach(), "response_loss": response_loss.detach()}

    def joint_step(self, batch: Batch) -> Metrics:
        """(w₀, Θ) descend E_ε L_T(λ₀ + ε, w₀ + Θ·offset) together."""
        loss, carry = self.perturbed_loss(self.weights.tensors, self.carry, batch)
        descend(loss, self.weights, self.theta)
        self.watch(loss)
        self.carry = self.response_carry = carry
        return {"inner_loss": loss.detach()}

    def unperturbed_weights(self) -> Params:
        """w₀ itself; uncentered, the effective weights φ + Θu₀ with Θ held."""
        if self.centered:
            return self.weights.tensors
        return self.response.weights(
            self.theta.detached(), self.weights.tensors, self.belief.centre, tangent=False
        )

    def perturbed_loss(self, base: Params, carry: Carry, batch: Batch) -> tuple[Tensor, Carry]:
        """L_T at λ₀ + ε and w₀ + Θ·offset, on the network's prediction or on its linearization at w₀."""
        noise = self.belief.perturbation(count_examples(batch), self.generator)
        perturbed = self.belief.centre + noise
        offset = noise if self.centered else perturbed
        hypers = self.problem.space.constrain(perturbed, self.generator)
        params = self.response.weights(self.theta.tensors, base, offset, tangent=False)
        if self.linearize:
            prediction, carry = self.linearized(hypers, base, offset, carry, batch)
        else:
            prediction, carry = self.problem.predict(
                hypers, params, carry, batch, train=True, generator=self.generator
            )
        return self.problem.inner_objective(hypers, params, prediction, batch), detached(carry)

    def linearized(
        self, hypers: Hypers, base: Params, offset: Tensor, carry: Carry, batch: Batch
    ) -> tuple[Prediction, Carry]:
        """y₀ + ẏ with y₀ = f(x; λ₀ + ε, w₀) and ẏ = J_w f · Θε: in forward mode where w₀ is held, which is cheap."""

        def predict(params: Params) -> tuple[Prediction, Carry]:
            return self.problem.predict(
                hypers, params, carry, batch, train=True, generator=self.generator
            )

        weights = partial(self.response.weights, self.theta.tensors, base)
        if self.regularized_w0:
            return forward_mode(predict, weights, offset, self.functions)
        return double_backward(predict, weights, offset)

    # --- the outer phase ---

    def respond(self, offset: Tensor) -> Params:
        """ŵ = w₀ + Θ(u − u₀ + ε), or φ + Θ(u + ε): never linearized, w₀ and Θ constants."""
        at = offset if self.centered else self.belief.centre + offset
        return self.response.weights(
            self.theta.detached(), self.weights.detached(), at, tangent=False
        )

    def effective_weights(self) -> Params:
        return detached(self.unperturbed_weights())

    def doubts(self, metrics: Mapping[str, float]) -> dict[str, str]:
        h, weights = self.problem.space.numel, sum(leaf.numel() for leaf in self.weights.leaves)
        if h <= MOST_DIRECTIONS:
            return {}
        numbers = sum(leaf.numel() for leaf in self.theta.leaves)
        size = numbers * self.theta.leaves[0].element_size()
        return {
            "response": f"SelfTuning: λ has {h:,} coordinates (most of them `{largest(self.problem.space)}`), and the response "
            f"holds {numbers:,} numbers ({units(size)}), {round(numbers / weights):,} for each weight, of which a "
            "step learns what one random direction of λ shows; share the hyperparameter, or tune it with a solver whose memory "
            "does not grow with λ so fast (implicit, SAMA, unrolled)"
        }

    # --- set-up and state ---

    def build(
        self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator
    ) -> None:
        super().build(problem, data, device, generator)
        self.response_carry = self.carry
        theta = self.response.init(
            self.weights.detached(), problem.space.numel, self.calls.axes, on_cpu(generator, 1)
        )
        self.theta = self.trained_with(theta, self.response_optimizer)

    def check(self, problem: Problem, data: Data, device: torch.device) -> None:
        """Refuse what has nothing to tune, what would not fit in memory, and a network with a function that cannot respond."""
        check_space(
            type(self).__name__, problem.space, self.needs, tunes_optimizer=False
        )  # before what may not fit is built
        check_response(problem, self.response, device)
        super().check(problem, data, device)

    def lacking(self) -> str | None:
        if not self.linearize:
            return None
        return (
            "linearize=true needs derivatives that PyTorch lacks for a layer of this network ({said}); compose that layer from "
            "elementary operations, or set linearize=false (centered STN)"
        )

    def rehearse(self) -> None:
        train, valid = self.data.train.peek(), self.data.valid.peek()
        self.rehearse_on(train, valid)
        if (
            self.response.per_example
            and bool(self.problem.space.per_example.any())
            and not self.carry
        ):
            # one example fewer: a network that moves the example axis to one of equal length is then found out
            self.rehearse_on(without_last(train), without_last(valid))

    def rehearse_on(self, train: Batch, valid: Batch) -> None:
        """Every pass of a round once; nothing is updated."""
        hypers = self.problem.space.constrain(self.belief.centre, self.generator)
        loss, _ = self.problem.inner_loss(
            hypers, self.unperturbed_weights(), self.carry, train, self.generator
        )
        torch.autograd.grad(loss, self.weights.leaves, allow_unused=True)
        loss, _ = self.perturbed_loss(self.weights.tensors, self.carry, train)
        trained = (
            self.theta.leaves if self.regularized_w0 else self.theta.leaves + self.weights.leaves
        )
        torch.autograd.grad(loss, trained, allow_unused=True)
        torch.autograd.grad(self.outer_loss(valid), [self.belief.u], allow_unused=True)

    def uncapturable(self) -> str | None:
        return None

    def trained(self) -> dict[str, Optimized]:
        return super().trained() | {"theta": self.theta}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"response_carry": self.response_carry}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.response_carry = to_device(state["response_carry"], self.device)
