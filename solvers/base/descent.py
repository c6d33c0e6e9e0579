"""The one outer loop: train near λ₀, then descend L_V(λ, ŵ(λ)), with ŵ whatever the solver answers, differentiable in λ."""

import copy
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bilevel import Batch, Carry, Data, Hypers, Metrics, Need, Params, Problem, Solution
from bilevel.params import count_examples, detached, to_device
from bilevel.solvers.autodiff.decompositions import RECURRENT
from bilevel.solvers.autodiff.pullback import Pullback, flat
from bilevel.solvers.base.dry_run import peeking, refusals
from bilevel.solvers.base.search_distribution import Belief
from bilevel.solvers.base.training import Training, at_least
from bilevel.solvers.optim.optimized import MakeOptimizer, MakeScheduler, descend
from bilevel.solvers.response.jacobian import CallRecorder


class Descent(Training):
    """Rounds of `inner_steps` updates of w (and of what answers ŵ) and `outer_steps` updates of λ.

    A subclass answers ŵ(u₀ + offset) in `respond`, and may train more than w in `inner_step`; direct and indirect terms of the
    hypergradient then add up by autograd itself:

        dL_V/du = ∂_λ L_V · dλ/du + ∂_w L_V · dŵ/du

    Attributes:
        belief: u, u₀, σ and their optimizers.
        functions: the torch functions that the network calls, as one pass at set-up saw them.
        last_outer_carry: what the last outer batch ended with; a problem may go on from there (`Problem.outer_carry`).
        recurrent: whether the network has fused recurrent layers, which cuDNN does not differentiate in evaluation mode.
        per_example: whether ŵ can follow a perturbation that varies within a batch.
        perturbs: whether it draws λ from the belief at all; σ means nothing to the others.
    """

    belief: Belief
    functions: set[Any]
    last_outer_carry: Carry | None = None
    recurrent: bool = False
    per_example: bool = False
    perturbs: bool = False

    def __init__(
        self,
        *,
        inner_steps: int,
        inner_optimizer: MakeOptimizer,
        inner_scheduler: MakeScheduler | None,
        clip_norm: float | None,
        outer_optimizer: MakeOptimizer,
        outer_steps: int = 1,
        scale_optimizer: MakeOptimizer | None = None,
        entropy_weight: float = 0.0,
    ) -> None:
        super().__init__(
            inner_steps=inner_steps,
            inner_optimizer=inner_optimizer,
            inner_scheduler=inner_scheduler,
            clip_norm=clip_norm,
        )
        at_least(outer_steps=outer_steps, least=1)
        at_least(entropy_weight=entropy_weight, least=0)
        self.outer_steps, self.outer_optimizer, self.scale_optimizer = (
            outer_steps,
            outer_optimizer,
            scale_optimizer,
        )
        self.entropy_weight = entropy_weight

    def inner_step(self, batch: Batch) -> Metrics:
        """w descends L_T(λ₀, ·)."""
        return self.descend_inner(self.belief.centre, batch)

    @abstractmethod
    def respond(self, offset: Tensor) -> Params:
        """ŵ(u₀ + offset), differentiable in offset [h] or [B, h] alone."""

    def outer_phase(self) -> Metrics:
        metrics: Metrics = {}
        for _ in range(self.outer_steps):
            self.outer_count += 1
            metrics = self.take(self.outer_step, self.next_batch(self.data.valid))
        self.belief.recentre()
        return metrics

    def outer_step(self, batch: Batch) -> Metrics:
        """(u, s) descend L_V(λ(u₀ + δ), ŵ(u₀ + δ)) − τ H[N(u, σ²)], with δ = u − u₀ + ε and dropout and augmentation off.

        Where σ is not tuned there is neither ε nor entropy.
        """
        loss = self.outer_loss(batch)
        self.watch(loss)
        metrics, objective = {"outer_loss": loss.detach()}, loss
        if self.belief.tune_scale:
            entropy = self.belief.entropy()
            metrics["entropy"], objective = entropy.detach(), loss - self.entropy_weight * entropy
        gradient = descend(objective, *self.belief.trained())[0]
        return metrics if gradient is None else metrics | {"hypergradient_norm": gradient.norm()}

    def hypergradient(self, batch: Batch | None = None) -> Tensor:
        """dL_V/du, [h], as an outer step would follow it on `batch` (by default the next one of validation); u stays.

        Example:
            >>> from bilevel import solvers
            >>> from bilevel.problems import Quadratic
            >>> problem, device = Quadratic.random(seed=1), torch.device("cpu")
            >>> solver = solvers.delta_stn()
            >>> solver.setup(problem, problem.data(device, torch.Generator()), device, torch.Generator())
            >>> solver.hypergradient().shape
            torch.Size([3])
        """
        loss = self.outer_loss(self.data.valid.next() if batch is None else batch)
        return torch.autograd.grad(loss, self.belief.u, materialize_grads=True)[0]

    def outer_loss(self, batch: Batch) -> Tensor:
        """L_V(λ(u₀ + δ), ŵ(u₀ + δ)) with a fresh draw of δ."""
        offset = self.belief.offset(count_examples(batch), self.generator)
        hypers = self.problem.space.constrain(self.belief.centre + offset)
        carry = self.problem.outer_carry(self.carry, self.last_outer_carry, batch)
        with self._without_cudnn():
            loss, last = self.problem.outer_loss(hypers, self.respond(offset), carry, batch)
        self.last_outer_carry = detached(last)
        return loss

    def outer_gradients(
        self, batch: Batch, params: Params, carry: Carry
    ) -> tuple[Tensor, Tensor, Tensor]:
        """L_V(λ(u), w), ∇_w L_V [m] and ∂_u L_V [h] at `params` and u as they are, for a solver that adds ŵ's part itself."""
        w = {name: p.detach().requires_grad_() for name, p in params.items()}
        hypers = self.problem.space.constrain(self.belief.u)
        with self._without_cudnn():
            loss, _ = self.problem.outer_loss(
                hypers, w, self.problem.fresh_carry(carry, batch), batch
            )
        *gradients, direct = torch.autograd.grad(
            loss, [*w.values(), self.belief.u], materialize_grads=True
        )
        return loss.detach(), flat(gradients), direct

    def _without_cudnn(self) -> AbstractContextManager[Any]:
        return torch.backends.cudnn.flags(enabled=False) if self.recurrent else nullcontext()

    def setup(
        self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator
    ) -> None:
        self.check(problem, data, device)
        self.build(problem, data, device, generator)

    def build(
        self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator
    ) -> None:
        """All state, without the checks."""
        super().setup(problem, data, device, generator)
        like = self.weights.leaves[0]
        self.belief = Belief(
            problem.space,
            self.outer_optimizer,
            self.scale_optimizer,
            per_example=self.per_example,
            like=like,
        )
        hypers, draws = (
            problem.space.constrain(self.belief.centre),
            torch.Generator(generator.device).manual_seed(0),
        )
        self.calls = CallRecorder(
            problem, hypers, self.weights.detached(), self.carry, data.train.peek(), draws
        )
        self.functions, self.recurrent = (
            self.calls.functions,
            not self.calls.functions.isdisjoint(RECURRENT),
        )

    def check(self, problem: Problem, data: Data, device: torch.device) -> None:
        """Besides what the space says, refuse a problem on which a round cannot run: it is tried, on a copy."""
        super().check(problem, data, device)
        trial = copy.copy(self)
        trial.first_bad_step = None
        with refusals(self.lacking()):
            trial.build(problem, peeking(data), device, torch.Generator(device).manual_seed(0))
            trial.rehearse()

    def rehearse(self) -> None:
        """What a round does, so that what cannot run fails at set-up."""
        self.step(limit=2)
        if Need.SECOND_DERIVATIVES in self.needs:
            u, params, batch = self.belief.centre, self.weights.detached(), self.data.train.peek()
            Pullback(
                self.problem, u, params, self.carry, [batch], self.generator, self.functions
            ).check()

    def lacking(self) -> str | None:
        """The sentence for a layer without a derivative that this solver needs, with {said} for what PyTorch says; None where
        it needs none but the gradient.
        """
        if Need.SECOND_DERIVATIVES not in self.needs:
            return None
        return (
            f"{type(self).__name__} needs {Need.SECOND_DERIVATIVES.value}, which PyTorch lacks for a layer of this network "
            "({said}); compose that layer from elementary operations, or use a solver that needs the gradient alone "
            "(self-tuning, SAMA, penalty, evolution strategies, black box)"
        )

    def solution(self) -> Solution:
        with torch.no_grad():
            hypers = self.problem.space.constrain(self.belief.centre)
            return Solution(hypers, self.effective_weights(), self.carry)

    def effective_weights(self) -> Params:
        """The weights that go with λ₀."""
        return self.weights.detached()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return super().optimizers() + [group.optimizer for group in self.belief.trained()]

    def scales(self) -> Hypers:
        return self.belief.scales() if self.perturbs else {}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "belief": self.belief.state_dict(),
            "last_outer_carry": self.last_outer_carry,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.belief.load_state_dict(state["belief"])
        self.last_outer_carry = to_device(state["last_outer_carry"], self.device)
