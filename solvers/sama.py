"""SAMA: the hypergradient of one inner step, from three gradients.

Source: Choe, Mehta, Ahn, Neiswanger, Xie, Strubell & Xing, NeurIPS 2023 (arXiv 2310.05674).
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel import Batch, BilevelError, Carry, Data, Metrics, Need, Problem
from bilevel.params import count_examples
from bilevel.solvers.autodiff.pullback import Pullback, flat, unflat
from bilevel.solvers.base.explicit import Explicit
from bilevel.solvers.optim.functional import FunctionalOptimizer, Moments, sgd
from bilevel.solvers.optim.optimized import RMSPROP, SGD, MakeOptimizer, MakeScheduler


class SAMA(Explicit):
    """λ follows what the next step w − s(g) of the inner optimizer, g = ∇_w L_T(λ, w), would do to L_V.

        dL_V/dλ ≈ ∂_λ L_V − (∂²L_T/∂λ∂w)ᵀ v    with    v = (∂s/∂g)ᵀ ∇_w L_V

    The base Jacobian is the identity: there is no solve. ∂s/∂g, the adaptation to the optimizer, is the learning rate for SGD,
    a diagonal for Adam, AdamW and RMSprop with their present memory, and whatever clipping makes of these. With SGD of rate η
    this takes ηI for the inverse Hessian. The mixed derivative is a central difference of first-order gradients on the last
    training batch of the round, under the same masks,

        (∂²L_T/∂λ∂w)ᵀ v ≈ (∂_λ L_T(λ, w + εv) − ∂_λ L_T(λ, w − εv)) / 2ε    with    ε = alpha/‖v‖

    whose error goes with alpha², and is none where ∂_λ L_T is quadratic in w. Across the kinks of a ReLU network it sees their
    curvature too, of which the exact derivative knows nothing.

    Bias: in a direction of curvature μ the indirect term is ημ of what it should be, so that it is short and turned, and weighs
    too little beside a direct term. Momentum m is counted for one step, though over all later steps it moves w by η/(1 − m).

    It differs from the authors' code in this: ∂s/∂g holds SGD's learning rate, Adam's bias correction and the derivative of its
    root exactly, and is taken at the gradient where w is now (a fourth pass, if s is not linear in g), not at the last step's.

    Args:
        alpha: ‖εv‖, how far w is displaced.
        finite_difference: False takes the exact mixed derivative, which needs second derivatives.
        inner_steps: training batches per round.
        outer_steps: validation batches per round.
        inner_optimizer: for w, one that has a twin (`bilevel.solvers.optim.functional`).
        inner_scheduler: its learning-rate schedule, stepped every epoch.
        clip_norm: largest gradient norm.
        outer_optimizer: for u.

    Raises:
        BilevelError: an `alpha` that is not positive.

    Example:
        >>> from bilevel.problems import Quadratic
        >>> problem, device = Quadratic.random(seed=1), torch.device("cpu")
        >>> solver = SAMA()
        >>> solver.setup(problem, problem.data(device, torch.Generator()), device, torch.Generator())
        >>> solver.hypergradient().shape
        torch.Size([3])
    """

    needs = frozenset({Need.INNER_DERIVATIVE})
    twin: FunctionalOptimizer
    recent: tuple[Batch, Carry] | None = None
    """The last training batch, and the carry that it was met with."""

    def __init__(
        self,
        *,
        alpha: float = 0.01,
        finite_difference: bool = True,
        inner_steps: int = 5,
        outer_steps: int = 1,
        inner_optimizer: MakeOptimizer = SGD,
        inner_scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
        outer_optimizer: MakeOptimizer = RMSPROP,
    ) -> None:
        if not 0 < alpha < math.inf:
            raise BilevelError(
                f"alpha={alpha} is no distance to displace w by; choose a positive one, small beside ‖w‖"
            )
        super().__init__(
            inner_steps=inner_steps,
            outer_steps=outer_steps,
            inner_optimizer=inner_optimizer,
            inner_scheduler=inner_scheduler,
            clip_norm=clip_norm,
            outer_optimizer=outer_optimizer,
        )
        self.alpha, self.finite_difference, self.subtracts = (
            alpha,
            finite_difference,
            finite_difference,
        )
        if not finite_difference:
            self.needs = self.needs | {Need.SECOND_DERIVATIVES}  # type: ignore[misc]  # of this one

    def inner_step(self, batch: Batch) -> Metrics:
        self.recent = batch, self.carry
        return super().inner_step(batch)

    def differentiate(self, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        """L_V on `batch`, the hypergradient [h] on it and on the last training batch, and what was measured."""
        loss, vector, direct = self.outer_gradients(batch, self.weights.detached(), self.carry)
        training, carry = self.recent or (self.data.train.peek(), self.carry)
        self.data.train.count(count_examples(training))
        product = self.difference if self.finite_difference else self.exact
        with self.phase("response"):
            indirect, metrics = product(vector, training, carry)
        return loss, direct - indirect, metrics

    def exact(self, vector: Tensor, batch: Batch, carry: Carry) -> tuple[Tensor, Metrics]:
        """(∂²L_T/∂λ∂w)ᵀ v, of one graph."""
        w = self.weights.detached()
        pull = Pullback(
            self.problem, self.belief.u, w, carry, [batch], self.generator, self.functions
        )
        return pull.cross(self.adapted(vector, pull.gradient)), {
            "inner_gradient_norm": pull.gradient_norm
        }

    def difference(self, vector: Tensor, batch: Batch, carry: Carry) -> tuple[Tensor, Metrics]:
        """(∂²L_T/∂λ∂w)ᵀ v by a central difference, all its passes with the same masks."""
        masks = self.generator.get_state()  # lies on the host, whatever the device
        metrics: Metrics = {}
        gradient, tiny = torch.zeros_like(vector), torch.finfo(vector.dtype).tiny
        if self.twin.update is not sgd or self.clip_norm is not None:
            gradient = self.inner_gradient(gradient, batch, carry, of="w")
            metrics["inner_gradient_norm"] = gradient.norm()
            self.generator.set_state(masks)
        v = self.adapted(vector, gradient)
        length = v.norm()
        displacement = v * (self.alpha / length.clamp_min(tiny))
        ahead = self.inner_gradient(displacement, batch, carry, of="u")
        self.generator.set_state(masks)
        behind = self.inner_gradient(-displacement, batch, carry, of="u")
        change = ahead - behind
        metrics["relative_difference"] = change.norm() / (ahead.norm() + behind.norm()).clamp_min(
            tiny
        )
        return change * (length / (2 * self.alpha)), metrics

    def inner_gradient(
        self, displacement: Tensor, batch: Batch, carry: Carry, *, of: Literal["w", "u"]
    ) -> Tensor:
        """The gradient of L_T in w, [m], or in u, [h], at w + displacement."""
        shifts = unflat(displacement, self.weights.leaves)
        params = {
            name: w + shift
            for (name, w), shift in zip(self.weights.detached().items(), shifts, strict=True)
        }
        u = self.belief.u.detach()
        wanted = [x.requires_grad_() for x in (params.values() if of == "w" else [u])]
        hypers = self.problem.space.constrain(u, self.generator)
        loss, _ = self.problem.inner_loss(hypers, params, carry, batch, self.generator)
        if not loss.requires_grad:  # λ acts on L_V alone
            return torch.zeros_like(u)
        return flat(torch.autograd.grad(loss, wanted, materialize_grads=True))

    def adapted(self, vector: Tensor, gradient: Tensor) -> Tensor:
        """(∂s/∂g)ᵀ vector at g = gradient, [m] all, with the optimizer's memory as it is; it stays so."""
        leaves = self.weights.leaves
        g = [part.requires_grad_() for part in unflat(gradient.detach(), leaves)]
        settings = self.twin.settings(self.problem.space.constrain(self.belief.centre))
        slots = self.twin.slots()
        memory = Moments(slots, dict.fromkeys(slots, self.inner_count))
        after, _ = self.twin.step(self.weights.detached(), memory, g, settings)
        return -flat(torch.autograd.grad(list(after.values()), g, unflat(vector, leaves)))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.recent = None

    def doubts(self, metrics: Mapping[str, float]) -> dict[str, str]:
        relative = metrics.get("relative_difference", 1.0)
        if not 0 < relative < 100 * torch.finfo(self.belief.u.dtype).eps:
            return {}
        return {
            "alpha": f"SAMA: the two gradients of the finite difference differ by {relative:.1g} of themselves, which is no "
            "more than rounding; raise alpha, or set finite_difference=false"
        }

    def build(
        self, problem: Problem, data: Data, device: torch.device, generator: torch.Generator
    ) -> None:
        super().build(problem, data, device, generator)
        self.twin, self.recent = FunctionalOptimizer(self.weights, problem.space), None
