"""SAMA: the hypergradient of one inner step, from three gradients.

Source: Choe, Mehta, Ahn, Neiswanger, Xie, Strubell & Xing, NeurIPS 2023 (arXiv 2310.05674).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from bilevel import Batch, Carry, Metrics, Need
from bilevel.params import count_examples
from bilevel.requirements import Trait
from bilevel.solvers.autodiff.pullback import Pullback, flat, unflat
from bilevel.solvers.base.core import Core
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.base.method import WrittenHypergradient
from bilevel.solvers.linear_solve.half_products import widened
from bilevel.solvers.optim.functional import FunctionalOptimizer, Moments
from bilevel.solvers.optim.updates import sgd
from bilevel.validate import positive


@dataclass(kw_only=True, eq=False)
class SAMA(Descent):
    """λ follows the effect on L_V of the next step w − s(g) of the inner optimizer, g = ∇_w L_T.

        dL_V/dλ ≈ ∂_λ L_V − (∂²L_T/∂λ∂w)ᵀ v    with    v = (∂s/∂g)ᵀ ∇_w L_V

    The base Jacobian is the identity, so there is no solve. ∂s/∂g is the adaptation to the inner
    optimizer, one of SGD, Adam, AdamW and RMSprop: the learning rate for SGD, a diagonal for the
    others with their present memory, and the effect of clipping on these. With SGD of rate η this
    takes ηI for the inverse Hessian. The mixed derivative is a central difference of first-order
    gradients, on the last training batch of the round and under the same masks,

        (∂²L_T/∂λ∂w)ᵀ v ≈ (∂_λ L_T(λ, w + εv) − ∂_λ L_T(λ, w − εv)) / 2ε    with    ε = alpha/‖v‖

    Its error is proportional to alpha², and zero where ∂_λ L_T is quadratic in w. In a ReLU network
    it includes the curvature of the kinks, which the exact derivative leaves out.

    Bias: in a direction of curvature μ the indirect term is ημ times its true size. So it is short
    and turned, and weighs too little against a direct term. Momentum m counts for one step, though
    over all later steps it moves w by η/(1 − m).

    Difference from the authors' code: ∂s/∂g has SGD's learning rate, Adam's bias correction and the
    derivative of its root exactly. It is taken at the gradient at the present w, not at that of the
    last step; this is a fourth pass if s is not linear in g.

    Attributes:
        alpha: ‖εv‖, the displacement of w.
        finite_difference: False takes the exact mixed derivative, by second derivatives.

    Raises:
        BilevelError: `alpha` is not positive.

    Example:
        >>> from bilevel.problems import Quadratic
        >>> problem, device = Quadratic.random(seed=1), torch.device("cpu")
        >>> solver = SAMA()
        >>> data = problem.data(device, torch.Generator())
        >>> solver.setup(problem, data, device, torch.Generator())
        >>> solver.hypergradient().shape
        torch.Size([3])
    """

    alpha: float = 0.01
    finite_difference: bool = True

    def start(self, core: Core) -> "SAMAMethod":
        """Return the method before its first batch."""
        return SAMAMethod(self, core)

    def check_settings(self) -> None:
        positive("choose a displacement of w that is small beside ‖w‖", alpha=self.alpha)
        self.needs = frozenset({Need.OUTER_DERIVATIVE, Need.INNER_DERIVATIVE})
        if self.finite_difference:
            self.traits = frozenset({Trait.SUBTRACTS})
        else:
            self.needs |= {Need.SECOND_DERIVATIVES}


class SAMAMethod(WrittenHypergradient):
    """Plain training of w, and three gradients per outer step.

    Attributes:
        optimizer: the inner optimizer as a function.
        recent: the last training batch and the carry before it, or None.
    """

    def __init__(self, settings: SAMA, core: Core) -> None:
        self.settings = settings
        self.core = core
        self.optimizer = FunctionalOptimizer(core.weights, core.problem.space)
        self.recent: tuple[Batch, Carry] | None = None

    def inner_step(self, *batches: Batch) -> Metrics:
        """Take one step of w on L_T(λ₀, ·), and keep the batch."""
        (batch,) = batches
        self.recent = batch, self.core.carry
        return self.core.descend_inner(self.core.hypers(), batch)

    def differentiate(self, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        """Return L_V on `batch`, ∂_λ L_V − (∂²L_T/∂λ∂w)ᵀ v, and metrics."""
        core = self.core
        training, carry = self.recent or (core.data.train.peek(), core.carry)
        w = core.weights.detached()
        loss, vector, direct = core.outer_gradients(batch, w, core.carry, training)
        core.data.train.count(count_examples(training))
        product = self.difference if self.settings.finite_difference else self.exact
        with core.services.phase("response"):
            indirect, metrics = product(vector, training, carry)
        return loss, direct - indirect, metrics

    # --- (∂²L_T/∂λ∂w)ᵀ v ---

    def exact(self, vector: Tensor, batch: Batch, carry: Carry) -> tuple[Tensor, Metrics]:
        """Return (∂²L_T/∂λ∂w)ᵀ v from one graph."""
        core = self.core
        w, u = core.weights.detached(), core.search.u
        pull = Pullback(core.problem, u, w, carry, [batch], core.generator, core.functions)
        kind = vector.dtype
        adapted = widened(partial(self.adapted, gradient=pull.gradient), kind)
        v = adapted(vector.to(u.dtype))
        return widened(pull.cross, kind)(v), {"inner_gradient_norm": pull.gradient_norm}

    def difference(self, vector: Tensor, batch: Batch, carry: Carry) -> tuple[Tensor, Metrics]:
        """Return (∂²L_T/∂λ∂w)ᵀ v by a central difference, all its passes with the same masks."""
        alpha, generator = self.settings.alpha, self.core.generator
        masks = generator.get_state()  # lies on the host, whatever the device
        metrics: Metrics = {}
        gradient, tiny = torch.zeros_like(vector), torch.finfo(vector.dtype).tiny
        if self.optimizer.update is not sgd or self.settings.clip_norm is not None:
            gradient = self.inner_gradient(gradient, batch, carry, of="w")
            metrics["inner_gradient_norm"] = gradient.norm()
            generator.set_state(masks)
        v = self.adapted(vector, gradient)
        length = v.norm()
        displacement = v * (alpha / length.clamp_min(tiny))
        ahead = self.inner_gradient(displacement, batch, carry, of="u")
        generator.set_state(masks)
        behind = self.inner_gradient(-displacement, batch, carry, of="u")
        change = ahead - behind
        total = (ahead.norm() + behind.norm()).clamp_min(tiny)
        metrics["relative_difference"] = change.norm() / total
        return change * (length / (2 * alpha)), metrics

    def inner_gradient(
        self, displacement: Tensor, batch: Batch, carry: Carry, *, of: Literal["w", "u"]
    ) -> Tensor:
        """Return the gradient of L_T in w, [m], or in u, [h], at w + displacement."""
        core = self.core
        shifts = unflat(displacement, core.weights.leaves)
        weights = core.weights.detached()
        params = {n: w + shift for (n, w), shift in zip(weights.items(), shifts, strict=True)}
        u = core.search.u.detach()
        wanted = [x.requires_grad_() for x in (params.values() if of == "w" else [u])]
        hypers = core.problem.space.constrain(u, core.generator)
        loss, _ = core.problem.inner_loss(hypers, params, carry, batch, core.generator)
        if not loss.requires_grad:  # λ acts on L_V alone
            return torch.zeros_like(u)
        return flat(torch.autograd.grad(loss, wanted, materialize_grads=True))

    def adapted(self, vector: Tensor, gradient: Tensor) -> Tensor:
        """Return (∂s/∂g)ᵀ vector at g = gradient, [m]; the optimizer's memory stays as it is."""
        core = self.core
        leaves = core.weights.leaves
        g = [part.requires_grad_() for part in unflat(gradient.detach(), leaves)]
        settings = self.optimizer.settings(core.problem.space.constrain(core.search.u0))
        slots = self.optimizer.slots()
        memory = Moments(slots, dict.fromkeys(slots, core.inner_count))
        after, _ = self.optimizer.step(core.weights.detached(), memory, g, settings)
        return -flat(torch.autograd.grad(list(after.values()), g, unflat(vector, leaves)))

    # --- what the runner asks for ---

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        relative = metrics.get("relative_difference", 1.0)
        if not 0 < relative < 100 * torch.finfo(self.core.search.u.dtype).eps:
            return {}
        return {
            "alpha": "SAMA: the two gradients of the finite difference differ by a relative "
            f"{relative:.1g}, which is within rounding; raise alpha, or set finite_difference=false"
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.recent = None
